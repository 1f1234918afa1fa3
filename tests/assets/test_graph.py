"""The asset graph, run with fake models through a real Dagster instance."""

import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

from tests import conftest
from tests.conftest import Project, make_transfer_folder
from tests.fake_engine import FakeEngine
from tuneshift_dag import TuneshiftError
from tuneshift_dag.assets.comparison import _candidates
from tuneshift_dag.assets.filtered_dataset import _check_seeds
from tuneshift_dag.assets.scored_pairs import _check_finite
from tuneshift_dag.assets.synthetic_prompts import _check_duplicates, _check_held_out
from tuneshift_dag.config.files import load_all
from tuneshift_dag.definitions import build_definitions
from tuneshift_dag.method import AdapterCheck
from tuneshift_dag.method.evaluation import general_texts
from tuneshift_dag.reports import report
from tuneshift_dag.reports.export import export, model_card
from tuneshift_dag.reports.thresholds import sweep
from tuneshift_dag.store.records import Records
from tuneshift_dag.store.tables import FILTERED_DATASET, SCORED_PAIRS, SYNTHETIC_PROMPTS

ROUND_ASSETS = ["synthetic_prompts", "scored_pairs", "filtered_dataset"]
WHOLE_RUN = [
    ("seed_set", None),
    *((asset, round_) for round_ in ("round_01", "round_02") for asset in ROUND_ASSETS),
    ("threshold_report", None),
    ("rehearsal_set", None),
    ("distilled_model", None),
    ("evaluation", None),
]
Edit = Callable[[str, Any], None]

# With the fake models these thresholds keep: the usual pairs, the same pairs, and more pairs.
USUAL, SAME, LOOSER = 1.5, 1.6, 1.08
PAIRS_BY_ROUND = "SELECT round, count(*) FROM filtered_dataset GROUP BY round ORDER BY round"
# Below this no fake answer is confident enough.
IMPOSSIBLE = 1.01


class TestWholeRun:
    def test_materializes_every_asset_once_in_order(self, finished: Project) -> None:
        assert finished.result.materialized == WHOLE_RUN
        assert finished.result.kept_rounds == []

    def test_a_round_starts_after_the_round_before_it_has_ended(self, finished: Project) -> None:
        first_ends = materializations(finished, "filtered_dataset", "round_01")[0].timestamp
        second_starts = step_start(finished, "synthetic_prompts", "round_02")
        assert first_ends <= second_starts

    def test_seeds_of_every_round_are_observed(self, finished: Project) -> None:
        for round_ in ("round_01", "round_02"):
            observed = observation(finished, round_)
            drawn = [row[0] for row in finished.rows(f"SELECT prompt_id FROM round_seeds WHERE round = '{round_}'")]
            assert set(observed.metadata["seed_ids"].value) == set(drawn) != set()
            assert observed.tags["dagster/data_version"]
        assert len({observation(finished, r).tags["dagster/data_version"] for r in ("round_01", "round_02")}) == 2

    def test_later_rounds_are_seeded_by_pairs_that_were_kept(self, finished: Project) -> None:
        seeds = finished.rows("SELECT DISTINCT prompt_id FROM round_seeds WHERE round = 'round_02'")
        kept = finished.rows("SELECT prompt_id FROM filtered_dataset WHERE round = 'round_01'")
        assert set(seeds) <= set(kept)

    def test_the_distilled_model_is_trained_on_all_kept_pairs(self, finished: Project) -> None:
        kept = finished.rows("SELECT prompt, response FROM filtered_dataset ORDER BY round, prompt_id")
        assert finished.models.trained == [kept]
        assert len(kept) > 10

    def test_every_check_passes(self, finished: Project) -> None:
        assert check_results(finished) == {
            "adapter_applied": {True},
            "no_duplicate_prompts": {True},
            "no_held_out_prompts": {True},
            "finite_perplexities": {True},
            "seeds_still_kept": {True},
            "dataset_not_empty": {True},
            "every_round_read": {True},
            "keeps_skill": {False},  # the fake source knows no held-out answer
            "keeps_general_text": {True},
        }

    def test_a_second_run_does_nothing_and_its_report_says_so(self, ran: Project) -> None:
        assert report(ran.store, ran.transfer)["model_calls"] > 0
        assert ran.run().materialized == []
        assert ran.models.calls() == 0
        assert ran.models.trained == []
        assert report(ran.store, ran.transfer)["model_calls"] == 0

    def test_a_materialization_without_a_model_call_says_so(self, finished: Project) -> None:
        (record,) = materializations(finished, "filtered_dataset", "round_01")
        metadata = record.asset_materialization.metadata
        assert metadata["model_calls"].value == 0
        (kept,) = finished.rows("SELECT count(*) FROM filtered_dataset WHERE round = 'round_01'")
        assert metadata["dagster/partition_row_count"].value == kept[0]


