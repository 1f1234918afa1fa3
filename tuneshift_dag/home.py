"""Where a project's files are: transfers, the database, Dagster's instance and outputs."""

import os
import shutil
from pathlib import Path


def transfers_dir() -> Path:
    """Folder of transfer folders: ``$TUNESHIFT_TRANSFERS`` or ``./transfers``."""
    return Path(os.environ.get("TUNESHIFT_TRANSFERS", "transfers")).resolve()


def home_dir() -> Path:
    """Folder of everything that is computed: ``$TUNESHIFT_HOME`` or ``./.tuneshift``."""
    return Path(os.environ.get("TUNESHIFT_HOME", ".tuneshift")).resolve()


def database_file() -> Path:
    return home_dir() / "tuneshift.duckdb"


def output_dir(transfer: str) -> Path:
    """Adapters, pictures and exports of one transfer."""
    return home_dir() / "output" / transfer


def use_dagster_home() -> Path:
    """Point ``DAGSTER_HOME`` at this project's instance, unless the user has set it, and set it up."""
    folder = Path(os.environ.setdefault("DAGSTER_HOME", str(home_dir() / "dagster")))
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "dagster.yaml").exists():
        shutil.copy(Path(__file__).with_name("dagster_template.yaml"), folder / "dagster.yaml")
    return folder
