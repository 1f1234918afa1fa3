"""SIGKILL of a process of `make ui` while it materializes a whole transfer: of the daemon, the webserver, the server of
the code, and the run. `tuneshift run` then ends with what a run in one go gives."""

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from random import Random
from signal import SIGKILL

import pytest

from tests.reliability import parts
from tests.reliability.whole_run import Undisturbed, make_tiny_transfer, plain
from tests.ui.server import Server
from tuneshift_dag import TuneshiftError
from tuneshift_dag.store.records import ROUND_ASSETS

pytestmark = pytest.mark.reliability
CASES = int(os.environ.get("TUNESHIFT_DAGSTER_KILLS", 8))
WHOLE = ["seed_set", "threshold_report", "rehearsal_set", "distilled_model", "evaluation"]
ROUNDS = ["round_01", "round_02"]
KINDS = {
    "the daemon": "dagster._daemon",
    "the webserver": "dagster_webserver",
    "the code server": "dagster api grpc",
    "a run": "spawn_main",
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    root = tmp_path_factory.mktemp("dagster")
    return Undisturbed(root, make_tiny_transfer(root / "transfers" / "tiny"), plain)


def test_a_dagster_of_which_a_part_was_killed(undisturbed: Undisturbed, campaign: Callable[..., None]) -> None:
    def kill(seed: int) -> str:
        dice, kind = Random(seed), list(KINDS)[seed % len(KINDS)]
        home = undisturbed.root / f"home{seed}" / "home"
        server = Server(home.parent)
        server.environment |= {
            "TUNESHIFT_TRANSFERS": str(undisturbed.folder.parent), "TUNESHIFT_CACHE": str(undisturbed.root / "cache"),
        }  # fmt: skip
        try:
            server.start()
            server.launch_backfill("tiny", [*WHOLE, *ROUND_ASSETS], ROUNDS)
            time.sleep(dice.uniform(0, 2 * undisturbed.seconds))
            killed = kill_first(server.process.pid, KINDS[kind], 60)
            time.sleep(dice.uniform(0, 8))
        finally:
            server.stop()
        shutil.copytree(undisturbed.root / "cache", home.parent / "cache")
        try:
            different = undisturbed.finished(home)
        except (AssertionError, TuneshiftError) as error:
            return f"not finished: {error}; {home}"
        if not different:
            shutil.rmtree(home.parent)
        return different or f"({kind if killed else 'none'})"

    must = "`tuneshift run` goes on; tables and adapter equal those of a run of which nothing was killed"
    campaign("SIGKILL of a part of Dagster", must, CASES, kill)


def kill_first(dagster: int, words: str, seconds: float) -> bool:
    """Kill a process of the deployment, as soon as there is one; False when there was none."""
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        for pid in parts.descendants(dagster):
            if words in parts.command(pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, SIGKILL)
                    return True
        time.sleep(0.05)
    return False
