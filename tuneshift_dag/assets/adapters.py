"""Trained target adapters, kept by the hash of their dataset and settings: what was trained once is never again.

`distilled_model` trains one and points at it, `comparison` several.
"""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from tuneshift_dag.assets.common import Step, content_version
from tuneshift_dag.config.transfer import Transfer
from tuneshift_dag.home import output_dir
from tuneshift_dag.resources.dagster_resources import EngineResource
from tuneshift_dag.store.database import Store, insert
from tuneshift_dag.store.tables import DISTILLED_MODELS, TRAINING_EXAMPLES
from tuneshift_dag.training.hardware import check_training

# The parts of transfer.yaml that a training depends on.
TRAINING_SECTIONS = ("distill", "target", "prompt_template", "seed", "models.compute_dtype")


def training_version(transfer: Transfer) -> str:
    """Changes with all that makes another adapter of the same pairs."""
    # Balanced drawing has changed three times: those models aren't current.
    code = 1 if transfer.config.distill.balance == "none" else 4
    return transfer.version(*TRAINING_SECTIONS, code=code)


def trained_adapter(
    current: Step, database: Store, engines: EngineResource, transfer: Transfer, pairs: pl.DataFrame
) -> dict[str, Any]:
    """The row of ``distilled_models`` for these pairs (prompt_id, round, prompt, response); trained if it must be.

    The row is written as soon as the training ends, so that a killed step trains nothing twice.
    """
    dataset_version = content_version(pairs.select("prompt_id", "prompt", "response"))
    model_id = _model_id(transfer, dataset_version)
    weights = engines.target_weights(transfer)
    row = _find(database, transfer, model_id)
    if row is not None and row["target_weights"] not in (weights, None):
        # The folder, or the hub's branch, that target.base names holds another model by now.
        model_id = _model_id(transfer, dataset_version, weights)
        row = _find(database, transfer, model_id)
    if row is None:
        row = _train(current, database, engines, transfer, pairs, dataset_version, model_id, weights)
    else:
        current.context.log.info(f"model {model_id} is already trained: nothing to do")
    examples = pairs.select(pl.lit(model_id).alias("model_id"), "prompt_id", "round")
    with database.transaction(transfer.name) as connection:
        for table, frame in ((DISTILLED_MODELS, DISTILLED_MODELS.frame([row])), (TRAINING_EXAMPLES, examples)):
            connection.execute(f"DELETE FROM {table.name} WHERE model_id = ?", [model_id])
            insert(connection, table, frame)
    return row


def _model_id(transfer: Transfer, dataset_version: str, *more: str) -> str:
    parts = "|".join([dataset_version, training_version(transfer), *more])
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def _find(database: Store, transfer: Transfer, model_id: str) -> dict[str, Any] | None:
    rows = database.read("SELECT * FROM distilled_models WHERE model_id = ?", [model_id], transfer.name)
    found = rows.to_dicts()
    if found and (Path(found[0]["path"]) / "adapter_model.safetensors").is_file():
        return found[0]
    return None


def _train(
    current: Step,
    database: Store,
    engines: EngineResource,
    transfer: Transfer,
    pairs: pl.DataFrame,
    dataset_version: str,
    model_id: str,
    weights: str,
) -> dict[str, Any]:
    """Train, and return the new row of ``distilled_models``."""
    check_training(transfer)
    folder = output_dir(transfer.name) / "models" / model_id

    def on_step(number: int, total: int, loss: float) -> None:
        if number % max(1, total // 20) == 0 or number == total:
            current.context.log.info(f"training: step {number}/{total}, loss {loss:.3f} nats per token")

    with current.cost.model_time():
        curve = engines.distill(transfer, pairs.select("prompt", "response").rows(), folder, on_step)
    return {
        "model_id": model_id,
        "dataset_version": dataset_version,
        "pairs": len(pairs),
        "target": transfer.config.target.base,
        "target_weights": weights,
        "settings": transfer.config.distill.model_dump_json(),
        "filter": None,
        "curve": json.dumps({"steps": curve.steps, "epochs": curve.epochs}),
        "seconds": curve.seconds,
        "path": str(folder),
        "created_at": datetime.now(UTC).replace(tzinfo=None),
        "current": False,
    }
