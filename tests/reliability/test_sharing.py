"""Many who use one database file at a time: nobody is told of a lock, and nobody reads what never was."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import duckdb
import pytest

from tests.conftest import edit, make_transfer_folder
from tests.reliability import sharing
from tests.reliability.conftest import MINUTES
from tests.reliability.whole_run import Undisturbed, fake, finish, log_of, refused, start, start_process

pytestmark = pytest.mark.reliability
HOLDERS = int(os.environ.get("TUNESHIFT_HOLDERS", 20))


def test_many_readers_and_two_writers(tmp_path: Path, campaign: Callable[..., None]) -> None:
    folders = [make_transfer_folder(tmp_path, name) for name in ("one", "two")]
    edit(folders[1], {"generator.calls_per_round": 5})
    expected: dict[str, dict[int, dict[str, str]]] = {folder.name: {} for folder in folders}
    states: sharing.States = {}
    prompts: list[str] = []
    counts: set[Any] = set()
    for folder in folders:
        for seed in sharing.SEEDS:
            home = tmp_path / f"{folder.name}-{seed}"
            edit(folder, {"seed": seed})
            finish(home, folder, fake)
            grown = f"SELECT round, prompt_id FROM {folder.name}.synthetic_prompts"
            with duckdb.connect(str(home / "tuneshift.duckdb"), read_only=True) as connection:
                found = sharing.contents(connection, folder.name)
                rows = connection.execute(grown).fetchall()
            prompts += [prompt_id for _, prompt_id in rows]
            counts.update((folder.name, one, number) for one, number in Counter(one for one, _ in rows).items())
            expected[folder.name][seed] = found
            for name, digest in found.items():
                states.setdefault(name, {sharing.sha256(b"[]").hexdigest()}).add(digest)
    home = tmp_path / "home"
    for folder in folders:
        edit(folder, {"seed": 0})
        finish(home, folder, fake)

    def minute(number: int) -> str:
        notes = [tmp_path / f"notes{place}" for place in range(4)]
        named = [folder.name for folder in folders]
        processes = [
            start_process(home, sharing.run_in_turn, folders[0], expected["one"], 60.0, notes[0]),
            start_process(home, sharing.run_in_turn, folders[1], expected["two"], 60.0, notes[1]),
            start_process(home, sharing.ask, folders, prompts, counts, 60.0, notes[2]),
            start_process(home, sharing.look, named, states, 60.0, notes[3]),
        ]
        for process in processes:
            process.join(200)
            if process.exitcode is None:
                process.kill()
        if any(process.exitcode for process in processes):
            return f"exit statuses {[process.exitcode for process in processes]}: {log_of(home).read_text()[-2000:]}"
        counted: Counter[str] = Counter()
        for file in notes:
            counted.update(json.loads(file.read_text()))
        wrong = [f"{count} times {what}" for what, count in counted.items() if ": " in what]
        return "; ".join(wrong) or f"({', '.join(f'{count} {what}' for what, count in counted.items())})"

    must = "0 lock errors, 0 wrong reads"
    campaign("two transfers, commands and a notebook, a minute each", must, max(1, min(10, int(MINUTES))), minute)


# A database browser: it takes the file, writes a table of its own, and keeps the file open.
BROWSER = """
import duckdb, sys, time
path, name, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
while True:
    try:
        connection = duckdb.connect(path)
        break
    except duckdb.IOException:
        time.sleep(0.005)
connection.execute(f"CREATE TABLE main.{name} AS SELECT 42 AS answer")
print("held", flush=True)
time.sleep(seconds)
connection.close()
"""


def impatient(patch: pytest.MonkeyPatch) -> None:
    """A run that waits two seconds for the file instead of a minute."""
    fake(patch)
    patch.setattr("tuneshift_dag.store.file._LOCK_WAIT_SECONDS", 2.0)


def test_a_browser_that_holds_the_file(tmp_path: Path, campaign: Callable[..., None]) -> None:
    folder = make_transfer_folder(tmp_path)
    whole = Undisturbed(tmp_path, folder, fake)

    def hold(seed: int) -> str:
        dice, home = Random(seed), tmp_path / f"home{seed}"
        seconds = [0.5, 60.0, 60.0][seed % 3]  # it lets go; the run gives up; it is killed in the middle
        run = start(home, folder, impatient)
        file = home / "tuneshift.duckdb"
        while not file.exists() and run.exitcode is None:
            time.sleep(0.01)
        time.sleep(dice.uniform(0, whole.seconds))
        command = [sys.executable, "-c", BROWSER, str(file), "browser", str(seconds)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as browser:
            assert browser.stdout is not None and browser.stdout.readline() == b"held\n"
            goes_on = run.exitcode is None
            if seed % 3 == 2:
                time.sleep(dice.uniform(0, 1.5))
                browser.kill()
            problem = refused(home, run, (f"PID {browser.pid}",))
            browser.kill()
        if problem:
            return problem
        how = "that waited" if run.exitcode == 0 else "that named the process"
        if different := whole.finished(home):
            return different
        if browsed(file) != [(42,)]:
            return "what the browser committed is gone"
        shutil.rmtree(home)
        return f"({how if goes_on else 'that had ended'})"

    must = "the run waits, or ends with one message that names the process; nothing of either is lost"
    campaign("a process that holds the file for writing", must, HOLDERS, hold)


def browsed(file: Path) -> list[Any]:
    with duckdb.connect(str(file), read_only=True) as connection:
        found: list[Any] = connection.execute("SELECT answer FROM main.browser").fetchall()
    return found
