"""The response cache under fire: killed writers, writers side by side. What is removed of it: test_collect.py."""

import multiprocessing
import os
import random
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TextIO

import pytest

from tests.scoring_process import BATCH, score
from tuneshift_dag.store import Store

ENTRIES = [
    "SELECT * EXCLUDE (added_at) FROM cache.responses ORDER BY key",
    "SELECT * EXCLUDE (added_at) FROM cache.scores ORDER BY key",
]


# Processes are forked from one that has imported everything and done nothing.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.scoring_process"])


def start(database: Path, first: int, last: int) -> tuple[BaseProcess, TextIO]:
    """A process that scores prompts, and what it prints."""
    reader, writer = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_score, args=(database, first, last, writer))
    process.start()
    writer.close()
    return process, os.fdopen(os.dup(reader.fileno()))


def _score(database: Path, first: int, last: int, writer: Connection) -> None:
    os.dup2(writer.fileno(), sys.stdout.fileno())
    score(database, first, last, 0.02)


def test_scoring_killed_twenty_times_ends_with_the_tables_of_an_undisturbed_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = Store(tmp_path / "whole.duckdb"), Store(tmp_path / "killed.duckdb")
    count = 400
    score(whole.path, 0, count, 0)
    dice = random.Random(0)
    kept = 0
    for _ in range(20):
        process, printed = start(killed.path, 0, count)
        batches = dice.randrange(1, 7)
        with printed:
            for _ in range(batches):
                assert printed.readline(), "it ended before it could be killed"
            time.sleep(dice.random() * 0.04)  # while it computes, or while it writes
            process.kill()
            process.join()
        now = killed.read("SELECT count(*) FROM cache.responses").item() // 2
        assert now >= kept + (batches - 1) * BATCH, "more than the batch in progress was lost"
        kept = now
    capsys.readouterr()
    score(killed.path, 0, count, 0)
    batches = capsys.readouterr().out.count("batch")
    assert batches == -(-(count - kept) // BATCH), "it computed other batches than the missing ones"
    for query in ENTRIES:
        assert killed.read(query).equals(whole.read(query))


def test_two_processes_that_score_overlapping_prompts_end_with_one_copy_of_each(tmp_path: Path) -> None:
    together, whole = Store(tmp_path / "together.duckdb"), Store(tmp_path / "whole.duckdb")
    processes = [start(together.path, 0, 60), start(together.path, 30, 90)]
    for process, printed in processes:
        with printed:
            process.join(60)
        assert process.exitcode == 0
    score(whole.path, 0, 90, 0)
    for query in ENTRIES:
        assert together.read(query).equals(whole.read(query))
