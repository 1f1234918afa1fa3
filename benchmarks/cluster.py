"""The engine `ray` on this machine: its throughput against the local engine, and the memory of the writing process."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import GREEDY, REPETITIONS, prompts, ratio, source_files, spread
from tuneshift_dag.config.schema_models import RayCluster
from tuneshift_dag.engines.local import LocalEngine
from tuneshift_dag.engines.ray import RayEngine

PROMPTS = 128
BATCH = 32
ACTORS = 2
MEMORY_CASES = (1_000, 10_000, 100_000, 300_000)


class TimedEngine(LocalEngine):
    """Appends to ``log`` where and when each batch started and ended; loading and warming up come before that."""

    log: str

    def pairs(self, prompts: Any, known: Any, decoding: Any) -> Iterator[Any]:
        if not self._loaded:
            list(super().pairs(prompts[:1], [{}], decoding))
        started = time.time()
        yield from super().pairs(prompts, known, decoding)
        with open(self.log, "a") as log:
            log.write(json.dumps([torch.get_num_threads(), os.getpid(), len(prompts), started, time.time()]) + "\n")


def ray_vs_local() -> dict[str, Any]:
    """Pairs per second of two actors with a thread each, against the local engine with two threads, models loaded."""
    # Ray makes its workers nice; the local engine isn't, and whatever else runs here must hit both alike.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (its name)
    base, adapter = source_files()
    torch.set_num_threads(ACTORS)
    local = LocalEngine(base, adapter, "nf4", "bfloat16", BATCH)
    ids = [local.encode(text) for text in prompts(PROMPTS)]
    list(local.pairs(ids, [{} for _ in ids], GREEDY))
    rates: dict[str, list[float]] = {"local": [], "ray": []}
    seconds: dict[str, list[float]] = {"local": [], "ray": []}
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        list(local.pairs(ids, [{} for _ in ids], GREEDY))
        seconds["local"].append(time.perf_counter() - started)
        rates["local"].append(len(ids) / seconds["local"][-1])
        with tempfile.NamedTemporaryFile() as log:
            timed = TimedEngine(base, adapter, "nf4", "bfloat16", BATCH)
            timed.log = log.name
            started = time.perf_counter()
            found = list(RayEngine(timed, BATCH, RayCluster(actors=ACTORS)).pairs(ids, [{} for _ in ids], GREEDY))
            seconds["ray"].append(time.perf_counter() - started)
            assert sum(map(len, found)) == len(ids)
            rates["ray"].append(_rate(Path(log.name).read_text()))
    return ratio(
        [1 / rate for rate in rates["local"]],
        [1 / rate for rate in rates["ray"]],
        pairs_per_second={name: spread(values) for name, values in rates.items()},
        whole_call_seconds={name: spread(values) for name, values in seconds.items()},
        prompts=PROMPTS,
    )


def _rate(log: str) -> float:
    """The sum over actors of pairs per second from its first batch's start to its last's end, pauses included."""
    batches = defaultdict(list)
    for threads, actor, rows, started, ended in map(json.loads, log.splitlines()):
        assert threads == 1
        batches[actor].append((rows, started, ended))
    assert len(batches) == ACTORS
    return sum(
        sum(rows for rows, _, _ in own) / (max(ended for _, _, ended in own) - min(started for _, started, _ in own))
        for own in batches.values()
    )


def writer_memory() -> dict[str, Any]:
    """Growth of a whole `scored_pairs` step's peak memory, with a fake model on two actors or in its process."""
    cases = []
    for engine in ("ray", "process"):
        for count in MEMORY_CASES:
            command = [sys.executable, "-m", "benchmarks.writer_case", engine, str(count)]
            cases.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    return {**spread([case["peak_growth_bytes"] for case in cases]), "unit": "bytes", "by_prompts": cases}
