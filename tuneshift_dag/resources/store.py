"""The store: one DuckDB file, one schema per transfer, and a schema ``cache`` that all of them share.

DuckDB lets one process write at a time, and a writer shuts out readers. So a connection lives only
for one transaction or one read, and never while a model runs; a held lock is waited for.
"""

# Annotations stay text: as objects, those that name a DuckDB class keep its module alive to the end of the
# process, and DuckDB then prints pages of "nanobind: leaked … instances".
from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import polars as pl

from tuneshift_dag.errors import TuneshiftError
from tuneshift_dag.resources.tables import (
    CACHE,
    CACHE_TABLES,
    SCHEMA_VERSION,
    TRANSFER_TABLES,
    TRANSFER_VIEWS,
    Table,
)

_LOCK_WAIT_SECONDS = 60.0
_CHECKPOINT_EVERY = "4 MB"
"""A checkpoint overwrites DuckDB's first block (256 KiB) in place: a process killed within those microseconds leaves a
file that can't be opened (seen once in 1,200 kills while every close made one). What is committed is safe in the
``.wal`` beside the file before; a larger one is slower to open (4 MB: about 10 ms)."""


class Store:
    """Polars frames in, Polars frames out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ready: set[str] = set()

    def read(
        self, query: str, parameters: Sequence[Any] | dict[str, Any] = (), schema: str | None = None
    ) -> pl.DataFrame:
        """Rows of a query; unqualified table names are those of ``schema`` (a transfer's name)."""
        self.prepare(schema)
        with self._connection(read_only=True) as connection:
            if schema:
                connection.execute(f"SET schema = '{schema}'")
            rows: pl.DataFrame = connection.sql(query, params=parameters or None).pl()
        return rows

    def replace(self, schema: str, table: Table, rows: pl.DataFrame, **where: str) -> None:
        """Replace a table's rows, or those where the given columns have the given values.

        One transaction: either the old rows or the new ones are there, whatever happens.
        """
        self.replace_all(schema, [(table, rows)], **where)

    def replace_all(self, schema: str, frames: Sequence[tuple[Table, pl.DataFrame]], **where: str) -> None:
        """`replace` for several tables in the same transaction."""
        condition = " AND ".join(f"{column} = ?" for column in where) or "TRUE"
        with self.transaction(schema) as connection:
            for table, rows in frames:
                connection.execute(f"DELETE FROM {table.name} WHERE {condition}", list(where.values()))
                insert(connection, table, rows)

    def append_all(self, schema: str, frames: Sequence[tuple[Table, pl.DataFrame]]) -> None:
        """Add rows in one transaction; a row whose key is there already is left out."""
        with self.transaction(schema) as connection:
            for table, rows in frames:
                insert(connection, table, rows, or_ignore=bool(table.key))

    @contextmanager
    def transaction(self, schema: str) -> Iterator[duckdb.DuckDBPyConnection]:
        """A read-write connection inside one transaction, for a few statements and no model call."""
        self.prepare(schema)
        with self._connection(read_only=False) as connection:
            connection.execute(f"SET schema = '{schema}'")
            connection.execute("BEGIN")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    def prepare(self, schema: str | None) -> None:
        """Create the file, the schema and its tables when they aren't there yet, and the views when they differ."""
        name = schema or CACHE
        if name in self._ready and self.path.exists():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._connection(read_only=False) as connection:
            connection.execute("BEGIN")
            self._check_version(connection)
            for known, tables in ((CACHE, CACHE_TABLES), (name, TRANSFER_TABLES)):
                connection.execute(f'CREATE SCHEMA IF NOT EXISTS "{known}"')
                if known == CACHE or name != CACHE:
                    for table in tables:
                        connection.execute(table.ddl(known))
                    _add_columns(connection, known, tables)
            _replace_views(connection, name)
            connection.execute("COMMIT")
        self._ready.add(name)

    def _check_version(self, connection: duckdb.DuckDBPyConnection) -> None:
        connection.execute("CREATE TABLE IF NOT EXISTS main.tuneshift_schema (version INTEGER)")
        row = connection.execute("SELECT max(version) FROM main.tuneshift_schema").fetchone()
        version = row[0] if row else None
        if version is None:
            connection.execute("INSERT INTO main.tuneshift_schema VALUES (?)", [SCHEMA_VERSION])
        elif version > SCHEMA_VERSION:
            connection.execute("ROLLBACK")
            raise TuneshiftError(
                f"{self.path} was written by a newer tuneshift_dag (schema version {version}; this one knows"
                f" {SCHEMA_VERSION}). Upgrade tuneshift_dag, or set TUNESHIFT_HOME to another folder."
            )
        elif version < SCHEMA_VERSION:
            _migrate(connection)
            connection.execute("INSERT INTO main.tuneshift_schema VALUES (?)", [SCHEMA_VERSION])

    @contextmanager
    def _connection(self, read_only: bool) -> Iterator[duckdb.DuckDBPyConnection]:
        connection = self._connect(read_only)
        try:
            if not read_only:
                connection.execute("PRAGMA disable_checkpoint_on_shutdown")
                connection.execute(f"SET wal_autocheckpoint = '{_CHECKPOINT_EVERY}'")
            yield connection
        finally:
            connection.close()

    def _connect(self, read_only: bool) -> duckdb.DuckDBPyConnection:
        give_up = time.monotonic() + _LOCK_WAIT_SECONDS
        pause = 0.01
        while True:
            try:
                return duckdb.connect(str(self.path), read_only=read_only)
            except duckdb.ConnectionException:
                # Another thread of this process holds a connection of the other kind for a moment.
                if time.monotonic() > give_up:
                    raise
            except duckdb.Error as error:
                if "Could not set lock" not in str(error):
                    raise TuneshiftError(f"{self.path} can't be opened as a DuckDB file: {error}") from error
                if time.monotonic() > give_up:
                    raise TuneshiftError(
                        f"{self.path} has been locked by another process for {_LOCK_WAIT_SECONDS:.0f} s"
                        f" (a notebook or DuckDB shell with an open connection?): {error}"
                    ) from error
            time.sleep(pause)
            pause = min(0.5, pause * 2)


def _migrate(connection: duckdb.DuckDBPyConnection) -> None:
    """From schema version 1 to 2: two tables lose their keys."""
    schemas = connection.execute("SELECT schema_name FROM duckdb_tables() WHERE table_name = 'steps'").fetchall()
    for (schema,) in schemas:
        for table in ("filtered_dataset", "rejected_pairs"):
            connection.execute(f'CREATE TABLE "{schema}".copied AS SELECT * FROM "{schema}".{table}')
            connection.execute(f'DROP TABLE "{schema}".{table}')
            connection.execute(f'ALTER TABLE "{schema}".copied RENAME TO {table}')


def _add_columns(connection: duckdb.DuckDBPyConnection, schema: str, tables: Sequence[Table]) -> None:
    """Give tables of an older file the columns that it doesn't have yet; their rows hold NULL there."""
    there = connection.execute("SELECT table_name, column_name FROM duckdb_columns() WHERE schema_name = ?", [schema])
    known = set(there.fetchall())
    for table in tables:
        for column in table.columns:
            if (table.name, column.name) not in known:
                connection.execute(f'ALTER TABLE "{schema}".{table.name} ADD COLUMN "{column.name}" {column.type}')


def _replace_views(connection: duckdb.DuckDBPyConnection, schema: str) -> None:
    """Make the views of a transfer those of this code; nothing is written when they are already."""
    connection.execute(f"SET schema = '{schema}'")
    there = connection.execute("SELECT view_name, comment FROM duckdb_views() WHERE schema_name = ?", [schema])
    comments = dict(there.fetchall())
    for view in TRANSFER_VIEWS:
        if comments.get(view.name) != view.comment:
            connection.execute(view.ddl())


def insert(connection: duckdb.DuckDBPyConnection, table: Table, rows: pl.DataFrame, or_ignore: bool = False) -> None:
    """Add rows to a table, by column name."""
    if rows.is_empty():
        return
    unknown = set(rows.columns) ^ {c.name for c in table.columns}
    if unknown:
        raise ValueError(f"{table.name}: columns differ from the declared ones: {sorted(unknown)}")
    connection.register("incoming", rows.to_arrow())
    verb = "INSERT OR IGNORE" if or_ignore else "INSERT"
    connection.execute(f"{verb} INTO {table.name} BY NAME SELECT * FROM incoming")
    connection.unregister("incoming")
