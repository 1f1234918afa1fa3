"""Where files are: a project's transfers, database, Dagster instance and outputs, and the cache of converted models."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from tuneshift_dag import TuneshiftError


def transfers_dir() -> Path:
    """Folder of transfer folders: ``$TUNESHIFT_TRANSFERS`` or ``./transfers``."""
    return _folder("TUNESHIFT_TRANSFERS", Path("transfers"))


def home_dir() -> Path:
    """Folder of everything that is computed: ``$TUNESHIFT_HOME`` or ``./.tuneshift``."""
    return _folder("TUNESHIFT_HOME", Path(".tuneshift"))


def database_file() -> Path:
    """The file of every table, in a folder that is made for it; raises `TuneshiftError` when it can't be."""
    with _writing("TUNESHIFT_HOME", home_dir()) as folder:
        return folder / "tuneshift.duckdb"


def output_dir(transfer: str) -> Path:
    """Adapters, pictures and exports of one transfer."""
    return home_dir() / "output" / transfer


def cache_dir() -> Path:
    """Folder of converted models, for all projects: ``$TUNESHIFT_CACHE`` or the user's cache folder."""
    return _folder("TUNESHIFT_CACHE", Path(platformdirs.user_cache_dir("tuneshift_dag")))


def use_dagster_home() -> Path:
    """Set this project's Dagster instance up, and ``DAGSTER_HOME`` to it (Dagster wants an absolute path) unless the
    user has named another; `TuneshiftError` when it is no folder or can't be written."""
    with _writing("DAGSTER_HOME", _folder("DAGSTER_HOME", home_dir() / "dagster")) as folder:
        if not (folder / "dagster.yaml").exists():
            shutil.copy(Path(__file__).with_name("dagster_template.yaml"), folder / "dagster.yaml")
    os.environ["DAGSTER_HOME"] = str(folder)
    return folder


def _folder(variable: str, otherwise: Path) -> Path:
    """The absolute path that a variable names, else ``otherwise``; `TuneshiftError` when it is no folder."""
    given = os.environ.get(variable, "").strip()
    try:
        folder = (Path(given) if given else otherwise).expanduser().resolve()
        usable = folder.is_dir() or not folder.exists()
        str(folder).encode()  # which DuckDB wants
    except (OSError, RuntimeError, ValueError) as error:  # too long a name; there is no such user; not UTF-8
        repair = "Name a folder, or unset the variable." if given else "Set it to a folder."
        raise TuneshiftError(f"{variable} {given!r}: {str(error).rstrip('.')}. {repair}") from error
    if not usable:
        raise TuneshiftError(f"{variable}: {folder} is no folder. Name one, or unset the variable.")
    return folder


@contextmanager
def _writing(variable: str, folder: Path) -> Iterator[Path]:
    """The folder, made if it isn't there, and an error in words when something can't be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):  # also of a file system that is mounted read-only
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        yield folder
    except OSError as error:
        raise TuneshiftError(f"{variable}: {folder}: {error.strerror}. Name a folder that can be written.") from error
