"""The Ray engine on a real cluster of this machine with two actors: what it gives is what the engine in them gives."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from tests.broken_engine import BrokenEngine
from tests.conftest import Project
from tests.engines.test_local import TRANSFER, smollm2
from tests.fake_engine import FakeEngine
from tests.fakes import FakeModels
from tuneshift_dag import TuneshiftError
from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.config.schema_models import RayCluster
from tuneshift_dag.engines import ray as ray_engine
from tuneshift_dag.engines.local import LocalEngine
from tuneshift_dag.engines.ray import RayEngine, balanced_batches, connect
from tuneshift_dag.method import Decoding, Pair, Response, Side
from tuneshift_dag.resources import EngineResource

CLUSTER = RayCluster(actors=2)
GREEDY = Decoding(8)
QUERIES = [json.loads(line)["prompt"] for line in (TRANSFER / "heldout.jsonl").read_text().splitlines()[:96:8]]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Started by the first engine that needs one; every test uses the same."""
    yield
    ray_engine.ray.shutdown()


class WatchedEngine(LocalEngine):
    """The local engine; it writes its process and the size of every batch to a file before it starts on it."""

    log: Path

    def pairs(
        self, prompts: Sequence[list[int]], known: Sequence[dict[Side, Response]], decoding: Decoding
    ) -> Iterator[list[tuple[int, Pair]]]:
        with self.log.open("a") as log:
            log.write(json.dumps([os.getpid(), prompts]) + "\n")
        yield from super().pairs(prompts, known, decoding)


def collect(batches: Iterator[list[tuple[int, Any]]]) -> list[Any]:
    found = dict(item for batch in batches for item in batch)
    return [found[i] for i in range(len(found))]


def kill_during_batch(log: Path, number: int, killed: list[int]) -> None:
    """Kill the actor that starts on batch ``number`` (from 1), as soon as it has."""
    deadline = time.monotonic() + 600  # of a busy machine, which starts a cluster in minutes
    while time.monotonic() < deadline:
        lines = log.read_text().splitlines() if log.exists() else []
        if len(lines) >= number:
            killed.append(json.loads(lines[number - 1])[0])
            os.kill(killed[0], signal.SIGKILL)
            return
        time.sleep(0.005)


def test_a_killed_actor_costs_its_batch_and_the_results_are_the_local_engines(tmp_path: Path) -> None:
    # In one thread and in the same batches the local engine does exactly the same work.
    threads = torch.get_num_threads()
    local = smollm2("float32", batch_size=2)
    ids = [local.encode(f"Customer query: {query}\nIntent:") for query in QUERIES]
    watched = WatchedEngine(local.base, local.adapter, "nf4", "float32", 2)
    watched.log = tmp_path / "log"
    killed: list[int] = []
    killer = threading.Thread(target=kill_during_batch, args=(watched.log, 3, killed))
    killer.start()
    engine = RayEngine(watched, 2, CLUSTER)
    found = collect(engine.pairs(ids, [{} for _ in ids], GREEDY))
    killer.join()

    batches = [json.loads(line) for line in watched.log.read_text().splitlines()]
    assert len({pid for pid, _ in batches}) == 3, "two actors, and the one that replaced the killed one"
    times = Counter(str(prompts) for _, prompts in batches)
    assert sorted(times.values()) == [1, 1, 1, 1, 1, 2]
    assert batches[2][0] == killed[0] and times[str(batches[2][1])] == 2

    assert engine.fingerprint("fine_tuned") == local.fingerprint("fine_tuned")
    torch.set_num_threads(1)
    expected = collect(local.pairs(ids, [{} for _ in ids], GREEDY))
    torch.set_num_threads(threads)
    assert len(found) == len(expected) == len(ids)
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in ((ours.base, theirs.base), (ours.fine_tuned, theirs.fine_tuned)):
            assert (a.text, a.token_ids, a.finish_reason) == (b.text, b.token_ids, b.finish_reason)
        assert numbers(ours) == pytest.approx(numbers(theirs), rel=1e-4, abs=1e-4)


