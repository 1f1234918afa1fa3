"""Where the time of a decode step and of a training step goes, by kind of operation, from `torch.profiler`."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import GREEDY, TRANSFER, prompts, source_files, target_files
from tuneshift_dag.engines import decoding as loop
from tuneshift_dag.engines.local import LocalEngine
from tuneshift_dag.engines.rows import Rows
from tuneshift_dag.method import Side
from tuneshift_dag.models.loading import dtype_name, load_for_training, load_tokenizer
from tuneshift_dag.training.batches import tokenize_example
from tuneshift_dag.training.loop import LoraTraining, train
from tuneshift_dag.training.lora import add_lora

DECODED, TRAINED = 160, 96
# An operation is of the first kind whose words its name holds.
KINDS = {
    "matrix products": ("mm", "linear", "matmul", "gemm"),
    "4-bit weights": ("bitsandbytes",),
    "attention": ("attention",),
    "copies and casts": ("copy", "cat", "clone"),
    "softmax, sampling": ("softmax", "exp", "log", "sort", "topk", "max"),
    "fresh memory": ("empty", "zero", "fill"),
}


def time_by_operation() -> dict[str, Any]:
    """Shares of the time of each, on one thread, and the seconds that it took without the profiler."""
    torch.set_num_threads(1)
    return {
        "decode_base": _shares(*_decoding("base")),
        "decode_fine_tuned": _shares(*_decoding("fine_tuned")),
        "training": _shares(*_training(0.0)),
        "training_with_rehearsal": _shares(*_training(TRANSFER.config.distill.retain.weight)),
    }


def _decoding(side: Side) -> tuple[Callable[[], Any], str]:
    base, adapter = source_files()
    engine = LocalEngine(base, adapter, "nf4", "auto", DECODED, workers=1)
    ids = [engine.encode(text) for text in prompts(DECODED)]

    def decode() -> None:
        with engine.side(side) as model:
            rows = Rows(engine.tokenizer, engine.ends, len(ids), GREEDY)
            loop.decode(model, rows, loop.prefill(model, ids, GREEDY.max_new_tokens), GREEDY)

    return decode, f"{len(ids)} prompts answered"


def _training(retain: float) -> tuple[Callable[[], Any], str]:
    settings = LoraTraining(epochs=1, validation_fraction=0.0, retain=retain)
    files, format = target_files(), TRANSFER.config.target_format
    tokenizer = load_tokenizer(files)
    examples = [tokenize_example(tokenizer, format, p, f" {r}") for p, r in TRANSFER.heldout[:TRAINED]]
    dtype = getattr(torch, dtype_name("auto"))
    model = add_lora(load_for_training(files, "nf4", dtype), settings)
    # Long enough for a rehearsal, whatever they say.
    texts = [(e.prompt_ids + e.response_ids)[:32] * 2 for e in examples]
    return lambda: train(model, examples, settings, texts=texts), f"{TRAINED // settings.batch_size} steps"


def _shares(work: Callable[[], Any], what: str) -> dict[str, Any]:
    work()
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    times = {row.key: row.self_cpu_time_total for row in profiler.key_averages()}
    total = sum(times.values())
    kinds = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for name, spent in times.items():
        kinds[next((kind for kind, words in KINDS.items() if any(w in name for w in words)), "the rest")] += spent
    most = sorted(times, key=lambda name: -times[name])[:8]
    return {
        "what": what,
        "seconds": seconds,
        "shares": {kind: round(spent / total, 3) for kind, spent in kinds.items()},
        "operations": {name: round(times[name] / total, 3) for name in most},
    }
