"""What the benchmarks share: the prompts, the packaged models, interleaved timing and its summary."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.method import Decoding
from tuneshift_dag.models.references import ModelFiles, resolve_adapter, resolve_model

TRANSFER = load_transfer(Path(__file__).parents[1] / "transfers" / "banking_intents")
REPETITIONS = 5
RESPONSE_TOKENS = TRANSFER.config.response.max_new_tokens
GREEDY = Decoding(RESPONSE_TOKENS)


def prompts(count: int) -> list[str]:
    """Rendered prompts: the transfer's held-out queries, spread over all intents."""
    queries = [query for query, _ in TRANSFER.heldout]
    step = max(1, len(queries) // count)
    return [TRANSFER.config.prompt_template.replace("{prompt}", q) for q in queries[::step][:count]]


def source_files() -> tuple[ModelFiles, ModelFiles]:
    source = TRANSFER.config.source
    return (
        resolve_model(source.base, TRANSFER.folder, "source.base"),
        resolve_adapter(source.adapter, TRANSFER.folder, "source.adapter"),
    )


def target_files() -> ModelFiles:
    return resolve_model(TRANSFER.config.target.base, TRANSFER.folder, "target.base")


def interleaved(contestants: dict[str, Callable[[], Any]], repetitions: int = REPETITIONS) -> dict[str, list[float]]:
    """Seconds of each contestant in each repetition, taken in turns so that drift hits all alike.

    Each must have run before: kernels repack weights and fill caches then.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repetitions):
        for name, run in contestants.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Median and range of repeated measurements."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratio(baseline: list[float], ours: list[float], **more: Any) -> dict[str, Any]:
    """How many times faster ours is than the baseline, repetition by repetition."""
    ratios = [b / o for b, o in zip(baseline, ours, strict=True)]
    return {**spread(ratios), "repetitions": len(ratios), **more}