def numbers(pair: Pair) -> list[float]:
    """Every log-probability of a pair, 0 for none."""
    own = [value for r in (pair.base, pair.fine_tuned) for value in (r.sum_logprob, r.eos_logprob)]
    return [value or 0.0 for value in [*own, pair.base_on_fine_tuned, pair.fine_tuned_on_base]]


def test_sampled_responses_and_scores_are_each_prompts_own() -> None:
    fake = FakeEngine()
    engine = RayEngine(fake, 2, CLUSTER)
    prompts = [fake.encode("x" * n) for n in (3, 9, 1, 7, 5)]
    sampling, seeds = Decoding(200, temperature=1.0), [10, 11, 12, 13, 14]
    answers = collect(engine.generate(prompts, "base", sampling, seeds))
    assert answers == collect(fake.generate(prompts, "base", sampling, seeds))
    responses = [answer.token_ids for answer in answers]
    assert collect(engine.score(prompts, responses, "base")) == collect(fake.score(prompts, responses, "base"))


def test_actors_stay_for_a_session_and_otherwise_for_one_call(tmp_path: Path) -> None:
    log = tmp_path / "log"
    engine = RayEngine(BrokenEngine(9, fatal=False, log=log), 1, CLUSTER)

    def actors() -> set[int]:
        log.unlink(missing_ok=True)
        assert len(collect(engine.generate([[1], [1, 2]], "base", GREEDY))) == 2
        return {int(line.split()[0]) for line in log.read_text().splitlines()}

    assert list(engine.generate([], "base", GREEDY)) == []
    assert not actors() & actors()
    with engine.session():
        first = actors()
        assert actors() == first and len(first) == 2
    assert ended(first)


def test_a_call_that_nobody_reads_to_its_end_leaves_nothing_to_the_next_one(tmp_path: Path) -> None:
    engine = RayEngine(BrokenEngine(9, fatal=False, log=tmp_path / "log"), 1, CLUSTER)
    with engine.session():
        unread = engine.generate([[1]] * 8, "base", GREEDY)
        next(unread)
        unread.close()
        assert [i for batch in engine.generate([[1, 2]], "base", GREEDY) for i, _ in batch] == [0]
    assert (tmp_path / "log").read_text().count(" 1\n") < 8


def ended(pids: set[int]) -> bool:
    """Whether these processes end within ten seconds."""
    actors = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    return psutil.wait_procs(actors, timeout=10)[1] == []


def test_an_actors_exception_arrives_with_its_traceback_and_ends_the_actors(tmp_path: Path) -> None:
    log = tmp_path / "log"
    engine = RayEngine(BrokenEngine(1, fatal=False, log=log), 1, CLUSTER)
    found = []
    with pytest.raises(ValueError, match="too short") as error:
        for batch in engine.generate([[1], [1, 2], [1, 2, 3]], "base", GREEDY):
            found += batch
    assert sorted(i for i, _ in found) == [1, 2]
    assert "In an actor on 127.0.0.1" in error.value.__notes__[0] and "broken_engine.py" in error.value.__notes__[0]
    assert ended({int(line.split()[0]) for line in log.read_text().splitlines()})


def test_a_batch_that_kills_every_actor_ends_the_run_and_no_other_batch_is_lost(tmp_path: Path) -> None:
    log = tmp_path / "log"
    engine = RayEngine(BrokenEngine(1, fatal=True, log=log), 1, CLUSTER)
    found = []
    with pytest.raises(TuneshiftError, match=r"engine\.ray: Ray gave up on a batch \(Actor.*lower models\.batch_size"):
        for batch in engine.generate([[1], [1, 2], [1, 2, 3]], "base", GREEDY):
            found += batch
    assert sorted(i for i, _ in found) == [1, 2]
    assert log.read_text().count(" 1\n") == 4


def test_a_node_without_the_files_is_named(tmp_path: Path) -> None:
    engine = RayEngine(FakeEngine(), 2, CLUSTER, [tmp_path / "model"])
    with pytest.raises(TuneshiftError, match=rf"node 127\.0\.0\.1 has no {tmp_path / 'model'}\. Keep transfers"):
        engine.check_adapter([[1]])


