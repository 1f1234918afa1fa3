"""The store: one DuckDB file, one schema per transfer, and a schema ``cache`` that all of them share.

A connection lives only for one transaction or one read, and never while a model runs.
"""

# Annotations stay text: as objects, those that name a DuckDB class keep its module alive to the end of the
# process, and DuckDB then prints pages of "nanobind: leaked … instances".
from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import duckdb
import polars as pl
import pyarrow as pa

from tuneshift_dag import TuneshiftError
from tuneshift_dag.store.file import DatabaseFile
from tuneshift_dag.store.queries import TRANSFER_VIEWS
from tuneshift_dag.store.tables import CACHE, CACHE_TABLES, MAIN_TABLES, SCHEMA_VERSION, TRANSFER_TABLES, Table

_LITTLE_MEMORY = 24
"""MB that DuckDB gets for a look-up or an append in a large table, or for rows that come in parts, beside those rows
that it must hold at once. Without a limit it keeps what it has read and, until the commit, what it writes: 180 MB for
100,000 scored pairs. With 16 an append and the commit of those pairs fail."""
_TOO_LITTLE_MEMORY = (duckdb.OutOfMemoryException, duckdb.TransactionException, duckdb.FatalException)
"""As a statement, a commit and the checkpoint that a commit makes say it."""


class Spool:
    """Rows of a table that are to be written in one transaction, chunk by chunk in a file until then."""

    def __init__(self, table: Table, file: IO[bytes]) -> None:
        self.at_once = 0.0
        """Bytes of the rows that DuckDB takes from `reader` at a time, in the chunk with the largest."""
        self._rows = 0
        self._file = file
        self._schema = table.empty().to_arrow().schema
        self._stream = pa.ipc.new_stream(file, self._schema)

    def append(self, rows: pl.DataFrame) -> None:
        table = rows.rechunk().to_arrow()
        self._file.seek(0, os.SEEK_END)
        self._stream.write_table(table)
        self._rows += len(rows)
        self.at_once = max(self.at_once, int(duckdb.__standard_vector_size__) * table.nbytes / max(1, len(rows)))

    def __len__(self) -> int:
        return self._rows

    def reader(self) -> pa.RecordBatchReader:
        """The rows as a stream that DuckDB reads as it goes; one at a time."""
        if not self._rows:  # not even the schema is written yet
            return pa.RecordBatchReader.from_batches(self._schema, [])
        self._file.seek(0)
        return pa.ipc.open_stream(self._file)

    def __iter__(self) -> Iterator[pl.DataFrame]:
        """The chunks that hold rows, in the order in which they came."""
        return (pl.DataFrame(batch) for batch in self.reader())


_CLAIMS = "SELECT name, folder FROM main.transfers WHERE lower(name) = lower(?)"


def now() -> datetime:
    """The time in UTC, as a TIMESTAMP of a table holds it."""
    return datetime.now(UTC).replace(tzinfo=None)


def in_chunks(rows: pl.DataFrame | Spool) -> Iterable[pl.DataFrame]:
    return rows if isinstance(rows, Spool) else [rows]