def test_what_a_server_says_stands_in_the_runs_log(project: Project) -> None:
    server = logging.getLogger("tuneshift_dag.server")
    project.models.source = FakeEngine("source", on_batch=lambda number: server.info("seeds: 12 requests"))
    result = project.materialize("seed_set")
    said = [entry.user_message for entry in project.instance.all_logs(result.run_id)]
    assert said.count("seeds: 12 requests") == 1
    server.info("after the step")
    assert said == [entry.user_message for entry in project.instance.all_logs(result.run_id)]


class TestDefinitions:
    @pytest.fixture
    def graph(self, project: Project) -> Any:
        return build_definitions([project.transfer], project.store.path).resolve_asset_graph()

    def test_keys(self, graph: Any) -> None:
        assert {key.to_user_string() for key in graph.get_all_asset_keys()} == {
            "banking/seed_set",
            "banking/round_seeds",
            "banking/synthetic_prompts",
            "banking/scored_pairs",
            "banking/filtered_dataset",
            "banking/threshold_report",
            "banking/rehearsal_set",
            "banking/distilled_model",
            "banking/evaluation",
        }

    def test_without_a_held_out_file_there_is_no_evaluation(self, project: Project) -> None:
        (project.folder / "heldout.jsonl").unlink()
        definitions = build_definitions([project.transfer], project.store.path)
        assert project.key("evaluation") not in definitions.resolve_asset_graph().get_all_asset_keys()

    def test_the_diversity_map_has_a_switch(self, project: Project, edit_config: Edit) -> None:
        edit_config("diversity_map", True)
        definitions = build_definitions([project.transfer], project.store.path)
        assert project.key("diversity_map") in definitions.resolve_asset_graph().get_all_asset_keys()

    def test_every_asset_is_described(self, graph: Any) -> None:
        for key in graph.get_all_asset_keys():
            node = graph.get(key)
            assert node.description, key
            assert node.group_name == "banking"
            assert node.owners == ["team:tuneshift"]
            assert node.kinds, key
            columns = node.metadata["dagster/column_schema"].columns
            assert columns and all(column.description and column.type for column in columns), key
            assert node.metadata["dagster/table_name"].startswith("banking."), key
            assert node.code_version or key.path[-1] == "round_seeds"

    def test_steps_that_use_a_model_share_a_pool(self, graph: Any) -> None:
        pools = {key.path[-1]: graph.get(key).pools for key in graph.get_all_asset_keys()}
        assert {asset for asset, pool in pools.items() if not pool} == {
            "round_seeds",
            "filtered_dataset",
            "threshold_report",
        }
        assert {pool for names in pools.values() for pool in names or ()} == {"models"}

    def test_the_refilter_job_is_one_run_for_every_round_and_leaves_nothing_out_of_date(
        self, project: Project, edit_config: Edit
    ) -> None:
        edit_config("seed", 8)
        project.run()
        edit_config("filter.threshold", LOOSER)
        calls = project.models.calls()
        result = project.runner().defs.resolve_job_def("banking_refilter").execute_in_process(instance=project.instance)
        assert result.success
        assert project.models.calls() == calls
        for round_ in project.transfer.round_keys:
            (record, *_) = materializations(project, "filtered_dataset", round_)
            assert record.run_id == result.run_id
            assert causes(project, "filtered_dataset", round_) == []
        assert causes(project, "synthetic_prompts", "round_02") == ["input round_seeds/round_02"]
        assert causes(project, "distilled_model") != []

    def test_a_broken_transfer_costs_its_own_group_and_says_what_to_repair(
        self, project: Project, tmp_path: Path
    ) -> None:
        broken = make_transfer_folder(tmp_path, "broken")
        (broken / "transfer.yaml").write_text("rounds: three")
        transfers, problems = load_all(tmp_path / "transfers")
        graph = build_definitions(transfers, project.store.path, broken=problems).resolve_asset_graph()
        (spec,) = [graph.get(key) for key in graph.get_all_asset_keys() if key.path[0] == "broken"]
        assert spec.key.path[-1] == "transfer_yaml" and spec.group_name == "broken"
        assert str(broken / "transfer.yaml") in spec.description and "rounds" in spec.description
        assert {key.path[-1] for key in graph.get_all_asset_keys() if key.path[0] == "banking"} >= set(ROUND_ASSETS)

    @pytest.mark.parametrize("name", ["my-transfer", "a b", "café", "[red]x", "$x", "n" * 101])
    def test_a_folder_whose_name_can_t_be_used_costs_no_other(
        self, project: Project, tmp_path: Path, name: str
    ) -> None:
        make_transfer_folder(tmp_path, name)
        transfers, problems = load_all(tmp_path / "transfers")
        graph = build_definitions(transfers, project.store.path, broken=problems).resolve_asset_graph()
        assert len(graph.get_all_asset_keys()) == 10
        (spec,) = [graph.get(key) for key in graph.get_all_asset_keys() if key.path[0] == name]
        assert "rename the folder" in spec.description

    def test_what_stands_in_a_broken_file_is_shown_and_not_obeyed(self, project: Project, tmp_path: Path) -> None:
        broken = make_transfer_folder(tmp_path, "broken")
        (broken / "transfer.yaml").write_text('"x\\n```\\n\\n![p](http://evil/p.png) \\x1b[31m\\n": 1\n')
        _, problems = load_all(tmp_path / "transfers")
        (spec,) = build_definitions([], project.store.path, broken=problems).resolve_all_asset_specs()
        before, fence, shown = spec.description.partition("````\n")
        assert fence and "evil" not in before and "evil" in shown.partition("\n````")[0] and "\x1b" not in shown

    def test_two_transfers_live_in_one_deployment(self, project: Project, tmp_path: Path) -> None:
        other = make_transfer_folder(tmp_path, "cards")
        definitions = build_definitions([project.transfer, conftest.load_transfer(other)], project.store.path)
        assert len(definitions.resolve_asset_graph().get_all_asset_keys()) == 18


