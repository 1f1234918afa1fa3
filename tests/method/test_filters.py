import math

import pytest

from tests.fakes import CONFIDENT_PAIR
from tuneshift_dag.method.filters import KEEP_RULES, Guards, repetition_sql, verdict_sql
from tuneshift_dag.method.filters import RULES as ALL_RULES
from tuneshift_dag.store import Store
from tuneshift_dag.store.tables import SCORED_PAIRS

RULES = ("both", "difference", "ratio", "cross_ratio", "surprise_ratio")
JUDGED = (*RULES, *KEEP_RULES)


def verdicts(store: Store, rule: str, threshold: float, pairs: list[dict], rounds: int | None = None, **guards) -> list:
    """(reason, margin) of each pair, in order. A pair is confident, and its base isn't, where it says nothing."""
    rows = [{**CONFIDENT_PAIR, "prompt_id": f"{i:03}", **pair} for i, pair in enumerate(pairs)]
    store.replace("transfer", SCORED_PAIRS, SCORED_PAIRS.frame(rows))
    query = f"SELECT reason, margin FROM ({verdict_sql(rule, Guards(**guards), rounds=rounds)}) ORDER BY prompt_id"
    return store.read(query, {"threshold": threshold} if "$threshold" in query else (), "transfer").rows()


def reasons(*arguments, **more) -> list:
    return [reason for reason, _ in verdicts(*arguments, **more)]


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
    [
        ("difference", 4.0 - 1.25),
        ("ratio", 4.0 / 1.25),
        ("cross_ratio", 8.0 / 1.25),
        ("surprise_ratio", math.log(8.0) / math.log(1.25)),
    ],
)
def test_the_other_rules_keep_what_exceeds_the_threshold(store, rule, margin):
    pair = {"ppl_fine_tuned": 1.25, "ppl_base": 4.0, "ppl_base_cross": 8.0}
    assert verdicts(store, rule, margin - 0.5, [pair]) == [(None, pytest.approx(0.5))]
    assert verdicts(store, rule, margin, [pair]) == [("below_threshold", 0)]
    swapped = {"ppl_fine_tuned": 4.0, "ppl_base": 1.25, "ppl_base_cross": 1.25, "ppl_fine_tuned_cross": 8.0}
    assert verdicts(store, rule, margin - 0.5, [swapped])[0][0] == "below_threshold"


def test_an_empty_response_is_dropped(store):
    pairs = [{"fine_tuned_response": response} for response in ("", "  ", "\n", "\t \n")]
    assert reasons(store, "both", 1.5, pairs, allow_truncated=True) == ["empty_response"] * 4


@pytest.mark.parametrize(
    ("rule", "columns"),
    [
        ("both", ("ppl_fine_tuned", "ppl_base")),
        ("difference", ("ppl_fine_tuned", "ppl_base")),
        ("ratio", ("ppl_fine_tuned", "ppl_base")),
        ("cross_ratio", ("ppl_fine_tuned", "ppl_base_cross")),
        ("surprise_ratio", ("ppl_fine_tuned", "ppl_base_cross")),
        ("top_excess", ("ppl_fine_tuned", "ppl_base_cross")),
        ("balanced_confidence", ("ppl_fine_tuned",)),
        ("seed_similarity", ("seed_similarity",)),
        ("random", ()),
        ("unfiltered", ()),
    ],
)
def test_a_pair_without_a_finite_perplexity_that_the_rule_reads_is_not_kept(store, rule, columns):
    broken = ("ppl_fine_tuned", "ppl_base", "ppl_base_cross", "ppl_fine_tuned_cross", "seed_similarity")
    pairs = [{column: value} for column in broken for value in (None, math.inf, math.nan)]
    expected = [("no_perplexity" if column in columns else None) for column in broken for _ in range(3)]
    assert reasons(store, rule, 1.5 if rule in RULES else 1, pairs) == expected


@pytest.mark.parametrize("rule", ALL_RULES)
def test_every_pair_has_a_verdict_and_its_columns(store, rule):
    rows = SCORED_PAIRS.frame([{"round": "round_01", "prompt_id": str(i), "ppl_base": float(i)} for i in range(3)])
    store.replace("transfer", SCORED_PAIRS, rows)
    query = verdict_sql(rule, Guards())
    found = store.read(query, {"threshold": 1.5} if "$threshold" in query else (), "transfer")
    assert sorted(found["ppl_base"]) == [0, 1, 2]
    assert set(found.columns) == {*rows.columns, "margin", "reason"}


