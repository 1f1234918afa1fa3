"""The local engine on a Ray cluster: Ray Data maps it over a pool of actors, each with a model of its own.

Actors compute and hand results back; the step's process alone writes them to the store, as they arrive. A batch is
one block and one task, so an actor that dies costs the batch that it was at: Ray starts the actor again, and the
batch is computed again.
"""

import logging
import math
import os
import pickle
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any

# Read by Ray when it is imported, and on Linux too: a cluster that `ray.init` starts listens on 127.0.0.1 alone.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import pyarrow as pa
import ray
import ray.data

from tuneshift_dag.errors import TuneshiftError
from tuneshift_dag.method.engine import CHUNK_SIZE, Decoding, Engine, Pair, Response, Side
from tuneshift_dag.method.preflight import AdapterCheck
from tuneshift_dag.transfer import RayCluster

# A batch that has killed this many more actors would kill the next one too.
_RETRIES = 3
# Batches of each actor in one Ray dataset, all of which Ray keeps until its end. A next dataset starts its actors anew.
_TURNS = 250
# Batches of each actor in a chunk of `pairs`. More take memory of the step's process, about 8 KB a prompt; fewer have
# actors start and load the model more often.
_CHUNK_TURNS = 64
# Bytes for prompts and results on their way, in a cluster of our own; Ray writes to disk what doesn't fit.
_OBJECT_STORE = 256 * 2**20


class RayEngine:
    """Implements `tuneshift_dag.method.engine.Engine` with the actors of a cluster that do what ``engine`` does.

    An actor gets a copy of ``engine``, which loads its model there and never in this process. Actors live as long as
    one call of `generate`, `pairs` or `score`, so that the next model finds their memory free.
    """

    def __init__(self, engine: Engine, batch_size: int, settings: RayCluster, files: Sequence[Path] = ()) -> None:
        """
        Args:
            batch_size: most prompts that an actor works on at once.
            files: what every node must have.
        """
        self.engine = engine
        self.cross_scores = engine.cross_scores
        self.chunk_size = max(CHUNK_SIZE, _CHUNK_TURNS * settings.actors * batch_size)
        self.batch_size = batch_size
        self.settings = settings
        self.files = files

    def fingerprint(self, side: Side) -> str:
        """That of ``engine``: the results are the same, and so are their places in the cache."""
        return self.engine.fingerprint(side)

    def encode(self, text: str, templated: bool = False) -> list[int]:
        return self.engine.encode(text, templated)

    def render_chat(self, message: str) -> str:
        return self.engine.render_chat(message)

    def check_adapter(self, prompts: Sequence[str]) -> AdapterCheck:
        [(_, check)] = self._run([methodcaller("check_adapter", prompts)])
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
        yield from self._scores("score", prompts, responses, side)

    def token_scores(
        self, prompts: Sequence[list[int]], responses: Sequence[list[int]], side: Side
    ) -> Iterator[list[tuple[int, list[float]]]]:
        yield from self._scores("token_scores", prompts, responses, side)

    def _scores(
        self, method: str, prompts: Sequence[list[int]], responses: Sequence[list[int]], side: Side
    ) -> Iterator[list[tuple[int, Any]]]:
        def call(batch: list[int]) -> methodcaller:
            return methodcaller(method, [prompts[i] for i in batch], [responses[i] for i in batch], side)

        yield from self._map([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], call)

    def _map(self, lengths: list[int], call: Callable[[list[int]], methodcaller]) -> Iterator[list[tuple[int, Any]]]:
        """Results of calls on batches of rows, each with the index of its row."""
        batches = balanced_batches(lengths, self.batch_size, self.settings.actors)
        most = _TURNS * self.settings.actors
        for start in range(0, len(batches), most):
            for number, results in self._run(map(call, batches[start : start + most])):
                yield [(batches[start + number][i], result) for i, result in results]

    def _run(self, calls: Iterable[methodcaller]) -> Iterator[tuple[int, Any]]:
        """Results of calls on the actors' engines as they finish, each with its place in ``calls``.

        Closing the iterator ends the actors.
        """
        items = [{"number": number, "pickled": pickle.dumps(call)} for number, call in enumerate(calls)]
        connect(self.settings)
        actors = min(self.settings.actors, len(items))
        dataset = ray.data.from_items(items, override_num_blocks=len(items))
        del items  # they are in the object store now
        with warnings.catch_warnings():
            # Ray Data is to lose max_restarts and max_task_retries, without which it tries a batch again for ever.
            warnings.simplefilter("ignore", DeprecationWarning)
            results = dataset.map_batches(
                _Actor,
                fn_constructor_args=(self.engine, self.settings.cpus_per_actor, self.files),
                compute=ray.data.ActorPoolStrategy(
                    size=actors,
                    # None waits in an actor: each death there would be counted as its failure too.
                    max_tasks_in_flight_per_actor=1,
                ),
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=self.settings.cpus_per_actor,
                num_gpus=self.settings.gpus_per_actor,
                max_restarts=-1,
                max_task_retries=_RETRIES,
            )
        results.context.enable_progress_bars = False
        try:
            # Nothing is fetched ahead: a batch would wait for the next one before it is stored.
            for block in results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                result = pickle.loads(block["pickled"][0].as_py())
                if isinstance(result, Exception):
                    raise result
                yield block["number"][0].as_py(), result
        except ray.exceptions.RayError as error:
            raise TuneshiftError(
                f"engine.ray: Ray gave up on a batch ({_first_line(error)}). Actors mostly die of a lack of memory:"
                " lower models.batch_size or engine.ray.actors. What had finished is kept. Ray's logs are in"
                " /tmp/ray/session_latest/logs of each node."
            ) from error


