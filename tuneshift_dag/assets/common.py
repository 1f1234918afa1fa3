"""What every asset of a transfer shares: how it is declared, and the step that writes its rows, record and cost."""

import base64
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import dagster as dg
import polars as pl
from tqdm import tqdm

from tuneshift_dag.config import Transfer
from tuneshift_dag.config.versions import code_version, inputs_of
from tuneshift_dag.engines.server_process import stop_all
from tuneshift_dag.home import output_dir
from tuneshift_dag.method.filters import repetition_sql
from tuneshift_dag.method.scoring import Cost
from tuneshift_dag.models.memory import peak_bytes, reset_peak
from tuneshift_dag.reports import escape_markdown
from tuneshift_dag.reports.plan import runs_on
from tuneshift_dag.resources import BATCH_TAG
from tuneshift_dag.resources.runs import note_process
from tuneshift_dag.store import Spool, Store, insert, now, records
from tuneshift_dag.store.cache import ResponseCache
from tuneshift_dag.store.queries import COLUMN_SOURCES
from tuneshift_dag.store.tables import CACHE_REFERENCES, STEPS, Table

Context = dg.AssetExecutionContext
OWNERS = ["team:tuneshift"]
# Steps that load a model. Hosts that share an instance name a pool each: a pool's limit holds for all hosts together.
MODEL_POOL = os.environ.get("TUNESHIFT_MODEL_POOL") or "models"
EVERY_ROUND = {
    "every_round_read": "It was made from all rounds. Dagster runs an unpartitioned asset also when some don't exist."
}
# Nothing below is materialized on what fails one of these.
BLOCKING = ("adapter_applied", "no_held_out_prompts", "finite_perplexities")
# What is said here and below it reaches Dagster's log while a step runs, and whoever else listens.
LOG = logging.getLogger("tuneshift_dag")
LOG.setLevel(logging.INFO)


def key(transfer: Transfer, asset: str) -> dg.AssetKey:
    return dg.AssetKey([transfer.name, asset])


def shared(transfer: Transfer, asset: str, table: Table, *kinds: str) -> dict[str, Any]:
    """What every asset is declared with, also one that is only observed."""
    columns = [dg.TableColumn(c.name, c.type, description=c.description) for c in table.columns]
    by_round = asset in (*records.ROUND_ASSETS, "round_seeds")
    return {
        "key": key(transfer, asset),
        "partitions_def": dg.StaticPartitionsDefinition(transfer.round_keys) if by_round else None,
        "group_name": transfer.name,
        "owners": OWNERS,
        "kinds": {"duckdb", *kinds},
        "metadata": {
            "dagster/column_schema": dg.TableSchema(columns),
            "dagster/table_name": f"{transfer.name}.{table.name}",
        },
    }


