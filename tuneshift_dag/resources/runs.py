"""In which process a run of Dagster is: one whose process was killed would hold its pool slot for ever.

Dagster's own run monitoring doesn't see it when the process that launched the run was killed too."""

import os
import socket
import uuid

import dagster as dg
import psutil

PROCESS_TAG = "tuneshift/process"
# In a container that was started again, a killed process had this one's id.
_OWN_ID = uuid.uuid4().hex
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


def process_tag() -> str:
    """Names this process, also when another one had its number before."""
    return f"{socket.gethostname()}-{os.getpid()}-{_OWN_ID}"


def _is_alive(pid: int, own_id: str) -> bool:
    if pid == os.getpid():
        return own_id == _OWN_ID
    return psutil.pid_exists(pid)