class _Actor:
    """One worker of the pool: what Ray Data makes of it is an actor of its own process."""

    def __init__(self, engine: Engine, threads: int, files: Sequence[Path]) -> None:
        self.engine = engine
        self.files = files
        torch = sys.modules.get("torch")  # there when the engine needs it
        if torch is not None:
            torch.set_num_threads(threads)

    def __call__(self, block: pa.Table) -> pa.Table:
        # An exception goes back as a result: Ray's own way wraps it in two pages of tracebacks.
        try:
            result = self._result(pickle.loads(block["pickled"][0].as_py()))
            pickled = pickle.dumps(result)
        except Exception as error:
            if not isinstance(error, TuneshiftError):
                error.add_note(f"In an actor on {ray.util.get_node_ip_address()}:\n{traceback.format_exc()}")
            pickled = pickle.dumps(error)
        return pa.table({"number": block["number"], "pickled": [pickled]})

    def _result(self, call: methodcaller) -> Any:
        for path in self.files:
            if not path.exists():
                raise TuneshiftError(
                    f"engine.ray: the node {ray.util.get_node_ip_address()} has no {path}. Keep transfers,"
                    " $TUNESHIFT_CACHE, $HF_HOME and, for filter.discriminator, $TUNESHIFT_HOME in folders that every"
                    " node sees under the same path."
                )
        result = call(self.engine)
        return [item for batch in result for item in batch] if isinstance(result, Iterator) else result


def balanced_batches(lengths: Sequence[int], batch_size: int, actors: int) -> list[list[int]]:
    """Indices of rows in batches of similar length, longest first, so that no actor works long after the others.

    There are as few batches as ``batch_size`` allows, but as many for every actor.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    turns = math.ceil(len(order) / (batch_size * actors))
    size = max(1, math.ceil(len(order) / max(1, turns * actors)))
    return [order[start : start + size] for start in range(0, len(order), size)]


def connect(settings: RayCluster) -> None:
    """Connect this process to the cluster, or start one of this machine that ends with this process.

    Raises:
        TuneshiftError: when there is no cluster, or it hasn't the CPUs and GPUs that ``settings`` ask for.
    """
    if not ray.is_initialized():
        own = {
            "num_cpus": settings.actors * settings.cpus_per_actor,
            "object_store_memory": _OBJECT_STORE,
            "include_dashboard": False,
        }
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(
                settings.address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                **({} if settings.address else own),
            )
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
        logging.getLogger("ray.data").setLevel(logging.ERROR)
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


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
