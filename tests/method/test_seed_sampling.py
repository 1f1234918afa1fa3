import random
from collections import Counter

import pytest

from tuneshift_dag.method.seed_sampling import Candidate, draw_seeds

POOL = [Candidate(f"{i:04}", f"prompt {i}", f"response {i % 7}") for i in range(200)]


def test_the_draw_does_not_depend_on_the_order_of_the_pool():
    shuffled = random.Random(1).sample(POOL, len(POOL))
    assert draw_seeds(shuffled, 2, 10, 5, True, 0) == draw_seeds(POOL, 2, 10, 5, True, 0)


def test_round_and_salt_change_the_draw():
    first = draw_seeds(POOL, 1, 10, 5, True, 0)
    assert draw_seeds(POOL, 2, 10, 5, True, 0) != first
    assert draw_seeds(POOL, 1, 10, 5, True, 1) != first


def test_more_calls_keep_the_calls_before_them():
    assert draw_seeds(POOL, 1, 20, 5, True, 0)[:10] == draw_seeds(POOL, 1, 10, 5, True, 0)


@pytest.mark.parametrize("balance", [False, True])
def test_removing_a_candidate_changes_only_the_calls_that_drew_it(balance: bool):
    before = draw_seeds(POOL, 1, 40, 5, balance, 0)
    gone = before[0][0]
    after = draw_seeds([c for c in POOL if c != gone], 1, 40, 5, balance, 0)
    for old, new in zip(before, after, strict=True):
        assert (old == new) == (gone not in old)


def test_removing_a_response_changes_only_the_calls_that_drew_it():
    before = draw_seeds(POOL, 1, 40, 2, True, 0)
    gone = before[0][0].response
    after = draw_seeds([c for c in POOL if c.response != gone], 1, 40, 2, True, 0)
    for old, new in zip(before, after, strict=True):
        assert (old == new) == (gone not in {c.response for c in old})


def test_balance_draws_rare_and_common_responses_equally_often():
    pool = [Candidate(f"{i:04}", f"prompt {i}", "rare" if i < 5 else "common") for i in range(100)]

    def share_of_rare(balance: bool) -> float:
        calls = draw_seeds(pool, 1, 800, 1, balance, 0)
        return Counter(c.response for call in calls for c in call)["rare"] / 800

    # Standard errors: 1.8 and 0.8 points.
    assert abs(share_of_rare(True) - 0.5) < 0.06
    assert abs(share_of_rare(False) - 0.05) < 0.03


def test_the_seeds_of_a_call_are_distinct():
    assert all(len(set(call)) == 5 for call in draw_seeds(POOL[:6], 1, 30, 5, True, 0))


def test_a_pool_smaller_than_a_call_is_drawn_whole():
    assert [set(call) for call in draw_seeds(POOL[:3], 1, 2, 5, True, 0)] == [set(POOL[:3])] * 2
    assert draw_seeds([], 1, 2, 5, True, 0) == [[], []]


def test_original_seeds_open_every_call_and_the_pool_fills_the_rest():
    originals = [Candidate(f"seed{i}", f"seed prompt {i}", f"seed{i}") for i in range(5)]
    calls = draw_seeds(POOL, 2, 30, 5, True, 0, originals, 3)
    assert all([c in originals for c in call] == [True] * 3 + [False] * 2 for call in calls)
    assert {c for call in calls for c in call if c in originals} == set(originals)


def test_calls_of_a_round_open_with_all_originals_in_the_same_order():
    originals = [Candidate(f"seed{i}", f"seed prompt {i}", f"seed{i}") for i in range(5)]
    orders = [{tuple(call[:5]) for call in draw_seeds(POOL, r, 30, 6, True, 0, originals, 5)} for r in range(1, 4)]
    assert [len(order) for order in orders] == [1, 1, 1]
    assert len(set.union(*orders)) == 3