class TestThresholdChange:
    def test_reruns_only_what_it_can_change(self, project: Project, edit_config: Edit) -> None:
        """One run, then the threshold moves: the same pairs, more pairs, back, and once more with --regrow."""
        filters = [("filtered_dataset", "round_01"), ("filtered_dataset", "round_02")]
        after = [("threshold_report", None), ("distilled_model", None), ("evaluation", None)]
        current = "SELECT model_id FROM distilled_models WHERE current"
        edit_config("seed", 8)  # few seeds change with the threshold; with this one round_02's do
        project.run()
        source, generator = work(project.models.source), work(project.models.generator)
        seeds, model = seeds_by_round(project), project.rows(current)

        edit_config("filter.threshold", SAME)
        result = project.run()
        assert result.materialized == [*filters, ("threshold_report", None)]
        assert result.kept_rounds == []
        assert len(project.models.trained) == 1

        edit_config("filter.threshold", LOOSER)
        result = project.run()
        assert result.materialized == [*filters, *after]
        # Rounds whose seeds changed keep their prompts, and the result names them.
        changed = [r for r in project.transfer.round_keys if seeds_by_round(project)[r] != seeds[r]]
        assert result.kept_rounds == changed == ["round_02"]
        assert len(project.models.trained) == 2
        assert project.rows(current) != model
        assert (work(project.models.source), work(project.models.generator)) == (source, generator)

        # Back: the adapter is there, and so are its held-out answers.
        edit_config("filter.threshold", USUAL)
        calls = project.models.calls()
        result = project.run()
        assert result.materialized == [*filters, *after]
        assert result.kept_rounds == []
        assert project.rows(current) == model
        assert len(project.models.trained) == 2
        assert project.models.calls() == calls

        edit_config("filter.threshold", LOOSER)
        result = project.run(regrow=True)
        assert result.materialized[:4] == [filters[0], *((asset, "round_02") for asset in ROUND_ASSETS)]
        assert result.kept_rounds == []
        assert work(project.models.generator) > generator
        result = project.run()
        assert result.materialized == result.kept_rounds == []

    def test_that_would_keep_nothing_leaves_the_dataset_as_it_was(self, project: Project, edit_config: Edit) -> None:
        """Back at the old threshold the round counts as fresh, so nothing would bring lost rows back."""
        project.materialize("seed_set")
        project.materialize(*ROUND_ASSETS, round="round_01")
        kept = project.rows("SELECT * FROM filtered_dataset ORDER BY ALL")
        rejected = project.rows("SELECT * FROM rejected_pairs ORDER BY ALL")
        edit_config("filter.threshold", IMPOSSIBLE)
        assert "filter.threshold" in failure(project.materialize("filtered_dataset", round="round_01"))
        edit_config("filter.threshold", USUAL)
        # Its data is fresh, and its last attempt was not: it is made once more, which costs nothing.
        assert causes(project, "filtered_dataset", "round_01") == ["attempt"]
        assert project.rows("SELECT * FROM filtered_dataset ORDER BY ALL") == kept != []
        assert project.rows("SELECT * FROM rejected_pairs ORDER BY ALL") == rejected

    def test_makes_exactly_the_rounds_stale_whose_seeds_changed(self, project: Project, edit_config: Edit) -> None:
        edit_config("rounds", 3)
        edit_config("generator.calls_per_round", 1)
        edit_config("seed", 8)
        project.materialize("seed_set")
        for round_ in project.transfer.round_keys:
            assert project.materialize(*ROUND_ASSETS, round=round_).success
        seeds = seeds_by_round(project)
        keys = project.transfer.round_keys
        assert [causes(project, "synthetic_prompts", key) for key in keys] == [[]] * 3
        edit_config("filter.threshold", LOOSER)
        assert [causes(project, "filtered_dataset", key) for key in keys] == [["code"]] * 3
        for round_ in project.transfer.round_keys:
            assert project.materialize("filtered_dataset", round=round_).success
        changed = {r for r in project.transfer.round_keys if seeds_by_round(project)[r] != seeds[r]}
        assert changed == {"round_03"}
        assert {key: causes(project, "synthetic_prompts", key) for key in keys} == {
            key: [f"input round_seeds/{key}"] if key in changed else [] for key in keys
        }
        assert [causes(project, "scored_pairs", key) for key in keys] == [[]] * 3


