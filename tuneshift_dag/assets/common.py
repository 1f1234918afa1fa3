"""What every asset of a transfer shares: its key, its metadata and the record of what it cost."""

import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
from tqdm import tqdm

from tuneshift_dag.config.transfer import Transfer
from tuneshift_dag.method.filters import repetition_sql
from tuneshift_dag.method.scoring import Cost
from tuneshift_dag.models.memory import peak_bytes, reset_peak
from tuneshift_dag.store.database import Spool, Store, in_chunks, insert
from tuneshift_dag.store.tables import CACHE_REFERENCES, COLUMN_SOURCES, STEPS, Table

# `tuneshift run` puts this tag on its runs, so that their cost can be added up.
BATCH_TAG = "tuneshift/batch"
OWNERS = ["team:tuneshift"]
# Steps that load a model. Hosts that share an instance name a pool each: a pool's limit holds for all hosts together.
MODEL_POOL = os.environ.get("TUNESHIFT_MODEL_POOL") or "models"
# What a round materializes, in this order.
ROUND_ASSETS = ("synthetic_prompts", "scored_pairs", "filtered_dataset")


def key(transfer: Transfer, asset: str) -> dg.AssetKey:
    return dg.AssetKey([transfer.name, asset])


def partitions(transfer: Transfer) -> dg.StaticPartitionsDefinition:
    return dg.StaticPartitionsDefinition(transfer.round_keys)


def content_version(*frames: pl.DataFrame | Spool) -> str:
    """Hash of the rows, whatever their order: the same content is the same data version.

    A spool's chunks come in the order of their rows, and so give the version of one frame.
    """
    digest = hashlib.sha256()
    for frame in frames:
        for chunk in in_chunks(frame):
            for row in sorted(json.dumps(list(row)) for row in chunk.iter_rows()):
                digest.update(row.encode() + b"\n")
    return digest.hexdigest()[:16]


def column_schema(table: Table) -> dg.TableSchema:
    return dg.TableSchema([dg.TableColumn(c.name, c.type, description=c.description) for c in table.columns])


def definition_metadata(transfer: Transfer, table: Table) -> dict[str, Any]:
    """Metadata that holds before anything is materialized."""
    return {
        "dagster/column_schema": column_schema(table),
        "dagster/table_name": f"{transfer.name}.{table.name}",
    }


def column_lineage(transfer: Transfer, table: Table) -> dg.TableColumnLineage:
    """What each column is made from, for the metadata ``dagster/column_lineage`` of a materialization."""
    return dg.TableColumnLineage(
        {
            column: [dg.TableColumnDep(key(transfer, source), name) for source, name in sources]
            for column, sources in COLUMN_SOURCES[table.name].items()
        }
    )


def with_code_references(
    assets: Sequence[dg.AssetsDefinition | dg.AssetSpec], transfer: Transfer
) -> list[dg.AssetsDefinition | dg.AssetSpec]:
    """The assets, each with links to its code and to its ``transfer.yaml`` (``dagster/code_references``)."""
    with warnings.catch_warnings():
        # Beta in Dagster 1.13, and it would warn at every start.
        warnings.simplefilter("ignore", dg.BetaWarning)
        settings = dg.LocalFileCodeReference(file_path=str(transfer.folder / "transfer.yaml"), label="transfer.yaml")

        def with_settings(spec: dg.AssetSpec, *code: dg.LocalFileCodeReference) -> dg.AssetSpec:
            references = dg.CodeReferencesMetadataValue(code_references=[*code, settings])
            return spec.merge_attributes(metadata={"dagster/code_references": references})

        linked: list[dg.AssetsDefinition | dg.AssetSpec] = []
        for asset in assets:
            if isinstance(asset, dg.AssetSpec):
                # Without a function of its own, so Dagster can't find the file; it is named like the asset.
                file = Path(__file__).with_name(f"{asset.key.path[-1]}.py")
                linked.append(with_settings(asset, dg.LocalFileCodeReference(file_path=str(file))))
            else:
                linked += dg.with_source_code_references([asset.map_asset_specs(with_settings)])  # type: ignore[arg-type]
        return linked


def prompt_chunks(store: Store, transfer: Transfer, round_: str, size: int) -> Iterator[pl.DataFrame]:
    """A round's prompts (prompt_id, prompt) in the order of their ids, at most ``size`` at once."""
    last = ""
    while True:
        prompts = store.read(
            "SELECT prompt_id, prompt FROM synthetic_prompts WHERE round = ? AND prompt_id > ?"
            " ORDER BY prompt_id LIMIT ?",
            [round_, last, size],
            transfer.name,
        )
        if prompts.is_empty():
            return
        last = prompts["prompt_id"][-1]
        yield prompts


EVERY_ROUND_READ = "every_round_read"


def every_round_read(transfer: Transfer, asset: str) -> dg.AssetCheckSpec:
    return dg.AssetCheckSpec(
        EVERY_ROUND_READ,
        asset=key(transfer, asset),
        description="It was made from all rounds. Dagster runs an unpartitioned asset also when some don't exist yet.",
    )


def missing_rounds(context: dg.AssetExecutionContext, transfer: Transfer, asset: str) -> list[str]:
    """Rounds of ``asset`` that were never materialized."""
    there = context.instance.get_materialized_partitions(key(transfer, asset))
    return [round_ for round_ in transfer.round_keys if round_ not in there]


