import json
import math
from dataclasses import replace

import pytest

from tests.conftest import Project, Run
from tests.fakes import CONFIDENT_PAIR
from tuneshift_dag import TuneshiftError
from tuneshift_dag.config import Transfer
from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.method.filters import KEEP_RULES
from tuneshift_dag.method.filters import RULES as ALL_RULES
from tuneshift_dag.reports import thresholds
from tuneshift_dag.reports.thresholds import default_grid, parse_grid, sweep
from tuneshift_dag.store import Store
from tuneshift_dag.store.tables import SCORED_PAIRS

# Those with a threshold that the fake pairs have the perplexities for.
RULES = ("both", "difference", "ratio", "cross_ratio", "surprise_ratio")


@pytest.fixture
def transfer(transfer_folder, edit_config) -> Transfer:
    edit_config("compare", {"arms": ["both", "seed_similarity"]})
    return load_transfer(transfer_folder)


def score(store: Store, *pairs: dict) -> None:
    """Write scored pairs; a pair is finished and sure where it says nothing."""
    rows = [{**CONFIDENT_PAIR, "prompt_id": f"{i:03}", **pair} for i, pair in enumerate(pairs)]
    store.replace("banking", SCORED_PAIRS, SCORED_PAIRS.frame(rows))


def kept(cells: list[dict]) -> list[int]:
    return [cell["pairs_kept"] for cell in cells]