class TestRuleChange:
    def test_to_one_without_scores_of_its_own_reruns_what_a_threshold_does(
        self, ran: Project, edit_config: Edit
    ) -> None:
        edit_config("filter", {"rule": "top_excess", "keep": 12})
        assert {asset for asset, _ in ran.run().materialized} == {
            "filtered_dataset", "threshold_report", "distilled_model", "evaluation",
        }  # fmt: skip
        assert ran.rows("SELECT round, count(*) FROM filtered_dataset GROUP BY round ORDER BY round") == [
            ("round_01", 6), ("round_02", 6),
        ]  # fmt: skip
        excess = "SELECT ln(p.ppl_base_cross / p.ppl_fine_tuned) FROM scored_pairs p JOIN {} r USING (round, prompt_id)"
        for round_ in ran.transfer.round_keys:
            kept = ran.rows(f"{excess.format('filtered_dataset')} WHERE round = '{round_}'")
            late = ran.rows(f"{excess.format('rejected_pairs')} WHERE round = '{round_}'")
            assert min(kept) >= max(late)  # equal where an answer is
        rejected = ran.rows("SELECT count(*), count(DISTINCT (round, prompt_id)) FROM rejected_pairs")[0]
        assert rejected[0] == rejected[1] == ran.rows("SELECT count(*) FROM scored_pairs")[0][0] - 12
        assert work(ran.models.source) == work(ran.models.generator) == 0


class TestRetention:
    def test_general_text_is_scored_by_the_target_before_and_after(self, finished: Project) -> None:
        rows = finished.rows("SELECT model, perplexity, bits_per_byte, tokens, bytes FROM retention ORDER BY model")
        assert [row[0] for row in rows] == ["target_base", "target_distilled"]
        # The fake's tokens are characters, at 4 to 5 nats each.
        for _, perplexity, bits_per_byte, tokens, size in rows:
            assert math.exp(4) <= perplexity <= math.exp(5)
            assert bits_per_byte * math.log(2) * size == pytest.approx(math.log(perplexity) * tokens)
        (record,) = materializations(finished, "evaluation")
        metadata = record.asset_materialization.metadata
        assert metadata["target_base_perplexity"].value == rows[0][1]
        assert metadata["target_distilled_perplexity"].value == rows[1][1]
        figures = report(finished.store, finished.transfer)
        assert figures["retention"]["target_distilled"]["perplexity"] == rows[1][1]
        assert f"| all | {rows[0][1]:.2f} | {rows[1][1]:.2f} |" in model_card(finished.transfer, figures)

    def test_the_base_is_scored_once_however_often_it_is_distilled(self, project: Project, edit_config: Edit) -> None:
        project.run()
        edit_config("distill.epochs", 1)
        assert project.run().materialized == [("distilled_model", None), ("evaluation", None)]
        by_side = [[side for side, _ in engine.scored] for engine in project.models.targets.values()]
        texts = len(general_texts())  # one of each kind, and one of them at every other scale of the adapter
        assert [sides.count("base") for sides in by_side] == [0, texts, 0], "the first one wrote the rehearsal set"
        assert [sides.count("fine_tuned") for sides in by_side] == [0, texts + 3, texts + 3]


class TestTargetPairs:
    def test_rounds_after_the_target_is_reached_are_empty_and_say_so(self, project: Project, edit_config: Edit) -> None:
        edit_config("target_pairs", 3)
        project.run()
        assert project.rows("SELECT DISTINCT round FROM synthetic_prompts") == [("round_01",)]
        assert observation(project, "round_02").metadata["status"].value == "target size reached: nothing left to do"
        for asset in ROUND_ASSETS:
            (record,) = materializations(project, asset, "round_02")
            assert record.asset_materialization.metadata["dagster/partition_row_count"].value == 0
        assert project.models.trained[0] != []
        failed = {name for name, passed in check_results(project).items() if passed != {True}}
        assert failed == {"keeps_skill"}, "the fake source knows no held-out answer"

    def test_a_raised_target_fills_the_rounds_that_it_had_ended_before(
        self, project: Project, edit_config: Edit
    ) -> None:
        edit_config("rounds", 3)
        edit_config("target_pairs", 1)
        project.run()
        counted = "SELECT round, count(*) > 0 FROM synthetic_prompts GROUP BY round ORDER BY round"
        assert project.rows(counted) == [("round_01", True)]
        edit_config("target_pairs", 1000)
        result = project.run()
        assert project.rows(counted) == [(round_, True) for round_ in project.transfer.round_keys]
        assert result.kept_rounds == []


class TestFewerRounds:
    def test_are_all_that_is_reported_swept_and_compared(self, project: Project, edit_config: Edit) -> None:
        """The third round's rows stay in the tables, for when there are three again."""
        edit_config("rounds", 3)
        edit_config("compare", {"seeds": 2})
        project.run()
        edit_config("rounds", 2)
        project.run()
        assert len(project.rows("SELECT DISTINCT round FROM scored_pairs")) == 3
        made = report(project.store, project.transfer)
        kept = len(project.models.trained[-1])
        assert (made["rounds"], made["pairs_kept"], made["model"]["pairs"]) == (2, kept, kept)
        assert [row["round"] for row in made["by_round"]] == ["round_01", "round_02"]
        [cell] = [cell for cell in sweep(project.store, project.transfer, ["both"]) if cell["current"]]
        assert cell["pairs_kept"] == kept and list(cell["by_round"]) == ["round_01", "round_02"]
        assert [len(pairs) for pairs in _candidates(project.store, project.transfer)["both"]] == [kept, kept]