class Store:
    """Polars frames in, Polars frames out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.home = path.parent.resolve()
        """Folder of the database file. Paths in its tables are relative to it, so that both can be moved."""
        self.file = DatabaseFile(path)

    def relative(self, path: Path) -> str:
        """How a path is written into a table: relative to `home`, or absolute when it isn't inside."""
        # Not resolved at first: a link inside `home` may lead out of it.
        for place in (Path(os.path.abspath(path)), path.resolve()):
            if place.is_relative_to(self.home):
                return place.relative_to(self.home).as_posix()
        return str(path.resolve())

    def absolute(self, text: str) -> Path:
        return Path(os.path.normpath(self.home / text))

    def check_claim(self, name: str, folder: Path) -> None:
        """`TuneshiftError` when the tables of ``name`` are those of a transfer in another folder, as in `claim`."""
        self._check_claims(self.read(_CLAIMS, [name]).rows(), folder.resolve())

    def _check_claims(self, claims: list[tuple[str, str]], folder: Path) -> None:
        for other, text in claims:
            place = self.absolute(text)
            if (place / "transfer.yaml").is_file() and not (folder.exists() and place.samefile(folder)):
                raise TuneshiftError(
                    f"{folder}: in {self.path} the name {other!r} (in whatever case) is that of {place}. Rename one of"
                    " the folders, or give one of them another TUNESHIFT_HOME."
                )

    def claim(self, name: str, folder: Path) -> None:
        """Note that the tables of ``name`` are those of the transfer in ``folder``; one that was moved takes them over.
        `TuneshiftError` when another folder has the name, or one that differs only in case, which is one to DuckDB."""
        folder = folder.resolve()
        # With the project that holds both, a folder and its claim can be moved or copied.
        near = folder.is_relative_to(self.home.parent)
        claimed = (name, Path(os.path.relpath(folder, self.home)).as_posix() if near else str(folder))
        if self.read(_CLAIMS, [name]).rows() == [claimed]:
            return
        with self.transaction(CACHE) as connection:
            self._check_claims(connection.execute(_CLAIMS, [name]).fetchall(), folder)
            connection.execute("DELETE FROM main.transfers WHERE lower(name) = lower(?)", [name])
            connection.execute("INSERT INTO main.transfers VALUES (?, ?)", claimed)

    def read(
        self,
        query: str,
        parameters: Sequence[Any] | dict[str, Any] = (),
        schema: str | None = None,
        little_memory: bool = False,
    ) -> pl.DataFrame:
        """Rows of a query to the tables of ``schema`` (a transfer's name). With ``little_memory`` what was read of a
        large table isn't kept, as long as the rows of the result allow it."""
        self.prepare(schema)
        with self.file.open(read_only=True) as connection:
            if schema:
                connection.execute(f"SET schema = '{schema}'")
            rows: pl.DataFrame
            if little_memory:
                with suppress(duckdb.OutOfMemoryException):
                    _limit_memory(connection)
                    rows = connection.sql(query, params=parameters or None).pl()
                    return rows
                connection.execute("RESET memory_limit")
            rows = connection.sql(query, params=parameters or None).pl()
            return rows

    @contextmanager
    def spool(self, table: Table) -> Iterator[Spool]:
        """A place on this file's disk for more rows than memory should hold; a killed process leaves nothing there."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.path.parent) as file:
            yield Spool(table, file)

    def replace(self, schema: str, table: Table, rows: pl.DataFrame | Spool, **where: str) -> None:
        """Replace a table's rows, or those where the given columns have the given values, in one transaction."""
        condition = " AND ".join(f"{column} = ?" for column in where) or "TRUE"

        def statements(connection: duckdb.DuckDBPyConnection) -> None:
            connection.execute(f"DELETE FROM {table.name} WHERE {condition}", list(where.values()))
            insert(connection, table, rows)

        self.write(schema, statements, rows.at_once if isinstance(rows, Spool) else None)

    def append_all(self, schema: str, frames: Sequence[tuple[Table, pl.DataFrame]]) -> None:
        """Add rows in one transaction; a row whose key is there already is left out."""

        def statements(connection: duckdb.DuckDBPyConnection) -> None:
            for table, rows in frames:
                insert(connection, table, rows, new_only=bool(table.key))

        # Without a limit all keys of the table, which are read to leave out the known ones, stay in memory.
        self.write(schema, statements, sum(rows.estimated_size() for _, rows in frames))

    def write(
        self, schema: str, statements: Callable[[duckdb.DuckDBPyConnection], None], at_once: float | None = None
    ) -> None:
        """One transaction; with ``at_once``, the bytes that a statement must hold, it takes little memory beside."""
        if at_once is not None:
            # When it was too little, nothing of this is in the file, and the statements are run again without a limit.
            with suppress(*_TOO_LITTLE_MEMORY), self.transaction(schema) as connection:
                _limit_memory(connection, at_once)
                statements(connection)
                return
        with self.transaction(schema) as connection:
            connection.execute("RESET memory_limit")
            statements(connection)

    @contextmanager
    def transaction(self, schema: str, compact: bool = False) -> Iterator[duckdb.DuckDBPyConnection]:
        """A read-write connection inside one transaction, for a few statements and no model call. With ``compact``
        what was deleted leaves the file, whatever memory it takes."""
        self.prepare(schema)
        with self.file.open(read_only=False) as connection:
            connection.execute(f"SET schema = '{schema}'")
            if compact:
                connection.execute("RESET max_vacuum_tasks")
            connection.execute("BEGIN")  # what isn't committed goes with the connection
            yield connection
            connection.execute("COMMIT")
            if compact:
                connection.execute("CHECKPOINT")
                self.file.ready.clear()  # schemas may be gone
            self.file.note_wal()

    def prepare(self, schema: str | None) -> None:
        """Create the file, the schema and its tables when they aren't there yet, and the views when they differ."""
        name = schema or CACHE
        if name in self.file.ready:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open(read_only=False) as connection:
            connection.execute("BEGIN")
            _refuse_foreign(connection, self.path)
            self._check_version(connection)
            for known, tables in {name: TRANSFER_TABLES, "main": MAIN_TABLES, CACHE: CACHE_TABLES}.items():
                connection.execute(f'CREATE SCHEMA IF NOT EXISTS "{known}"')
                for table in tables:
                    connection.execute(table.ddl(known))
                    _add_columns(connection, known, table)
            if name != CACHE:
                _replace_views(connection, name)
            connection.execute("COMMIT")
            self.file.note_wal()
        self.file.ready.add(name)

    def _check_version(self, connection: duckdb.DuckDBPyConnection) -> None:
        connection.execute("CREATE TABLE IF NOT EXISTS main.tuneshift_schema (version INTEGER)")
        ((version,),) = connection.execute("SELECT max(version) FROM main.tuneshift_schema").fetchall()
        if version == SCHEMA_VERSION:
            return
        if version is not None and version > SCHEMA_VERSION:
            raise TuneshiftError(
                f"{self.path} was written by a newer tuneshift_dag (schema version {version}; this one knows"
                f" {SCHEMA_VERSION}). Upgrade tuneshift_dag, or set TUNESHIFT_HOME to another folder."
            )
        if version is not None:
            try:
                _migrate(connection)
            except duckdb.Error as error:
                problem = f"can't be brought from schema version {version} to {SCHEMA_VERSION}, and stays as it was"
                raise TuneshiftError(f"{self.path} {problem}: {error}") from error
        connection.execute("INSERT INTO main.tuneshift_schema VALUES (?)", [SCHEMA_VERSION])


