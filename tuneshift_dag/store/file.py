"""The database file, opened only for as long as one transaction or one read takes.

DuckDB lets one process write at a time, and a writer shuts out readers: a held lock is waited for.
"""

# Annotations stay text: as objects, those that name a DuckDB class keep its module alive to the end of the
# process, and DuckDB then prints pages of "nanobind: leaked … instances".
from __future__ import annotations

import atexit
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import duckdb

from tuneshift_dag import TuneshiftError

_LOCK_WAIT_SECONDS = 60.0
# A checkpoint overwrites DuckDB's first block (256 KiB) in place: a process killed within those microseconds leaves a
# file that can't be opened (seen once in 1,200 kills while every close made one). What is committed is safe in the
# `.wal` beside the file before; a larger one is slower to open (460 kB of a real run: 12 ms; 590 kB
# of hundreds of tiny commits: 50).
# A checkpoint also merges a table's small row groups into one of up to 122,880 rows, and holds all of it in memory:
# 80 MB for responses. Without merges it writes what was added since the last one, some 2,500 rows, and drops row groups
# whose rows are all deleted; look-ups in 27 groups of 400,000 responses were as fast as in 5.
_WRITER = "PRAGMA disable_checkpoint_on_shutdown; SET wal_autocheckpoint = '4 MB'; SET max_vacuum_tasks = 0"
_DATABASE = "tuneshift"
"""What the file is called in queries: no transfer may have this name."""
_IN_USE = ("Could not set lock", "already attached")
"""Said of a file that another process holds, or another thread of this one."""
_FRESH = "RESET memory_limit; RESET threads"
_INSTANCES: dict[tuple[int, Path], duckdb.DuckDBPyConnection] = {}
"""DuckDB in memory, by process and database file, which is attached to it when it is needed: that takes 2 ms, and a
new instance for each connection 30."""
_READY: dict[tuple[Path, int], set[str]] = {}
"""Schemas that were prepared in this process, which takes some statements each, by the very file (path and inode)."""