class TestRegrow:
    def test_gives_what_a_run_from_nothing_gives(self, project: Project, edit_config: Edit, tmp_path: Path) -> None:
        """Edits in any order, and rounds lowered and raised again, leave no trace in the prompts."""
        edit_config("rounds", 3)
        edit_config("generator.near_duplicate", 0.3)  # so that rounds drop what others have
        edit_config("seed", 8)
        project.run()
        edit_config("filter.threshold", LOOSER)
        edit_config("rounds", 2)
        project.run(regrow=True)
        edit_config("rounds", 3)
        project.run(regrow=True)
        prompts = "SELECT round, prompt_id FROM synthetic_prompts ORDER BY ALL"
        kept = "SELECT round, prompt_id, response FROM filtered_dataset ORDER BY ALL"
        with dg.DagsterInstance.ephemeral() as instance, pytest.MonkeyPatch.context() as patch:
            patch.setenv("TUNESHIFT_HOME", str(tmp_path / "another"))
            fresh = Project(project.folder, instance)
            fresh.run()
        assert fresh.rows(prompts) == project.rows(prompts)
        assert fresh.rows(kept) == project.rows(kept)

    def test_of_one_round_makes_the_prompts_after_it_out_of_date(self, ran: Project, edit_config: Edit) -> None:
        """They must not repeat it. Dagster's graph can't say so: an asset's rounds don't depend on each other."""
        edit_config("seed", 3)
        assert ran.materialize("seed_set").success
        assert ran.materialize(*ROUND_ASSETS, round="round_01").success
        assert "input synthetic_prompts/round_01" in causes(ran, "synthetic_prompts", "round_02")


class TestTargetWeights:
    def test_other_ones_are_trained_when_the_model_is_materialized(self, ran: Project) -> None:
        assert ran.materialize("distilled_model").success
        assert ran.models.trained == []
        weights = ran.folder / "models" / "tiny-base" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
        assert not ran.materialize("distilled_model").success, "the texts that it is held to are of the old ones"
        assert ran.materialize("rehearsal_set", "distilled_model").success
        assert len(ran.models.trained) == 1
        assert causes(ran, "evaluation") != []
        assert ran.materialize("distilled_model").success
        assert len(ran.models.trained) == 1


class TestReport:
    def test_what_was_measured_of_the_model_before_is_not_shown(self, ran: Project, edit_config: Edit) -> None:
        assert report(ran.store, ran.transfer)["accuracy"] and not report(ran.store, ran.transfer)["out_of_date"]
        edit_config("distill.epochs", 9)
        assert report(ran.store, ran.transfer)["out_of_date"] == ["distilled_model"]
        assert ran.materialize("distilled_model").success
        figures = report(ran.store, ran.transfer)
        measured = ("accuracy", "retention", "retention_by_kind", "frontier", "verdicts", "tasks")
        assert all(not figures[name] for name in measured) and figures["model"]
        ran.run()
        assert all(report(ran.store, ran.transfer)[name] for name in measured[:-1])

    def test_figures_are_titled_as_they_were_measured(self, ran: Project, edit_config: Edit) -> None:
        edit_config("evaluation.keeps_skill", 0.5)
        assert report(ran.store, ran.transfer)["metric"] == "exact_match"


class TestAnAdapterThatIsGone:
    def test_is_trained_again(self, ran: Project) -> None:
        (path,) = ran.rows("SELECT path FROM distilled_models WHERE current")[0]
        shutil.rmtree(ran.store.absolute(path))
        assert causes(ran, "distilled_model") == ["missing"]
        assert ("distilled_model", None) in ran.run().materialized
        assert ran.store.absolute(path).is_dir() and ran.run().materialized == []


class TestWithoutHeldOutFile:
    def test_a_scale_is_chosen_all_the_same(self, ran: Project, edit_config: Edit) -> None:
        (ran.folder / "heldout.jsonl").unlink()
        assert ("evaluation", None) not in ran.run().materialized
        edit_config("distill.keep", 1e9)
        assert ("evaluation", None) in ran.run().materialized
        assert ran.rows("SELECT scale, value FROM frontier WHERE chosen") == [(1.0, None)]


class TestWhatIsMissingAbove:
    @pytest.mark.parametrize(
        ("asset", "above"), [("scored_pairs", "synthetic_prompts"), ("filtered_dataset", "scored_pairs")]
    )
    def test_is_named(self, project: Project, asset: str, above: str) -> None:
        assert project.materialize("seed_set").success
        if asset == "filtered_dataset":
            assert project.materialize("synthetic_prompts", round="round_01").success
        result = project.materialize(asset, round="round_01")
        (event,) = [event for event in result.all_events if event.is_step_failure]
        told = str(event.step_failure_data.user_failure_data)
        assert f"There is no {above} of round_01: materialize that first, then {asset} of round_01." in told