def _refuse_foreign(connection: duckdb.DuckDBPyConnection, path: Path) -> None:
    """Raise `TuneshiftError` for another program's file, into which nothing of ours belongs."""
    names = connection.execute(
        "SELECT table_name FROM duckdb_tables() WHERE database_name = current_database() AND schema_name = 'main'"
        " UNION ALL SELECT view_name FROM duckdb_views() WHERE NOT internal AND database_name = current_database()"
    ).fetchall()
    if names and ("tuneshift_schema",) not in names:
        raise TuneshiftError(
            f"{path} is another program's database: it holds {names[0][0]!r}, and no store. Move it away, or set"
            " TUNESHIFT_HOME to another folder."
        )


def _limit_memory(connection: duckdb.DuckDBPyConnection, at_once: float = 0) -> None:
    """Let DuckDB drop what it has read, and write to disk what it would hold until the commit, beside ``at_once``."""
    # It has those bytes twice while it writes them, and each thread has buffers of its own.
    connection.execute(f"SET memory_limit = '{_LITTLE_MEMORY + 2 * at_once / 1e6:.0f} MB'; SET threads = 1")


def _migrate(connection: duckdb.DuckDBPyConnection) -> None:
    """To schema version 5: what is no longer declared goes, and the paths of adapters become relative."""
    # Tables and views of a transfer were made in the cache's schema too, by mistake.
    for view in TRANSFER_VIEWS:
        connection.execute(f"DROP VIEW IF EXISTS {CACHE}.{view.name}")
    for name in ("token_scores", *(table.name for table in TRANSFER_TABLES)):
        connection.execute(f"DROP TABLE IF EXISTS {CACHE}.{name}")
    indexed = connection.execute("SELECT schema_name, table_name FROM duckdb_tables() WHERE has_primary_key").fetchall()
    without = {table.name for table in (*CACHE_TABLES, *TRANSFER_TABLES) if not (table.key and table.indexed)}
    for schema, table in indexed:
        if table in without:  # DuckDB drops no primary key
            connection.execute(f'CREATE TABLE "{schema}".copied AS SELECT * FROM "{schema}".{table}')
            connection.execute(f'DROP TABLE "{schema}".{table}')
            connection.execute(f'ALTER TABLE "{schema}".copied RENAME TO {table}')
    transfers = connection.execute("SELECT schema_name FROM duckdb_tables() WHERE table_name = 'steps'").fetchall()
    for (schema,) in transfers:
        for column in ("base_alone_logprob", "ppl_base_alone", "agreement", "ppl_target", "discriminator_score"):
            connection.execute(f'ALTER TABLE "{schema}".scored_pairs DROP COLUMN IF EXISTS {column}')
        models = f"output/{schema}/models/"
        shorter = f'UPDATE "{schema}".distilled_models SET path = regexp_replace(path, ?, ?)'
        connection.execute(shorter, [f"^.*/{models}", models])


