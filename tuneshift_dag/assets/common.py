"""What every asset of a transfer shares: its key and metadata, and the step that writes its rows, record and cost."""

import logging
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

from tuneshift_dag.config import Transfer
from tuneshift_dag.config.versions import code_version
from tuneshift_dag.method.filters import repetition_sql
from tuneshift_dag.method.scoring import Cost
from tuneshift_dag.models.memory import peak_bytes, reset_peak
from tuneshift_dag.reports import escape_markdown
from tuneshift_dag.reports.plan import engine_of, models_of
from tuneshift_dag.resources import BATCH_TAG
from tuneshift_dag.store import Spool, Store, insert, records
from tuneshift_dag.store.queries import COLUMN_SOURCES
from tuneshift_dag.store.tables import CACHE_REFERENCES, STEPS, Table

OWNERS = ["team:tuneshift"]
# Steps that load a model. Hosts that share an instance name a pool each: a pool's limit holds for all hosts together.
MODEL_POOL = os.environ.get("TUNESHIFT_MODEL_POOL") or "models"
EVERY_ROUND_READ = "every_round_read"
# What is said here and below it reaches Dagster's log while a step runs, and whoever else listens.
LOG = logging.getLogger("tuneshift_dag")
LOG.setLevel(logging.INFO)
Statements = Callable[[Any], str | None]


def key(transfer: Transfer, asset: str) -> dg.AssetKey:
    return dg.AssetKey([transfer.name, asset])


def partitions(transfer: Transfer) -> dg.StaticPartitionsDefinition:
    return dg.StaticPartitionsDefinition(transfer.round_keys)


def definition(transfer: Transfer, table: Table, asset: str, *kinds: str, models: bool = False) -> dict[str, Any]:
    """Arguments of ``@dg.asset`` that every asset has.

    Args:
        models: whether it loads one, and so waits for the pool.
    """
    return {
        "key": key(transfer, asset),
        "group_name": transfer.name,
        "owners": OWNERS,
        "kinds": {"duckdb", *kinds},
        "pool": MODEL_POOL if models else None,
        "code_version": code_version(transfer, asset),
        "metadata": table_metadata(transfer, table),
    }


def table_metadata(transfer: Transfer, table: Table) -> dict[str, Any]:
    columns = [dg.TableColumn(c.name, c.type, description=c.description) for c in table.columns]
    return {"dagster/column_schema": dg.TableSchema(columns), "dagster/table_name": f"{transfer.name}.{table.name}"}


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
                # round_seeds is without a function of its own, so Dagster can't find the file.
                file = Path(__file__).with_name("seed_set.py")
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


def every_round_read(transfer: Transfer, asset: str) -> dg.AssetCheckSpec:
    return dg.AssetCheckSpec(
        EVERY_ROUND_READ,
        asset=key(transfer, asset),
        description="It was made from all rounds. Dagster runs an unpartitioned asset also when some don't exist yet.",
    )


def check_rounds(current: "Step", asset: str) -> dg.AssetCheckResult:
    """The outcome of `every_round_read`: a warning that names the missing rounds of ``asset``."""
    missing = current.records.missing_rounds(asset)
    message = f"{asset} has no {', '.join(missing)} yet; materialize this again after them."
    if missing:
        LOG.warning(message)
    return dg.AssetCheckResult(
        passed=not missing,
        severity=dg.AssetCheckSeverity.WARN,
        check_name=EVERY_ROUND_READ,
        description=message if missing else None,
        metadata={"rounds": len(current.transfer.round_keys) - len(missing), "missing": missing},
    )


def example_rows(frame: pl.DataFrame, columns: list[str], limit: int = 5) -> dg.MetadataValue:
    """The first rows as a Markdown table; what models wrote is text in it and no markup."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in frame.select(columns).head(limit).iter_rows():
        cells = [f"{v:.4f}" if isinstance(v, float) else str(v) for v in row]
        lines.append("| " + " | ".join(escape_markdown(c.replace("\n", "⏎")[:120]) for c in cells) + " |")
    return dg.MetadataValue.md("\n".join(lines))


def mean_repetition(store: Store, prompts: Sequence[str]) -> float | None:
    """Share of a prompt's word 4-grams that were there before, mean over the prompts; None without any."""
    query = f"SELECT avg({repetition_sql('prompt')}) FROM (SELECT unnest($prompts) AS prompt)"
    mean: float | None = store.read(query, {"prompts": list(prompts)}).item() if len(prompts) else None
    return mean


