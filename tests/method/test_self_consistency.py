import pytest

from tests.fakes import FakeEngine
from tuneshift_dag.method.engine import Decoding
from tuneshift_dag.method.scoring import Cost, generate
from tuneshift_dag.method.self_consistency import agreement, agreements
from tuneshift_dag.store.cache import ResponseCache
from tuneshift_dag.store.database import Store

SAMPLING = Decoding(64, temperature=0.7)
TEXTS = [f"prompt {i}" for i in range(8)]
PROMPTS = [FakeEngine().encode(text) for text in TEXTS]


@pytest.fixture
def cache(store: Store) -> ResponseCache:
    return ResponseCache(store)


def measure(engine: FakeEngine, cache: ResponseCache, count: int, cost: Cost | None = None, seed: int = 0):
    greedy = [r.text for r in generate(FakeEngine(), cache, PROMPTS, "fine_tuned", Decoding(64), Cost())]
    return agreements(engine, cache, PROMPTS, greedy, count, SAMPLING, seed, "exact_match", cost or Cost())


def test_outer_white_space_is_no_disagreement():
    assert agreement("exact_match", " card_arrival", ["card_arrival\n", " card_lost", " card_arrival", ""]) == 0.5


def test_numbers_are_compared_and_not_how_they_were_found():
    samples = ["3 + 4 = 7\n#### 7", "It is 7.", "#### 8", "no idea"]
    assert agreement("numeric", "4 + 3 = 7\n#### 7", samples) == 0.5
    assert agreement("numeric", "#### 1,000 and then 5", ["so 1000 dollars: $1,000"]) == 1


def test_a_response_without_an_answer_agrees_with_nothing():
    assert agreement("numeric", "no idea", ["no idea", "no idea"]) == 0


def test_each_prompt_gets_the_share_of_its_own_samples(cache):
    shares = measure(FakeEngine(batch_size=3), cache, 5)
    assert len(set(shares)) > 2 and all(share * 5 == round(share * 5) for share in shares)
    alone = [measure_one(prompt, cache) for prompt in PROMPTS]
    assert shares == alone, "whatever the batch"
    assert measure(FakeEngine(), cache, 5, seed=1) != shares


def measure_one(prompt: list[int], cache: ResponseCache) -> float:
    (greedy,) = generate(FakeEngine(), cache, [prompt], "fine_tuned", Decoding(64), Cost())
    return agreements(FakeEngine(), cache, [prompt], [greedy.text], 5, SAMPLING, 0, "exact_match", Cost())[0]


def test_samples_come_from_the_cache_and_more_of_them_cost_only_the_new_ones(cache):
    first = measure(FakeEngine(), cache, 3)
    engine, cost = FakeEngine(), Cost()
    assert measure(engine, cache, 3, cost) == first
    assert engine.answered == [] and cost == Cost(model_calls=0, cache_hits=24)
    cost = Cost()
    measure(FakeEngine(), cache, 5, cost)
    assert cost == Cost(model_calls=16, cache_hits=24)


def test_a_killed_run_keeps_its_finished_batches(cache):
    with pytest.raises(RuntimeError, match="killed"):
        measure(FakeEngine(batch_size=4, fail_after=3), cache, 3)
    cost = Cost()
    measure(FakeEngine(), cache, 3, cost)
    assert cost == Cost(model_calls=12, cache_hits=12)
