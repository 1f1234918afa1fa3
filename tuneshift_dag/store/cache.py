"""Content-addressed results of model calls, kept in the store; and what no materialization uses any more.

A key names everything that can change a result: the model's fingerprint, the rendered prompt's token
ids and the decoding settings (for a score: the response's token ids). Batch size isn't part of it: in
bfloat16 the batch around a prompt can flip a near-tie, and whichever result came first is kept.
"""

import hashlib
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tuneshift_dag import TuneshiftError
from tuneshift_dag.method import Decoding, Response
from tuneshift_dag.models.references import quantized_dir
from tuneshift_dag.store import Store, now
from tuneshift_dag.store.tables import CACHE, CACHED_RESPONSES, CACHED_SCORES

MODEL_REFERENCE = "model:"
"""What the key of ``cache_references`` starts with where it names an adapter by its model id."""
# Bytes of a row as they count here: its text and numbers, before DuckDB compresses them.
_SIZES = {
    CACHED_RESPONSES.name: "length(key) + strlen(text) + 4 * len(token_ids) + 32",
    CACHED_SCORES.name: "length(key) + 16",
}


class ResponseCache:
    """Responses and scores by key. Each `put` is one transaction."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def response_key(self, fingerprint: str, prompt_ids: Sequence[int], decoding: Decoding) -> str:
        return _key(fingerprint, prompt_ids, decoding.key())

    def score_key(self, fingerprint: str, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
        return _key(fingerprint, prompt_ids, ",".join(map(str, response_ids)))

    def responses(self, keys: Sequence[str]) -> dict[str, Response]:
        return {row.pop("key"): Response(**row) for row in self._read(CACHED_RESPONSES.name, keys)}

    def scores(self, keys: Sequence[str]) -> dict[str, float]:
        return {row["key"]: row["sum_logprob"] for row in self._read(CACHED_SCORES.name, keys)}

    def put(self, responses: dict[str, Response], scores: dict[str, float]) -> None:
        added = now()
        rows = CACHED_RESPONSES.frame([{"key": key, **vars(r), "added_at": added} for key, r in responses.items()])
        values = CACHED_SCORES.frame([{"key": k, "sum_logprob": v, "added_at": added} for k, v in scores.items()])
        self.store.append_all(CACHE, [(CACHED_RESPONSES, rows), (CACHED_SCORES, values)])

    def _read(self, table: str, keys: Sequence[str]) -> list[dict[str, Any]]:
        if not keys:
            return []
        query = f"SELECT * EXCLUDE (added_at) FROM {CACHE}.{table} WHERE key IN (SELECT unnest(?))"
        return self.store.read(query, [list(keys)], little_memory=True).to_dicts()


def stats(store: Store) -> list[dict[str, Any]]:
    """For each table of the cache: entries and bytes (uncompressed), in all and unreferenced."""
    unused = _unused(_schemas(store))
    return [{"table": table, **_count(store, table, unused, datetime.max)} for table in _SIZES]


@dataclass(frozen=True)
class Removable:
    kind: str  # responses, scores, adapter, training, discriminators, schema, output or quantized
    name: str
    bytes: int  # on disk; of what is in the database: before DuckDB compresses it
    reason: str
    path: Path | None = None
    before: datetime = datetime.max  # (UTC) only responses and scores added, or a schema last used, before this


def collect_plan(
    store: Store, here: Collection[str], quantized_in_use: Collection[str] | None = None
) -> list[Removable]:
    """What `collect` can remove, but for what a step that runs, or has failed, may have computed. Transfers that are
    ``here`` by name stay, and of 4-bit copies those that are in use; None leaves all copies alone."""
    schemas = _schemas(store)
    gone = _gone(store, schemas, {name.lower() for name in here})
    staying = [schema for schema in schemas if schema not in gone]
    recorded = "SELECT round FROM cache_references WHERE asset = 'scored_pairs'"
    for schema in staying:
        if store.read(f"SELECT 1 FROM scored_pairs WHERE round NOT IN ({recorded}) LIMIT 1", schema=schema).height:
            raise TuneshiftError(
                f"{schema}: its pairs were scored by an older tuneshift_dag, which didn't record what they use."
                " Materialize its synthetic_prompts and scored_pairs once more (all from the cache), then try again."
            )
    before = min(_first_attempt(store, staying), now())
    plan = []
    for table in _SIZES:
        found = _count(store, table, _unused(staying), before)
        if found["unreferenced"]:
            reason = f"{found['unreferenced']} of {found['entries']}, which no materialization uses"
            plan.append(Removable(table, f"{CACHE}.{table}", found["unreferenced_bytes"], reason, before=before))
    for schema in staying:
        plan += _left_over(store, schema)
    for schema, folder in gone.items():
        reason, output = f"its folder {folder} is gone", store.home / "output" / schema
        plan.append(Removable("schema", schema, _schema_bytes(store, schema), reason, before=now()))
        if output.is_dir():
            plan.append(Removable("output", schema, _bytes(output), reason, output))
    if quantized_in_use is not None:
        plan += _copies_but(quantized_in_use, before)
    return plan


def collect(store: Store, plan: Sequence[Removable]) -> None:
    """Remove what `collect_plan` found, but for what a step has come to use or to need since."""
    schemas = _schemas(store)
    gone = _gone(store, schemas, ())
    dropped = [
        item.name
        for item in plan
        if item.kind == "schema"
        and item.name in gone
        and store.read("SELECT 1 FROM attempts WHERE started_at >= ?", [item.before], item.name).is_empty()
    ]
    staying = [schema for schema in schemas if schema not in dropped]
    first = _first_attempt(store, staying)
    with store.transaction(CACHE, compact=True) as connection:
        for schema in dropped:
            connection.execute(f'DROP SCHEMA "{schema}" CASCADE')
            connection.execute("DELETE FROM main.transfers WHERE lower(name) = lower(?)", [schema])
        for item in plan:
            if item.kind in _SIZES:
                connection.execute(f"DELETE FROM {item.kind} WHERE {_unused(staying)}", [min(first, item.before)])
    still = {item.path for schema in staying for item in _left_over(store, schema)}
    for item in plan:
        if item.path and (item.path in still or item.kind == "quantized" or item.name in dropped):
            if item.path.is_dir() and not item.path.is_symlink():
                shutil.rmtree(item.path)
            else:
                item.path.unlink(missing_ok=True)


def _schemas(store: Store) -> list[str]:
    """The transfers in this file. Those that an older version wrote and nobody opened since are prepared first."""
    names = store.read("SELECT schema_name FROM duckdb_tables() WHERE table_name = 'steps' ORDER BY 1")["schema_name"]
    for name in names:
        store.prepare(name)
    return list(names)


def _gone(store: Store, schemas: Sequence[str], here: Collection[str]) -> dict[str, Path]:
    """Transfers whose folder doesn't exist any more, with that folder. Where the one that held it is missing, too, the
    store or a disk may have been moved, and nothing is known."""
    claims = store.read("SELECT lower(name), folder FROM main.transfers").rows()
    folders = {name: store.absolute(folder) for name, folder in claims if name not in here}
    of = {name: folders[name.lower()] for name in schemas if name.lower() in folders}
    return {name: folder for name, folder in of.items() if folder.parent.is_dir() and not folder.exists()}


def held_back(store: Store, here: Collection[str]) -> list[str]:
    """Steps that run or have failed, in words: what was computed since each began stays. Not of transfers whose folder
    is gone, unless they are ``here``."""
    schemas = _schemas(store)
    gone = _gone(store, schemas, {name.lower() for name in here})
    told = "SELECT asset, round, started_at FROM attempts ORDER BY started_at"
    return [
        f"{schema}: {asset}{f' of {round_}' if round_ else ''}, begun at {started:%Y-%m-%d %H:%M} UTC"
        for schema in schemas
        if schema not in gone
        for asset, round_, started in store.read(told, schema=schema).iter_rows()
    ]


def _first_attempt(store: Store, schemas: Sequence[str]) -> datetime:
    """When the oldest attempt began that hasn't succeeded (UTC); `datetime.max` when there is none."""
    attempts = " UNION ALL ".join(f'SELECT started_at FROM "{schema}".attempts' for schema in schemas)
    first = store.read(f"SELECT min(started_at) FROM ({attempts})").item() if schemas else None
    return first or datetime.max


