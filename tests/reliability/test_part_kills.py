"""SIGKILL of one process of a run: a worker of the local engine, a process of the training, an actor of a Ray cluster,
the vLLM server that a step has started. And of a whole run that has such processes: none of them stays."""

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.broken_engine import SlowEngine
from tests.conftest import edit, make_transfer_folder
from tests.engines.test_openai import ServedModels
from tests.fake_server import FakeServer, save_tokenizer
from tests.fakes import FakeModels
from tests.reliability import parts
from tests.reliability.conftest import ROOT
from tests.reliability.whole_run import (
    Undisturbed,
    fake,
    little,
    log_of,
    make_tiny_transfer,
    refused,
    start,
    use_models,
)

pytestmark = pytest.mark.reliability
CASES = int(os.environ.get("TUNESHIFT_PART_KILLS", 10))
"""Of each kind."""
EQUAL = "tables and adapter equal those of a run of which nothing was killed"
FAKE = [sys.executable, str(ROOT / "tests" / "fake_vllm.py"), "serve"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Two processes for answers and scores, and two for the training."""
    root = tmp_path_factory.mktemp("parts")
    return Undisturbed(root, make_tiny_transfer(root / "transfers" / "tiny", **{"models.workers": 2}), little)


def test_workers_of_the_local_engine(shared: Undisturbed, campaign: Callable[..., None]) -> None:
    def kill(seed: int) -> str:
        home, dice, seen, killed = shared.root / f"workers{seed}", Random(seed), set[int](), 0
        run = start(home, shared.folder, little)
        while parts.kill_one(run, parts.workers, dice, seen, dice.randrange(4), 0.03):
            killed += 1
        return ended_well(run, home) or reported(shared.different(home), home, f"{killed} workers")

    campaign("SIGKILL of workers", f"the run goes on without a word; {EQUAL}", CASES, kill)


def test_processes_of_the_training(shared: Undisturbed, campaign: Callable[..., None]) -> None:
    before = shared.root / "before"  # all but the training
    if not before.exists():
        run = start(before, shared.folder, little)
        assert parts.kill_one(run, parts.trainers, Random(0), set(), 0, 0)
        run.kill()
        run.join()

    def kill(seed: int) -> str:
        home, dice = shared.root / f"training{seed}", Random(seed)
        shutil.copytree(before, home)
        run = start(home, shared.folder, little)
        killed = parts.kill_one(run, parts.trainers, dice, set(), dice.randrange(2), shared.seconds / 2)
        if problem := refused(home, run, ("a process of the training was killed",)):
            return problem
        return reported(shared.finished(home), home, "a training's process" if killed else "none")

    campaign("SIGKILL of a process of the training", f"one message; then {EQUAL}", CASES, kill)


def test_a_run_takes_its_processes_with_it(shared: Undisturbed, campaign: Callable[..., None]) -> None:
    def kill(seed: int) -> str:
        home, dice, kind = shared.root / f"orphans{seed}", Random(seed), ("workers", "trainers")[seed % 2]
        run, find = start(home, shared.folder, little), getattr(parts, kind)
        assert run.pid is not None
        skip, seen = dice.randrange(10 if kind == "workers" else 2), set[int]()
        while run.exitcode is None and len(seen) <= skip:
            seen.update(find(run.pid))
            time.sleep(0.002)
        time.sleep(dice.uniform(0, 0.05 if kind == "workers" else 3))
        own = parts.descendants(run.pid)
        run.kill()
        run.join()
        if left := parts.still_there(own, 20):
            return f"still there: {list(map(parts.command, left))}"
        return reported(shared.finished(home), home, f"with {kind}")

    campaign("SIGKILL of a run with processes", f"none of them is there after 20 s; {EQUAL}", CASES, kill)


def on_vllm(port: int, notes: Path, patch: pytest.MonkeyPatch) -> None:
    """Source and generator are on a vLLM that a step starts, whose stand-in asks the server at ``port``."""
    patch.setenv("FAKE_VLLM_SERVER", str(port))
    patch.setenv("FAKE_VLLM_NOTES", str(notes))
    use_models(patch, ServedModels())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Undisturbed]:
    root = tmp_path_factory.mktemp("vllm")
    folder = make_transfer_folder(root)
    base = folder / "models" / "tiny-base"
    save_tokenizer(base)
    vllm = {"command": FAKE, "concurrency": 2}
    generator = {"mode": "continuation", "calls_per_round": 6, "server": {"type": "vllm", **vllm}}
    edit(folder, {"engine": {"type": "vllm", "vllm": vllm}, **{f"generator.{key}": v for key, v in generator.items()}})
    sides: Any = {"base": "base", "fine_tuned": "fine_tuned", "generator": "base"}
    with FakeServer(base, sides=sides, before=lambda server, body: time.sleep(0.02)) as server:
        yield Undisturbed(root, folder, partial(on_vllm, urlsplit(server.url).port, root / "notes"))


def test_the_vllm_server_of_a_step(served: Undisturbed, campaign: Callable[..., None]) -> None:
    def kill(seed: int) -> str:
        home, dice = served.root / f"home{seed}", Random(seed)
        kind = ("servers", "engines", "keepers")[seed % 3]
        run = start(home, served.folder, served.prepare)
        killed = parts.kill_one(run, getattr(parts, kind), dice, set(), dice.randrange(4), 1.0)
        if problem := refused(home, run, ("vLLM with",)):
            return problem
        how = f"{kind[:-1]}{' unnoticed' if run.exitcode == 0 else ''}" if killed else "none"
        different = served.finished(home)
        if left := [pid for pid in parts.everything() if str(served.folder) in parts.command(pid)]:
            return f"still there: {list(map(parts.command, left))}"
        return reported(different, home, how)

    campaign("SIGKILL of the vLLM server", f"one message that names it, or none; then {EQUAL}", CASES, kill)


def on_ray(patch: pytest.MonkeyPatch) -> None:
    from tuneshift_dag.config.schema_models import RayCluster
    from tuneshift_dag.engines.ray import RayEngine

    engine = SlowEngine("source", batch_size=2)
    use_models(patch, FakeModels(RayEngine(engine, 2, RayCluster(actors=2))))  # type: ignore[arg-type]


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra `ray` isn't installed")
def test_actors_of_a_ray_cluster(tmp_path: Path, campaign: Callable[..., None]) -> None:
    folder = make_transfer_folder(tmp_path)
    edit(folder, {"generator.calls_per_round": 8})
    whole = Undisturbed(tmp_path, folder, fake)

    def kill(seed: int) -> str:
        home, dice, seen, killed = tmp_path / f"home{seed}", Random(seed), set[int](), 0
        run = start(home, folder, on_ray)
        while killed < 3 and parts.kill_one(run, parts.actors, dice, seen, dice.randrange(2), 0.5):
            killed += 1
        return ended_well(run, home) or reported(whole.different(home), home, f"{killed} actors")

    campaign("SIGKILL of Ray actors", f"the run goes on without a word; {EQUAL}", CASES, kill)


def ended_well(run: BaseProcess, home: Path) -> str:
    """What is wrong with how a run has ended; empty for nothing."""
    if problem := refused(home, run, ()):
        return problem
    return "" if "Traceback" not in log_of(home).read_text() else f"a traceback in {log_of(home)}"


def reported(different: str, home: Path, counted: str) -> str:
    """What a case says of itself."""
    if different:
        return f"{different} ({counted}); {home}"
    shutil.rmtree(home)
    return f"({counted})"
