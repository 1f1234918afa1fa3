"""``tuneshift run``: materialize what is missing or out of date, in round order, through Dagster's instance.

What is out of date is asked of Dagster itself: see `tuneshift_dag/staleness.py`.
"""

import os
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import dagster as dg
from dagster._core.definitions.data_version import StaleCause, StaleCauseCategory
from dagster._core.storage.dagster_run import IN_PROGRESS_RUN_STATUSES

from tuneshift_dag.assets.common import BATCH_TAG, ROUND_ASSETS, key
from tuneshift_dag.config.transfer import Transfer
from tuneshift_dag.definitions import build_definitions
from tuneshift_dag.errors import TuneshiftError
from tuneshift_dag.home import database_file
from tuneshift_dag.resources.dagster_resources import EngineResource
from tuneshift_dag.staleness import Staleness
from tuneshift_dag.store.database import Store
from tuneshift_dag.store.tables import RUNS
from tuneshift_dag.training.hardware import check_training

_PID_TAG = "tuneshift/process"
# In a container that was started again, a killed process had this one's id.
_OWN_ID = uuid.uuid4().hex


@dataclass
class RunResult:
    """What a run did: materialized (asset, round) pairs, and rounds kept although their seeds changed."""

    batch_id: str
    materialized: list[tuple[str, str | None]] = field(default_factory=list)
    kept_rounds: list[str] = field(default_factory=list)


class Runner:
    """Materializes one transfer's assets in this process."""

    def __init__(
        self,
        transfer: Transfer,
        instance: dg.DagsterInstance,
        engines: EngineResource | None = None,
        on_step: Callable[[str, str | None], None] = lambda asset, round_: None,
    ) -> None:
        self.transfer = transfer
        self.instance = instance
        self.defs = build_definitions([transfer], database_file(), engines)
        self.job = self.defs.resolve_implicit_global_asset_job_def()
        self._assets = self.defs.resolve_asset_graph().get_all_asset_keys()
        self.on_step = on_step
        self.result = RunResult(batch_id=f"cli-{uuid.uuid4().hex[:12]}")

    def run(self, regrow: bool = False) -> RunResult:
        """Run every step that needs it.

        Args:
            regrow: also grow rounds anew that are out of date only because their seeds changed.

        Raises:
            TuneshiftError: when a step fails; what was done before it is kept.
        """
        started = time.monotonic()
        close_dead_runs(self.instance)
        if self._causes("distilled_model", None) != []:
            check_training(self.transfer)  # now, not after hours of work
        if self._causes("seed_set", None) != []:
            self._materialize(["seed_set"], None)
        for round_ in self.transfer.round_keys:
            self._run_round(round_, regrow)
        # The report comes before the training: it is cheap, and says what to do when too little was kept.
        for asset in ("threshold_report", "distilled_model", "evaluation", "diversity_map"):
            if key(self.transfer, asset) not in self._assets:
                continue
            if self._causes(asset, None) != []:
                self._materialize([asset], None)
        row = {
            "batch_id": self.result.batch_id,
            "finished_at": datetime.now(UTC).replace(tzinfo=None),
            "seconds": time.monotonic() - started,
        }
        Store(database_file()).append_all(self.transfer.name, [(RUNS, RUNS.frame([row]))])
        return self.result

    def compare(self) -> RunResult:
        """Bring ``comparison`` up to date; `run` leaves it out, since it trains many models.

        Raises:
            TuneshiftError: without ``compare`` in ``transfer.yaml``, or when the step fails.
        """
        if key(self.transfer, "comparison") not in self._assets:
            raise TuneshiftError(
                f"{self.transfer.folder / 'transfer.yaml'}: compare: missing. Add `compare: {{}}` for the defaults"
                " (the current filter, random and unfiltered, three trainings each)."
            )
        close_dead_runs(self.instance)
        if self._causes("comparison", None) != []:
            self._materialize(["comparison"], None)
        return self.result

    def _run_round(self, round_: str, regrow: bool) -> None:
        for place, asset in enumerate(ROUND_ASSETS):
            causes = self._causes(asset, round_)
            if causes == []:
                continue
            grown = asset == "synthetic_prompts" and causes and self._has_prompts(round_)
            if grown and causes and not regrow and self._only_seeds_changed(causes):
                self.result.kept_rounds.append(round_)
                continue
            self._materialize(ROUND_ASSETS[place:], round_)
            return

    def _causes(self, asset: str, round_: str | None) -> list[StaleCause] | None:
        """Why an asset is out of date: [] when it isn't, None when it was never materialized."""
        return Staleness(self.defs.resolve_asset_graph(), self.instance).causes(key(self.transfer, asset), round_)

    def _has_prompts(self, round_: str) -> bool:
        """A round after the one that reached ``target_pairs`` has none, and nothing to keep when that is raised."""
        counted = "SELECT count(*) FROM synthetic_prompts WHERE round = ?"
        return bool(Store(database_file()).read(counted, [round_], self.transfer.name).item())

    def _only_seeds_changed(self, causes: list[StaleCause]) -> bool:
        seeds = key(self.transfer, "round_seeds")
        return all(
            cause.category == StaleCauseCategory.DATA
            and cause.dependency is not None
            and cause.dependency.asset_key == seeds
            for cause in causes
        )

    def _materialize(self, assets: Sequence[str], round_: str | None) -> None:
        self.on_step(assets[0], round_)
        result = self.job.execute_in_process(
            instance=self.instance,
            asset_selection=[key(self.transfer, asset) for asset in assets],
            partition_key=round_,
            raise_on_error=False,
            run_config={"loggers": {"console": {"config": {"log_level": "INFO"}}}},
            tags={BATCH_TAG: self.result.batch_id, _PID_TAG: process_tag()},
        )
        if not result.success:
            raise TuneshiftError(_explain(result, round_))
        self.result.materialized += [(asset, round_) for asset in assets]


def close_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """Mark runs of killed `tuneshift` processes as failed and free their pool slots; return their ids.

    A killed process can't do this itself, and a held slot would block every later run.
    """
    closed = []
    for run in instance.get_runs(dg.RunsFilter(statuses=list(IN_PROGRESS_RUN_STATUSES))):
        process, _, own_id = run.tags.get(_PID_TAG, "").rpartition("-")
        host, _, pid = process.rpartition("-")
        if host == socket.gethostname() and not _is_alive(int(pid), own_id):
            instance.report_run_failed(run, "The process that ran this was killed.")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
            closed.append(run.run_id)
    return closed


def process_tag() -> str:
    """Names this process, also when another one had its number before."""
    return f"{socket.gethostname()}-{os.getpid()}-{_OWN_ID}"


def _is_alive(pid: int, own_id: str) -> bool:
    if pid == os.getpid():
        return own_id == _OWN_ID
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _explain(result: dg.ExecuteInProcessResult, round_: str | None) -> str:
    """One message from a failed run: the first failing step and the innermost cause."""
    for event in result.all_events:
        if event.is_step_failure:
            error = event.step_failure_data.error
            failure = event.step_failure_data.user_failure_data
            while error and error.cause:
                error = error.cause
            message = (failure and failure.description) or (error.message.strip() if error else "unknown error")
            where = f"{(event.step_key or '').split('__')[-1]}{f' of {round_}' if round_ else ''}"
            return f"{where} failed: {message}"
    return f"run {result.run_id} failed"
