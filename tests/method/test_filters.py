import math

import pytest

from tests.fakes import CONFIDENT_PAIR
from tuneshift_dag.method.filters import verdict_sql
from tuneshift_dag.resources.store import Store
from tuneshift_dag.resources.tables import SCORED_PAIRS

RULES = ("both", "difference", "ratio", "cross_ratio")


def verdicts(store: Store, rule: str, threshold: float, pairs: list[dict], allow_truncated: bool = False) -> list:
    """(reason, margin) of each pair, in order. A pair is confident, and its base isn't, where it says nothing."""
    rows = [{**CONFIDENT_PAIR, "prompt_id": f"{i:03}", **pair} for i, pair in enumerate(pairs)]
    store.replace("transfer", SCORED_PAIRS, SCORED_PAIRS.frame(rows))
    query = f"SELECT reason, margin FROM ({verdict_sql(rule, allow_truncated)}) ORDER BY prompt_id"
    return store.read(query, {"t": threshold}, "transfer").rows()


def test_both_keeps_a_confident_fine_tuned_model_beside_an_unsure_base(store):
    pairs = [
        {"ppl_fine_tuned": 1.2, "ppl_base": 2.5},
        {"ppl_fine_tuned": 1.4, "ppl_base": 1.6},
        {"ppl_fine_tuned": 2.5, "ppl_base": 1.2},
        {"ppl_fine_tuned": 1.2, "ppl_base": 1.3},
        {"ppl_fine_tuned": 1.5, "ppl_base": 9.0},
        {"ppl_fine_tuned": 1.0, "ppl_base": 1.5},
    ]
    found = verdicts(store, "both", 1.5, pairs)
    assert [reason for reason, _ in found] == [
        None,
        None,
        "fine_tuned_not_confident",
        "base_already_confident",
        "fine_tuned_not_confident",
        "base_already_confident",
    ]
    assert [margin for _, margin in found] == pytest.approx([0.3, 0.1, -1.0, -0.2, 0, 0])


@pytest.mark.parametrize(
    ("rule", "margin"),
    [("difference", 4.0 - 1.25), ("ratio", 4.0 / 1.25), ("cross_ratio", 8.0 / 1.25)],
)
def test_the_other_rules_keep_what_exceeds_the_threshold(store, rule, margin):
    pair = {"ppl_fine_tuned": 1.25, "ppl_base": 4.0, "ppl_base_cross": 8.0}
    assert verdicts(store, rule, margin - 0.5, [pair]) == [(None, pytest.approx(0.5))]
    assert verdicts(store, rule, margin, [pair]) == [("below_threshold", 0)]
    swapped = {"ppl_fine_tuned": 4.0, "ppl_base": 1.25, "ppl_base_cross": 1.25, "ppl_fine_tuned_cross": 8.0}
    assert verdicts(store, rule, margin - 0.5, [swapped])[0][0] == "below_threshold"


@pytest.mark.parametrize("rule", RULES)
def test_a_truncated_response_is_dropped_unless_allowed(store, rule):
    pairs = [{"fine_tuned_finish": "length"}, {"base_finish": "length"}]
    assert [r for r, _ in verdicts(store, rule, 1.5, pairs)] == ["truncated_response", None]
    assert [r for r, _ in verdicts(store, rule, 1.5, pairs, allow_truncated=True)] == [None, None]


@pytest.mark.parametrize("response", ["", "  ", "\n", "\t \n"])
def test_an_empty_response_is_dropped(store, response):
    pair = {"fine_tuned_response": response}
    assert verdicts(store, "both", 1.5, [pair], allow_truncated=True)[0][0] == "empty_response"


@pytest.mark.parametrize("value", [None, math.inf, math.nan])
@pytest.mark.parametrize(
    ("rule", "column"),
    [(rule, "ppl_fine_tuned") for rule in RULES]
    + [("both", "ppl_base"), ("difference", "ppl_base"), ("ratio", "ppl_base"), ("cross_ratio", "ppl_base_cross")],
)
def test_a_pair_without_a_finite_perplexity_is_not_kept(store, rule, column, value):
    assert verdicts(store, rule, 1.5, [{column: value}])[0][0] is not None


def test_every_pair_has_a_verdict_and_its_columns(store):
    rows = SCORED_PAIRS.frame([{"round": "round_01", "prompt_id": str(i), "ppl_base": float(i)} for i in range(3)])
    store.replace("transfer", SCORED_PAIRS, rows)
    found = store.read(verdict_sql("both", False), {"t": 1.5}, "transfer")
    assert sorted(found["ppl_base"]) == [0, 1, 2]
    assert set(found.columns) == {*rows.columns, "margin", "reason"}
