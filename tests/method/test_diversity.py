from itertools import combinations

import numpy as np
import pytest

from tuneshift_dag.method.diversity import distinct_bigrams, mean_similarity, novel_bigrams


def test_repeated_bigrams_lower_the_share() -> None:
    assert distinct_bigrams(["where is my card"]) == 1
    assert distinct_bigrams(["where is my card", "Where is my money?"]) == 4 / 6


def test_novelty_counts_what_no_known_prompt_has() -> None:
    assert novel_bigrams(["where is my money"], ["Where is my card?"]) == 1 / 3
    assert novel_bigrams(["where is my card"], ["where is my card"]) == 0


def test_without_two_words_there_is_no_figure() -> None:
    assert distinct_bigrams(["card", ""]) is None
    assert novel_bigrams([], ["where is my card"]) is None


def test_mean_similarity_is_that_of_all_pairs() -> None:
    vectors = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert mean_similarity(vectors) == pytest.approx(np.mean([a @ b for a, b in combinations(vectors, 2)]), abs=1e-6)
    assert mean_similarity(vectors[[0, 0, 0]]) == pytest.approx(1)
    assert mean_similarity(np.eye(3, dtype=np.float32)) == 0


def test_one_prompt_is_like_nothing() -> None:
    assert mean_similarity(np.eye(1, 3, dtype=np.float32)) is None
    assert mean_similarity(np.zeros((0, 3), np.float32)) is None
