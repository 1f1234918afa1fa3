"""``distilled_model``: the target model, LoRA-tuned on the kept pairs. `comparison` trains its own in the same way."""

import hashlib
import json
from typing import Any

import dagster as dg
import polars as pl

from tuneshift_dag.assets.common import EVERY_ROUND, LOG, Context, Step, check_rounds, definition, key, step
from tuneshift_dag.config import Transfer
from tuneshift_dag.config.versions import training_version
from tuneshift_dag.home import output_dir
from tuneshift_dag.reports import describe_filter, plots
from tuneshift_dag.resources import EngineResource, StoreResource
from tuneshift_dag.store import insert, now
from tuneshift_dag.store.cache import MODEL_REFERENCE
from tuneshift_dag.store.records import content_version
from tuneshift_dag.store.tables import DISTILLED_MODELS, TRAINING_EXAMPLES
from tuneshift_dag.training import check_training

_CURVE = ("steps", "epochs", "kept_epoch", "cut", "left_out")
CHECKS = {"dataset_not_empty": "There are pairs to train on.", **EVERY_ROUND}


def build_distilled_model(transfer: Transfer) -> dg.AssetsDefinition:
    kinds = ("pytorch", "huggingface")

    @dg.asset(**definition(transfer, "distilled_model", DISTILLED_MODELS, *kinds, models=True, checks=CHECKS))
    def distilled_model(context: Context, store: StoreResource, engines: EngineResource) -> dg.MaterializeResult:
        """A LoRA adapter for the target model, trained on (prompt, fine-tuned response) of every kept pair.

        The loss is on the response tokens; in every step the target is also held to what it predicted before in some
        texts of `rehearsal_set` (`distill.retain`), so that it forgets little. The adapter is that of the epoch with
        the lowest loss on the pairs held back. Adapters are kept by the hash of dataset, target and settings, so a
        dataset that was trained on before is not trained on again.
        """
        with step(context, store.store(), transfer, "distilled_model") as current:
            pairs = _kept_pairs(current)
            row = trained_adapter(current, engines, transfer, pairs)

            def make_current(connection: Any) -> None:
                connection.execute("UPDATE distilled_models SET current = (model_id = ?)", [row["model_id"]])
                if "filtered_dataset" not in current.records.changed():  # else another filter has kept these pairs
                    described = [describe_filter(transfer), row["model_id"]]
                    connection.execute("UPDATE distilled_models SET filter = ? WHERE model_id = ?", described)

            current.write([], row["model_id"], make_current)
            curve = json.loads(row["curve"])
            picture = current.picture("training_curve", plots.training_curve(curve))
        trained_on = [
            dg.TableRecord({"round": round_, "data_version": current.records.version("filtered_dataset", round_)})
            for round_ in transfer.round_keys
        ]
        figures = {
            "dataset": dg.MetadataValue.asset(key(transfer, "filtered_dataset")),
            "dataset_version": row["dataset_version"],
            "dataset_materializations": dg.MetadataValue.table(trained_on),
            "pairs": len(pairs),
            "pairs_by_round": dict(pairs.group_by("round").len().sort("round").iter_rows()),
            "distinct_responses": pairs["response"].n_unique(),
            "path": dg.MetadataValue.path(str(current.store.absolute(row["path"]))),
            "training_seconds": row["seconds"],
            "final_losses": curve["epochs"][-1],
            **{name: curve.get(name) for name in _CURVE[2:]},
            "training_curve": picture,
        }
        not_empty = dg.AssetCheckResult(passed=True, check_name="dataset_not_empty", metadata={"pairs": len(pairs)})
        return current.result(None, figures, not_empty, check_rounds(current, "filtered_dataset"))

    return distilled_model


def _kept_pairs(current: Step) -> pl.DataFrame:
    missing = current.records.missing_rounds("filtered_dataset")
    if missing:  # Dagster runs an unpartitioned asset also when partitions above it don't exist yet
        raise current.lacks(f"filtered_dataset of {', '.join(missing)}")
    pairs = current.read(KEPT_PAIRS, [current.transfer.round_keys[-1]])
    if pairs.is_empty():
        raise dg.Failure("filtered_dataset is empty in every round: there is nothing to train on.")
    return pairs


