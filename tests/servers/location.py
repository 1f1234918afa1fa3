"""The project's definitions with fake models: what a code server of tests/servers/test_postgres.py loads."""

import os
import time
from pathlib import Path

import dagster as dg

from tests.fake_engine import FakeEngine
from tests.fakes import FakeModels
from tuneshift_dag.config.files import find_transfers, load_transfer
from tuneshift_dag.definitions import build_definitions
from tuneshift_dag.home import database_file, transfers_dir


def wait_to_be_killed(number: int) -> None:
    """Before the first batch of the source models, where a test asks for it; a run after that one goes on."""
    file = Path(os.environ.get("TUNESHIFT_TEST_KILL_ME", os.devnull))
    if not file.exists():
        file.write_text(str(os.getpid()))
        time.sleep(60)


@dg.definitions
def defs() -> dg.Definitions:
    transfers = [load_transfer(folder) for folder in find_transfers(transfers_dir())]
    return build_definitions(
        transfers, database_file(), FakeModels(FakeEngine("source", on_batch=wait_to_be_killed)).resource()
    )
