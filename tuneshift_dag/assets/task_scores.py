"""Standard tasks, ``evaluation.tasks``: measured once for every model, for ``evaluation`` and for ``comparison``."""

import hashlib
from typing import Any

import polars as pl

from tuneshift_dag.assets.common import Step
from tuneshift_dag.config.transfer import Transfer
from tuneshift_dag.method.engine import Engine, Side
from tuneshift_dag.store.database import Store
from tuneshift_dag.store.tables import TASK_SCORES

TASK_COLUMNS = ["model", "task", "metric", "filter", "value", "stderr", "n"]


def score_tasks(
    transfer: Transfer, database: Store, harness: Any, models: list[tuple[str, Engine, Side]], current: Step
) -> pl.DataFrame:
    """Rows of ``task_scores`` for both target models, which are then the current ones.

    Args:
        harness: a `tuneshift_dag.engines.harness.Harness`; without one there are no rows.
        models: name, engine and side, of which those of the target are measured.
    """
    keys = []
    for name, engine, side in models:
        if name.startswith("target_"):
            keys += measured_tasks(transfer, database, harness, name, engine, side, current)
    with database.transaction(transfer.name) as connection:
        connection.execute("UPDATE task_scores SET current = key IN (SELECT unnest(?))", [keys])
    return database.read(
        "SELECT * FROM task_scores WHERE current ORDER BY task, metric, filter, model", schema=transfer.name
    )


def measured_tasks(
    transfer: Transfer, database: Store, harness: Any, name: str, engine: Engine, side: Side, current: Step
) -> list[str]:
    """Keys of a model's rows in ``task_scores``; what it scored before isn't computed again.

    A task is written when it is done, so a killed run loses at most one.

    Args:
        harness: as in `score_tasks`.
        name: `target_base` or `target_distilled`, which every trained target is.
    """
    keys = []
    for task in harness.names if harness else ():
        asked = f"{engine.fingerprint(side)}|{task}|{harness.version(task)}"
        keys.append(hashlib.sha256(asked.encode()).hexdigest())
        known = database.read("SELECT n FROM task_scores WHERE key = ?", [keys[-1]], transfer.name)
        if len(known):
            current.cost.cache_hits += 1
            continue
        current.context.log.info(f"{name}: {task}")
        with current.cost.model_time():
            rows = harness.run(task, engine, side)
        current.cost.model_calls += max((row["n"] or 0 for row in rows), default=0)
        marks = {"key": keys[-1], "model": name, "example_limit": harness.limit, "current": False}
        database.append_all(transfer.name, [(TASK_SCORES, TASK_SCORES.frame([{**marks, **row} for row in rows]))])
    return keys
