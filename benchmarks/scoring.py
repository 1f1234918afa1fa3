"""Pairs per second, memory and the machine's limits, for the scoring engine on the packaged source pair."""

import json
import math
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.baselines import TwoModels
from benchmarks.common import GREEDY, REPETITIONS, interleaved, prompts, ratio, source_files, spread
from tuneshift_dag.engines import decoding as loop
from tuneshift_dag.engines.kv_cache import KVDtype
from tuneshift_dag.engines.local import LocalEngine
from tuneshift_dag.engines.rows import Rows

BATCH = 32


def _engine(batch_size: int = BATCH, kv_cache_dtype: KVDtype = "auto") -> LocalEngine:
    base, adapter = source_files()
    return LocalEngine(base, adapter, "nf4", "bfloat16", batch_size, kv_cache_dtype=kv_cache_dtype)


def _rows(engine: LocalEngine, batch: int) -> Rows:
    return Rows(engine.tokenizer, engine.ends, batch, GREEDY)


def _score(engine: LocalEngine, texts: list[str]) -> list[tuple[float, ...]]:
    ids = [engine.encode(text) for text in texts]
    found = dict(i for batch in engine.pairs(ids, [{} for _ in ids], GREEDY) for i in batch)

    def ppl(total: float, tokens: list[int]) -> float:
        return math.exp(-total / len(tokens))

    return [
        (
            ppl(p.base.sum_logprob, p.base.token_ids),
            ppl(p.base_on_fine_tuned, p.fine_tuned.token_ids),
            ppl(p.fine_tuned_on_base, p.base.token_ids),
            ppl(p.fine_tuned.sum_logprob, p.fine_tuned.token_ids),
        )
        for p in (found[i] for i in range(len(ids)))
    ]


def scoring_vs_naive() -> dict[str, Any]:
    """Against one prompt at a time, two models, and a forward pass for each perplexity."""
    texts, engine, baseline = prompts(96), _engine(96), TwoModels(contiguous_head=False)
    int8 = _engine(96, "int8")
    baseline.naive(texts[:2])
    _score(engine, texts)
    _score(int8, texts)
    times = interleaved(
        {
            "naive": lambda: baseline.naive(texts),
            "ours": lambda: _score(engine, texts),
            "int8": lambda: _score(int8, texts),
        }
    )
    return ratio(times["naive"], times["ours"], int8=ratio(times["naive"], times["int8"]), **_rates(times, len(texts)))


