"""``distilled_model``: the target model, LoRA-tuned on the kept pairs."""

import json

import dagster as dg

from tuneshift_dag.assets.adapters import trained_adapter, training_version
from tuneshift_dag.assets.common import (
    EVERY_ROUND_READ,
    MODEL_POOL,
    OWNERS,
    definition_metadata,
    every_round_read,
    key,
    missing_rounds,
    step,
)
from tuneshift_dag.config.transfer import Transfer
from tuneshift_dag.home import output_dir
from tuneshift_dag.reports import plots
from tuneshift_dag.resources.dagster_resources import EngineResource, StoreResource
from tuneshift_dag.store.database import Store
from tuneshift_dag.store.tables import DISTILLED_MODELS


def build_distilled_model(transfer: Transfer) -> dg.AssetsDefinition:
    asset_key = key(transfer, "distilled_model")

    @dg.asset(
        key=asset_key,
        deps=[key(transfer, "filtered_dataset")],
        group_name=transfer.name,
        owners=OWNERS,
        kinds={"pytorch", "huggingface"},
        pool=MODEL_POOL,
        # Fewer rounds change no partition that is left, and still are another dataset.
        code_version=f"{training_version(transfer)}-{transfer.config.rounds}",
        metadata=definition_metadata(transfer, DISTILLED_MODELS),
        check_specs=[
            dg.AssetCheckSpec("dataset_not_empty", asset=asset_key, description="There are pairs to train on."),
            every_round_read(transfer, "distilled_model"),
        ],
    )
    def distilled_model(
        context: dg.AssetExecutionContext, store: StoreResource, engines: EngineResource
    ) -> dg.MaterializeResult:
        """A LoRA adapter for the target model, trained on (prompt, fine-tuned response) of every kept pair.

        The loss is on the response tokens only. Adapters are kept by the hash of dataset, target and settings, so a
        dataset that was trained on before is not trained on again.
        """
        database = store.store()
        with step(context, database, transfer) as current:
            _refuse_missing_rounds(context, transfer)
            trained_on = _materializations(context, transfer)
            pairs = database.read(
                "SELECT prompt_id, round, prompt, response FROM filtered_dataset WHERE round <= ?"
                " ORDER BY round, prompt_id",
                [transfer.round_keys[-1]],
                transfer.name,
            )
            if pairs.is_empty():
                raise dg.Failure("filtered_dataset is empty in every round: there is nothing to train on.")
            known = trained_adapter(current, database, engines, transfer, pairs)
            _make_current(database, transfer, known["model_id"])
            curve = json.loads(known["curve"])
            picture = plots.training_curve(curve)
        picture.save(output_dir(transfer.name) / "training_curve.png")
        return dg.MaterializeResult(
            data_version=dg.DataVersion(known["model_id"]),
            metadata={
                "dataset": dg.MetadataValue.asset(key(transfer, "filtered_dataset")),
                "dataset_version": known["dataset_version"],
                "dataset_materializations": trained_on,
                "pairs": len(pairs),
                "pairs_by_round": dict(pairs.group_by("round").len().sort("round").iter_rows()),
                "distinct_responses": pairs["response"].n_unique(),
                "path": dg.MetadataValue.path(known["path"]),
                "training_seconds": known["seconds"],
                "final_losses": curve["epochs"][-1],
                "training_curve": picture.markdown(),
                **current.metadata(),
            },
            check_results=[
                dg.AssetCheckResult(passed=True, check_name="dataset_not_empty", metadata={"pairs": len(pairs)}),
                dg.AssetCheckResult(
                    passed=True, check_name=EVERY_ROUND_READ, metadata={"rounds": transfer.config.rounds}
                ),
            ],
        )

    return distilled_model


def _refuse_missing_rounds(context: dg.AssetExecutionContext, transfer: Transfer) -> None:
    """Dagster runs an unpartitioned asset also when partitions above it don't exist yet."""
    missing = missing_rounds(context, transfer, "filtered_dataset")
    if missing:
        raise dg.Failure(
            f"filtered_dataset has no {', '.join(missing)}: materialize these rounds first, then distilled_model.",
            allow_retries=False,
        )


def _materializations(context: dg.AssetExecutionContext, transfer: Transfer) -> dg.MetadataValue:
    """A table of each round's present data version and of the run that made it: later runs may replace them."""
    records = []
    for round_ in transfer.round_keys:
        found = context.instance.fetch_materializations(
            dg.AssetRecordsFilter(key(transfer, "filtered_dataset"), asset_partitions=[round_]), limit=1
        ).records
        for event in found:
            tags = event.asset_materialization.tags or {} if event.asset_materialization else {}
            version = tags.get("dagster/data_version", "")
            records.append(dg.TableRecord({"round": round_, "data_version": version, "run_id": event.run_id}))
    return dg.MetadataValue.table(records)


def _make_current(database: Store, transfer: Transfer, model_id: str) -> None:
    with database.transaction(transfer.name) as connection:
        connection.execute("UPDATE distilled_models SET current = (model_id = ?)", [model_id])
        now = [transfer.describe_filter(), model_id]
        connection.execute("UPDATE distilled_models SET filter = ? WHERE model_id = ?", now)