def test_top_excess_keeps_the_largest_mean_excess(store):
    """TiTok's score: log p_f(y_f) - log p_b(y_f), per token."""
    pairs = [{"ppl_fine_tuned": 2.0, "ppl_base_cross": cross} for cross in (4.0, 32.0, 2.0, 8.0)]
    found = verdicts(store, "top_excess", 0.5, pairs)
    assert [reason for reason, _ in found] == ["below_the_top", None, "below_the_top", None]
    assert [margin for _, margin in found] == pytest.approx([math.log(x) for x in (2, 16, 1, 4)])
    assert reasons(store, "top_excess", 3, pairs) == [None, None, "below_the_top", None]


def test_seed_similarity_keeps_the_prompts_most_like_a_seed(store):
    found = verdicts(store, "seed_similarity", 2, [{"seed_similarity": value} for value in (0.2, 0.9, 0.4)])
    assert found == [("below_the_top", 0.2), (None, 0.9), (None, 0.4)]


def test_balanced_confidence_takes_the_most_confident_of_every_response_in_turn(store):
    pairs = [
        {"fine_tuned_response": response, "ppl_fine_tuned": ppl}
        for response, ppl in ((" a", 1.01), (" a", 1.03), (" a", 1.02), (" b", 1.4), ("b", 1.3), (" c", 9.0))
    ]
    found = verdicts(store, "balanced_confidence", 4, pairs)
    assert [reason for reason, _ in found] == [None, "below_the_top", None, "below_the_top", None, None]
    assert [margin for _, margin in found] == pytest.approx(
        [1 / 1.01 - 1, 1 / 1.03 - 3, 1 / 1.02 - 2, 1 / 1.4 - 2, 1 / 1.3 - 1, 1 / 9 - 1]
    )


def test_balanced_confidence_counts_the_responses_of_each_round_apart(store):
    pairs = [{"round": f"round_{r:02}", "fine_tuned_response": "a", "ppl_fine_tuned": 1.5 - r / 10} for r in (1, 2)]
    assert reasons(store, "balanced_confidence", 2, pairs, rounds=2) == [None, None]
    bad = {"fine_tuned_response": "a", "ppl_fine_tuned": 1.0, "fine_tuned_finish": "length"}
    found = verdicts(store, "balanced_confidence", 2, [*pairs, bad])
    assert found[:2] == [(None, pytest.approx(1 / 1.4 - 2)), (None, pytest.approx(1 / 1.3 - 1))], (
        "a dropped pair has no place"
    )


@pytest.mark.parametrize("rule", KEEP_RULES)
def test_a_share_is_of_each_rounds_pairs_that_pass_the_guards(store, rule):
    pairs = [{"round": f"round_{1 + i % 2:02}", "ppl_base_cross": 3.0 + i} for i in range(20)]
    bad = [{"round": "round_02", "fine_tuned_finish": "length", "ppl_base_cross": 99.0}] * 7
    found = reasons(store, rule, 0.3, [*pairs, *bad], rounds=2)
    assert [found[start:20:2].count(None) for start in (0, 1)] == [3, 3]
    assert found[20:] == ["truncated_response"] * 7
    assert reasons(store, rule, 1, [*pairs, *bad], rounds=2)[:20] == [None] * 20
    assert reasons(store, rule, 0.01, pairs, rounds=2).count(None) == 2, "a round keeps at least one pair to go on"


@pytest.mark.parametrize("rule", KEEP_RULES)
def test_a_number_is_shared_by_the_rounds_whatever_each_of_them_holds(store, rule):
    def kept(*sizes: int) -> list[int]:
        names = [f"round_{r:02}" for r, size in enumerate(sizes, 1) for _ in range(size)]
        found = reasons(
            store, rule, 8, [{"round": n, "ppl_base_cross": 3.0 + i} for i, n in enumerate(names)], rounds=3
        )
        return [sum(r is None for n, r in zip(names, found, strict=True) if n == name) for name in dict.fromkeys(names)]

    assert kept(9, 9, 9) == [2, 3, 3]
    assert kept(9, 1, 9) == [2, 1, 3], "a round's verdict doesn't depend on another's"
    assert kept(9) == [2], "nor on whether the others exist yet"


def test_without_rounds_the_whole_pool_is_ranked(store):
    pairs = [{"round": f"round_{1 + i // 5:02}", "ppl_base_cross": 3.0 + i} for i in range(10)]
    assert reasons(store, "top_excess", 4, pairs) == ["below_the_top"] * 6 + [None] * 4


