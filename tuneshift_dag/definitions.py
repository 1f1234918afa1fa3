"""Dagster's entry point: assets, refilter job and automation of every transfer found, and their resources."""

from pathlib import Path

import dagster as dg

from tuneshift_dag.assets import build_assets
from tuneshift_dag.assets.filtered_dataset import build_refilter_job
from tuneshift_dag.automation import build_automation
from tuneshift_dag.config.transfer import Transfer, find_transfers, load_transfer
from tuneshift_dag.home import database_file, transfers_dir
from tuneshift_dag.resources.dagster_resources import EngineResource, StoreResource


def build_definitions(
    transfers: list[Transfer], database: Path, engines: EngineResource | None = None
) -> dg.Definitions:
    """Definitions for the given transfers; tests pass an `EngineResource` of their own."""
    return dg.Definitions(
        assets=[asset for transfer in transfers for asset in build_assets(transfer)],
        jobs=[build_refilter_job(transfer) for transfer in transfers],
        sensors=[build_automation(transfer) for transfer in transfers],
        resources={"store": StoreResource(path=str(database)), "engines": engines or EngineResource()},
        # One process per run: its steps share the loaded models, and torch is imported once.
        executor=dg.in_process_executor,
    )


@dg.definitions
def defs() -> dg.Definitions:
    return build_definitions([load_transfer(f) for f in find_transfers(transfers_dir())], database_file())
