"""Memory of the process that writes a round's scored pairs: ``python -m benchmarks.writer_case ENGINE PROMPTS``.

The whole step as Dagster runs it (prompts read and tokenized, results cached batch by batch, table, data version and
checks), in a database of its own and with a model that answers at once. ENGINE is ``process``, the model in this
process, or ``ray``, on two actors.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import dagster as dg
import psutil

from tuneshift_dag.config import Transfer
from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.config.schema_models import RayCluster
from tuneshift_dag.engines.ray import RayEngine
from tuneshift_dag.home import database_file
from tuneshift_dag.method import CHUNK_SIZE, Decoding, Engine, Pair, Response, Side
from tuneshift_dag.models.memory import peak_bytes
from tuneshift_dag.resources import EngineResource
from tuneshift_dag.runner import Runner
from tuneshift_dag.store import Store
from tuneshift_dag.store.tables import SYNTHETIC_PROMPTS

PROMPT_TOKENS, RESPONSE_TOKENS, BATCH = 50, 24, 32
WARM_UP, MEASURED = "round_01", "round_02"


class FakeModel:
    """Answers at once, with as many tokens as a model would."""

    cross_scores = True
    chunk_size = CHUNK_SIZE

    def session(self) -> AbstractContextManager[None]:
        return nullcontext()

    def fingerprint(self, side: Side) -> str:
        return f"fake|{side}"

    def encode(self, text: str, templated: bool = False) -> list[int]:
        first = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        return [300 + (first + 7919 * place) % 48000 for place in range(PROMPT_TOKENS)]

    def pairs(self, prompts: Sequence[list[int]], known: Any, decoding: Decoding) -> Iterator[list[tuple[int, Pair]]]:
        for start in range(0, len(prompts), BATCH):
            yield [(i, self._pair(prompts[i])) for i in range(start, min(start + BATCH, len(prompts)))]

    def _pair(self, prompt: list[int]) -> Pair:
        tokens = [prompt[0] + place for place in range(RESPONSE_TOKENS)]
        base, fine_tuned = (
            Response(f"{side} answer {prompt[0]} " * 6, tokens, "stop", -1.0, -0.1) for side in ("base", "fine_tuned")
        )
        return Pair(base, fine_tuned, -2.0, -3.0)


def write_prompts(transfer: Transfer, round_: str, count: int) -> None:
    """Prompts of a round, in a process of its own: what it frees would hide what the step takes."""
    rows = [
        {
            "round": round_,
            "prompt_id": hashlib.sha256(f"{round_} {number}".encode()).hexdigest()[:16],
            "prompt": f"What happens to payment {number} of {round_} when the card that I paid with is replaced?",
            "proposal_id": "none",
            "position": 0,
        }
        for number in range(count)
    ]
    Store(database_file()).append_all(transfer.name, [(SYNTHETIC_PROMPTS, SYNTHETIC_PROMPTS.frame(rows))])


def main(engine_name: str, count: int) -> None:
    transfer = load_transfer(Path(__file__).parents[1] / "transfers" / "banking_intents")
    fake: Any = FakeModel()
    engine: Engine = RayEngine(fake, BATCH, RayCluster(actors=2)) if engine_name == "ray" else fake

    class FakeEngines(EngineResource):
        def source(self, transfer: Transfer) -> Engine:
            return engine

    for round_, prompts in ((WARM_UP, 2 * BATCH), (MEASURED, count)):
        subprocess.run([sys.executable, "-m", "benchmarks.writer_case", "prompts", round_, str(prompts)], check=True)
    with dg.DagsterInstance.ephemeral() as instance:
        runner = Runner(transfer, instance, FakeEngines())
        for round_ in (WARM_UP, MEASURED):  # the first starts the cluster and imports all
            before, started = psutil.Process().memory_info().rss, time.perf_counter()
            result = runner.job.execute_in_process(
                instance=instance,
                asset_selection=[dg.AssetKey([transfer.name, "scored_pairs"])],
                partition_key=round_,
                run_config={"loggers": {"console": {"config": {"log_level": "ERROR"}}}},
            )
            assert result.success
    (event,) = result.get_asset_materialization_events()
    assert event.materialization.metadata["dagster/partition_row_count"].value == count
    shared = re.search(r"RssShmem:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(
        json.dumps(
            {
                "engine": engine_name,
                "prompts": count,
                "start_bytes": before,
                "peak_growth_bytes": peak_bytes() - before,
                "of_it_object_store_bytes": int(shared.group(1)) * 1024 if shared else None,
                "seconds": time.perf_counter() - started,
                "data_version": event.materialization.tags["dagster/data_version"],
            }
        )
    )


if __name__ == "__main__":
    if sys.argv[1] == "prompts":
        transfer = load_transfer(Path(__file__).parents[1] / "transfers" / "banking_intents")
        write_prompts(transfer, sys.argv[2], int(sys.argv[3]))
    else:
        with tempfile.TemporaryDirectory() as home:
            os.environ["TUNESHIFT_HOME"] = home
            main(sys.argv[1], int(sys.argv[2]))
