"""The automation sensor: once it is turned on, the loop drives itself.

A sensor and no declarative automation: that one listens to materializations and to observable assets, and
an `AssetObservation` of an external asset, which is how the loop reports a round's seeds, starts nothing
(Dagster 1.13). Reporting materializations instead would hide the staleness of the round (dagster issue 26162).
"""

from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet

import dagster as dg
from dagster._core.execution.backfill import BulkActionsFilter, BulkActionStatus
from dagster._core.storage.dagster_run import NOT_FINISHED_STATUSES

from tuneshift_dag.assets.common import ROUND_ASSETS, key
from tuneshift_dag.config.transfer import Transfer
from tuneshift_dag.staleness import Staleness

# After the rounds, in the order in which they may need each other.
_AFTER_ROUNDS = ("threshold_report", "distilled_model", "evaluation", "diversity_map")
_RUNS_LOOKED_AT = 200


def build_automation(transfer: Transfer) -> dg.SensorDefinition:
    @dg.sensor(
        name=f"{transfer.name}_automation",
        target=dg.AssetSelection.groups(transfer.name),
        default_status=dg.DefaultSensorStatus.STOPPED,
        minimum_interval_seconds=10,
        description=(
            f"Drives {transfer.name} by itself: materialize seed_set once, and every round whose seeds are new is"
            " materialized after the round before it, until target_pairs is reached; then the model is trained and"
            " evaluated. While it is on it also brings up to date what a change of transfer.yaml made unsynced,"
            " rounds with changed seeds included. It starts nothing while a run of the transfer is going on, and"
            " after a failed or terminated run it waits until you have materialized that step yourself."
        ),
    )
    def automation(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        assert context.repository_def
        wait = _reason_to_wait(transfer, context.instance)
        if wait:
            return dg.SkipReason(wait)
        graph = context.repository_def.asset_graph
        return next_request(transfer, graph.get_all_asset_keys(), Staleness(graph, context.instance))

    return automation


def next_request(
    transfer: Transfer, assets: AbstractSet[dg.AssetKey], staleness: Staleness
) -> dg.RunRequest | dg.SkipReason:
    """The first step, in round order, that is missing or out of date."""
    if staleness.causes(key(transfer, "seed_set")) != []:
        return dg.SkipReason("seed_set is missing or out of date: materialize it, and the rounds follow.")
    for round_ in transfer.round_keys:
        for place, asset in enumerate(ROUND_ASSETS):
            if staleness.causes(key(transfer, asset), round_) != []:
                return _request(transfer, ROUND_ASSETS[place:], round_)
    after = [asset for asset in _AFTER_ROUNDS if key(transfer, asset) in assets]
    stale = [asset for asset in after if staleness.causes(key(transfer, asset)) != []]
    if "distilled_model" in stale and "evaluation" in after:
        # In the same run, because a new model needs it anyway.
        stale = [asset for asset in after if asset in stale or asset == "evaluation"]
    return _request(transfer, stale) if stale else dg.SkipReason("Everything is up to date.")


def _request(transfer: Transfer, assets: Sequence[str], round_: str | None = None) -> dg.RunRequest:
    return dg.RunRequest(asset_selection=[key(transfer, asset) for asset in assets], partition_key=round_)


def _reason_to_wait(transfer: Transfer, instance: dg.DagsterInstance) -> str | None:
    """A run or backfill of this transfer that is going on, or a last run that didn't succeed."""
    going_on = BulkActionsFilter(statuses=[BulkActionStatus.REQUESTED, BulkActionStatus.CANCELING])
    for backfill in instance.get_backfills(filters=going_on):
        if _touches(transfer, backfill.asset_selection):
            return f"Backfill {backfill.backfill_id} is going on."
    runs = [run for run in instance.get_runs(limit=_RUNS_LOOKED_AT) if _touches(transfer, run.asset_selection)]
    for run in runs:
        if run.status in NOT_FINISHED_STATUSES:
            return f"Run {run.run_id[:8]} is going on."
    if runs and runs[0].status != dg.DagsterRunStatus.SUCCESS:
        return (
            f"The last run, {runs[0].run_id[:8]}, failed or was terminated: see its log, then materialize that step"
            " yourself, and the automation goes on."
        )
    return None


def _touches(transfer: Transfer, assets: Collection[dg.AssetKey] | None) -> bool:
    return any(asset.path[0] == transfer.name for asset in assets or ())
