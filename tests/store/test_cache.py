"""The response cache under fire: killed writers, writers side by side; and its upkeep."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import Project
from tests.scoring_process import BATCH, score
from tuneshift_dag.errors import TuneshiftError
from tuneshift_dag.home import output_dir
from tuneshift_dag.store.cache import collect, stats
from tuneshift_dag.store.database import Store

ROOT = Path(__file__).parents[2]
ENTRIES = [
    "SELECT * FROM cache.responses ORDER BY key",
    "SELECT * FROM cache.scores ORDER BY key",
]


def start(database: Path, first: int, last: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.scoring_process", str(database), str(first), str(last)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_scoring_killed_twenty_times_ends_with_the_tables_of_an_undisturbed_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = Store(tmp_path / "whole.duckdb"), Store(tmp_path / "killed.duckdb")
    count = 400
    score(whole.path, 0, count, 0)
    dice = random.Random(0)
    kept = 0
    for _ in range(20):
        process = start(killed.path, 0, count)
        batches = dice.randrange(1, 7)
        assert process.stdout is not None
        for _ in range(batches):
            assert process.stdout.readline(), "it ended before it could be killed"
        time.sleep(dice.random() * 0.04)  # while it computes, or while it writes
        process.kill()
        process.communicate()
        now = killed.read("SELECT count(*) FROM cache.responses").item() // 2
        assert now >= kept + (batches - 1) * BATCH, "more than the batch in progress was lost"
        kept = now
    capsys.readouterr()
    score(killed.path, 0, count, 0)
    printed = capsys.readouterr().out.count("batch")
    assert printed == -(-(count - kept) // BATCH), "it computed other batches than the missing ones"
    for query in ENTRIES:
        assert killed.read(query).equals(whole.read(query))


def test_two_processes_that_score_overlapping_prompts_end_with_one_copy_of_each(tmp_path: Path) -> None:
    together, whole = Store(tmp_path / "together.duckdb"), Store(tmp_path / "whole.duckdb")
    processes = [start(together.path, 0, 60), start(together.path, 30, 90)]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    score(whole.path, 0, 90, 0)
    for query in ENTRIES:
        assert together.read(query).equals(whole.read(query))


def test_gc_removes_only_what_no_materialization_uses(project: Project) -> None:
    project.run()
    calls = project.models.calls()
    assert all(row["unreferenced"] == 0 for row in stats(project.store))
    unfinished = output_dir(project.folder.name) / "models" / ".id-weights.checkpoint"
    unfinished.touch()
    score(project.store.path, 0, 6, 0)
    responses, scores, _ = stats(project.store)
    assert (responses["unreferenced"], scores["unreferenced"]) == (12, 12)
    assert 0 < responses["unreferenced_bytes"] < responses["bytes"]
    collect(project.store)
    assert all(row["unreferenced"] == 0 for row in stats(project.store))
    for asset in ("synthetic_prompts", "scored_pairs"):
        assert project.materialize(asset, round="round_01").success
    assert not unfinished.exists() and list(unfinished.parent.iterdir()), "the adapter stays"
    assert project.models.calls() == calls, "something that is still used was removed"


def test_gc_refuses_when_it_does_not_know_what_is_used(project: Project) -> None:
    project.run()
    with project.store.transaction(project.folder.name) as connection:
        connection.execute("DELETE FROM cache_references")
    with pytest.raises(TuneshiftError, match=project.folder.name):
        collect(project.store)
    assert stats(project.store)[0]["entries"] > 0