class TestExport:
    def test_says_which_filter_kept_the_pairs(self, ran: Project, edit_config: Edit, tmp_path: Path) -> None:
        edit_config("filter.threshold", LOOSER)
        export(ran.store, ran.transfer, tmp_path / "out")
        for card in ("README.md", "adapter/README.md"):
            assert f"threshold {USUAL}" in (tmp_path / "out" / card).read_text()

    @pytest.mark.parametrize("key", ["target.prompt", "prompt_template", "distill.epochs"])
    def test_of_a_model_made_with_other_settings_is_refused(
        self, ran: Project, edit_config: Edit, tmp_path: Path, key: str
    ) -> None:
        edit_config(key, 9 if key == "distill.epochs" else "Other: {prompt}\n")
        with pytest.raises(TuneshiftError, match=r"(scored_pairs|distilled_model) depends? on has changed since model"):
            export(ran.store, ran.transfer, tmp_path / "out")

    def test_the_seeds_of_its_card_are_those_that_it_grew_from(self, ran: Project, tmp_path: Path) -> None:
        seeds = ran.folder / "seeds.jsonl"
        seeds.write_text(seeds.read_text() + '{"prompt": "Something new?"}\n')
        export(ran.store, ran.transfer, tmp_path / "out")
        assert "Something new?" not in (tmp_path / "out" / "adapter" / "README.md").read_text()

    def test_the_scale_of_another_model_is_not_its_own(self, ran: Project, edit_config: Edit, tmp_path: Path) -> None:
        edit_config("distill.keep", 5.0)
        with pytest.raises(TuneshiftError, match="the model of now isn't evaluated"):
            export(ran.store, ran.transfer, tmp_path / "out")
        ran.run()
        export(ran.store, ran.transfer, tmp_path / "out")

    def test_of_pairs_that_are_gone_is_refused(self, ran: Project, edit_config: Edit, tmp_path: Path) -> None:
        edit_config("generator.instruction", "Others, {count} of them:")
        for asset in ("synthetic_prompts", "scored_pairs"):
            assert ran.materialize(asset, round="round_01").success
        with pytest.raises(TuneshiftError, match="rounds were materialized again since the model was trained"):
            export(ran.store, ran.transfer, tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestErrors:
    def test_a_round_without_seeds_names_the_round_to_materialize_first(
        self, project: Project, edit_config: Edit
    ) -> None:
        edit_config("rounds", 3)
        for round_ in project.transfer.round_keys:
            assert "because seed_set isn't finished" in failure(project.materialize("synthetic_prompts", round=round_))
        project.materialize("seed_set")
        assert failure(project.materialize("synthetic_prompts", round="round_03")) == (
            "round_03 has no seeds yet, because round_01 isn't finished. Materialize round_01 first (if it failed, its"
            " run says what to fix), then round_03 again. Nothing that was computed is lost."
        )
        project.materialize(*ROUND_ASSETS, round="round_01")
        assert "because round_02 isn't finished" in failure(project.materialize("synthetic_prompts", round="round_03"))

    def test_fewer_rounds_train_on_theirs_and_lose_nothing(self, project: Project, edit_config: Edit) -> None:
        current = "SELECT model_id FROM distilled_models WHERE current"
        edit_config("rounds", 3)
        project.run()
        kept, model = project.rows(PAIRS_BY_ROUND), project.rows(current)

        edit_config("rounds", 2)
        assert ("distilled_model", None) in project.run().materialized
        assert len(project.models.trained[-1]) == sum(pairs for _, pairs in kept[:2])
        assert project.rows(current) != model

        edit_config("rounds", 3)
        made = project.run().materialized
        assert made == [("threshold_report", None), ("distilled_model", None), ("evaluation", None)]
        assert project.rows(current) == model
        assert project.rows(PAIRS_BY_ROUND) == kept
        assert len(project.models.trained) == 2

    def test_a_model_without_all_rounds_names_the_missing_ones(self, project: Project, edit_config: Edit) -> None:
        edit_config("rounds", 3)
        project.materialize("seed_set")
        project.materialize(*ROUND_ASSETS, round="round_01")
        assert "no filtered_dataset of round_02, round_03:" in failure(project.materialize("distilled_model"))
        assert project.models.trained == []

    def test_an_evaluation_without_a_model_says_so(self, project: Project) -> None:
        assert "no distilled_model: materialize that first" in failure(project.materialize("evaluation"))

    def test_a_filter_that_keeps_nothing_names_the_threshold_and_loses_no_scores(
        self, project: Project, edit_config: Edit
    ) -> None:
        edit_config("filter.threshold", IMPOSSIBLE)
        with pytest.raises(TuneshiftError) as error:
            project.run()
        message = str(error.value)
        assert message.startswith("filtered_dataset of round_01 failed: No pair was kept up to round_01")
        assert f"In {project.folder / 'transfer.yaml'}, raise filter.threshold (now {IMPOSSIBLE})" in message
        prompts = project.rows("SELECT count(*) FROM synthetic_prompts")
        assert project.rows("SELECT count(*) FROM scored_pairs") == prompts != [(0,)]
        calls = project.models.calls()
        edit_config("filter.threshold", USUAL)
        assert project.materialize("filtered_dataset", round="round_01").success
        assert project.rows("SELECT count(*) FROM filtered_dataset") != [(0,)]
        assert project.models.calls() == calls

    def test_an_unapplied_adapter_fails_before_anything_is_generated(self, project: Project) -> None:
        problem = AdapterCheck(["the adapter's weights are zero: it changes nothing"], [], 0.0, 0.0)
        project.models.source = FakeEngine("source", check=problem)
        with pytest.raises(TuneshiftError, match=r"seed_set failed: .*adapter: the adapter's weights are zero"):
            project.run()
        assert project.models.calls() == 0
        assert project.rows("SELECT * FROM seed_set") == []

    def test_what_is_said_is_what_was_raised_for_people_and_not_its_cause(
        self, project: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any) -> None:
            try:
                raise ValueError("process 1 terminated with signal SIGKILL")
            except ValueError as error:
                raise TuneshiftError("a process was killed. Run again.") from error

        monkeypatch.setattr(project.models.source, "check_adapter", refuse)
        with pytest.raises(TuneshiftError, match=r"^seed_set failed: a process was killed\. Run again\.$"):
            project.run()

    def test_a_failure_while_scoring_keeps_the_finished_batches(self, project: Project) -> None:
        project.models.source = FakeEngine("source", fail_after=2)
        with pytest.raises(TuneshiftError, match=r"scored_pairs of round_01 failed: .*the engine was killed"):
            project.run()
        seeds = {project.transfer.config.prompt_template.replace("{prompt}", s) for s in project.transfer.seeds}
        finished = {prompt for _, prompt in project.models.source.answered} - seeds
        assert len(finished) == 2 * project.models.source.batch_size
        project.models.source = FakeEngine("source")
        assert causes(project, "synthetic_prompts", "round_01") == []
        assert project.materialize("scored_pairs", round="round_01").success
        assert finished.isdisjoint(prompt for _, prompt in project.models.source.answered)

    def test_a_failed_rerun_leaves_the_rows_of_the_last_success(self, project: Project, edit_config: Edit) -> None:
        project.materialize("seed_set")
        project.materialize(*ROUND_ASSETS, round="round_01")
        before = project.rows("SELECT * FROM scored_pairs ORDER BY prompt_id")
        edit_config("response.max_new_tokens", 63)
        project.models.source = FakeEngine("source", fail_after=1)
        assert failure(project.materialize("scored_pairs", round="round_01")) == "the engine was killed"
        assert project.rows("SELECT * FROM scored_pairs ORDER BY prompt_id") == before


class TestChecks:
    def test_adapter_applied_warns(self, project: Project) -> None:
        doubtful = AdapterCheck([], ["the fine-tuned model isn't more confident"], 1.0, 1.0)
        project.models.source = FakeEngine("source", check=doubtful)
        result = project.materialize("seed_set")
        assert result.success
        (evaluation,) = result.get_asset_check_evaluations()
        assert (evaluation.check_name, evaluation.passed) == ("adapter_applied", False)
        assert evaluation.severity == dg.AssetCheckSeverity.WARN
        assert evaluation.description == "the fine-tuned model isn't more confident"

    def test_what_would_spoil_all_that_follows_blocks_it(self, project: Project) -> None:
        graph = build_definitions([project.transfer], project.store.path).resolve_asset_graph()
        blocking = {key.name for key in graph.asset_check_keys if graph.get_check_spec(key).blocking}
        assert blocking == {"adapter_applied", "no_held_out_prompts", "finite_perplexities"}

    def test_a_held_out_prompt_among_the_prompts_stops_the_round(self, project: Project, monkeypatch: Any) -> None:
        leaked = dg.AssetCheckResult(passed=False, check_name="no_held_out_prompts", metadata={"leaked": ["x"]})
        monkeypatch.setattr("tuneshift_dag.assets.synthetic_prompts._check_held_out", lambda *arguments: leaked)
        project.materialize("seed_set")
        result = project.materialize(*ROUND_ASSETS, round="round_01")
        assert not result.success
        assert project.rows("SELECT count(*) FROM scored_pairs") == [(0,)]

    def test_no_duplicate_prompts(self, project: Project) -> None:
        add_prompts(project, "round_01", "a first")
        add_prompts(project, "round_02", "a second")
        assert _check_duplicates(project.transfer, project.store, "round_02").passed
        add_prompts(project, "round_02", "A first!")
        result = _check_duplicates(project.transfer, project.store, "round_02")
        assert not result.passed
        assert result.metadata["duplicates"].value == ["A first!"]

    def test_no_held_out_prompts(self, project: Project) -> None:
        add_prompts(project, "round_01", "Is my card late?")
        assert _check_held_out(project.transfer, project.store, "round_01").passed
        add_prompts(project, "round_01", "is my transfer late")
        result = _check_held_out(project.transfer, project.store, "round_01")
        assert not result.passed
        assert result.metadata["leaked"].value == ["is my transfer late"]

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.5])
    @pytest.mark.parametrize("column", ["ppl_fine_tuned", "ppl_base", "ppl_base_cross", "ppl_fine_tuned_cross"])
    def test_finite_perplexities(self, finished: Project, column: str, value: float) -> None:
        rows = finished.store.read("SELECT * FROM scored_pairs", schema="banking")
        assert _check_finite(rows).passed
        bad = rows["prompt_id"][3]
        broken = rows.with_columns(pl.when(pl.col("prompt_id") == bad).then(value).otherwise(column).alias(column))
        result = _check_finite(broken)
        assert not result.passed
        assert result.metadata["prompt_ids"].value == [bad]

    def test_a_response_without_tokens_has_no_perplexity_to_check(self, finished: Project) -> None:
        rows = finished.store.read("SELECT * FROM scored_pairs", schema="banking")
        assert _check_finite(rows.with_columns(pl.lit(None, pl.Float64).alias("ppl_base"))).passed
        assert _check_finite(SCORED_PAIRS.empty()).passed

    def test_seeds_still_kept(self, project: Project, edit_config: Edit) -> None:
        project.materialize("seed_set")
        for round_ in project.transfer.round_keys:
            project.materialize(*ROUND_ASSETS, round=round_)
        assert _check_seeds(project.store, project.transfer, "round_02").passed
        gone = project.rows("SELECT seed_ids[1] FROM proposals WHERE round = 'round_02' AND call = 0")[0][0]
        kept = project.store.read("SELECT * FROM filtered_dataset WHERE prompt_id <> ?", [gone], "banking")
        project.store.replace("banking", FILTERED_DATASET, kept)
        result = _check_seeds(project.store, project.transfer, "round_02")
        assert not result.passed
        assert result.severity == dg.AssetCheckSeverity.WARN
        assert result.metadata["prompt_ids"].value == [gone]
        assert _check_seeds(project.store, project.transfer, "round_01").passed