def scoring_vs_batched() -> dict[str, Any]:
    """Against static batches of 32, left padding, two models and a second forward pass."""
    texts, engine, baseline = prompts(96), _engine(), TwoModels(contiguous_head=True)
    int8 = _engine(kv_cache_dtype="int8")
    theirs, ours = baseline.batched(texts), _score(engine, texts)
    _score(int8, texts)
    times = interleaved(
        {
            "batched": lambda: baseline.batched(texts),
            "ours": lambda: _score(engine, texts),
            "int8": lambda: _score(int8, texts),
        }
    )
    agreement = [
        abs(a - b) / b for row_a, row_b in zip(ours, theirs, strict=True) for a, b in zip(row_a, row_b, strict=True)
    ]
    agreement.sort()
    return ratio(
        times["batched"],
        times["ours"],
        int8=ratio(times["batched"], times["int8"]),
        **_rates(times, len(texts)),
        relative_perplexity_difference={
            "median": agreement[len(agreement) // 2],
            "p90": agreement[int(len(agreement) * 0.9)],
        },
    )


def _rates(times: dict[str, list[float]], count: int) -> dict[str, Any]:
    return {"pairs_per_second": {name: spread([count / t for t in values]) for name, values in times.items()}}


def fraction_of_limit() -> dict[str, Any]:
    """Decode and prefill throughput over what the machine can do.

    Ceilings: FLOP/s of a large bfloat16 matrix product and bytes/s of a large copy, measured here. A
    decode step must read every weight once (4-bit body, 16-bit head, adapter) and the keys and values,
    and multiply each token with every weight; prefill must multiply only.
    """
    flops, bandwidth = _matmul_ceiling(), _copy_ceiling()
    engine = _engine()
    config = engine.model.config
    body = sum(
        m.in_features * m.out_features
        for name, m in engine.model.named_modules()
        if hasattr(m, "in_features") and ".layers." in name and "lora_" not in name and "base_layer" in name
    )
    head = config.vocab_size * config.hidden_size
    best: dict[str, Any] = {}
    for batch in (8, 32, 96):
        ids = [engine.encode(text) for text in prompts(batch)]
        tokens = sum(map(len, ids))
        # The base side decodes to the limit, so every step has the whole batch.
        with engine.side("base") as model:
            loop.decode(model, _rows(engine, batch), loop.prefill(model, ids), GREEDY)
            rates = {"prefill": [], "decode": []}
            for _ in range(5):
                started = time.perf_counter()
                prefix = loop.prefill(model, ids)
                middle = time.perf_counter()
                responses = loop.decode(model, _rows(engine, batch), prefix, GREEDY)
                rates["prefill"].append(tokens / (middle - started))
                rates["decode"].append(sum(len(r.token_ids) - 1 for r in responses) / (time.perf_counter() - middle))
        step_bytes = body / 2 + head * 2 + batch * (tokens / batch + 12) * _kv_bytes(config)
        decode_limit = min(flops / (2 * (body + head)), bandwidth / step_bytes * batch)
        prefill_limit = flops / (2 * (body + head * batch / tokens))
        best[str(batch)] = {
            "prefill_tokens_per_second": spread(rates["prefill"]),
            "decode_tokens_per_second": spread(rates["decode"]),
            "prefill_fraction": spread([r / prefill_limit for r in rates["prefill"]]),
            "decode_fraction": spread([r / decode_limit for r in rates["decode"]]),
            "decode_bound_by": "compute" if flops / (2 * (body + head)) < bandwidth / step_bytes * batch else "memory",
        }
    top = max(best.values(), key=lambda b: b["decode_fraction"]["median"])
    return {
        **top["decode_fraction"],
        "prefill": max((b["prefill_fraction"] for b in best.values()), key=lambda f: f["median"]),
        "ceilings": {"bfloat16_gflops": flops / 1e9, "copy_gigabytes_per_second": bandwidth / 1e9},
        "by_batch_size": best,
    }


def _kv_bytes(config: Any) -> int:
    return int(config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 2)


def _matmul_ceiling() -> float:
    a, b = (torch.randn(2048, 2048).bfloat16() for _ in range(2))
    a @ b
    times = []
    for _ in range(10):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(times)


def _copy_ceiling() -> float:
    """Bytes read per second by a large copy (as many are written; only reads are counted)."""
    a = torch.empty(1 << 28, dtype=torch.uint8).fill_(1)
    b = torch.empty_like(a)
    times = []
    for _ in range(8):
        started = time.perf_counter()
        b.copy_(a)
        times.append(time.perf_counter() - started)
    return 2 * a.numel() / min(times)


def memory() -> dict[str, Any]:
    """Peak resident memory above imports over the model's footprint, at batch 32 and 128 new tokens.

    Each case runs in a process of its own. The headline is that of keys and values in 8 bits, with which
    `scoring_vs_naive` and `scoring_vs_batched` are measured too (`int8`); `auto` is the default setting's. `workers` is
    that of two processes side by side, each with a batch of its own.
    """
    ours: dict[str, list[dict[str, float]]] = {"int8": [], "auto": []}
    for _ in range(REPETITIONS):
        for dtype, measured in ours.items():
            measured.append(_measure("ours", dtype))
    stock, two, workers = _measure("stock"), _measure("two_models"), _measure("ours", "int8", "2")
    return {
        **spread([one["ratio"] for one in ours["int8"]]),
        "repetitions": REPETITIONS,
        "kv_cache_dtype": "int8",
        "auto": spread([one["ratio"] for one in ours["auto"]]),
        "ours": ours,
        "workers": workers,
        "stock_peft_generate": stock,
        "two_models_bytes_over_ours": two["footprint"] / ours["auto"][0]["footprint"],
    }


def _measure(*arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.memory_case", *arguments]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(out.stdout.strip().splitlines()[-1]))