def check_rounds(context: dg.AssetExecutionContext, transfer: Transfer, asset: str) -> dg.AssetCheckResult:
    """The outcome of `every_round_read`: a warning that names the missing rounds of ``asset``."""
    missing = missing_rounds(context, transfer, asset)
    message = f"{asset} has no {', '.join(missing)} yet; materialize this again after them."
    if missing:
        context.log.warning(message)
    return dg.AssetCheckResult(
        passed=not missing,
        severity=dg.AssetCheckSeverity.WARN,
        check_name=EVERY_ROUND_READ,
        description=message if missing else None,
        metadata={"rounds": len(transfer.round_keys) - len(missing), "missing": missing},
    )


def example_rows(frame: pl.DataFrame, columns: list[str], limit: int = 5) -> dg.MetadataValue:
    """The first rows as a Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in frame.select(columns).head(limit).iter_rows():
        cells = [f"{v:.4f}" if isinstance(v, float) else str(v) for v in row]
        lines.append("| " + " | ".join(c.replace("|", "\\|").replace("\n", "⏎")[:120] for c in cells) + " |")
    return dg.MetadataValue.md("\n".join(lines))


def mean_repetition(store: Store, prompts: Sequence[str]) -> float | None:
    """Share of a prompt's word 4-grams that were there before, mean over the prompts; None without any."""
    query = f"SELECT avg({repetition_sql('prompt')}) FROM (SELECT unnest($prompts) AS prompt)"
    mean: float | None = store.read(query, {"prompts": list(prompts)}).item() if len(prompts) else None
    return mean


@dataclass
class Step:
    """A running materialization: its cost so far and a throttled progress line."""

    context: dg.AssetExecutionContext
    references: Spool
    cost: Cost = field(default_factory=Cost)
    started: float = field(default_factory=time.monotonic)
    _last_line: float = 0.0

    def progress(self, what: str) -> Callable[[int, int], None]:
        """A callback (done, total): a bar in a terminal, else at most one log line in ten seconds."""
        started, tokens_before = time.monotonic(), self.cost.tokens
        bar = tqdm(desc=what, disable=not sys.stderr.isatty(), leave=False)

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            bar.set_postfix(cached=self.cost.cache_hits)
            if done == total:
                bar.close()
            now = time.monotonic()
            if done < total and now - self._last_line < 10:
                return
            self._last_line = now
            rate = done / max(now - started, 1e-9)
            left = (total - done) / rate if rate else 0
            tokens = (self.cost.tokens - tokens_before) / max(now - started, 1e-9)
            self.context.log.info(
                f"{what}: {done}/{total}, {rate:.1f}/s, {tokens:.0f} tokens/s, {left:.0f} s left,"
                f" {self.cost.cache_hits} from the cache"
            )

        return report

    def spool_keys(self) -> None:
        """Take the cache keys that were used so far out of memory."""
        asset, round_ = _place(self.context)
        keys = sorted(self.cost.keys)
        used: list[dict[str, object]] = [{"asset": asset, "round": round_ or "", "key": key} for key in keys]
        self.references.append(CACHE_REFERENCES.frame(used))
        self.cost.keys.clear()

    def metadata(self) -> dict[str, Any]:
        return {
            "seconds": time.monotonic() - self.started,
            "model_calls": self.cost.model_calls,
            "cache_hits": self.cost.cache_hits,
            "tokens_generated": self.cost.tokens,
            "peak_memory_mb": peak_bytes() / 1e6,
        }


@contextmanager
def step(context: dg.AssetExecutionContext, store: Store, transfer: Transfer) -> Iterator[Step]:
    """Time a materialization and write what it cost to the table ``steps`` when it succeeds."""
    with store.spool(CACHE_REFERENCES) as references:
        current = Step(context, references)
        reset_peak()
        yield current
        current.spool_keys()
        _record(current, store, transfer)


def _record(current: Step, store: Store, transfer: Transfer) -> None:
    context = current.context
    asset, round_ = _place(context)
    tags = context.run.tags
    row: dict[str, object] = {
        "run_id": context.run.run_id,
        "batch_id": tags.get(BATCH_TAG) or tags.get("dagster/backfill") or context.run.run_id,
        "asset": asset,
        "round": round_,
        "finished_at": datetime.now(UTC).replace(tzinfo=None),
        "seconds": time.monotonic() - current.started,
        "model_seconds": current.cost.model_seconds,
        "model_calls": current.cost.model_calls,
        "cache_hits": current.cost.cache_hits,
        "tokens_generated": current.cost.tokens,
        "models": transfer.models_of(asset),
        "engine": transfer.engine_of(asset),
        "peak_bytes": peak_bytes(),
    }

    def statements(connection: Any) -> None:
        connection.execute("DELETE FROM cache_references WHERE asset = ? AND round = ?", [asset, round_ or ""])
        insert(connection, CACHE_REFERENCES, current.references)
        insert(connection, STEPS, STEPS.frame([row]))

    store.write(transfer.name, statements, current.references.at_once)


def _place(context: dg.AssetExecutionContext) -> tuple[str, str | None]:
    """The asset's name and, if it has partitions, the round."""
    return context.asset_key.path[-1], context.partition_key if context.has_partition_key else None
