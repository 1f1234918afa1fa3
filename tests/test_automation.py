"""The automation sensor with fake models: what it requests next, and when it waits."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill

from tests.conftest import Project, make_transfer_folder
from tests.fake_engine import FakeEngine
from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.resources.runs import busy_transfers

Edit = Callable[[str, Any], None]
Step = tuple[list[str], str | None]
ROUND_ASSETS = ["synthetic_prompts", "scored_pairs", "filtered_dataset"]
WHOLE_LOOP: list[Step] = [
    (ROUND_ASSETS, "round_01"),
    (ROUND_ASSETS, "round_02"),
    (["threshold_report", "rehearsal_set", "distilled_model", "evaluation"], None),
]


def tick(project: Project) -> dg.RunRequest | str:
    """What the sensor answers now: a request, or why it makes none."""
    defs = project.runner().defs
    sensor = defs.resolve_sensor_def(f"{project.folder.name}_automation")
    context = dg.build_sensor_context(instance=project.instance, repository_def=defs.get_repository_def())
    answer = sensor.evaluate_tick(context)
    assert len(answer.run_requests or []) <= 1
    return answer.run_requests[0] if answer.run_requests else str(answer.skip_message)


def follow(project: Project) -> Iterator[Step]:
    """Run what the sensor requests, as the daemon does, until it requests nothing."""
    for _ in range(20):
        request = tick(project)
        if isinstance(request, str):
            assert request == "Everything is up to date."
            return
        assets = [key.path[-1] for key in request.asset_selection or ()]
        assert project.materialize(*assets, round=request.partition_key).success
        yield assets, request.partition_key
    pytest.fail("the automation doesn't come to an end")


def test_it_is_off_by_default(project: Project) -> None:
    (sensor,) = project.runner().defs.sensors or ()
    assert sensor.default_status == dg.DefaultSensorStatus.STOPPED
    assert sensor.description


def test_one_materialization_of_seed_set_starts_the_whole_loop(project: Project) -> None:
    assert "materialize it" in str(tick(project))
    project.materialize("seed_set")
    assert list(follow(project)) == WHOLE_LOOP
    assert len(project.models.trained) == 1


def test_rounds_after_the_target_size_are_empty(project: Project, edit_config: Edit) -> None:
    edit_config("target_pairs", 3)
    project.materialize("seed_set")
    assert list(follow(project)) == WHOLE_LOOP
    assert project.rows("SELECT DISTINCT round FROM filtered_dataset") == [("round_01",)]


def test_a_looser_threshold_goes_through_the_rounds_whose_seeds_changed(project: Project, edit_config: Edit) -> None:
    edit_config("seed", 8)  # few seeds change with the threshold; with this one round_02's do
    project.materialize("seed_set")
    list(follow(project))
    edit_config("filter.threshold", 1.08)
    assert list(follow(project)) == [
        (["filtered_dataset"], "round_01"),
        (ROUND_ASSETS, "round_02"),
        (["threshold_report", "distilled_model", "evaluation"], None),
    ]


def test_it_waits_after_a_failure_until_that_step_has_succeeded(project: Project) -> None:
    project.materialize("seed_set")
    project.models.source = FakeEngine("source", fail_after=0)
    assert not project.materialize(*ROUND_ASSETS, round="round_01").success
    project.models.source = FakeEngine("source")
    for _ in range(2):
        assert "failed or was terminated" in str(tick(project))
    project.materialize("scored_pairs", "filtered_dataset", round="round_01")
    assert list(follow(project)) == WHOLE_LOOP[1:]


@pytest.mark.parametrize("mine", [True, False])
def test_it_waits_for_runs_and_backfills_of_its_own_transfer_only(mine: bool, project: Project, tmp_path: Path) -> None:
    other = Project(make_transfer_folder(tmp_path, "cards"), project.instance)
    assert load_transfer(other.folder).name == "cards"
    project.materialize("seed_set")
    busy = project if mine else other
    run = project.instance.create_run_for_job(
        busy.runner().job, asset_selection=frozenset({busy.key("scored_pairs")}), status=dg.DagsterRunStatus.STARTED
    )
    assert isinstance(tick(project), str) == mine
    project.instance.delete_run(run.run_id)
    name = f"{busy.folder.name}_refilter"
    run = project.instance.create_run(
        job_name=name, run_id=None, run_config=None, status=dg.DagsterRunStatus.STARTED, tags=None,
        root_run_id=None, parent_run_id=None, step_keys_to_execute=None, execution_plan_snapshot=None,
        job_snapshot=None, parent_job_snapshot=None, asset_selection=None, asset_check_selection=None,
        resolved_op_selection=None, op_selection=None, remote_job_origin=None, job_code_origin=None,
        asset_graph=None,
    )  # fmt: skip
    assert isinstance(tick(project), str) == mine
    assert busy_transfers(project.instance) == {busy.folder.name}
    project.instance.delete_run(run.run_id)
    backfill = PartitionBackfill(
        "abc", BulkActionStatus.REQUESTED, from_failure=False, tags={}, backfill_timestamp=0.0,
        asset_selection=[busy.key("filtered_dataset")],
    )  # fmt: skip
    project.instance.add_backfill(backfill)
    assert isinstance(tick(project), str) == mine