def _unused(schemas: Sequence[str]) -> str:
    """SQL condition of the cache's entries that no materialization used and that were added before a parameter."""
    keys = " UNION ".join(f'SELECT key FROM "{schema}".cache_references' for schema in schemas)
    return f"key NOT IN ({keys or 'SELECT NULL WHERE FALSE'}) AND coalesce(added_at < ?::TIMESTAMP, TRUE)"


def _count(store: Store, table: str, unused: str, before: datetime) -> dict[str, int]:
    query = f"""
        SELECT count(*) AS entries, coalesce(sum(size), 0)::BIGINT AS bytes, count(*) FILTER (unused) AS unreferenced,
            coalesce(sum(size) FILTER (unused), 0)::BIGINT AS unreferenced_bytes
        FROM (SELECT {_SIZES[table]} AS size, {unused} AS unused FROM {CACHE}.{table})
    """
    return store.read(query, [before]).row(0, named=True)


def _left_over(store: Store, schema: str) -> Iterator[Removable]:
    folder = store.home / "output" / schema
    old = folder / "discriminators"
    if old.is_dir():
        yield Removable("discriminators", schema, _bytes(old), "of an older version; nothing reads it", old)
    if _first_attempt(store, [schema]) != datetime.max:
        return  # the attempt may go on from what is there
    used = _adapters_in_use(store, schema)
    for path in sorted((folder / "models").glob("*")):
        name = f"{schema}/{path.name}"
        if path.name.startswith("."):
            reason = "of a training that was ended; no step goes on with it"
            yield Removable("training", name, _bytes(path), reason, path)
        elif used is not None and path.name not in used:
            yield Removable("adapter", name, _bytes(path), "neither the current one nor one of the comparison", path)


