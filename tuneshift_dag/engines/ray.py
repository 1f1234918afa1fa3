"""The local engine on a Ray cluster: batches go to a pool of actors, each with a model of its own.

The step's process alone writes results to the store, as they arrive. A batch is one task, so an actor that dies costs
the batch that it was at: Ray starts the actor again, and the batch is computed again. It is Ray's `ActorPool` and not
Ray Data, whose actors end with each dataset and which keeps every block until then."""

import logging
import math
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import methodcaller
from pathlib import Path
from typing import Any

# Read by Ray when it is imported, and on Linux too: a cluster that `ray.init` starts listens on 127.0.0.1 alone.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import ray
from ray.util import ActorPool

from tuneshift_dag import TuneshiftError
from tuneshift_dag.config.schema_models import RayCluster
from tuneshift_dag.method import CHUNK_SIZE, AdapterCheck, Decoding, Engine, Pair, PromptFormat, Response, Side

# A batch that has killed this many more actors would kill the next one too.
_RETRIES = 3
# Batches of each actor in a chunk of `pairs`. More take memory of the step's process, about 8 KB a prompt; with fewer,
# actors wait more often for the last batch of a chunk.
_CHUNK_TURNS = 16
# Bytes for prompts and results on their way, in a cluster of our own; Ray writes to disk what doesn't fit.
_OBJECT_STORE = 256 * 2**20


class RayEngine(Engine):
    """The actors of a cluster, each with a copy of ``engine`` that loads its model there. They live as long as a
    `session`, or else one call of `generate`, `pairs` or `score`, so that the next model finds their memory free."""

    def __init__(self, engine: Engine, batch_size: int, settings: RayCluster, files: Sequence[Path] = ()) -> None:
        """``batch_size``: most prompts that an actor works on at once; ``files``: what every node must have."""
        self.engine = engine
        self.cross_scores = engine.cross_scores
        self.chunk_size = max(CHUNK_SIZE, _CHUNK_TURNS * settings.actors * batch_size)
        self.batch_size = batch_size
        self.settings = settings
        self.files = files
        self._sessions = 0
        self._actors: list[Any] = []

    @contextmanager
    def session(self) -> Iterator[None]:
        self._sessions += 1
        try:
            yield
        finally:
            self._sessions -= 1
            if not self._sessions:
                self._end_actors()

    def fingerprint(self, side: Side) -> str:
        return self.engine.fingerprint(side)

    def encode(self, text: str, templated: bool = False) -> list[int]:
        return self.engine.encode(text, templated)

    def chat_ids(self, message: str) -> list[int]:
        return self.engine.chat_ids(message)

    def prompt_ids(self, prompt: str, format: PromptFormat) -> list[int]:
        return self.engine.prompt_ids(prompt, format)

    def check_adapter(self, prompts: Sequence[list[int]]) -> AdapterCheck:
        [(_, check)] = self._run([methodcaller("check_adapter", prompts)], 1)
        assert isinstance(check, AdapterCheck)
        return check

    def generate(
        self, prompts: Sequence[list[int]], side: Side, decoding: Decoding, seeds: Sequence[int] | None = None
    ) -> Iterator[list[tuple[int, Response]]]:
        def call(batch: list[int]) -> methodcaller:
            own_seeds = [seeds[i] for i in batch] if seeds else None
            return methodcaller("generate", [prompts[i] for i in batch], side, decoding, own_seeds)

        yield from self._map([len(p) for p in prompts], call)

    def pairs(
        self, prompts: Sequence[list[int]], known: Sequence[dict[Side, Response]], decoding: Decoding
    ) -> Iterator[list[tuple[int, Pair]]]:
        def call(batch: list[int]) -> methodcaller:
            return methodcaller("pairs", [prompts[i] for i in batch], [known[i] for i in batch], decoding)

        yield from self._map([len(p) for p in prompts], call)

    def score(
        self, prompts: Sequence[list[int]], responses: Sequence[list[int]], side: Side
    ) -> Iterator[list[tuple[int, float]]]:
        def call(batch: list[int]) -> methodcaller:
            return methodcaller("score", [prompts[i] for i in batch], [responses[i] for i in batch], side)

        yield from self._map([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], call)

    def _map(self, lengths: list[int], call: Callable[[list[int]], methodcaller]) -> Iterator[list[tuple[int, Any]]]:
        batches = balanced_batches(lengths, self.batch_size, self.settings.actors)
        for number, results in self._run(map(call, batches), len(batches)):
            yield [(batches[number][i], result) for i, result in results]

    def _run(self, calls: Iterable[methodcaller], count: int) -> Iterator[tuple[int, Any]]:
        """Results of ``count`` calls on the actors' engines as they finish, each with its place in ``calls``. After a
        failure no more calls are made; what had begun is still handed over before it is raised."""
        if not count:
            return
        waiting = enumerate(calls)
        failure: Exception | None = None
        with self.session():
            pool = self._pool(count)
            try:
                while True:
                    while failure is None and pool.has_free() and (call := next(waiting, None)):
                        pool.submit(lambda actor, call: actor.work.remote(*call), call)
                    if not pool.has_next():
                        break
                    try:
                        number, pickled = pool.get_next_unordered()
                    except ray.exceptions.RayError as error:
                        failure = _given_up(error)
                        continue
                    result = pickle.loads(pickled)
                    if isinstance(result, Exception):
                        failure = result
                    else:
                        yield number, result
            finally:
                if pool.has_next():  # nobody will ask for what they are at
                    self._end_actors()
            if failure is not None:
                raise failure

    def _pool(self, calls: int) -> "ActorPool[Any]":
        """As many actors as there are in the settings, those of this session among them; no more than calls."""
        connect(self.settings)
        actor = ray.remote(_Actor).options(
            num_cpus=self.settings.cpus_per_actor,
            num_gpus=self.settings.gpus_per_actor,
            max_restarts=-1,
            max_task_retries=_RETRIES,
        )
        while len(self._actors) < min(self.settings.actors, calls):
            self._actors.append(actor.remote(self.engine, self.settings.cpus_per_actor, self.files))
        return ActorPool(self._actors)

    def _end_actors(self) -> None:
        while self._actors:
            ray.kill(self._actors.pop())


