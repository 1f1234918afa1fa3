"""The project's definitions with fake models: what a code server of tests/servers/test_postgres.py loads."""

import dagster as dg

from tests.fakes import FakeModels
from tuneshift_dag.definitions import build_definitions
from tuneshift_dag.home import database_file, transfers_dir
from tuneshift_dag.transfer import find_transfers, load_transfer


@dg.definitions
def defs() -> dg.Definitions:
    transfers = [load_transfer(folder) for folder in find_transfers(transfers_dir())]
    return build_definitions(transfers, database_file(), FakeModels().resource())