class DatabaseFile:
    """One DuckDB file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        real = path.resolve()  # DuckDB keeps the `.wal` beside what a link leads to
        self.wal = real.with_name(f"{real.name}.wal")
        self._wal_is_due = real.with_name(f"{real.name}.wal-is-due")
        self._known: int | None = None

    @property
    def ready(self) -> set[str]:
        return _READY.setdefault((self.path, self.path.stat().st_ino), set()) if self.path.exists() else set()

    @contextmanager
    def open(self, read_only: bool) -> Iterator[duckdb.DuckDBPyConnection]:
        """The file, for as long as the block takes: other threads and processes wait for it meanwhile. A full disk and
        a damaged file are raised as `TuneshiftError`."""
        key = os.getpid(), self.path
        instance = _INSTANCES[key] if key in _INSTANCES else _INSTANCES.setdefault(key, _instance(self.path))
        with self._told():
            self._attach(instance, read_only)
            try:
                with instance.cursor() as connection:  # which takes what isn't committed with it
                    connection.execute(f"USE {_DATABASE}; {'' if read_only else _WRITER}")
                    yield connection
            except duckdb.Error:
                # After some, this instance refuses everything.
                _INSTANCES.pop(key, None)
                raise
            finally:
                usable = _INSTANCES.get(key) is instance
                if usable:
                    instance.cursor().execute(f"DETACH {_DATABASE}")
                else:
                    instance.close()

    def _attach(self, instance: duckdb.DuckDBPyConnection, read_only: bool) -> None:
        give_up = time.monotonic() + _LOCK_WAIT_SECONDS
        pause = 0.01
        while True:
            self._check_whole()
            try:
                with instance.cursor() as connection:
                    how = " (READ_ONLY)" if read_only else ""
                    # At first: attaching reads the whole `.wal`.
                    connection.execute(f"{_FRESH}; ATTACH {_quoted(self.path)} AS {_DATABASE}{how}")
                self._known = self._known or self._state()[0]
                return
            except duckdb.Error as error:
                if not any(words in str(error) for words in _IN_USE):
                    _INSTANCES.pop((os.getpid(), self.path), None)
                    raise TuneshiftError(
                        f"{self.path} can't be opened as a DuckDB file: {error}{self._cut(str(error))}"
                    ) from error
                if time.monotonic() > give_up:
                    raise TuneshiftError(
                        f"{self.path} has been in use by another process for {_LOCK_WAIT_SECONDS:.0f} s"
                        f" (a notebook or DuckDB shell with an open connection?): {error}"
                    ) from error
            time.sleep(pause)
            pause = min(0.5, pause * 2)

    def _cut(self, error: str) -> str:
        """The repair of a ``.wal`` that a loss of power left with holes; one without its end is none to DuckDB."""
        found = re.search(r"Corrupt WAL file: entry at byte position (\d+)", error)
        if not found:
            return ""
        cut = f"truncate -s {found[1]} '{self.wal}' && rm -f '{self._wal_is_due}'"
        repair = f"keep a copy of {self.wal.name}, and cut it there: {cut}"
        return f". After a loss of power this was being written then, and what was committed is before it: {repair}"

    @contextmanager
    def _told(self) -> Iterator[None]:
        """A full disk and a damaged file as `TuneshiftError`."""
        try:
            yield
        except (duckdb.Error, OSError) as error:
            is_file = type(error) is duckdb.Error or isinstance(error, duckdb.IOException | OSError)
            if not is_file and "Could not write" not in str(error):
                raise
            raise TuneshiftError(
                f"{self.path} can't be read or written: {error}. What was committed is kept: make room on the disk or"
                " correct its permissions, and run again. If it is damaged, put a copy of it and its .wal back."
            ) from error

    def _state(self) -> tuple[int | None, str]:
        """The file's inode, and what a checkpoint changes and a commit doesn't. Never open the file for it: when this
        process closes it, DuckDB's lock on it is gone (POSIX)."""
        with suppress(FileNotFoundError):
            found = self.path.stat()
            return found.st_ino, f"{found.st_size} {found.st_mtime_ns}"
        return None, ""

    def note_wal(self) -> None:
        """While this process holds the file: note of which state of it the ``.wal`` has what was written since, and how
        long it is."""
        if not self.wal.exists():
            self._wal_is_due.unlink(missing_ok=True)
        else:
            self._wal_is_due.write_text(f"{self._state()[1]} {self.wal.stat().st_size}")

    def _noted(self) -> tuple[str, int]:
        """What `note_wal` has noted; versions before noted no length."""
        with suppress(FileNotFoundError):
            size, time, length, *_ = [*self._wal_is_due.read_text(errors="replace").split(), "", "", "1"]
            return f"{size} {time}", int(length) if length.isdecimal() else 1
        return "", 0

    def _wal_length(self) -> int | None:
        with suppress(FileNotFoundError):
            return self.wal.stat().st_size
        return None

    def _check_whole(self) -> None:
        """Raise `TuneshiftError` for a file where DuckDB would begin anew, or go on without what was written last."""
        # In this order: another process may create the file, or make a checkpoint (the file first, then the `.wal`).
        (due, length), wal, (inode, state) = self._noted(), self._wal_length(), self._state()
        if self._known is not None and inode != self._known:
            raise TuneshiftError(
                f"{self.path} was deleted or replaced while it was in use. Put it back, and run again."
            )
        if wal is not None and not state:
            problem = f"is missing, and {self.wal.name} beside it is there"
            raise TuneshiftError(f"{self.path} {problem}. Put it back; to begin anew, delete that one too.")
        if state and state == due and (wal or 0) < length:
            self.ready.clear()  # schemas may be gone
            how = "is missing" if wal is None else f"has {wal} of {length} bytes"
            problem = f"{how}, without what was written to {self.path.name} last"
            go_on = f"to compute that again, delete {self._wal_is_due.name}"
            raise TuneshiftError(f"{self.wal} {problem}. Put it back; {go_on}.")


def _instance(path: Path) -> duckdb.DuckDBPyConnection:
    instance = duckdb.connect()
    # What doesn't fit in memory goes beside the file, as for a connection to it; without a file to the working folder.
    instance.execute(f"SET temp_directory = {_quoted(path.with_name(f'{path.name}.tmp'))}")
    return instance


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "''") + "'"


@atexit.register
def _close_instances() -> None:
    """Before DuckDB's module goes: what is left of it then is reported as leaked."""
    while _INSTANCES:
        (process, _), instance = _INSTANCES.popitem()
        if process == os.getpid():  # one that was forked leaves alone what isn't its own
            instance.close()