def _add_columns(connection: duckdb.DuckDBPyConnection, schema: str, table: Table) -> None:
    """Give a table of an older file the columns that it doesn't have yet; its rows hold NULL there."""
    known = connection.table(f'"{schema}".{table.name}').columns
    for column in table.columns:
        if column.name not in known:
            connection.execute(f'ALTER TABLE "{schema}".{table.name} ADD COLUMN "{column.name}" {column.type}')


def _replace_views(connection: duckdb.DuckDBPyConnection, schema: str) -> None:
    """Make the views of a transfer those of this code; nothing is written when they are already."""
    connection.execute(f"SET schema = '{schema}'")
    there = connection.execute("SELECT view_name, comment FROM duckdb_views() WHERE schema_name = ?", [schema])
    comments = dict(there.fetchall())
    for view in TRANSFER_VIEWS:
        if comments.get(view.name) != view.comment:
            connection.execute(view.ddl())


def insert(
    connection: duckdb.DuckDBPyConnection, table: Table, rows: pl.DataFrame | Spool, new_only: bool = False
) -> None:
    """Add rows to a table, by column name; with ``new_only`` but those whose key is there already."""
    if not len(rows):
        return
    arrow = rows.reader() if isinstance(rows, Spool) else rows.to_arrow()
    unknown = set(arrow.schema.names) ^ {c.name for c in table.columns}
    if unknown:
        raise ValueError(f"{table.name}: columns differ from the declared ones: {sorted(unknown)}")
    connection.register("incoming", arrow)
    verb, source = "INSERT", "incoming"
    if new_only and table.indexed:
        verb = "INSERT OR IGNORE"
    elif new_only:
        key = ", ".join(table.key)
        source += f" ANTI JOIN (SELECT {key} FROM {table.name} SEMI JOIN incoming USING ({key})) USING ({key})"
    connection.execute(f"{verb} INTO {table.name} BY NAME SELECT * FROM {source}")
    connection.unregister("incoming")