def _adapters_in_use(store: Store, schema: str) -> set[str] | None:
    """Model ids; None when they aren't all known, for an older version compared without recording them."""
    query = "SELECT asset, key FROM cache_references WHERE starts_with(key, ?)"
    named = store.read(query, [MODEL_REFERENCE], schema)
    compared = store.read("SELECT count(*) FROM comparison", schema=schema).item()
    if compared and "comparison" not in named["asset"]:
        return None
    current = store.read("SELECT model_id FROM distilled_models WHERE current", schema=schema)["model_id"]
    return {*current, *(key.removeprefix(MODEL_REFERENCE) for key in named["key"])}


def _copies_but(names: Collection[str], before: datetime) -> Iterator[Removable]:
    """4-bit copies of models, in the user's cache folder, with other names than these."""
    for path in sorted(quantized_dir().glob("*")):
        made = datetime.fromtimestamp(path.stat().st_mtime, UTC).replace(tzinfo=None)
        if re.fullmatch("[0-9a-f]{16}", path.name) and path.name not in names and made < before:
            reason = "no transfer here uses it; it is made again when one does"
            yield Removable("quantized", path.name, _bytes(path), reason, path)


def _schema_bytes(store: Store, schema: str) -> int:
    tables = store.read("SELECT table_name FROM duckdb_tables() WHERE schema_name = ?", [schema])["table_name"]
    sizes = " UNION ALL ".join(f'SELECT sum(strlen(t::VARCHAR)) AS size FROM "{schema}".{name} t' for name in tables)
    return int(store.read(f"SELECT sum(size) FROM ({sizes})").item() or 0)


def _bytes(path: Path) -> int:
    return sum(file.lstat().st_size for file in (path, *path.rglob("*")) if file.is_symlink() or file.is_file())


def _key(fingerprint: str, prompt_ids: Sequence[int], result: str) -> str:
    return hashlib.sha256("\0".join([fingerprint, ",".join(map(str, prompt_ids)), result]).encode()).hexdigest()
