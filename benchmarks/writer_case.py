"""Memory of the process that writes what a cluster computes: ``python -m benchmarks.writer_case PROMPTS``."""

import json
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from tuneshift_dag.method.engine import Decoding, Pair, Response, Side
from tuneshift_dag.resources.memory import peak_bytes, reset_peak
from tuneshift_dag.resources.ray_engine import RayEngine
from tuneshift_dag.transfer import RayCluster

PROMPT_TOKENS, RESPONSE_TOKENS = 50, 24


class FakeModel:
    """Answers at once, with as many tokens as a model would."""

    cross_scores = True

    def pairs(self, prompts: Sequence[list[int]], known: Any, decoding: Decoding) -> Iterator[list[tuple[int, Pair]]]:
        for i, prompt in enumerate(prompts):
            tokens = [prompt[0] + t for t in range(RESPONSE_TOKENS)]
            answers = [Response(f"{side} answer " * 8, tokens, "stop", -1.0, -0.1) for side in ("base", "fine_tuned")]
            yield [(i, Pair(*answers, -2.0, -3.0))]


def main(count: int) -> None:
    draw = random.Random(0)
    prompts = [[draw.randrange(300, 49000) for _ in range(PROMPT_TOKENS)] for _ in range(count)]
    known: list[dict[Side, Response]] = [{} for _ in prompts]
    engine = RayEngine(FakeModel(), 32, RayCluster(actors=2))  # type: ignore[arg-type]
    list(engine.pairs(prompts[:64], known[:64], Decoding(RESPONSE_TOKENS)))  # starts the cluster and imports all
    before = psutil.Process().memory_info().rss
    reset_peak()
    started = time.perf_counter()
    rows = sum(map(len, engine.pairs(prompts, known, Decoding(RESPONSE_TOKENS))))
    seconds = time.perf_counter() - started
    assert rows == count
    shared = re.search(r"RssShmem:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(
        json.dumps(
            {
                "prompts": count,
                "peak_growth_bytes": peak_bytes() - before,
                "of_it_object_store_bytes": int(shared.group(1)) * 1024 if shared else None,
                "seconds": seconds,
            }
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