def definition(
    transfer: Transfer,
    asset: str,
    table: Table,
    *kinds: str,
    models: bool = False,
    checks: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Arguments of ``@dg.asset``; one that loads ``models`` waits for the pool. ``checks`` are descriptions by name."""
    own = key(transfer, asset)
    return {
        **shared(transfer, asset, table, *kinds),
        "deps": [key(transfer, source) for source, _ in inputs_of(transfer, asset) if source != asset],
        "check_specs": [
            dg.AssetCheckSpec(name, asset=own, description=d, blocking=name in BLOCKING)
            for name, d in (checks or {}).items()
        ],
        "pool": MODEL_POOL if models else None,
        "code_version": code_version(transfer, asset),
    }


def warning_check(name: str, problem: str, **metadata: Any) -> dg.AssetCheckResult:
    """The outcome of a check that stops nothing. It passes when there is no ``problem``."""
    return dg.AssetCheckResult(
        passed=not problem,
        severity=dg.AssetCheckSeverity.WARN,
        check_name=name,
        description=problem or None,
        metadata=metadata,
    )


def check_rounds(current: "Step", asset: str) -> dg.AssetCheckResult:
    """The outcome of `EVERY_ROUND`: a warning that names the missing rounds of ``asset``."""
    missing = current.records.missing_rounds(asset)
    problem = f"{asset} has no {', '.join(missing)} yet; materialize this again after them." if missing else ""
    if problem:
        LOG.warning(problem)
    read = len(current.transfer.round_keys) - len(missing)
    return warning_check("every_round_read", problem, rounds=read, missing=missing)


def example_rows(frame: pl.DataFrame, columns: list[str], limit: int = 5) -> dg.MetadataValue:
    """The first rows as a Markdown table; what models wrote is text in it and no markup."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in frame.select(columns).head(limit).iter_rows():
        cells = [f"{v:.4f}" if isinstance(v, float) else str(v) for v in row]
        lines.append("| " + " | ".join(escape_markdown(c.replace("\n", "⏎")[:120]) for c in cells) + " |")
    return dg.MetadataValue.md("\n".join(lines))


def mean_repetition(store: Store, prompts: Iterable[str]) -> float | None:
    """Share of a prompt's word 4-grams that were there before, mean over the prompts; None without any."""
    query = f"SELECT avg({repetition_sql('prompt')}) FROM (SELECT unnest($prompts::VARCHAR[]) AS prompt)"
    return store.read(query, {"prompts": list(prompts)}).item()


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
    version: str = ""
    """The data version of what it has written."""
    cost: Cost = field(default_factory=Cost)
    started: float = field(default_factory=time.monotonic)
    _last_line: float = 0.0

    @property
    def cache(self) -> ResponseCache:
        return ResponseCache(self.store)

    def read(self, query: str, parameters: Sequence[Any] | dict[str, Any] = ()) -> pl.DataFrame:
        return self.store.read(query, parameters, self.transfer.name)

    def lacks(self, asset: str) -> dg.Failure:
        """What ends a step that Dagster ran although what it reads was never materialized, or is of other models."""
        of_round = f" of {self.round}" if self.round else ""
        problem = f"There is no {asset}{of_round}" + (" of today's settings" if self.records.version(asset) else "")
        problem += f": materialize that first, then {self.asset}{of_round}."
        return dg.Failure(problem, allow_retries=False)

    def progress(self, what: str) -> Callable[[int, int], None]:
        """A callback (done, total): a bar in a terminal, else at most one line in ten seconds."""
        started, tokens_before = time.monotonic(), self.cost.tokens
        bar = tqdm(desc=f"{self.round or self.asset}: {what}", disable=not sys.stderr.isatty(), leave=False)
        first: tuple[int, float] | None = None

        def report(done: int, total: int) -> None:
            nonlocal first
            bar.total = total
            bar.update(done - bar.n)
            bar.set_postfix(cached=self.cost.cache_hits)
            if done == total:
                bar.close()
            clock = time.monotonic()
            # What comes before the first results, such as loading a model, says nothing of how long the others take.
            first = first or (done, clock)
            before, since = first
            if done < total and clock - self._last_line < 10:
                return
            self._last_line = clock
            words = f"{what}: {done}/{total}"
            if before < done or done == total:
                seconds = max(clock - started, 1e-9)
                tokens = (self.cost.tokens - tokens_before) / seconds
                left = (total - done) * (clock - since) / max(1, done - before)
                words += f", {done / seconds:.1f}/s{f', {tokens:.0f} tokens/s' if tokens else ''}, {left:.0f} s left"
            LOG.info(f"{words}, {self.cost.cache_hits} from the cache", extra={"progress": True})

        return report

    def spool_keys(self) -> None:
        """Take the cache keys that were used so far out of memory."""
        own: dict[str, object] = {"asset": self.asset, "round": self.round or ""}
        self.references.append(CACHE_REFERENCES.frame([{**own, "key": key} for key in sorted(self.cost.keys)]))
        self.cost.keys.clear()

    def write(
        self,
        tables: Sequence[tuple[Table, pl.DataFrame | Spool]],
        version: str = "",
        statements: Callable[[Any], str | None] | None = None,
    ) -> None:
        """Replace the rows of ``tables`` (of this round), and write the record and the cost, all in one transaction.
        ``statements`` is what else it does, and may return the data version."""
        self.spool_keys()
        self.version = version
        condition, values = ("round = ?", [self.round]) if self.round else ("TRUE", [])
        # Before the transaction: within it nothing else of this file can be read.
        code, inputs = code_version(self.transfer, self.asset), self.records.inputs(self.asset, self.round)

        def transaction(connection: Any) -> None:
            for table, rows in tables:
                connection.execute(f"DELETE FROM {table.name} WHERE {condition}", values)
                insert(connection, table, rows)
            if statements:
                self.version = statements(connection) or version
            here = [self.asset, self.round or ""]
            connection.execute("DELETE FROM cache_references WHERE asset = ? AND round = ?", here)
            insert(connection, CACHE_REFERENCES, self.references)
            insert(connection, STEPS, STEPS.frame([self._cost_row()]))
            records.note(connection, self.asset, self.round, self.version, self.run.run_id, code, inputs)

        sizes = [rows.at_once if isinstance(rows, Spool) else rows.estimated_size() for _, rows in tables]
        # What a statement of the asset's own holds can't be told, so that one gets all the memory.
        at_once = None if statements else max(self.references.at_once, *sizes, 0)
        self.store.write(self.transfer.name, transaction, at_once)

    def _cost_row(self) -> dict[str, object]:
        tags, (models, engine) = self.run.tags, runs_on(self.transfer, self.asset)
        return {
            "run_id": self.run.run_id,
            "batch_id": tags.get(BATCH_TAG) or tags.get("dagster/backfill") or self.run.run_id,
            "asset": self.asset,
            "round": self.round,
            "finished_at": now(),
            **self._figures(),
            "model_seconds": self.cost.model_seconds,
            "models": models,
            "engine": engine,
            "peak_bytes": peak_bytes(),
        }

    def _figures(self) -> dict[str, Any]:
        return {
            "seconds": time.monotonic() - self.started,
            "model_calls": self.cost.model_calls,
            "cache_hits": self.cost.cache_hits,
            "tokens_generated": self.cost.tokens,
        }

    def picture(self, name: str, png: bytes) -> dg.MetadataValue:
        """Keep a picture among the transfer's files; the value shows it in Dagster."""
        file = output_dir(self.transfer.name) / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png)
        return dg.MetadataValue.md(f"![](data:image/png;base64,{base64.b64encode(png).decode()})")

    def result(
        self, rows: int | None, metadata: Mapping[str, Any], *checks: dg.AssetCheckResult
    ) -> dg.MaterializeResult:
        """Of the ``metadata`` what is None is left out."""
        lineage = {
            column: [dg.TableColumnDep(key(self.transfer, asset), name) for asset, name in sources]
            for column, sources in COLUMN_SOURCES.get(self.asset, {}).items()
        }
        shown = {
            "dagster/partition_row_count" if self.round else "dagster/row_count": rows,
            "dagster/column_lineage": dg.TableColumnLineage(lineage) if lineage else None,
            **metadata,
            **self._figures(),
            "peak_memory_mb": peak_bytes() / 1e6,
        }
        return dg.MaterializeResult(
            data_version=dg.DataVersion(self.version),
            metadata={name: value for name, value in shown.items() if value is not None},
            check_results=checks,
        )


@contextmanager
def step(
    context: Context | dg.OpExecutionContext, store: Store, transfer: Transfer, asset: str, round_: str | None = None
) -> Iterator[Step]:
    """A materialization, from its first note to its last: one that doesn't come to the end is taken up again. Servers
    that it has started end with it."""
    reset_peak()
    note_process(context.instance, context.run)
    try:
        with store.spool(CACHE_REFERENCES) as references, _heard_by(context.log):
            records.begin(store, transfer, asset, round_, context.run.run_id)
            yield Step(transfer, store, asset, round_, context.run, references, records.Records(store, transfer))
            records.end(store, transfer, asset, round_)
    finally:
        stop_all()


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
