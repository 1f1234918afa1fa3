"""One measurement of memory in a process of its own: ``python -m benchmarks.memory_case CASE [KV_DTYPE [WORKERS]]``."""

import contextlib
import json
import sys
import threading
from collections.abc import Iterator

import psutil
import torch

from benchmarks.baselines import TwoModels
from benchmarks.common import prompts, source_files
from tuneshift_dag.engines.kv_cache import KVDtype
from tuneshift_dag.engines.local import LocalEngine
from tuneshift_dag.method import Decoding
from tuneshift_dag.models.memory import peak_bytes, reset_peak

BATCH, NEW_TOKENS = 32, 128
# Between two looks at the memory of all processes, in seconds.
_EVERY = 0.05


def main(case: str, kv_cache_dtype: KVDtype = "auto", workers: str = "1") -> None:
    texts = prompts(BATCH * int(workers))
    torch.zeros(1) @ torch.zeros(1)
    before = psutil.Process().memory_info().rss
    reset_peak()
    if case == "ours":
        base, adapter = source_files()
        engine = LocalEngine(base, adapter, "nf4", "auto", BATCH, "auto", kv_cache_dtype, int(workers))
        with _watched() as seen:
            list(engine.pairs([engine.encode(t) for t in texts], [{} for _ in texts], Decoding(NEW_TOKENS)))
        footprint = engine.model.get_memory_footprint()
    else:
        models = TwoModels(contiguous_head=False)
        footprint = models.base.get_memory_footprint() + models.fine_tuned.get_memory_footprint()
        if case == "stock":
            models.base = None
            footprint = models.fine_tuned.get_memory_footprint()
            inputs = models.tokenizer(texts, return_tensors="pt", padding=True)
            models.fine_tuned.generate(
                **inputs,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
    peak = peak_bytes() - before
    if int(workers) > 1:  # pages that processes share count once
        peak = max(seen) - before
    print(json.dumps({"peak_bytes": peak, "footprint": footprint, "ratio": peak / footprint}))


@contextlib.contextmanager
def _watched() -> Iterator[list[int]]:
    """The bytes of this process and its workers together (proportional set size), time after time."""
    seen: list[int] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_EVERY):
            total = 0
            for process in (psutil.Process(), *psutil.Process().children()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += process.memory_full_info().pss
            seen.append(total)

    threading.Thread(target=look, daemon=True).start()
    yield seen
    ended.set()


if __name__ == "__main__":
    main(*sys.argv[1:])
