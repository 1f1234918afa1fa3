"""In which process a run of Dagster is: one whose process was killed would hold its pool slot for ever.

Dagster's own run monitoring doesn't see it when the process that launched the run was killed too."""

import os
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import suppress

import dagster as dg
import psutil

PROCESS_TAG = "tuneshift/process"
# In a container that was started again, a killed process had this one's id.
_OWN_ID = uuid.uuid4().hex
_REFILTER = "_refilter"
# Seconds between two looks whether a pool has room.
_EVERY = 1.0
_IN_PROGRESS = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]


def note_process(instance: dg.DagsterInstance, run: dg.DagsterRun) -> None:
    """Tag a run with the process that it is in, if it isn't yet."""
    if run.tags.get(PROCESS_TAG) != process_tag():
        instance.add_run_tags(run.run_id, {PROCESS_TAG: process_tag()})


def close_dead_runs(instance: dg.DagsterInstance) -> None:
    """Mark runs of killed processes of this host as failed, and free their pool slots."""
    for run in instance.get_runs(dg.RunsFilter(statuses=_IN_PROGRESS)):
        process, _, own_id = run.tags.get(PROCESS_TAG, "").rpartition("-")
        host, _, pid = process.rpartition("-")
        if host == socket.gethostname() and not _is_alive(int(pid), own_id):
            instance.report_run_failed(run, "The process that ran this was killed.")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)


def busy_transfers(instance: dg.DagsterInstance) -> set[str]:
    """Names of the transfers of which a run is going on."""
    close_dead_runs(instance)
    runs = instance.get_runs(dg.RunsFilter(statuses=_IN_PROGRESS))
    return {name for run in runs for name in transfers_of(run)}


def refilter_job(transfer: str) -> str:
    """The name of a transfer's refilter job."""
    return f"{transfer}{_REFILTER}"


def transfers_of(run: dg.DagsterRun) -> set[str]:
    """Names of the transfers that a run materializes something of. The refilter job selects no assets."""
    selected = {asset.path[0] for asset in run.asset_selection or ()}
    return selected | ({run.job_name.removesuffix(_REFILTER)} if run.job_name.endswith(_REFILTER) else set())


def wait_for_pool(instance: dg.DagsterInstance, pool: str, say: Callable[[str], None]) -> None:
    """Until the pool has room. Dagster would wait too, but with a busy core, without a word, and for ever when the
    process of the run that has it is killed meanwhile."""
    storage, told = instance.event_log_storage, set[str]()
    while True:
        close_dead_runs(instance)
        found = storage.get_concurrency_info(pool)
        if not found.claimed_slots or found.active_slot_count < found.slot_count:
            return
        for run_id in found.active_run_ids:
            run = instance.get_run_by_id(run_id)
            if run and run.is_finished:  # it was ended from outside, and no daemon was there to see it
                storage.free_concurrency_slots_for_run(run_id)
            elif run_id not in told:
                told.add(run_id)
                process = run.tags.get(PROCESS_TAG, "").rpartition("-")[0] if run else ""
                where = f" in {process}" if process else ""
                say(f"waiting for run {run_id[:8]}{where}, which has the models (pool {pool})")
        time.sleep(_EVERY)


def process_tag() -> str:
    """Names this process, also when another one had its number before."""
    return f"{socket.gethostname()}-{os.getpid()}-{_OWN_ID}"


def _is_alive(pid: int, own_id: str) -> bool:
    if pid == os.getpid():
        return own_id == _OWN_ID
    with suppress(psutil.NoSuchProcess):
        # A killed one stays until somebody has waited for it, which the first process of a container may never do.
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