def test_actors_that_fit_nowhere_are_refused() -> None:
    for settings, words in [
        ({"gpus_per_actor": 1}, "2 actors with 1 CPUs and 1 GPUs each .* 2 CPUs, 0 GPUs on 1 nodes, room for 0"),
        ({"actors": 3}, "room for 2. Lower actors"),
    ]:
        with pytest.raises(TuneshiftError, match=f"engine.ray: .*{words}"):
            connect(RayCluster(**settings))


def test_only_this_machine_can_reach_the_cluster() -> None:
    connect(CLUSTER)
    listening = []
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # an actor that is just ending
            listening += [c for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert listening
    assert {c.laddr.ip.removeprefix("::ffff:") for c in listening} == {"127.0.0.1"}


def test_the_graph_gives_the_same_table_with_ray(project: Project) -> None:
    fake = FakeEngine("source")
    project.models = FakeModels(RayEngine(fake, 8, CLUSTER))
    for assets, round_ in [(["seed_set"], None), (["synthetic_prompts", "scored_pairs"], "round_01")]:
        assert project.materialize(*assets, round=round_).success
    rows = project.rows("SELECT * FROM scored_pairs ORDER BY prompt_id")
    assert len(rows) > 8
    project.models = FakeModels(fake)
    assert project.materialize("scored_pairs", round="round_01").success
    assert fake.answered == [], "the results of the cluster are those of the local engine, and cached as such"
    assert project.rows("SELECT * FROM scored_pairs ORDER BY prompt_id") == rows


def test_actors_share_a_gpu() -> None:
    """Ray takes our word for the GPU, and the fake engine needs none."""
    ray_engine.ray.shutdown()
    ray_engine.ray.init("local", num_cpus=2, num_gpus=1, object_store_memory=2**27, include_dashboard=False)
    fake = FakeEngine()
    prompts = [fake.encode("x" * n) for n in (3, 9, 1)]
    engine = RayEngine(fake, 1, RayCluster(actors=2, gpus_per_actor=0.5))
    expected = collect(fake.generate(prompts, "base", GREEDY))
    assert collect(engine.generate(prompts, "base", GREEDY)) == expected


def test_the_setting_puts_source_and_generator_on_the_cluster(transfer_folder, edit_config, monkeypatch) -> None:
    monkeypatch.setattr(LocalEngine, "ends", {0})
    monkeypatch.setattr(LocalEngine, "tokenizer", SimpleNamespace(eos_token_id=0))
    edit_config("engine", {"type": "ray", "ray": {"actors": 3}})
    transfer, engines = load_transfer(transfer_folder), EngineResource()
    source, generator, target = engines.source(transfer), engines.generator(transfer), engines.target(transfer)
    engines.release()
    assert isinstance(source, RayEngine) and isinstance(generator, RayEngine) and isinstance(target, LocalEngine)
    assert source.settings.actors == 3
    assert [file.name for file in source.files] == ["tiny-base", "adapter"]
    assert source.fingerprint("base") == target.fingerprint("base")


def test_without_ray_the_extra_is_named(transfer_folder, edit_config, monkeypatch) -> None:
    edit_config("engine", {"type": "ray"})
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "tuneshift_dag.engines.ray")
    with pytest.raises(TuneshiftError, match=r"engine\.type .* ray.*pip install 'tuneshift-dag\[ray\]'"):
        EngineResource().source(load_transfer(transfer_folder))


@pytest.mark.parametrize(
    ("rows", "batch_size", "actors", "sizes"),
    [
        (0, 32, 2, []),
        (1, 32, 2, [1]),
        (10, 32, 2, [5, 5]),
        (96, 32, 2, [24, 24, 24, 24]),
        (128, 32, 2, [32, 32, 32, 32]),
        (5, 2, 2, [2, 2, 1]),
    ],
)
def test_every_actor_has_as_many_batches(rows: int, batch_size: int, actors: int, sizes: list[int]) -> None:
    lengths = [i * 7 % 11 for i in range(rows)]
    batches = balanced_batches(lengths, batch_size, actors)
    assert [len(batch) for batch in batches] == sizes
    order = [i for batch in batches for i in batch]
    assert sorted(order) == list(range(rows))
    assert [lengths[i] for i in order] == sorted(lengths, reverse=True)
