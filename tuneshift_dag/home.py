"""Where a project's files are: transfers, the database, Dagster's instance and outputs."""

import os
import shutil
from pathlib import Path

from tuneshift_dag import TuneshiftError


def transfers_dir() -> Path:
    """Folder of transfer folders: ``$TUNESHIFT_TRANSFERS`` or ``./transfers``."""
    return _folder("TUNESHIFT_TRANSFERS", Path("transfers"))


def home_dir() -> Path:
    """Folder of everything that is computed: ``$TUNESHIFT_HOME`` or ``./.tuneshift``."""
    return _folder("TUNESHIFT_HOME", Path(".tuneshift"))


def database_file() -> Path:
    return home_dir() / "tuneshift.duckdb"


def output_dir(transfer: str) -> Path:
    """Adapters, pictures and exports of one transfer."""
    return home_dir() / "output" / transfer


def use_dagster_home() -> Path:
    """Set this project's Dagster instance up, and ``DAGSTER_HOME`` to it (Dagster wants an absolute path) unless the
    user has named another; `TuneshiftError` when it can't be written."""
    folder = _folder("DAGSTER_HOME", home_dir() / "dagster")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "dagster.yaml").exists():
            shutil.copy(Path(__file__).with_name("dagster_template.yaml"), folder / "dagster.yaml")
    except OSError as error:
        raise TuneshiftError(f"DAGSTER_HOME: {folder}: {error.strerror}. Name a folder that can be written.") from error
    os.environ["DAGSTER_HOME"] = str(folder)
    return folder


def _folder(variable: str, otherwise: Path) -> Path:
    """The absolute path that a variable names, else ``otherwise``; `TuneshiftError` when it is no folder."""
    given = os.environ.get(variable, "").strip()
    folder = (Path(given) if given else otherwise).expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise TuneshiftError(f"{variable}: {folder} is no folder. Name one, or unset the variable.")
    return folder