def materializations(project: Project, asset: str, round_: str | None = None) -> list[Any]:
    """Newest first."""
    filter_ = dg.AssetRecordsFilter(project.key(asset), asset_partitions=[round_] if round_ else None)
    return list(project.instance.fetch_materializations(filter_, limit=10).records)


def step_start(project: Project, asset: str, round_: str) -> float:
    (record,) = materializations(project, asset, round_)
    events = project.instance.all_logs(record.run_id, of_type=dg.DagsterEventType.STEP_START)
    (start,) = [e for e in events if e.dagster_event and e.dagster_event.step_key == f"banking__{asset}"]
    return start.timestamp


def observation(project: Project, round_: str) -> dg.AssetObservation:
    """The latest one of the seeds of a round."""
    filter_ = dg.AssetRecordsFilter(project.key("round_seeds"), asset_partitions=[round_])
    observed = project.instance.fetch_observations(filter_, limit=1).records[0].asset_observation
    assert observed
    return observed


def check_results(project: Project) -> dict[str, set[bool]]:
    """Outcomes of every check in all runs."""
    outcomes: dict[str, set[bool]] = {}
    for run in project.instance.get_runs():
        for entry in project.instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION):
            evaluation = entry.get_dagster_event().asset_check_evaluation_data
            outcomes.setdefault(evaluation.check_name, set()).add(evaluation.passed)
    return outcomes


