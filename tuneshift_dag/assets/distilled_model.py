"""``distilled_model``: the target model, LoRA-tuned on the kept pairs."""

import hashlib
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from tuneshift_dag.assets.common import (
    EVERY_ROUND_READ,
    MODEL_POOL,
    OWNERS,
    Step,
    content_version,
    definition_metadata,
    every_round_read,
    key,
    missing_rounds,
    step,
)
from tuneshift_dag.home import output_dir
from tuneshift_dag.reports import plots
from tuneshift_dag.resources.dagster_resources import EngineResource, StoreResource
from tuneshift_dag.resources.store import Store, insert
from tuneshift_dag.resources.tables import DISTILLED_MODELS, TRAINING_EXAMPLES
from tuneshift_dag.transfer import Transfer


def build_distilled_model(transfer: Transfer) -> dg.AssetsDefinition:
    asset_key = key(transfer, "distilled_model")
    sections = ("distill", "target", "prompt_template", "seed", "models.compute_dtype")

    @dg.asset(
        key=asset_key,
        deps=[key(transfer, "filtered_dataset")],
        group_name=transfer.name,
        owners=OWNERS,
        kinds={"pytorch", "huggingface"},
        pool=MODEL_POOL,
        code_version=transfer.version(*sections),
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

        The loss is on the response tokens only. Adapters are kept by the hash of dataset, target and
        settings, so a dataset that was trained on before is not trained on again.
        """
        database = store.store()
        with step(context, database, transfer) as current:
            _refuse_missing_rounds(context, transfer)
            trained_on = _materializations(context, transfer)
            pairs = database.read(
                "SELECT prompt_id, round, prompt, response FROM filtered_dataset ORDER BY round, prompt_id",
                schema=transfer.name,
            )
            if pairs.is_empty():
                raise dg.Failure("filtered_dataset is empty in every round: there is nothing to train on.")
            dataset_version = content_version(pairs.select("prompt_id", "prompt", "response"))
            model_id = _model_id(transfer, dataset_version, sections)
            known = _find(database, transfer, model_id)
            if known is None:
                known = _train(current, engines, transfer, pairs, dataset_version, model_id)
            else:
                context.log.info(f"model {model_id} is already trained: nothing to do")
            _make_current(database, transfer, known, pairs)
            curve = json.loads(known["curve"])
            picture = plots.training_curve(curve)
        picture.save(output_dir(transfer.name) / "training_curve.png")
        return dg.MaterializeResult(
            data_version=dg.DataVersion(model_id),
            metadata={
                "dataset": dg.MetadataValue.asset(key(transfer, "filtered_dataset")),
                "dataset_version": dataset_version,
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


def _model_id(transfer: Transfer, dataset_version: str, sections: tuple[str, ...]) -> str:
    parts = f"{dataset_version}|{transfer.version(*sections)}"
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def _find(database: Store, transfer: Transfer, model_id: str) -> dict[str, Any] | None:
    rows = database.read("SELECT * FROM distilled_models WHERE model_id = ?", [model_id], transfer.name)
    found = rows.to_dicts()
    if found and (Path(found[0]["path"]) / "adapter_model.safetensors").is_file():
        return found[0]
    return None


def _train(
    current: Step,
    engines: EngineResource,
    transfer: Transfer,
    pairs: pl.DataFrame,
    dataset_version: str,
    model_id: str,
) -> dict[str, Any]:
    """Train, and return the new row of ``distilled_models``."""
    folder = output_dir(transfer.name) / "models" / model_id
    every = max(1, transfer.config.distill.epochs * len(pairs) // transfer.config.distill.batch_size // 20)

    def on_step(number: int, total: int, loss: float) -> None:
        if number % every == 0 or number == total:
            current.context.log.info(f"training: step {number}/{total}, loss {loss:.3f} nats per token")

    started = time.monotonic()
    curve = engines.distill(transfer, pairs.select("prompt", "response").rows(), folder, on_step)
    current.cost.model_seconds += time.monotonic() - started
    return {
        "model_id": model_id,
        "dataset_version": dataset_version,
        "pairs": len(pairs),
        "settings": transfer.config.distill.model_dump_json(),
        "curve": json.dumps({"steps": curve.steps, "epochs": curve.epochs}),
        "seconds": curve.seconds,
        "path": str(folder),
        "created_at": datetime.now(UTC).replace(tzinfo=None),
        "current": True,
    }


def _make_current(database: Store, transfer: Transfer, row: dict[str, Any], pairs: pl.DataFrame) -> None:
    """Point the table at this model and note what it was trained on."""
    examples = pairs.select(pl.lit(row["model_id"]).alias("model_id"), "prompt_id", "round")
    rows = DISTILLED_MODELS.frame([{**row, "current": True}])
    with database.transaction(transfer.name) as connection:
        connection.execute("UPDATE distilled_models SET current = FALSE")
        for table, frame in ((DISTILLED_MODELS, rows), (TRAINING_EXAMPLES, examples)):
            connection.execute(f"DELETE FROM {table.name} WHERE model_id = ?", [row["model_id"]])
            insert(connection, table, frame)
