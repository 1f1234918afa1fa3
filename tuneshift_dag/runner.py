"""``tuneshift run``: materialize what is missing or out of date (`store.records`), in round order, through Dagster."""

import errno
import logging
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import dagster as dg
from sqlalchemy.exc import DBAPIError

from tuneshift_dag import TuneshiftError, without_frames
from tuneshift_dag.config import Transfer
from tuneshift_dag.definitions import build_definitions
from tuneshift_dag.home import database_file
from tuneshift_dag.resources import BATCH_TAG, EngineResource
from tuneshift_dag.resources.runs import PROCESS_TAG, close_dead_runs, process_tag, wait_for_pool
from tuneshift_dag.store import Store, now
from tuneshift_dag.store.records import Due, Records, next_step, place
from tuneshift_dag.store.tables import RUNS
from tuneshift_dag.training import check_training

_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
_DISK = " (make room on the disk, or correct its permissions; what was computed is kept)"


@dataclass
class RunResult:
    """What a run did: materialized (asset, round) pairs, and rounds kept although their seeds changed."""

    batch_id: str
    materialized: list[tuple[str, str | None]] = field(default_factory=list)
    kept_rounds: list[str] = field(default_factory=list)


@contextmanager
def _told_of_the_disk() -> Iterator[None]:
    """What can't be written outside of every step, by Dagster mostly, as `TuneshiftError`."""
    try:
        yield
    except DBAPIError as error:
        home = os.environ.get("DAGSTER_HOME")
        raise TuneshiftError(f"Dagster can't read or write its files in {home}: {error.orig}{_DISK}") from error
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        raise TuneshiftError(f"{error}{_DISK}") from error


class Runner:
    @_told_of_the_disk()
    def __init__(
        self,
        transfer: Transfer,
        instance: dg.DagsterInstance,
        engines: EngineResource | None = None,
        on_step: Callable[[str, str | None], None] = lambda asset, round_: None,
        on_line: Callable[[str], None] = lambda line: None,
    ) -> None:
        """``on_step`` is called with the first asset and the round of what is materialized next; ``on_line`` with every
        line that a step says of its progress (in a terminal it draws a bar instead)."""
        self.transfer = transfer
        self.instance = instance
        self.store = Store(database_file())
        self.engines = engines
        self.defs = build_definitions([transfer], database_file(), engines)
        self.job = self.defs.resolve_implicit_global_asset_job_def()
        self.on_step = on_step
        self.lines = _Lines(on_line)
        self.result = RunResult(f"cli-{uuid.uuid4().hex[:12]}")

    @_told_of_the_disk()
    def run(self, regrow: bool = False) -> RunResult:
        """Run every step that `next_step` names; `TuneshiftError` when one fails, and what was done before is kept."""
        started = time.monotonic()
        self.store.claim(self.transfer.name, self.transfer.folder)
        close_dead_runs(self.instance)
        if Records(self.store, self.transfer).causes("distilled_model"):
            check_training(self.transfer)  # now, not after hours of work
        records = self._catch_up(regrow)
        # What is out of date after the last step is kept.
        self.result.kept_rounds = [r for r in self.transfer.round_keys if records.causes("synthetic_prompts", r)]
        row = {"batch_id": self.result.batch_id, "finished_at": now(), "seconds": time.monotonic() - started}
        self.store.append_all(self.transfer.name, [(RUNS, RUNS.frame([row]))])
        return self.result

    @_told_of_the_disk()
    def compare(self) -> RunResult:
        """Bring ``comparison`` up to date, with `compare.loop` after the rounds of every arm; `run` leaves it out,
        since it trains many models. Errors as in `run`."""
        if self.transfer.config.compare is None:
            raise TuneshiftError(
                f"{self.transfer.folder / 'transfer.yaml'}: compare: missing. Add `compare: {{}}` for the defaults"
                " (the current filter, random and unfiltered, three trainings each)."
            )
        self.store.claim(self.transfer.name, self.transfer.folder)
        close_dead_runs(self.instance)
        self._check_compared()
        # Seed by seed, so that one that is ended has as much of every arm.
        for loop in self.transfer.loops.values():
            self.lines.on_line(f"rounds of {loop.loop}")
            Runner(loop, self.instance, self.engines, self.on_step, self.lines.on_line).grow()
        if Records(self.store, self.transfer).causes("comparison"):
            self._materialize(["comparison"], None)
        return self.result

    def _check_compared(self) -> None:
        """Before hours of work: the pairs that arms choose from, where `compare.loop` grows none, and the texts that
        their trainings are held to."""
        records, transfer = Records(self.store, self.transfer), self.transfer
        read: list[tuple[str, str | None]] = [("rehearsal_set", None)] if transfer.rehearses else []
        if not transfer.loops:
            # Rounds that there aren't yet have no pairs to choose from.
            missing = records.missing_rounds("scored_pairs")
            read += [("scored_pairs", round_) for round_ in transfer.round_keys if round_ not in missing]
        if stale := [place(*of) for of in read if records.causes(*of)]:
            raise TuneshiftError(
                f"{transfer.name}: {', '.join(stale)} of today's settings and files aren't there yet:"
                f" `tuneshift run {transfer.name}` first, then compare."
            )

    def grow(self) -> RunResult:
        """Bring the rounds up to date, also those of which only the seeds changed, and nothing after them."""
        self._catch_up(regrow=True, rounds_alone=True)
        return self.result

    def _catch_up(self, regrow: bool, rounds_alone: bool = False) -> Records:
        """Run every step that is due, or only those up to the last round; the records after them."""
        records, last = Records(self.store, self.transfer), Due(())
        while due := next_step(records, regrow):
            if rounds_alone and not (due.round or due.assets == ("seed_set",)):
                break
            if due == last:
                raise RuntimeError(f"{due} is out of date right after it was made: please report this")
            last = due
            self._materialize(due.assets if due.round else due.assets[:1], due.round)
            records = Records(self.store, self.transfer)
        return records

    def _materialize(self, assets: Sequence[str], round_: str | None) -> None:
        self.on_step(assets[0], round_)
        keys = [dg.AssetKey([self.transfer.name, asset]) for asset in assets]
        for pool in {pool for key in keys if (pool := self.defs.resolve_assets_def(key).op.pool)}:
            wait_for_pool(self.instance, pool, self.lines.on_line)
        said = logging.getLogger(__package__)
        said.addHandler(self.lines)
        try:
            result = self.job.execute_in_process(
                instance=self.instance,
                asset_selection=keys,
                partition_key=round_,
                raise_on_error=False,
                # Who looks at the terminal gets our own lines; Dagster's are in its event log.
                run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
                tags={BATCH_TAG: self.result.batch_id, PROCESS_TAG: process_tag()},
            )
        finally:
            said.removeHandler(self.lines)
        if not result.success:
            raise TuneshiftError(_explain(result, round_))
        self.result.materialized += [(asset, round_) for asset in assets]