# A round that was grown anew knows nothing of the ones after it, so a prompt may stand in two until they are, too.
KEPT_PAIRS = """
    SELECT prompt_id, round, prompt, response FROM filtered_dataset WHERE round <= ?
    QUALIFY row_number() OVER (PARTITION BY prompt_id ORDER BY round) = 1 ORDER BY round, prompt_id
"""


def trained_adapter(current: Step, engines: EngineResource, transfer: Transfer, pairs: pl.DataFrame) -> dict[str, Any]:
    """The row of ``distilled_models`` for these pairs (prompt_id, round, prompt, response); trained if it must be, and
    written as soon as the training ends, so that a killed step trains nothing twice."""
    dataset_version = content_version(pairs.select("prompt_id", "prompt", "response"))
    weights = engines.target_weights(transfer)
    # Nothing without rehearsal: what was trained so before there was any is found again.
    rehearsed = [current.records.version("rehearsal_set")] if transfer.rehearses else []
    model_id = _model_id(transfer, dataset_version, *rehearsed)
    row = _find(current, model_id)
    if row is not None and row["target_weights"] not in (weights, None):
        # The folder, or the hub's branch, that target.base names holds another model by now.
        model_id = _model_id(transfer, dataset_version, *rehearsed, weights)
        row = _find(current, model_id)
    if row is not None:
        LOG.info(f"model {model_id} is already trained: nothing to do")
    else:
        trained = _train(current, engines, transfer, pairs, model_id)
        row = {**trained, "dataset_version": dataset_version, "target_weights": weights}
    current.cost.keys.add(MODEL_REFERENCE + model_id)
    examples = pairs.select(pl.lit(model_id).alias("model_id"), "prompt_id", "round")
    with current.store.transaction(transfer.name) as connection:
        for table, frame in ((DISTILLED_MODELS, DISTILLED_MODELS.frame([row])), (TRAINING_EXAMPLES, examples)):
            connection.execute(f"DELETE FROM {table.name} WHERE model_id = ?", [model_id])
            insert(connection, table, frame)
    return row


def _model_id(transfer: Transfer, dataset_version: str, *more: str) -> str:
    parts = "|".join([dataset_version, training_version(transfer), *more])
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def _find(current: Step, model_id: str) -> dict[str, Any] | None:
    found = current.read("SELECT * FROM distilled_models WHERE model_id = ?", [model_id]).to_dicts()
    if found and (current.store.absolute(found[0]["path"]) / "adapter_model.safetensors").is_file():
        return found[0]
    return None


def _train(
    current: Step, engines: EngineResource, transfer: Transfer, pairs: pl.DataFrame, model_id: str
) -> dict[str, Any]:
    """The new row of ``distilled_models``, without the versions of what it was trained on."""
    check_training(transfer)
    texts = []
    if transfer.rehearses:
        texts = current.read("SELECT token_ids FROM rehearsal_set")["token_ids"].to_list()
        if not texts or "code" in current.records.causes("rehearsal_set"):  # of another tokenizer, perhaps
            raise current.lacks("rehearsal_set")
    folder = output_dir(transfer.name) / "models" / model_id
    progress = current.progress("training steps")

    def on_step(number: int, total: int, loss: float) -> None:
        progress(number, total)
        if number % max(1, total // 20) == 0 or number == total:
            LOG.info(f"training: step {number}/{total}, loss {loss:.3f} nats per token")

    with current.cost.model_time():
        curve = engines.distill(transfer, pairs.select("prompt", "response").rows(), texts, folder, on_step)
    return {
        "model_id": model_id,
        "pairs": len(pairs),
        "target": transfer.config.target.base,
        "settings": transfer.config.distill.model_dump_json(),
        "curve": json.dumps({name: getattr(curve, name) for name in _CURVE}),
        "seconds": curve.seconds,
        "path": current.store.relative(folder),
        "created_at": now(),
        "current": False,
    }
