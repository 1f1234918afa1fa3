"""The runner: what a killed `tuneshift run` leaves behind, and that the next one picks it up."""

import os
import random
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster import DagsterRunStatus

from tests.conftest import Project
from tests.fake_engine import FakeEngine
from tuneshift_dag import TuneshiftError
from tuneshift_dag.home import use_dagster_home
from tuneshift_dag.resources.runs import PROCESS_TAG, close_dead_runs, process_tag, wait_for_pool
from tuneshift_dag.runner import Runner

TABLES = ["synthetic_prompts", "scored_pairs", "filtered_dataset", "round_seeds", "rejected_pairs", "accuracy"]


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    """A project's own instance: its settings hold the pool limit."""
    use_dagster_home()
    with dg.DagsterInstance.get() as instance:
        yield instance


def test_a_traceback_of_another_process_is_no_part_of_the_message(project: Project) -> None:
    """As `torch.multiprocessing` puts it into what it raises."""
    told = 'Traceback (most recent call last):\n  File "x.py", line 1, in f\n    g()\nValueError: no room\n'

    def fail(number: int) -> None:
        raise RuntimeError(f"\n\n-- Process 0 terminated with the following error:\n{told}")

    project.models.generator.on_batch = fail
    with pytest.raises(TuneshiftError) as error:
        project.run()
    assert "terminated with the following error:\nValueError: no room (not a fault" in str(error.value)
    assert "Traceback" not in str(error.value)


class TestCloseDeadRuns:
    def test_fails_the_run_of_a_dead_process_and_frees_its_pool_slot(self, instance: dg.DagsterInstance) -> None:
        run = started_run(instance, f"{socket.gethostname()}-{dead_pid()}-a")
        claim_slot(instance, run)
        close_dead_runs(instance)
        assert status(instance, run) == DagsterRunStatus.FAILURE
        assert slots_taken(instance) == 0

    @pytest.mark.parametrize(
        "tag",
        [process_tag(), f"{socket.gethostname()}-1-a", "another-host-999999-a", None],
        ids=["own process", "other user's process", "other host", "no step has begun"],
    )
    def test_leaves_other_runs_alone(self, instance: dg.DagsterInstance, tag: str | None) -> None:
        run = started_run(instance, tag)
        claim_slot(instance, run)
        close_dead_runs(instance)
        assert status(instance, run) == DagsterRunStatus.STARTED
        assert slots_taken(instance) == 1

    def test_fails_the_run_of_a_dead_process_that_had_this_ones_number(self, instance: dg.DagsterInstance) -> None:
        """As in a container that was started again: its first process is always number 1."""
        run = started_run(instance, f"{socket.gethostname()}-{os.getpid()}-another")
        claim_slot(instance, run)
        close_dead_runs(instance)
        assert status(instance, run) == DagsterRunStatus.FAILURE
        assert slots_taken(instance) == 0

    def test_fails_the_run_of_a_killed_process_that_nobody_has_waited_for(self, instance: dg.DagsterInstance) -> None:
        process = subprocess.Popen(["true"])
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        run = started_run(instance, f"{socket.gethostname()}-{process.pid}-a")
        close_dead_runs(instance)
        assert status(instance, run) == DagsterRunStatus.FAILURE
        process.wait()

    def test_knows_the_process_also_of_a_run_that_dagster_has_launched(self, project: Project) -> None:
        run_id = project.materialize("seed_set").run_id
        run = project.instance.get_run_by_id(run_id)
        assert run is not None and run.tags[PROCESS_TAG] == process_tag()

    def test_leaves_a_finished_run_of_a_dead_process_alone(self, instance: dg.DagsterInstance) -> None:
        run = started_run(instance, f"{socket.gethostname()}-{dead_pid()}-a", DagsterRunStatus.SUCCESS)
        close_dead_runs(instance)
        assert status(instance, run) == DagsterRunStatus.SUCCESS