class TestCells:
    def test_of_the_current_filter_are_what_filtered_dataset_keeps(self, finished: Project) -> None:
        cells = [cell for cell in sweep(finished.store, finished.transfer) if cell["current"]]
        by_round = dict(finished.rows("SELECT round, count(*) FROM filtered_dataset GROUP BY round"))
        pairs, distinct, margin = finished.rows(
            "SELECT count(*), count(DISTINCT trim(response)), avg(margin) FROM filtered_dataset"
        )[0]
        scored = finished.rows("SELECT count(*) FROM scored_pairs")[0][0]
        assert cells == [
            {
                "rule": "both",
                "threshold": 1.5,
                "pairs_kept": pairs,
                "kept_share": pairs / scored,
                "distinct_responses": distinct,
                "mean_margin": pytest.approx(margin),
                "by_round": by_round,
                "current": True,
            }
        ]
        assert 0 < pairs < scored

    def test_of_both_count_pairs_around_the_threshold(self, store, transfer) -> None:
        score(
            store,
            {"ppl_fine_tuned": 1.2, "ppl_base": 3.0, "fine_tuned_response": " a"},
            {"ppl_fine_tuned": 1.6, "ppl_base": 2.0, "fine_tuned_response": "a "},
            {"ppl_fine_tuned": 1.2, "ppl_base": 1.3, "round": "round_02"},
        )
        low, middle, high = sweep(store, transfer, ["both"], [1.25, 1.8, 2.5])
        assert low["by_round"] == {"round_01": 1, "round_02": 1}
        assert low["mean_margin"] == pytest.approx((0.05 + 0.05) / 2)
        assert (middle["pairs_kept"], middle["distinct_responses"]) == (2, 1)
        assert middle["mean_margin"] == pytest.approx((0.6 + 0.2) / 2)
        assert middle["kept_share"] == pytest.approx(2 / 3)
        assert (high["pairs_kept"], high["by_round"]) == (1, {"round_01": 1, "round_02": 0})

    @pytest.mark.parametrize(
        ("rule", "thresholds", "counts"),
        [
            ("difference", [0.4, 1.0, 2.9], [2, 1, 0]),  # 2.75 and 0.5
            ("ratio", [1.2, 3.0, 3.2], [2, 1, 0]),  # 3.2 and 1.25
            ("cross_ratio", [4.5, 5.0, 6.4], [2, 1, 0]),  # 6.4 and 5
        ],
    )
    def test_of_the_other_rules_count_what_exceeds_the_threshold(
        self, store, transfer, rule, thresholds, counts
    ) -> None:
        score(
            store,
            {"ppl_fine_tuned": 1.25, "ppl_base": 4.0, "ppl_base_cross": 8.0},
            {"ppl_fine_tuned": 2.0, "ppl_base": 2.5, "ppl_base_cross": 10.0},
        )
        assert kept(sweep(store, transfer, [rule], thresholds)) == counts

    def test_fall_with_the_threshold_except_for_both_which_rises_first(self, store, transfer) -> None:
        score(store, *({"ppl_fine_tuned": 1 + i / 10, "ppl_base": 2 + i / 5, "ppl_base_cross": 9} for i in range(10)))
        for rule in RULES[1:]:
            counts = kept(sweep(store, transfer, [rule]))
            assert counts == sorted(counts, reverse=True)
            assert counts[0] > counts[-1]
        # A higher cut lets more fine-tuned responses in and shuts more base responses out.
        assert kept(sweep(store, transfer, ["both"], [1.05, 1.95, 3.75])) == [1, 10, 1]

    def test_leave_out_truncated_empty_and_unscored_pairs(self, store, transfer_folder, edit_config) -> None:
        score(
            store,
            {},
            {"fine_tuned_finish": "length"},
            {"fine_tuned_response": " \n"},
            {"ppl_fine_tuned": math.nan},
            {"ppl_base": None, "ppl_base_cross": None},
        )
        for allow, count in ((False, 1), (True, 2)):
            edit_config("filter.allow_truncated", allow)
            cells = sweep(store, load_transfer(transfer_folder), grid=[1.5])
            assert kept(cells) == [count] * len(RULES)
            assert [cell["kept_share"] for cell in cells] == [count / 5] * len(RULES)

    def test_of_rules_whose_scores_are_left_out_are_none(self, store, transfer) -> None:
        score(store, {"ppl_base_cross": None})
        without = {"engine": transfer.config.engine.model_copy(update={"cross_scores": False}), "compare": None}
        transfer = replace(transfer, config=transfer.config.model_copy(update=without))
        assert {cell["rule"] for cell in sweep(store, transfer)} == {
            "both", "difference", "ratio", "balanced_confidence", "random", "unfiltered",
        }  # fmt: skip
        with pytest.raises(TuneshiftError, match=r"cross_ratio needs scores .*engine.cross_scores: false"):
            sweep(store, transfer, ["cross_ratio"])

    def test_of_a_rule_that_keeps_so_many_are_so_many(self, store, transfer) -> None:
        """Of round_01 ten pairs pass the guards and of round_02 four; transfer.yaml has two rounds."""
        more = [{"round": "round_02"}] * 4
        score(store, *({"ppl_base_cross": 3.0 + i} for i in range(10)), *more, {"fine_tuned_finish": "length"})
        for rule in KEEP_RULES:
            cells = sweep(store, transfer, [rule], [0.5, 1, 6])
            assert [cell["by_round"] for cell in cells] == [
                {"round_01": 5, "round_02": 2}, {"round_01": 10, "round_02": 4}, {"round_01": 3, "round_02": 3},
            ]  # fmt: skip
            assert (cells[0]["mean_margin"] is None) == (rule == "random")
            (cell,) = sweep(store, transfer.with_rounds(1), [rule], [6])
            assert cell["by_round"] == {"round_01": 3}, "the rounds that follow have their part"
        (cell,) = sweep(store, transfer, ["unfiltered"])
        assert (cell["threshold"], cell["pairs_kept"]) == (1.0, 15)

    def test_of_a_grid_are_of_the_rules_that_can_take_it(self, store, transfer) -> None:
        score(store, {})
        tried = {grid: {c["rule"] for c in sweep(store, transfer, (), [grid])} for grid in (0.5, 1.5, 30)}
        assert tried == {
            0.5: {"difference", *KEEP_RULES},
            1.5: set(RULES),
            30: {*RULES, *KEEP_RULES},
        }
        with pytest.raises(TuneshiftError, match="No rule takes all of the thresholds -1, 2"):
            sweep(store, transfer, (), [-1, 2])

    def test_of_similarity_to_the_seeds_need_pairs_that_have_it(self, finished: Project) -> None:
        assert "seed_similarity" not in {cell["rule"] for cell in sweep(finished.store, finished.transfer)}
        with pytest.raises(TuneshiftError, match=r"name seed_similarity in compare\.arms of .*transfer\.yaml, then"):
            sweep(finished.store, finished.transfer, ["seed_similarity"])

    def test_without_scored_pairs_are_zero(self, store, transfer) -> None:
        cells = sweep(store, transfer)
        assert {cell["rule"] for cell in cells} == set(ALL_RULES)
        assert {(c["pairs_kept"], c["kept_share"], c["mean_margin"], len(c["by_round"])) for c in cells} == {
            (0, 0, None, 0)
        }

    def test_come_in_the_order_of_rules_and_thresholds_whatever_was_asked(self, store, transfer) -> None:
        cells = sweep(store, transfer, ["ratio", "both", "ratio"], [2.0, 1.5, 2.0])
        assert [(cell["rule"], cell["threshold"]) for cell in cells] == [
            ("both", 1.5), ("both", 2.0), ("ratio", 1.5), ("ratio", 2.0),
        ]  # fmt: skip


class TestDefaultGrid:
    def test_holds_the_papers_threshold_and_the_current_one(self, store, transfer_folder, edit_config) -> None:
        edit_config("filter", {"rule": "difference", "threshold": 0.7})
        transfer = load_transfer(transfer_folder)
        assert default_grid(store, transfer, "difference") == [0.7, 1.5]
        assert default_grid(store, transfer, "both") == [1.5]

    @pytest.mark.parametrize("rule", RULES)
    def test_lies_where_the_pairs_are(self, store, transfer, rule) -> None:
        pairs = [
            {"ppl_fine_tuned": 1 + i / 1e5, "ppl_base": 1 + i / 1e3, "ppl_base_cross": 100.0 * i + 1}
            for i in range(100)
        ]
        score(store, *pairs, {"ppl_base": 1e9, "ppl_base_cross": 1e9, "fine_tuned_finish": "length"})
        grid = default_grid(store, transfer, rule)
        assert grid == sorted(set(grid))
        assert 8 < len(grid) < 20
        # The fine-tuned model's surprise is 1e-5 nats and more.
        most = 1e6 if rule == "surprise_ratio" else 1e5
        assert all(1 < t < most or (rule == "difference" and t > 0) for t in grid)
        counts = kept(sweep(store, transfer, [rule]))
        assert len(set(counts)) > 5

    @pytest.mark.parametrize(
        ("threshold", "grid"), [(0.6, [0.1, 0.25, 0.5, 0.6, 0.75, 1]), (100, [25, 50, 100, 150, 200])]
    )
    def test_of_shares_or_of_numbers_like_the_current_one(
        self, store, transfer_folder, edit_config, threshold, grid
    ) -> None:
        edit_config("filter", {"rule": "top_excess", "threshold": threshold})
        transfer = load_transfer(transfer_folder)
        assert default_grid(store, transfer, "top_excess") == grid
        assert [cell["threshold"] for cell in sweep(store, transfer, ["top_excess"]) if cell["current"]] == [threshold]

    def test_has_no_threshold_that_transfer_yaml_would_refuse(self, store, transfer) -> None:
        score(store, *({"ppl_fine_tuned": 1.0, "ppl_base": 1.0, "ppl_base_cross": 1.0} for _ in range(5)))
        for rule in RULES:
            assert default_grid(store, transfer, rule) == [1.5]


class TestParseGrid:
    @pytest.mark.parametrize(
        ("text", "grid"),
        [
            ("1.5", [1.5]),
            ("1.1, 1.2,1.5", [1.1, 1.2, 1.5]),
            ("1.1:1.5:0.1", [1.1, 1.2, 1.3, 1.4, 1.5]),
            ("1:2:0.4", [1.0, 1.4, 1.8]),
            ("2:2:1", [2.0]),
        ],
    )
    def test_reads_lists_and_ranges(self, text, grid) -> None:
        assert parse_grid(text) == grid

    @pytest.mark.parametrize("text", ["", "a", "1.1;1.2", "1:2", "1:2:3:4", "1,,2"])
    def test_names_what_it_cannot_read_and_the_two_forms(self, text) -> None:
        with pytest.raises(TuneshiftError, match=r"can't be read.*1\.1:2:0\.1") as error:
            parse_grid(text)
        assert repr(text) in str(error.value)

    @pytest.mark.parametrize("text", ["2:1:0.1", "1:2:0", "1:2:-1", "1:inf:1", "nan:2:1", "1:2:0.0001"])
    def test_refuses_ranges_without_or_with_too_many_thresholds(self, text) -> None:
        with pytest.raises(TuneshiftError, match="thresholds"):
            parse_grid(text)


