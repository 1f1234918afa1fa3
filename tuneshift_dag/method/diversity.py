"""How varied a set of prompts is, by its bigrams: cheap, and comparable between rounds of a similar size."""

from collections.abc import Iterable, Iterator
from itertools import pairwise

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


def _bigrams(prompt: str) -> Iterator[Bigram]:
    words = normalize(prompt).split()
    return pairwise(words)
