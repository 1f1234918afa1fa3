"""SIGKILL at random moments of whole runs on tiny real models; each ends with what one in one go gives."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.reliability.conftest import JOBS
from tests.reliability.whole_run import SETTINGS, Undisturbed, batches_of, make_tiny_transfer, start, tiny
from tuneshift_dag import TuneshiftError
from tuneshift_dag.store import Store

pytestmark = pytest.mark.reliability
KILLS = int(os.environ.get("TUNESHIFT_KILLS", 200))
EACH = 5
"""Kills in one case. The run is begun anew when it has ended before the last of them."""
# A row of a batch is two responses and two scores.
LARGEST = 4 * SETTINGS["models"]["batch_size"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    root = tmp_path_factory.mktemp("kills")
    return Undisturbed(root, make_tiny_transfer(root / "transfers" / "tiny"), tiny)


def test_a_run_that_was_killed_ends_as_one_that_was_not(
    undisturbed: Undisturbed, campaign: Callable[..., None]
) -> None:
    def kill(seed: int) -> str:
        dice, places, life = Random(seed), list[str](), 0
        home, kept = undisturbed.root / f"home{seed}", set[str]()
        try:
            while len(places) < EACH:
                batches_of(home).unlink(missing_ok=True)
                process = start(home, undisturbed.folder, tiny)
                process.join(dice.uniform(0, undisturbed.idle + 2 * undisturbed.seconds / EACH))
                if process.exitcode is not None:  # a run's end
                    assert process.exitcode == 0, f"exit status {process.exitcode}"
                    if different := undisturbed.different(home):
                        return different
                    shutil.rmtree(home)
                    life += 1
                    home, kept = undisturbed.root / f"home{seed}-{life}", set()
                    continue
                process.kill()
                process.join()
                places.append(interrupted(home))
                there = cached(home)
                if lost := (kept - there) | not_committed(home, there):
                    return f"lost after kill {len(places)}: {len(lost)} results; {home}"
                kept = there
            different = undisturbed.finished(home)
        except (AssertionError, TuneshiftError) as error:
            return f"not finished: {error}; {home}"
        if not different:
            shutil.rmtree(home)
        return different or f"({', '.join(places)})"

    must = "tables and adapter equal those of a run that wasn't killed; nothing committed is lost, at most a batch is"
    campaign(f"SIGKILL of a run, {EACH} in each", must, -(-KILLS // EACH), kill, JOBS)


def cached(home: Path) -> set[str]:
    """Keys of all results that are committed."""
    file = home / "tuneshift.duckdb"
    keys = "SELECT key FROM cache.responses UNION ALL SELECT key FROM cache.scores"
    return set(Store(file).read(keys)["key"]) if file.exists() else set()


def not_committed(home: Path, there: set[str]) -> set[str]:
    """Results of the killed run that were computed and aren't there, but for those of its last batch; and those of a
    batch that was too large to be one."""
    lines = batches_of(home).read_text().split("\n")[:-1] if batches_of(home).exists() else []
    noted = [json.loads(line) for line in lines]
    lost = {key for batch in noted[:-1] for key in batch} - there
    return lost.union(*(batch for batch in noted if len(batch) > LARGEST))


def interrupted(home: Path) -> str:
    """Which step was at work."""
    file = home / "tuneshift.duckdb"
    if not file.exists():
        return "before the first step"
    begun = "SELECT asset FROM attempts ORDER BY started_at DESC LIMIT 1"
    rows = Store(file).read(begun, schema="tiny").rows()
    return str(rows[0][0]) if rows else "between steps"
