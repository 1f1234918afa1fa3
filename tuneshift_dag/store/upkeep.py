"""What the response cache holds, and removing what no materialization uses any more."""

from typing import Any

from tuneshift_dag.errors import TuneshiftError
from tuneshift_dag.store.database import Store
from tuneshift_dag.store.tables import CACHE, CACHED_RESPONSES, CACHED_SCORES, CACHED_TOKEN_SCORES

# Bytes of a row as they count here: its text and numbers, before DuckDB compresses them.
_SIZES = {
    CACHED_RESPONSES.name: "length(key) + strlen(text) + 4 * len(token_ids) + 24",
    CACHED_SCORES.name: "length(key) + 8",
    CACHED_TOKEN_SCORES.name: "length(key) + 8 * len(logprobs)",
}


def stats(store: Store) -> list[dict[str, Any]]:
    """For each table of the cache: entries and bytes (uncompressed), in all and unreferenced."""
    used = _used(store)
    rows = []
    for table, size in _SIZES.items():
        query = f"""
            SELECT count(*) AS entries, coalesce(sum({size}), 0)::BIGINT AS bytes,
                count(*) FILTER (key NOT IN ({used})) AS unreferenced,
                coalesce(sum({size}) FILTER (key NOT IN ({used})), 0)::BIGINT AS unreferenced_bytes
            FROM {CACHE}.{table}
        """
        rows.append({"table": table, **store.read(query).row(0, named=True)})
    return rows


def collect(store: Store) -> list[dict[str, Any]]:
    """Remove unreferenced entries, and what unfinished trainings would go on from; returns what `stats` said before.

    What a step has computed that failed or hasn't ended is unreferenced too.

    Raises:
        TuneshiftError: when a transfer has scored pairs from before references were recorded: everything it
            uses would count as unreferenced.
    """
    for schema in _schemas(store):
        known = store.read(f'SELECT count(*) FROM "{schema}".cache_references').item()
        if not known and store.read(f'SELECT count(*) FROM "{schema}".scored_pairs').item():
            raise TuneshiftError(
                f"{schema}: its pairs were scored by an older tuneshift_dag, which didn't record what they use."
                " Materialize its synthetic_prompts and scored_pairs once more (all from the cache), then try again."
            )
    before, used = stats(store), _used(store)
    with store.transaction(CACHE, compact=True) as connection:
        for table in _SIZES:
            connection.execute(f"DELETE FROM {table} WHERE key NOT IN ({used})")
    for file in store.path.parent.glob("output/*/*/.*.checkpoint"):
        file.unlink()
    return before


def _used(store: Store) -> str:
    """A SELECT of every referenced key."""
    keys = [f'SELECT key FROM "{schema}".cache_references' for schema in _schemas(store)]
    return " UNION ".join(keys) or "SELECT NULL WHERE FALSE"


def _schemas(store: Store) -> list[str]:
    """The transfers in this file. Those that an older version wrote and nobody opened since are prepared first."""
    names = store.read("SELECT schema_name FROM duckdb_tables() WHERE table_name = 'steps' ORDER BY 1")["schema_name"]
    for name in names:
        store.prepare(name)
    return list(names)