def test_a_draw_is_the_same_each_time_and_another_for_another_seed(store):
    rows = [{**CONFIDENT_PAIR, "prompt_id": f"{i:03}"} for i in range(100)]
    store.replace("transfer", SCORED_PAIRS, SCORED_PAIRS.frame(rows))

    def drawn(share: float, seed: int = 0) -> set[str]:
        query = f"SELECT prompt_id FROM ({verdict_sql('random', Guards(), seed=seed)}) WHERE reason IS NULL"
        return set(store.read(query, {"threshold": share}, "transfer")["prompt_id"])

    assert len(drawn(0.3)) == 30
    assert drawn(0.3) == drawn(0.3) < drawn(0.5)
    assert drawn(0.3, seed=1) != drawn(0.3)
    before = drawn(0.3)
    store.replace("transfer", SCORED_PAIRS, SCORED_PAIRS.frame([r for r in rows if r["prompt_id"] != min(before)]))
    assert len(before - drawn(30)) == 1, "a pair that goes changes no other"


def test_unfiltered_keeps_all_that_can_be_trained_on(store):
    pairs = [{"fine_tuned_finish": "length"}, {"ppl_base": None}, {"fine_tuned_response": " "}, {}]
    assert reasons(store, "unfiltered", 1, pairs) == [None, None, "empty_response", None]
    assert reasons(store, "random", 1, pairs) == ["truncated_response", None, "empty_response", None]


LOOP = "I do not know. " * 6
VARIED = "The balance of an account is what it holds after every payment that has been booked until now."


@pytest.mark.parametrize("rule", JUDGED)
def test_guards_come_before_the_rule(store, rule):
    texts = (LOOP, VARIED, "As an AI language model I can’t say.", "Sorry, I can’t help with that.")
    pairs = [{"fine_tuned_tokens": 30, "fine_tuned_response": text} for text in texts]
    pairs += [{"fine_tuned_finish": "length"}, {"base_finish": "length"}]
    threshold = 1.5 if rule in RULES else 1
    refusals = ("AS AN AI language model", "can't help with that")
    assert reasons(store, rule, threshold, pairs, refusals=refusals) == [
        "repetitive_response", None, "refused_response", "refused_response", "truncated_response", None,
    ]  # fmt: skip
    assert reasons(store, rule, threshold, pairs, max_repetition=1.0, allow_truncated=True) == [None] * 6


def test_short_responses_are_not_searched_for_repetition(store):
    pair = {"fine_tuned_response": LOOP, "fine_tuned_tokens": 15}
    assert reasons(store, "both", 1.5, [pair]) == [None]


def test_repetition_is_the_share_of_word_4_grams_that_were_there_before(store):
    shares = {"": 0, "a b c d": 0, "a b c d e": 0, "a a a a a": 0.5, "a b a b a b a": 0.5, "no " * 12 + "no": 0.9}
    columns = f"{repetition_sql('text')} AS share, {repetition_sql('text', 0.5)} AS least"
    query = f"SELECT {columns} FROM (SELECT unnest($texts) AS text)"
    found = store.read(query, {"texts": list(shares)})
    assert found["share"].to_list() == pytest.approx(list(shares.values()))
    assert [least > 0.5 for least in found["least"]] == [share > 0.5 for share in shares.values()]


def test_repetition_counts_characters_where_words_have_no_spaces(store):
    loop, text = "我的卡在哪里" * 4, "我昨天给朋友转账，但是她说没有收到，请问怎么办？"
    texts = {loop: 15 / 21, text: 0, "ดี " * 8: 11 / 13}
    query = f"SELECT {repetition_sql('text')} AS share FROM (SELECT unnest($texts) AS text)"
    assert store.read(query, {"texts": list(texts)})["share"].to_list() == pytest.approx(list(texts.values()))
    spaced = "a  b\nc é a  b\nc é a  b\nc é"
    as_it_was = "SELECT string_split(text, ' ') AS w FROM (SELECT unnest($texts) AS text)"
    words = store.read(as_it_was, {"texts": [spaced]})["w"].to_list()[0]
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    assert store.read(query, {"texts": [spaced]}).item() == pytest.approx(1 - len(set(grams)) / len(grams))


def test_a_certain_response_has_a_finite_ratio_of_surprise(store):
    certain = [{"ppl_fine_tuned": ppl, "ppl_base_cross": 8.0} for ppl in (1.0, 1 - 1e-9)]
    assert [margin > 1e5 for _, margin in verdicts(store, "surprise_ratio", 10.0, certain)] == [True, True]