class _Lines(logging.Handler):
    """Passes on what steps say; of their progress nothing where a bar shows it."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self.on_line = on_line

    def emit(self, record: logging.LogRecord) -> None:
        if not (getattr(record, "progress", False) and sys.stderr.isatty()):
            self.on_line(record.getMessage())


def _explain(result: dg.ExecuteInProcessResult, round_: str | None) -> str:
    """One message from a failed run: the first failing step, and the innermost cause or what was raised for people."""
    failed = next((event for event in result.all_events if event.is_step_failure), None)
    if failed is None:
        return f"run {result.run_id} failed"
    error, failure = failed.step_failure_data.error, failed.step_failure_data.user_failure_data
    told = {kind.__name__ for kind in _told()}
    while error and error.cause and error.cls_name not in told:
        error = error.cause
    if error and error.cls_name == "DagsterExecutionInterruptedError":
        raise KeyboardInterrupt  # Dagster makes a failed step of it
    message = (failure and failure.description) or (error.message if error else "unknown error")
    message = without_frames(message).strip()
    if error and error.cls_name in ("OSError", "PermissionError", "OperationalError"):
        message += _DISK
    elif not failure and error and error.cls_name not in told:
        message += f" (not a fault of your input; its traceback is in Dagster's UI, run {result.run_id[:8]})"
    where = f"{(failed.step_key or '').split('__')[-1]}{f' of {round_}' if round_ else ''}"
    for kind in _told():
        message = message.removeprefix(f"{kind.__module__}.{kind.__name__}: ")
    return f"{where} failed: {message}"


def _told() -> list[type[TuneshiftError]]:
    return [TuneshiftError, *TuneshiftError.__subclasses__()]
