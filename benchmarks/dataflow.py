"""What surrounds the models: refiltering in DuckDB, and Dagster's overhead on a run."""

import os
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import REPETITIONS, TRANSFER, spread
from tuneshift_dag.assets.filtered_dataset import judge
from tuneshift_dag.config import Transfer
from tuneshift_dag.store import Store


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
                with store.transaction(TRANSFER.name) as connection:
                    judge(connection, _with_threshold(1.3 + 0.02 * repetition), "round_01")
                seconds[rows].append(time.perf_counter() - started)
    result = {f"{rows:.0e}": spread(values) for rows, values in seconds.items()}
    return {
        **spread(seconds[1_000_000]),
        "unit": "seconds for 1e6 rows",
        "by_rows": result,
        "seconds_per_million": {f"{r:.0e}": spread(v)["median"] / r * 1e6 for r, v in seconds.items()},
    }


def _with_threshold(threshold: float) -> Transfer:
    config = TRANSFER.config
    rule = config.filter.model_copy(update={"threshold": threshold})
    return replace(TRANSFER, config=config.model_copy(update={"filter": rule}))


def _fill(store: Store, rows: int) -> None:
    """Scored rows with perplexities as a real round has them; a third or so passes."""
    with store.transaction(TRANSFER.name) as connection:
        connection.execute("SELECT setseed(0.5)").fetchall()
        # By name: columns that only some settings fill stay empty.
        connection.execute(
            f"""
            INSERT INTO scored_pairs BY NAME
            SELECT 'round_01' AS round, lpad(to_hex(i), 16, '0') AS prompt_id,
                'synthetic customer query number ' || i AS prompt,
                ' intent_' || (i % 77) AS fine_tuned_response,
                ' some longer base response number ' || i AS base_response,
                5 AS fine_tuned_tokens, 24 AS base_tokens, 'stop' AS fine_tuned_finish, 'length' AS base_finish,
                -1.0 AS fine_tuned_own_logprob, -12.0 AS base_own_logprob,
                -20.0 AS base_cross_logprob, -60.0 AS fine_tuned_cross_logprob, -0.01 AS fine_tuned_eos_logprob,
                1 + random() * 0.6 AS ppl_fine_tuned, 1 + random() * 2 AS ppl_base,
                3.0 AS ppl_base_cross, 9.0 AS ppl_fine_tuned_cross
            FROM range({rows}) AS t(i)
            """
        )


def overhead() -> dict[str, Any]:
    """Wall time of a `tuneshift run` of two rounds over the time spent loading, running and training models."""
    import dagster as dg

    from tuneshift_dag.config.files import load_transfer
    from tuneshift_dag.reports import report
    from tuneshift_dag.runner import Runner

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