class TestPictures:
    """What the pictures are drawn from."""

    @pytest.mark.parametrize("rule", ALL_RULES)
    def test_points_are_judged_as_the_current_filter_judges(
        self, finished: Project, edit_config, transfer_folder, rule
    ) -> None:
        threshold = 0.5 if rule in KEEP_RULES else 1.5
        edit_config("filter", {"rule": rule} | ({} if rule == "unfiltered" else {"threshold": threshold}))
        transfer = load_transfer(transfer_folder)
        (cell,) = [cell for cell in sweep(finished.store, transfer, [rule]) if cell["current"]]
        scored = finished.rows("SELECT count(*) FROM scored_pairs")[0][0]
        found = thresholds.perplexities(finished.store, transfer)
        assert (len(found), found["kept"].sum()) == (scored, cell["pairs_kept"])
        counts = thresholds.verdicts_by_round(finished.store, transfer)
        assert sum(row["pairs"] for row in counts) == scored
        assert sum(row["pairs"] for row in counts if row["reason"] == "kept") == cell["pairs_kept"]
        lengths = thresholds.response_lengths(finished.store, transfer)
        assert sum(row["kept"] + row["dropped"] for row in lengths) == scored
        assert sum(row["kept"] for row in lengths) == cell["pairs_kept"]

    def test_lengths_are_bucketed_from_the_shortest_to_the_longest(self, store, transfer_folder) -> None:
        rows = [
            {"round": "round_01", "prompt_id": str(i), "fine_tuned_tokens": tokens, "fine_tuned_response": " yes"}
            for i, tokens in enumerate([4, 5, 5, 27, 28, None])
        ]
        store.replace("banking", SCORED_PAIRS, SCORED_PAIRS.frame(rows))
        found = thresholds.response_lengths(store, load_transfer(transfer_folder))
        assert [(row["low"], row["high"], row["dropped"]) for row in found] == [(4, 6, 3), (25, 27, 1), (28, 30, 1)]

    def test_without_scored_pairs_there_is_nothing_to_draw(self, store, transfer_folder) -> None:
        transfer = load_transfer(transfer_folder)
        assert thresholds.perplexities(store, transfer).is_empty()
        assert thresholds.verdicts_by_round(store, transfer) == []
        assert thresholds.response_lengths(store, transfer) == []

    def test_pairs_without_a_perplexity_are_not_drawn(self, store, transfer_folder) -> None:
        good = {"ppl_fine_tuned": 1.2, "ppl_base": 2.0, "ppl_base_cross": 3.0, "fine_tuned_response": " yes"}
        bad = [{"ppl_base": None}, {"ppl_fine_tuned": float("inf")}, {"ppl_base_cross": float("nan")}]
        rows = [{"round": "round_01", "prompt_id": str(i), **good, **extra} for i, extra in enumerate([{}, *bad])]
        store.replace("banking", SCORED_PAIRS, SCORED_PAIRS.frame(rows))
        assert len(thresholds.perplexities(store, load_transfer(transfer_folder))) == 1


class TestErrors:
    def test_an_unknown_rule_is_named_with_the_known_ones(self, store, transfer) -> None:
        with pytest.raises(TuneshiftError, match=r"'perplexity'.*cross_ratio"):
            sweep(store, transfer, ["perplexity"])

    @pytest.mark.parametrize("threshold", [1.0, 0.5, -1.0, math.nan, math.inf])
    def test_an_impossible_threshold_is_named_with_its_rule(self, store, transfer, threshold) -> None:
        with pytest.raises(TuneshiftError, match=rf"{threshold:g}.*'both'.*above 1"):
            sweep(store, transfer, ["both"], [1.5, threshold])

    def test_a_difference_may_be_below_one_and_not_zero(self, store, transfer) -> None:
        assert kept(sweep(store, transfer, ["difference"], [0.5])) == [0]
        with pytest.raises(TuneshiftError, match=r"threshold 0 .*above 0"):
            sweep(store, transfer, ["difference"], [0.0])


class TestCommand:
    """`tuneshift sweep`."""

    @pytest.fixture
    def cells(self, finished: Project, tuneshift: Run, monkeypatch):
        """Its standard output; after a failure its standard error."""
        monkeypatch.setenv("TUNESHIFT_HOME", str(finished.store.path.parent))
        monkeypatch.setenv("TUNESHIFT_TRANSFERS", str(finished.folder.parent))

        def call(*arguments: str) -> str:
            status, out, err = tuneshift("sweep", "banking", *arguments)
            return out if status == 0 else f"failed: {err}"

        return call

    def test_json_is_the_list_of_cells(self, cells, finished: Project) -> None:
        found = json.loads(cells("--rule", "ratio", "--rule", "both", "--grid", "1.4:1.6:0.1", "--json"))
        assert found == sweep(finished.store, finished.transfer, ["both", "ratio"], [1.4, 1.5, 1.6])
        assert [cell["current"] for cell in found] == [False, True, False, False, False, False]

    def test_without_options_shows_every_rule_and_marks_the_current_filter(self, cells) -> None:
        lines = cells().splitlines()
        rules = [rule for rule in ALL_RULES if rule != "seed_similarity"]
        assert all(any(f" {rule} " in line for line in lines) for rule in rules)
        assert len([line for line in lines if " both " in line and " * 1.5 " in line]) == 1

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (("--rule", "some"), "'some'"),
            (("--grid", "x"), "'x'"),
            (("--rule", "both", "--grid", "0.5"), "0.5"),
            (("--grid", "-1"), "-1"),
        ],
    )
    def test_names_a_bad_rule_or_grid(self, cells, arguments, named) -> None:
        found = cells(*arguments)
        assert found.startswith("failed: error:")
        assert named in found
