"""One database file, used by two transfers, by the commands that read it, by a notebook, and by a database browser.

Two transfers go through some states in turn, over and over. What any of them holds in each state is known from a run
that had its file alone, so that every read can be held to it: a table, or a round of one, is that of one of the
states."""

import contextlib
import io
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import cycle, pairwise
from pathlib import Path
from random import Random
from typing import Any

import duckdb
import pytest

from tests.conftest import draw_quickly, edit
from tests.reliability.whole_run import fake
from tuneshift_dag import cli
from tuneshift_dag.home import database_file

BY_ROUND = ("synthetic_prompts", "proposals", "scored_pairs", "filtered_dataset", "rejected_pairs")
WHOLE = ("seed_set", "rehearsal_set", "evaluations", "retention", "frontier")
States = dict[str, set[str]]
"""Digests of all contents that a table, or a round of one, may have, by its name."""
SEEDS = (0, 1, 2)
# What a notebook holds its connection for, at most; the store waits a minute.
HELD = 10.0


def contents(connection: Any, transfer: str) -> dict[str, str]:
    """A digest of each table, or of a round of it."""
    queries = {table: f'SELECT * FROM "{transfer}".{table} ORDER BY ALL' for table in WHOLE}
    for table in BY_ROUND:
        for round_ in ("round_01", "round_02"):
            condition = f"WHERE round = '{round_}' ORDER BY ALL"
            queries[f"{table} of {round_}"] = f'SELECT * FROM "{transfer}".{table} {condition}'
    rows = {name: connection.execute(query).fetchall() for name, query in queries.items()}
    return {f"{transfer}: {name}": sha256(repr(found).encode()).hexdigest() for name, found in rows.items()}


def notes_of(folder: Path) -> Path:
    """Where a process writes how often what happened."""
    return folder / "notes.json"


def run_in_turn(folder: Path, expected: dict[int, dict[str, str]], seconds: float, notes: Path) -> None:
    """Run a transfer with one seed after another, until the time is over."""

    def work(end: float) -> Iterator[str]:
        for seed in cycle(SEEDS):
            if time.monotonic() > end:
                return
            edit(folder, {"seed": seed})
            status, _, said = call("run", str(folder), "--regrow")
            if status:
                yield problem(said)
                continue
            with opened(end + 60) as connection:
                different = [
                    name for name, was in contents(connection, folder.name).items() if was != expected[seed][name]
                ]
            yield f"wrong after a run: {', '.join(different)}" if different else "runs"

    _noted(work, seconds, notes)


def ask(folders: list[Path], prompts: list[str], counts: set[Any], seconds: float, notes: Path) -> None:
    """``tuneshift report``, ``sweep`` and ``lineage`` in a loop. ``counts`` are (transfer, round, prompts of it)."""
    dice = Random(0)

    def work(end: float) -> Iterator[str]:
        while time.monotonic() < end:
            folder, command = dice.choice(folders), dice.choice(["report", "sweep", "lineage"])
            more = [dice.choice(prompts)] if command == "lineage" else []
            status, out, said = call(command, str(folder), *more, "--json")
            if status and command == "lineage" and "no prompt" in said.lower():
                yield "commands that found no such prompt"
            elif status:
                yield problem(said)
            elif command == "report":
                found = [(folder.name, row["round"], row["prompts"]) for row in json.loads(out)["by_round"]]
                wrong = [row for row in found if row not in counts]
                yield f"wrong report: {wrong}" if wrong else "commands"
            else:
                yield "commands" if json.loads(out) else f"wrong answer: {command} has nothing to say"

    _noted(work, seconds, notes)


def look(transfers: list[str], states: States, seconds: float, notes: Path) -> None:
    """A notebook that holds a read connection for a while, and reads what it likes."""
    dice = Random(1)

    def work(end: float) -> Iterator[str]:
        while time.monotonic() < end:
            with opened(end + 60) as connection:
                read, until = [], time.monotonic() + dice.uniform(0, HELD)
                while not read or time.monotonic() < until:
                    read.append({name: was for one in transfers for name, was in contents(connection, one).items()})
                    time.sleep(0.2)
            wrong = [name for found in read for name, was in found.items() if was not in states[name]]
            wrong += [f"{name} changed" for one, other in pairwise(read) for name in one if one[name] != other[name]]
            yield f"wrong read: {', '.join(wrong[:5])}" if wrong else "reads of a notebook"
            time.sleep(dice.uniform(0.5, 3))

    _noted(work, seconds, notes)


def _noted(work: Callable[[float], Iterator[str]], seconds: float, notes: Path) -> None:
    counted: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        draw_quickly(patch)
        fake(patch)
        try:
            counted.update(work(time.monotonic() + seconds))
        finally:
            notes.write_text(json.dumps(counted))


def problem(said: str) -> str:
    kind = "lock error" if "in use by another process" in said or "lock" in said.lower() else "failed"
    return f"{kind}: {said.strip()[-600:]}"


@contextlib.contextmanager
def opened(give_up: float) -> Iterator[Any]:
    """The file as a notebook opens it: again and again, until nobody writes."""
    while True:
        try:
            connection = duckdb.connect(str(database_file()), read_only=True)
            break
        except duckdb.IOException:
            assert time.monotonic() < give_up, "the file was never free"
            time.sleep(0.02)
    try:
        yield connection
    finally:
        connection.close()


def call(*arguments: str) -> tuple[int, str, str]:
    """`tuneshift …` in this process: exit status, and what it prints on standard output and error."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["tuneshift", *arguments])
        try:
            cli.main()
        except SystemExit as ended:
            return int(ended.code or 0), out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()