def failure(result: dg.ExecuteInProcessResult) -> str:
    """What the failed step of a run says."""
    assert not result.success
    (event,) = [event for event in result.all_events if event.is_step_failure]
    data = event.step_failure_data
    if data.user_failure_data and data.user_failure_data.description:
        return data.user_failure_data.description
    error = data.error
    while error.cause:
        error = error.cause
    return error.message.strip().removeprefix("RuntimeError: ")


def causes(project: Project, asset: str, round_: str | None = None) -> list[str]:
    """Why `tuneshift run` would make it again; nothing when it wouldn't."""
    return Records(project.store, project.transfer).causes(asset, round_)


def seeds_by_round(project: Project) -> dict[str, list[Any]]:
    rows = project.rows("SELECT round, call, slot, prompt_id FROM round_seeds ORDER BY ALL")
    return {round_: [row for row in rows if row[0] == round_] for round_ in project.transfer.round_keys}


def work(engine: FakeEngine) -> int:
    return len(engine.answered) + len(engine.scored)


def materialize_rounds(project: Project) -> None:
    """The seeds and every round, in order."""
    assert project.materialize("seed_set").success
    for round_ in project.transfer.round_keys:
        assert project.materialize(*ROUND_ASSETS, round=round_).success


def add_prompts(project: Project, round_: str, *prompts: str) -> None:
    from tuneshift_dag.method.prompting import prompt_id

    rows = [
        {"round": round_, "prompt_id": prompt_id(p), "prompt": p, "proposal_id": "x", "position": 0} for p in prompts
    ]
    project.store.append_all("banking", [(SYNTHETIC_PROMPTS, SYNTHETIC_PROMPTS.frame(rows))])