def test_a_run_says_whom_it_waits_for_and_goes_on_when_that_one_is_killed(
    instance: dg.DagsterInstance, transfer_folder: Path
) -> None:
    holder = subprocess.Popen(["sleep", "60"])
    held = started_run(instance, f"{socket.gethostname()}-{holder.pid}-a")
    claim_slot(instance, held)
    said: list[str] = []

    def hear(line: str) -> None:
        said.append(line)
        holder.kill()

    project = Project(transfer_folder, instance)
    project.models.source.fail_after = 0
    with pytest.raises(TuneshiftError, match=r"seed_set failed: .*the engine was killed"):
        Runner(project.transfer, instance, project.models.resource(), on_line=hear).run()
    holder.wait()
    assert held.run_id[:8] in said[0] and f"{socket.gethostname()}-{holder.pid}" in said[0]
    assert status(instance, held) == DagsterRunStatus.FAILURE


def test_a_run_takes_the_place_of_one_that_was_ended_while_no_daemon_was_there(instance: dg.DagsterInstance) -> None:
    held = started_run(instance, None, DagsterRunStatus.CANCELED)
    claim_slot(instance, held)
    wait_for_pool(instance, "models", pytest.fail)
    assert slots_taken(instance) == 0


def test_what_dagster_cannot_read_or_write_is_one_message(instance: dg.DagsterInstance, transfer_folder: Path) -> None:
    """As on a full disk."""
    project, home = Project(transfer_folder, instance), Path(os.environ["DAGSTER_HOME"])
    (home / "history" / "runs.db").write_bytes(b"damaged" * 999)
    with pytest.raises(
        TuneshiftError, match=rf"^Dagster can't read or write its files in {home}: file is not a database"
    ):
        project.run()


@pytest.mark.parametrize("seed", range(2))
def test_a_killed_run_is_finished_by_the_next_one(
    seed: int, finished: Project, transfer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = finished.rows("SELECT count(*) FROM scored_pairs")[0][0] // 2
    batch_number = random.Random(seed).randrange(3, batches)
    use_dagster_home()
    kill_at_batch(transfer_folder, tmp_path / "progress", batch_number)

    with dg.DagsterInstance.get() as instance:
        project = Project(transfer_folder, instance)
        cached = project.store.read("SELECT count(*) FROM cache.scores").item() // 2
        # Batches before the one that was being computed are kept; the first answered the seeds.
        assert cached >= 2 * (batch_number - 2)
        project.models.source = FakeEngine("source", batch_size=2)
        project.run()
        assert {run.status for run in instance.get_runs()} == {DagsterRunStatus.SUCCESS, DagsterRunStatus.FAILURE}
        assert slots_taken(instance) == 0
    scored = {prompt for _, prompt in project.models.source.scored}
    assert len(scored) == 2 * batches - cached
    for table in TABLES:
        query = f"SELECT * FROM {table} ORDER BY ALL"
        assert project.rows(query) == finished.rows(query), table


def kill_at_batch(folder: Path, progress: Path, number: int) -> None:
    """Start a run in a process of its own and kill it while it computes its batch ``number`` (from 1)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.killed_run", str(folder), str(progress)],
        cwd=Path(__file__).parents[1],
        stderr=subprocess.DEVNULL,
    )
    try:
        give_up = time.monotonic() + 60
        while not progress.exists() or len(progress.read_text().splitlines()) < number:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < give_up
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()


def started_run(
    instance: dg.DagsterInstance, tag: str | None, status: DagsterRunStatus = DagsterRunStatus.STARTED
) -> dg.DagsterRun:
    @dg.job
    def work() -> None:
        pass

    return instance.create_run_for_job(
        work, run_id=str(uuid.uuid4()), tags={PROCESS_TAG: tag} if tag else {}, status=status
    )


def claim_slot(instance: dg.DagsterInstance, run: dg.DagsterRun) -> None:
    storage = instance.event_log_storage
    storage.initialize_concurrency_limit_to_default("models")
    claim = storage.claim_concurrency_slot("models", run.run_id, "step")
    assert claim.is_claimed


def slots_taken(instance: dg.DagsterInstance) -> int:
    return instance.event_log_storage.get_concurrency_info("models").active_slot_count


def status(instance: dg.DagsterInstance, run: dg.DagsterRun) -> DagsterRunStatus:
    found = instance.get_run_by_id(run.run_id)
    assert found
    return found.status


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid
