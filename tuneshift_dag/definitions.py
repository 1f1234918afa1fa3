"""Dagster's entry point: assets, refilter job and automation of every transfer found, and their resources.

The automation is a sensor and no declarative automation: that one listens to materializations and to observable
assets, and an `AssetObservation` of an external asset, which is how the loop reports a round's seeds, starts nothing
(Dagster 1.13). Reporting materializations instead would hide the staleness of the round (dagster issue 26162).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import dagster as dg

from tuneshift_dag.assets import build_assets
from tuneshift_dag.assets.common import OWNERS, key
from tuneshift_dag.assets.filtered_dataset import build_refilter_job
from tuneshift_dag.config import Transfer
from tuneshift_dag.config.files import load_all
from tuneshift_dag.home import database_file, transfers_dir
from tuneshift_dag.reports import fenced
from tuneshift_dag.resources import EngineResource, StoreResource
from tuneshift_dag.resources.runs import close_dead_runs, transfers_of
from tuneshift_dag.store import Store
from tuneshift_dag.store.records import Records, next_step

_RUNS_LOOKED_AT = 200


def build_definitions(
    transfers: Sequence[Transfer],
    database: Path,
    engines: EngineResource | None = None,
    broken: Mapping[str, str] | None = None,
) -> dg.Definitions:
    """Definitions for the given transfers; tests pass an `EngineResource` of their own. ``broken`` are the names of
    transfers that can't be read, and what to repair."""
    return dg.Definitions(
        assets=[
            *(asset for transfer in transfers for asset in build_assets(transfer)),
            *(_broken(name, problem) for name, problem in (broken or {}).items()),
        ],
        jobs=[build_refilter_job(transfer) for transfer in transfers],
        sensors=[build_automation(transfer, database) for transfer in transfers],
        resources={"store": StoreResource(path=str(database)), "engines": engines or EngineResource()},
        # One process per run: its steps share the loaded models, and torch is imported once.
        executor=dg.in_process_executor,
    )


@dg.definitions
def defs() -> dg.Definitions:
    transfers, broken = load_all(transfers_dir())
    return build_definitions(transfers, database_file(), broken=broken)


def _broken(name: str, problem: str) -> dg.AssetSpec:
    """What stands in the group of a transfer that can't be read: it costs its own group, and no other."""
    return dg.AssetSpec(
        dg.AssetKey([name, "transfer_yaml"]),
        group_name=re.sub(r"[^A-Za-z0-9_]", "_", name),
        owners=OWNERS,
        description=f"This transfer can't be read. Repair it, then reload the definitions:\n\n{fenced(problem)}",
    )


def build_automation(transfer: Transfer, database: Path) -> dg.SensorDefinition:
    @dg.sensor(
        name=f"{transfer.name}_automation",
        target=dg.AssetSelection.groups(transfer.name),
        default_status=dg.DefaultSensorStatus.STOPPED,
        minimum_interval_seconds=10,
        description=(
            f"Drives {transfer.name} by itself: materialize seed_set once, and every round whose seeds are new is"
            " materialized after the round before it, until target_pairs is reached; then the model is trained and"
            " evaluated. While it is on it also brings up to date what a change of transfer.yaml made out of date,"
            " rounds with changed seeds included. It starts nothing while a run of the transfer is going on, and"
            " after a failed or terminated run it waits until you have materialized that step yourself."
        ),
    )
    def automation(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        close_dead_runs(context.instance)
        wait = _reason_to_wait(transfer, context.instance)
        if wait:
            return dg.SkipReason(wait)
        records = Records(Store(database), transfer)
        if records.causes("seed_set"):
            return dg.SkipReason("seed_set is missing or out of date: materialize it, and the rounds follow.")
        due = next_step(records, regrow=True)
        if due is None:
            return dg.SkipReason("Everything is up to date.")
        return dg.RunRequest(asset_selection=[key(transfer, asset) for asset in due.assets], partition_key=due.round)

    return automation


def _reason_to_wait(transfer: Transfer, instance: dg.DagsterInstance) -> str | None:
    """A run or backfill of this transfer that is going on, or a last run that didn't succeed."""
    for backfill in instance.get_backfills(limit=_RUNS_LOOKED_AT):
        ours = any(asset.path[0] == transfer.name for asset in backfill.asset_selection or ())
        if ours and backfill.status.value in ("REQUESTED", "CANCELING"):
            return f"Backfill {backfill.backfill_id} is going on."
    runs = [run for run in instance.get_runs(limit=_RUNS_LOOKED_AT) if transfer.name in transfers_of(run)]
    for run in runs:
        if not run.is_finished:
            return f"Run {run.run_id[:8]} is going on."
    if runs and runs[0].status != dg.DagsterRunStatus.SUCCESS:
        return (
            f"The last run, {runs[0].run_id[:8]}, failed or was terminated: see its log, then materialize that step"
            " yourself, and the automation goes on."
        )
    return None
