"""Held-out accuracy: exact match of stripped responses, with a bootstrap interval."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Accuracy:
    """Share of correct responses with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


def is_exact_match(response: str, expected: str) -> bool:
    return response.strip() == expected.strip()


def bootstrap_accuracy(correct: Sequence[bool], samples: int, seed: int) -> Accuracy:
    """Accuracy with the 2.5 and 97.5 percentiles over resamples of the held-out prompts.

    The resampled counts of correct answers are binomial, so they are drawn directly.
    """
    n = len(correct)
    if n == 0:
        raise ValueError("no held-out prompts")
    value = sum(correct) / n
    resampled = np.random.default_rng(seed).binomial(n, value, samples) / n
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Accuracy(value, float(low), float(high), n)
