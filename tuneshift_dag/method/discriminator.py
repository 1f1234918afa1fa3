"""Does a prompt read like the user's, or like the generator's? The discriminator of Trans-LoRA (arXiv 2405.17258).

There a LoRA of the source base learns to tell real training inputs from generated ones, and generated prompts that it
takes for real are kept. Here the seeds are all that is real: five examples say how the user writes, not what the task
holds. So it is trained for a few steps only, on batches of as many seeds as generated prompts, and on no response.

What it calls generated is taken from the first round. No verdict of it or of the filter has shaped these prompts, so it
doesn't learn from its own choices; and one discriminator judges every round, so that their scores compare.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

from tuneshift_dag.method.engine import Engine
from tuneshift_dag.method.scoring import Cache, Cost, OnProgress, score_given

QUESTION = "{prompt}\n\nIs this prompt real or generated? Answer yes if it is real, and no if it is generated:"
YES, NO = " yes", " no"
EACH_A_STEP = 8
"""Seeds in a step's batch, and as many generated prompts."""
# Trans-LoRA's values aren't used: it has all training inputs to learn from.
LORA: dict[str, Any] = {"rank": 8, "alpha": 16, "learning_rate": 5e-4, "warmup_ratio": 0.1}


def training_batches(seeds: Sequence[str], generated: Sequence[str], steps: int) -> list[list[tuple[str, str]]]:
    """(question, answer) pairs of every step: `EACH_A_STEP` seeds and as many generated prompts, both in turn.

    Raises:
        ValueError: without seeds or without generated prompts.
    """
    if not seeds or not generated:
        raise ValueError("a discriminator needs seeds and generated prompts")
    real, other = cycle(seeds), cycle(generated)
    return [
        [
            (ask(prompt), answer)
            for prompts, answer in ((real, YES), (other, NO))
            for prompt in islice(prompts, EACH_A_STEP)
        ]
        for _ in range(steps)
    ]


def ask(prompt: str) -> str:
    return QUESTION.replace("{prompt}", prompt)


def identity(base_fingerprint: str, batches: Sequence[Sequence[tuple[str, str]]], seed: int) -> str:
    """What a trained discriminator is known by: the hash of all that makes it, which is in ``batches`` and `LORA`."""
    return hashlib.sha256(json.dumps([base_fingerprint, batches, LORA, seed]).encode()).hexdigest()[:16]


def scores(
    engine: Engine,
    cache: Cache,
    prompts: Sequence[str],
    cost: Cost,
    on_progress: OnProgress = lambda done, total: None,
) -> list[float]:
    """P(yes) / (P(yes) + P(no)) of every prompt: how sure the discriminator is that it is real, from 0 to 1.

    Two teacher-forced scores a prompt, so that answers of several tokens count as they should.

    Args:
        engine: whose fine-tuned side is the discriminator.
        on_progress: called with (done, total) of twice as many scores as there are prompts.
    """
    asked = [engine.encode(ask(prompt)) for prompt in prompts]
    yes, no = (engine.encode(answer, templated=True) for answer in (YES, NO))
    answers = [yes] * len(asked) + [no] * len(asked)
    found = score_given(engine, cache, asked * 2, answers, "fine_tuned", cost, on_progress)
    return [_share(*both) for both in zip(found[: len(asked)], found[len(asked) :], strict=True)]


def _share(yes: float, no: float) -> float:
    """p / (p + q) of log p and log q; the smaller of the two exponentials can't overflow."""
    ratio = math.exp(-abs(yes - no))
    return (1 if yes >= no else ratio) / (1 + ratio)