class _Actor:
    def __init__(self, engine: Engine, threads: int, files: Sequence[Path]) -> None:
        self.engine = engine
        self.files = files
        if torch := sys.modules.get("torch"):  # there when the engine needs it
            torch.set_num_threads(threads)

    def work(self, number: int, call: methodcaller) -> tuple[int, bytes]:
        # An exception goes back as a result: Ray's own way wraps it in two pages of tracebacks.
        try:
            return number, pickle.dumps(self._result(call))
        except Exception as error:
            if not isinstance(error, TuneshiftError):
                error.add_note(f"In an actor on {ray.util.get_node_ip_address()}:\n{traceback.format_exc()}")
            return number, pickle.dumps(error)

    def _result(self, call: methodcaller) -> Any:
        for path in self.files:
            if not path.exists():
                raise TuneshiftError(
                    f"engine.ray: the node {ray.util.get_node_ip_address()} has no {path}. Keep transfers,"
                    " $TUNESHIFT_CACHE and $HF_HOME in folders that every node sees under the same path."
                )
        result = call(self.engine)
        return [item for batch in result for item in batch] if isinstance(result, Iterator) else result


def balanced_batches(lengths: Sequence[int], batch_size: int, actors: int) -> list[list[int]]:
    """Indices of rows in batches of similar length, longest first, so that no actor works long after the others: as
    few batches as ``batch_size`` allows, but as many for every actor."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    turns = math.ceil(len(order) / (batch_size * actors))
    size = max(1, math.ceil(len(order) / max(1, turns * actors)))
    return [order[start : start + size] for start in range(0, len(order), size)]


def connect(settings: RayCluster) -> None:
    """Connect this process to the cluster, or start one of this machine that ends with this process. Raises
    `TuneshiftError` when there is none, or it hasn't the CPUs and GPUs that ``settings`` ask for."""
    if not ray.is_initialized():
        cpus = settings.actors * settings.cpus_per_actor
        own = {"num_cpus": cpus, "object_store_memory": _OBJECT_STORE, "include_dashboard": False}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        handler = signal.getsignal(signal.SIGTERM)
        try:
            options = {} if settings.address else own
            ray.init(settings.address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            if not settings.address:
                raise
            raise TuneshiftError(
                f"engine.ray.address: no Ray cluster answers at {settings.address!r} ({_first_line(error)}). Start one"
                " with `ray start --head`; if it wants a token, export RAY_AUTH_MODE=token; or leave the address out to"
                " use this machine alone."
            ) from error
        finally:
            # Dagster's own handler turns a termination into a cancelled run.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)
    _check_room(settings)


def _check_room(settings: RayCluster) -> None:
    """Ray would wait for ever for actors that fit on no node."""
    needs = {"CPU": settings.cpus_per_actor, "GPU": settings.gpus_per_actor}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(min(int(node.get(kind, 0) / need) for kind, need in needs.items() if need) for node in nodes)
    if room < settings.actors:
        has = ", ".join(f"{sum(node.get(kind, 0) for node in nodes):g} {kind}s" for kind in needs)
        raise TuneshiftError(
            f"engine.ray: {settings.actors} actors with {settings.cpus_per_actor} CPUs and {settings.gpus_per_actor:g}"
            f" GPUs each don't fit: the cluster has {has} on {len(nodes)} nodes, room for {room}. Lower actors,"
            " cpus_per_actor or gpus_per_actor, or add nodes."
        )


def _given_up(error: ray.exceptions.RayError) -> TuneshiftError:
    failure = TuneshiftError(
        f"engine.ray: Ray gave up on a batch ({_first_line(error)}). Actors mostly die of a lack of memory: lower"
        " models.batch_size or engine.ray.actors. What had finished is kept. Ray's logs are in"
        " /tmp/ray/session_latest/logs of each node."
    )
    failure.__cause__ = error
    return failure


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"
