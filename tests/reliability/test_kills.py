"""SIGKILL at a random moment of a whole run on tiny real models; the next run ends with what one in one go gives."""

import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.reliability.conftest import JOBS
from tests.reliability.whole_run import make_tiny_transfer, start
from tuneshift_dag import TuneshiftError
from tuneshift_dag.store import Store

pytestmark = pytest.mark.reliability
KILLS = int(os.environ.get("TUNESHIFT_KILLS", 20))
# Not those of times, run ids and costs.
TABLES = """seed_set round_seeds proposals synthetic_prompts rejected_prompts scored_pairs filtered_dataset
    rejected_pairs rehearsal_set training_examples evaluations accuracy retention retention_by_kind frontier"""
MODELS = "model_id, dataset_version, pairs, target, target_weights, settings, path, current"


def outcome(home: Path, name: str) -> dict[str, Any]:
    """Rows by table, and the trained adapter's files."""
    store = Store(home / "tuneshift.duckdb")
    queries = {table: f"SELECT * FROM {table} ORDER BY ALL" for table in TABLES.split()}
    queries["models"] = f"SELECT {MODELS} FROM distilled_models ORDER BY ALL"
    found: dict[str, Any] = {table: store.read(query, schema=name).rows() for table, query in queries.items()}
    adapters = sorted((home / "output" / name / "models").glob("*/*"))
    found["adapter"] = [
        (file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in adapters if file.is_file()
    ]
    return found


def same(one: Any, other: Any) -> bool:
    """Up to the rounding of another batch."""
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-5)
    return bool(one == other)


class Undisturbed:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = make_tiny_transfer(root / "transfers" / "tiny")
        finish(root / "warm", self.folder)  # so that what is noted once for all runs is there
        began = time.monotonic()
        finish(root / "home", self.folder)
        self.seconds = time.monotonic() - began
        self.outcome = outcome(root / "home", "tiny")
        assert all(self.outcome[table] for table in ("scored_pairs", "filtered_dataset", "evaluations", "adapter"))


def finish(home: Path, folder: Path, fake: bool = False) -> None:
    process = start(home, folder, fake)
    process.join()
    assert process.exitcode == 0, home.with_suffix(".log").read_text()[-3000:]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("kills"))


def test_a_run_that_was_killed_ends_as_one_that_was_not(
    undisturbed: Undisturbed, campaign: Callable[..., None]
) -> None:
    def kill(seed: int) -> str:
        home = undisturbed.root / f"home{seed}"
        process = start(home, undisturbed.folder)
        time.sleep(Random(seed).uniform(0, undisturbed.seconds))
        process.kill()
        process.join()
        try:
            place = interrupted(home)
            finish(home, undisturbed.folder)
            found = outcome(home, "tiny")
        except (AssertionError, TuneshiftError) as error:
            return f"not finished: {error}"
        different = [table for table, rows in undisturbed.outcome.items() if not same(rows, found[table])]
        if not different:
            shutil.rmtree(home)
        return f"{', '.join(different)} differ: {home}" if different else f"({place})"

    must = "tables and adapter equal those of a run that wasn't killed"
    campaign("SIGKILL of a run", must, KILLS, kill, JOBS)


def interrupted(home: Path) -> str:
    """Which step was at work."""
    if not (home / "tuneshift.duckdb").exists():
        return "before the first step"
    rows = (
        Store(home / "tuneshift.duckdb")
        .read("SELECT asset FROM attempts ORDER BY started_at DESC", schema="tiny")
        .rows()
    )
    return rows[0][0] if rows else "between steps"
