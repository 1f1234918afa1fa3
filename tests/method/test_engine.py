import math
from dataclasses import replace

import pytest

from tuneshift_dag.method import Decoding, perplexity


@pytest.mark.parametrize(
    ("sum_logprob", "n", "expected"),
    [(0.0, 3, 1.0), (2 * math.log(0.5), 2, 2.0), (math.log(0.5) + math.log(0.125), 2, 4.0), (-math.inf, 2, math.inf)],
)
def test_perplexity_is_the_inverse_geometric_mean_probability(sum_logprob, n, expected):
    assert perplexity(sum_logprob, n) == pytest.approx(expected)


def test_no_tokens_have_no_perplexity():
    assert perplexity(0.0, 0) is None


def test_a_perplexity_beyond_the_largest_float_is_infinite():
    assert perplexity(-1000.0, 1) == math.inf


@pytest.mark.parametrize(
    "change",
    [
        {"max_new_tokens": 9},
        {"temperature": 0.5},
        {"temperature": 0.0},
        {"top_k": 7},
        {"top_p": 0.5},
        {"seed": 1},
        {"stops": ("\n9.",)},
    ],
)
def test_every_sampling_setting_is_part_of_the_key(change):
    sampling = Decoding(8, temperature=1.0, top_k=50, top_p=0.9, seed=0, stops=("\n",))
    assert replace(sampling, **change).key() != sampling.key()


def test_the_key_of_a_greedy_decoding_leaves_out_what_has_no_effect():
    greedy = Decoding(8)
    assert replace(greedy, seed=5, top_k=3, top_p=0.5).key() == greedy.key()
    assert replace(greedy, max_new_tokens=9).key() != greedy.key()
    assert replace(greedy, stops=("\n",)).key() != greedy.key()
