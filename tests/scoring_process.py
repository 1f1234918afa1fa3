"""`python -m tests.scoring_process DATABASE FIRST LAST`: scores prompts FIRST to LAST - 1 with a fake model.

A process of its own, so that a test can kill it or run two at once. It prints a line before each batch.
"""

import sys
import time
from pathlib import Path

from tests.fake_engine import FakeEngine
from tuneshift_dag.method import Decoding
from tuneshift_dag.method.scoring import Cost, score_pairs
from tuneshift_dag.store import Store
from tuneshift_dag.store.cache import ResponseCache

BATCH = 3


def score(database: Path, first: int, last: int, seconds_per_batch: float) -> FakeEngine:
    def on_batch(number: int) -> None:
        print("batch", flush=True)
        time.sleep(seconds_per_batch)

    engine = FakeEngine(batch_size=BATCH, on_batch=on_batch)
    prompts = [engine.encode(f"prompt {number}") for number in range(first, last)]
    score_pairs(engine, ResponseCache(Store(database)), prompts, Decoding(20), Cost())
    return engine


if __name__ == "__main__":
    score(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), 0.02)
