"""Self-consistency: does the fine-tuned model give the same answer when it is sampled?

A low perplexity says that a model is sure, not that it is right. Wang et al. (arXiv 2203.11171) sample several
responses, take the answer of the majority, and find that the larger it is, the more often it is right. Here the greedy
response stays what is trained on, since its perplexities are known, and is dropped when too few samples agree.
"""

import hashlib
from collections.abc import Sequence

from tuneshift_dag.method import scoring
from tuneshift_dag.method.engine import Decoding, Engine
from tuneshift_dag.method.evaluation import Metric
from tuneshift_dag.method.numeric import flexible_number, strict_number


def agreements(
    engine: Engine,
    cache: scoring.Cache,
    prompts: Sequence[list[int]],
    greedy: Sequence[str],
    count: int,
    decoding: Decoding,
    seed: int,
    metric: Metric,
    cost: scoring.Cost,
    on_progress: scoring.OnProgress = lambda done, total: None,
) -> list[float]:
    """For every prompt (token ids), the share of ``count`` sampled fine-tuned responses that agree with ``greedy``.

    Each sample is a cached response with a sampling seed of its own, which doesn't depend on ``count``: more samples
    cost only the new ones.

    Args:
        decoding: with a temperature.
        seed: makes other samples.
    """
    asked = [prompt for prompt in prompts for _ in range(count)]
    seeds = [_sampling_seed(seed, number, prompt) for prompt in prompts for number in range(count)]
    responses = scoring.generate(engine, cache, asked, "fine_tuned", decoding, cost, seeds, on_progress)
    return [
        agreement(metric, text, [response.text for response in responses[i * count : (i + 1) * count]])
        for i, text in enumerate(greedy)
    ]


def agreement(metric: Metric, greedy: str, samples: Sequence[str]) -> float:
    """Share of the samples whose answer is that of the greedy response; 0 when that gives no answer."""
    answer = _answer(metric, greedy)
    return sum(answer is not None and _answer(metric, sample) == answer for sample in samples) / len(samples)


def _answer(metric: Metric, response: str) -> str | None:
    """What is compared: the text without outer white space, or for ``numeric`` its number, None without one."""
    if metric == "exact_match":
        return response.strip()
    return strict_number(response) or flexible_number(response)


def _sampling_seed(seed: int, number: int, prompt: list[int]) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}|{number}|{prompt}".encode()).digest()[:6], "big")
