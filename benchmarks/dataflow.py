"""What surrounds the models: refiltering in DuckDB, and Dagster's overhead on a run."""

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import REPETITIONS, TRANSFER, spread
from tuneshift_dag.assets.filtered_dataset import refilter
from tuneshift_dag.resources.store import Store
from tuneshift_dag.resources.tables import SCORED_PAIRS


def filter_rows() -> dict[str, Any]:
    """Seconds to filter synthetic scored rows with a new threshold and rewrite the kept texts."""
    seconds: dict[int, list[float]] = {}
    for rows in (100_000, 1_000_000, 10_000_000):
        with tempfile.TemporaryDirectory() as folder:
            store = Store(Path(folder) / "bench.duckdb")
            _fill(store, rows)
            seconds[rows] = []
            for repetition in range(REPETITIONS if rows < 10_000_000 else 3):
                started = time.perf_counter()
                refilter(store, TRANSFER, "round_01", threshold=1.3 + 0.02 * repetition)
                seconds[rows].append(time.perf_counter() - started)
    result = {f"{rows:.0e}": spread(values) for rows, values in seconds.items()}
    return {
        **spread(seconds[1_000_000]),
        "unit": "seconds for 1e6 rows",
        "by_rows": result,
        "seconds_per_million": {f"{r:.0e}": spread(v)["median"] / r * 1e6 for r, v in seconds.items()},
    }


def _fill(store: Store, rows: int) -> None:
    """Scored rows with perplexities as a real round has them; a third or so passes."""
    columns = ", ".join(f'"{c.name}"' for c in SCORED_PAIRS.columns)
    with store.transaction(TRANSFER.name) as connection:
        connection.execute("SELECT setseed(0.5)").fetchall()
        connection.execute(
            f"""
            INSERT INTO scored_pairs ({columns})
            SELECT 'round_01', lpad(to_hex(i), 16, '0'), 'synthetic customer query number ' || i,
                ' intent_' || (i % 77), ' some longer base response number ' || i, 5, 24, 'stop', 'length',
                -1.0, -12.0, -20.0, -60.0, -0.01, NULL,
                1 + random() * 0.6, 1 + random() * 2, 3.0, 9.0, NULL, NULL
            FROM range({rows}) AS t(i)
            """
        )


def overhead() -> dict[str, Any]:
    """Wall time of a `tuneshift run` of two rounds over the time spent loading, running and training models."""
    import dagster as dg

    from tuneshift_dag.reports.summary import report
    from tuneshift_dag.runner import Runner
    from tuneshift_dag.transfer import load_transfer

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        os.environ["TUNESHIFT_HOME"] = str(home)
        copy = home / "transfers" / TRANSFER.name
        shutil.copytree(TRANSFER.folder, copy)
        config = yaml.safe_load((copy / "transfer.yaml").read_text())
        config["rounds"] = 2
        (copy / "transfer.yaml").write_text(yaml.safe_dump(config))
        transfer = load_transfer(copy)
        (home / "dagster").mkdir()
        instance = dg.DagsterInstance.local_temp(str(home / "dagster"))
        started = time.perf_counter()
        runner = Runner(transfer, instance)
        runner.run()
        wall = time.perf_counter() - started
        figures = report(Store(home / "tuneshift.duckdb"), transfer)
    value = wall / figures["model_seconds"]
    return {"median": value, "low": value, "high": value, "wall_seconds": wall, "figures": figures["seconds"]}
