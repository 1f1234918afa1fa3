"""``threshold_report`` and ``diversity_map`` in the graph with fake models."""

import json

import dagster as dg
import pytest

from tests.conftest import Project
from tuneshift_dag.home import output_dir
from tuneshift_dag.models import encoder
from tuneshift_dag.reports import escape_markdown
from tuneshift_dag.reports.thresholds import sweep

PICTURES = {
    "perplexity_histograms", "perplexity_scatter", "kept_by_threshold", "acceptance_by_round", "response_lengths",
}  # fmt: skip


def metadata(project: Project, asset: str) -> dict:
    event = project.instance.get_latest_materialization_event(project.key(asset))
    assert event and event.asset_materialization
    return dict(event.asset_materialization.metadata)


@pytest.fixture
def quick_pictures() -> None:
    """Here the pictures themselves are looked at."""


class TestThresholdReport:
    def test_runs_before_the_training_and_the_evaluation(self, finished: Project) -> None:
        order = [asset for asset, _ in finished.result.materialized]
        assert order.index("filtered_dataset") < order.index("threshold_report") < order.index("distilled_model")

    def test_writes_the_cells_of_the_sweep(self, finished: Project) -> None:
        rows = finished.store.read("SELECT * FROM threshold_report", schema="banking").to_dicts()
        cells = sweep(finished.store, finished.transfer)
        key = ("rule", "threshold")
        found = sorted(
            ({**row, "by_round": json.loads(row["by_round"])} for row in rows), key=lambda r: [r[k] for k in key]
        )
        expected = sorted(cells, key=lambda c: [c[k] for k in key])
        # DuckDB's threads add up in any order, so a mean may differ in its last digit.
        means = [[cell.pop("mean_margin") for cell in of] for of in (found, expected)]
        assert [m is None for m in means[0]] == [m is None for m in means[1]]
        assert [m or 0 for m in means[0]] == pytest.approx([m or 0 for m in means[1]], rel=1e-12)
        assert found == expected

    def test_shows_and_saves_its_pictures(self, finished: Project, monkeypatch) -> None:
        found = metadata(finished, "threshold_report")
        monkeypatch.setenv("TUNESHIFT_HOME", str(finished.store.path.parent))
        for name in PICTURES:
            assert "data:image/png" in str(found[name].value)
            assert (output_dir("banking") / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        kept = finished.rows("SELECT count(*) FROM filtered_dataset")[0][0]
        assert found["pairs_kept"].value == kept
        assert "pairs_kept" in str(found["thresholds_of_the_rule"].value)

    def test_follows_the_threshold_and_is_fresh_otherwise(self, ran: Project, edit_config) -> None:
        edit_config("filter.threshold", 1.6)
        # These keep the same pairs, so that nothing is trained; the picture's cut has moved all the same.
        assert ("threshold_report", None) in ran.run().materialized
        assert ran.run().materialized == []
        assert ran.rows("SELECT threshold FROM threshold_report WHERE current") == [(1.6,)]

    def test_names_the_rounds_that_it_was_made_without(self, project: Project) -> None:
        project.materialize("seed_set")
        project.materialize("synthetic_prompts", "scored_pairs", "filtered_dataset", round="round_01")
        (evaluation,) = project.materialize("threshold_report").get_asset_check_evaluations()
        assert (evaluation.check_name, evaluation.passed) == ("every_round_read", False)
        assert evaluation.severity == dg.AssetCheckSeverity.WARN
        assert "scored_pairs has no round_02 yet" in str(evaluation.description)

    def test_reports_nothing_kept_rather_than_failing(self, project: Project) -> None:
        assert project.materialize("threshold_report").success
        assert project.rows("SELECT DISTINCT pairs_kept FROM threshold_report") == [(0,)]
        assert "data:image/png" in str(metadata(project, "threshold_report")["perplexity_scatter"].value)


class TestDiversityMap:
    def test_places_every_seed_and_prompt_once(self, project: Project, edit_config, quick_encoder) -> None:
        edit_config("diversity_map", True)
        assert project.run().materialized[-1] == ("diversity_map", None)
        prompts = project.rows("SELECT prompt FROM seed_set UNION ALL SELECT prompt FROM synthetic_prompts")
        assert [sorted(call) for call in quick_encoder] == [sorted(prompt for (prompt,) in prompts)]
        assert len(project.rows("SELECT * FROM diversity_map")) == len(prompts)
        found = metadata(project, "diversity_map")
        assert "data:image/png" in str(found["diversity_map"].value)
        assert (output_dir("banking") / "diversity_map.png").exists()
        rounds = project.rows("SELECT round, similarity FROM round_summary ORDER BY round")
        assert [round_ for round_, _ in rounds] == ["round_01", "round_02"]
        assert all(0 < similarity < 1 for _, similarity in rounds)
        assert all(f"| {escape_markdown(round_)} | " in found["similarity"].value for round_, _ in rounds)

    def test_is_redrawn_after_a_threshold_change_without_the_encoder(
        self, project: Project, edit_config, quick_encoder
    ) -> None:
        edit_config("diversity_map", True)
        project.run()
        before = (output_dir("banking") / "diversity_map.png").read_bytes()
        edit_config("filter.threshold", 1.08)
        assert ("diversity_map", None) in project.run().materialized
        assert len(quick_encoder) == 1
        assert (output_dir("banking") / "diversity_map.png").read_bytes() != before
        assert project.run().materialized == []

    def test_without_the_encoder_says_what_to_install(self, project: Project, edit_config, monkeypatch) -> None:
        edit_config("diversity_map", True)
        monkeypatch.setattr(encoder, "missing_packages", lambda: "Run `pip install it`.")
        assert project.run().materialized[-1] == ("diversity_map", None)
        found = metadata(project, "diversity_map")
        assert found["skipped"].value == "Run `pip install it`."
        assert "diversity_map" not in found
        assert project.run().materialized == []

    def test_runs_again_once_the_encoder_is_installed(
        self, project: Project, edit_config, quick_encoder, monkeypatch
    ) -> None:
        edit_config("diversity_map", True)
        with monkeypatch.context() as patch:
            patch.setattr(encoder, "missing_packages", lambda: "Run `pip install it`.")
            project.run()
        assert project.run().materialized == [("diversity_map", None)]
        assert "diversity_map" in metadata(project, "diversity_map")

    def test_can_be_switched_off(self, finished: Project) -> None:
        assert project_assets(finished) == {"threshold_report"}


def project_assets(project: Project) -> set[str]:
    keys = project.runner().defs.resolve_asset_graph().get_all_asset_keys()
    return {key.path[-1] for key in keys} & {"threshold_report", "diversity_map"}