@dataclass
class Step:
    """A running materialization of an asset, or of one round of it."""

    transfer: Transfer
    store: Store
    asset: str
    round: str | None
    run: dg.DagsterRun
    references: Spool
    records: records.Records
    """As they were when it began."""
    cost: Cost = field(default_factory=Cost)
    started: float = field(default_factory=time.monotonic)
    _last_line: float = 0.0

    def progress(self, what: str) -> Callable[[int, int], None]:
        """A callback (done, total): a bar in a terminal, else at most one line in ten seconds."""
        started, tokens_before = time.monotonic(), self.cost.tokens
        bar = tqdm(desc=f"{self.round or self.asset}: {what}", disable=not sys.stderr.isatty(), leave=False)

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
            LOG.info(
                f"{what}: {done}/{total}, {rate:.1f}/s, {tokens:.0f} tokens/s, {left:.0f} s left,"
                f" {self.cost.cache_hits} from the cache",
                extra={"progress": True},
            )

        return report

    def spool_keys(self) -> None:
        """Take the cache keys that were used so far out of memory."""
        keys = sorted(self.cost.keys)
        used: list[dict[str, object]] = [{"asset": self.asset, "round": self.round or "", "key": key} for key in keys]
        self.references.append(CACHE_REFERENCES.frame(used))
        self.cost.keys.clear()

    def write(
        self,
        tables: Sequence[tuple[Table, pl.DataFrame | Spool]],
        version: str = "",
        statements: Statements | None = None,
    ) -> str:
        """Replace the rows of ``tables`` (of this round), and write the record and the cost, all in one transaction.

        Args:
            version: the data version of what is written.
            statements: what else the transaction does; may return the version.

        Returns:
            The data version.
        """
        self.spool_keys()
        where = ("round = ?", [self.round]) if self.round else ("TRUE", [])
        sizes = (rows.at_once if isinstance(rows, Spool) else rows.estimated_size() for _, rows in tables)
        at_once = max(self.references.at_once, *sizes, 0)

        def transaction(connection: Any) -> None:
            nonlocal version
            for table, rows in tables:
                connection.execute(f"DELETE FROM {table.name} WHERE {where[0]}", where[1])
                insert(connection, table, rows)
            if statements:
                version = statements(connection) or version
            connection.execute(
                "DELETE FROM cache_references WHERE asset = ? AND round = ?", [self.asset, self.round or ""]
            )
            insert(connection, CACHE_REFERENCES, self.references)
            insert(connection, STEPS, STEPS.frame([self._cost_row()]))
            code, inputs = code_version(self.transfer, self.asset), self.records.inputs(self.asset, self.round)
            records.note(connection, self.asset, self.round, version, self.run.run_id, code, inputs)

        # What a statement of the asset's own holds can't be told, so that one gets all the memory.
        self.store.write(self.transfer.name, transaction, None if statements else at_once)
        return version

    def _cost_row(self) -> dict[str, object]:
        tags, figures = self.run.tags, self.metadata()
        return {
            "run_id": self.run.run_id,
            "batch_id": tags.get(BATCH_TAG) or tags.get("dagster/backfill") or self.run.run_id,
            "asset": self.asset,
            "round": self.round,
            "finished_at": datetime.now(UTC).replace(tzinfo=None),
            **{name: figures[name] for name in ("seconds", "model_calls", "cache_hits", "tokens_generated")},
            "model_seconds": self.cost.model_seconds,
            "models": models_of(self.transfer, self.asset),
            "engine": engine_of(self.transfer, self.asset),
            "peak_bytes": peak_bytes(),
        }

    def metadata(self) -> dict[str, Any]:
        return {
            "seconds": time.monotonic() - self.started,
            "model_calls": self.cost.model_calls,
            "cache_hits": self.cost.cache_hits,
            "tokens_generated": self.cost.tokens,
            "peak_memory_mb": peak_bytes() / 1e6,
        }


@contextmanager
def step(
    context: dg.AssetExecutionContext | dg.OpExecutionContext,
    store: Store,
    transfer: Transfer,
    asset: str,
    round_: str | None = None,
) -> Iterator[Step]:
    """A materialization, from its first note to its last: one that doesn't come to the end is taken up again."""
    reset_peak()
    with store.spool(CACHE_REFERENCES) as references, _heard_by(context.log):
        records.begin(store, transfer, asset, round_, context.run.run_id)
        now = records.Records(store, transfer)
        yield Step(transfer, store, asset, round_, context.run, references, now)
        records.end(store, transfer, asset, round_)


@contextmanager
def _heard_by(log: logging.Logger) -> Iterator[None]:
    """While it is open, what is said to `LOG`, and to the loggers below it, also stands in the run's log."""

    class ToDagster(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log.log(record.levelno, record.getMessage())

    handler = ToDagster()
    LOG.addHandler(handler)
    try:
        yield
    finally:
        LOG.removeHandler(handler)
