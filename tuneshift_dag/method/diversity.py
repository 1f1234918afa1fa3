"""How varied prompts are: by their bigrams, which is cheap and compares sets of a similar size, and by meaning."""

from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tuneshift_dag.method.prompting import normalize

Bigram = tuple[str, str]


def distinct_bigrams(prompts: Iterable[str]) -> float | None:
    """Different bigrams over all bigrams (distinct-2 of Li et al., arXiv 1510.03055); None without any.

    1 when no two words ever stand beside each other twice. It falls as a set grows.
    """
    found = [bigram for prompt in prompts for bigram in _bigrams(prompt)]
    return len(set(found)) / len(found) if found else None


def novel_bigrams(prompts: Iterable[str], known: Iterable[str]) -> float | None:
    """Share of the different bigrams of ``prompts`` that no ``known`` prompt has; None without any."""
    mine = {bigram for prompt in prompts for bigram in _bigrams(prompt)}
    before = {bigram for prompt in known for bigram in _bigrams(prompt)}
    return len(mine - before) / len(mine) if mine else None


def mean_similarity(vectors: NDArray[np.float32]) -> float | None:
    """Mean cosine similarity of all pairs of rows (unit vectors, (n, d)); None for fewer than two.

    Lower is more varied. The squared length of their sum counts every ordered pair once and each row with itself, so
    no pair is looked at. A set of any size is measured alike, unlike by bigrams.
    """
    count = len(vectors)
    if count < 2:
        return None
    total = vectors.sum(axis=0, dtype=np.float64)
    return float((total @ total - count) / (count * (count - 1)))


def _bigrams(prompt: str) -> Iterator[Bigram]:
    words = normalize(prompt).split()
    return pairwise(words)
