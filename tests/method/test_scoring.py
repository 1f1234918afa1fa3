import pytest

from tests.fake_engine import FakeEngine
from tuneshift_dag.method import Decoding, before_stop
from tuneshift_dag.method.scoring import Cost, chunk_progress, generate, score, score_pairs
from tuneshift_dag.store import Store
from tuneshift_dag.store.cache import ResponseCache

GREEDY = Decoding(64)
SAMPLING = Decoding(64, temperature=1.0, top_k=50)
# Lengths differ and aren't sorted, so that batches come back in another order.
TEXTS = [f"prompt {'x' * (i * 7 % 5)} {i}" for i in range(10)]
PROMPTS = [FakeEngine().encode(text) for text in TEXTS]


@pytest.fixture
def cache(store: Store) -> ResponseCache:
    return ResponseCache(store)


def reference(prompt: list[int]):
    return score_pairs(FakeEngine(), _Nothing(), [prompt], GREEDY, Cost())[0]


class _Nothing(ResponseCache):
    """A cache that forgets: what the engine gives on its own."""

    def __init__(self) -> None:
        pass

    def responses(self, keys):
        return {}

    def scores(self, keys):
        return {}

    def put(self, responses, scores):
        pass


def test_pairs_come_in_the_order_of_the_prompts(cache):
    assert score_pairs(FakeEngine(), cache, PROMPTS, GREEDY, Cost()) == [reference(p) for p in PROMPTS]


def test_the_second_time_pairs_come_from_the_cache_alone(cache):
    first = score_pairs(FakeEngine(), cache, PROMPTS, GREEDY, Cost())
    engine, cost = FakeEngine(), Cost()
    assert score_pairs(engine, cache, PROMPTS, GREEDY, cost) == first
    assert engine.answered == engine.scored == []
    assert cost == Cost(model_calls=0, cache_hits=10)


def test_texts_are_scored_once_each_and_then_come_from_the_cache(cache):
    texts = [[7, 7, 0], [5, 0], [7, 7, 0], [4, 4, 4, 4, 0]]
    engine, cost = FakeEngine(batch_size=2), Cost()
    first = score(engine, cache, texts, "base", cost)
    assert engine.scored == [("base", "")] * 3, "no prompt"
    assert first[0] == first[2] and len(set(first)) == 3
    assert cost == Cost(model_calls=3, cache_hits=1)
    again = FakeEngine()
    assert score(again, cache, texts, "base", Cost()) == first
    assert again.scored == []


def test_a_killed_run_keeps_the_finished_batches_of_scored_texts(cache):
    texts = [[token, 0] for token in range(1, 7)]
    with pytest.raises(RuntimeError):
        score(FakeEngine(batch_size=2, fail_after=2), cache, texts, "base", Cost())
    engine = FakeEngine()
    score(engine, cache, texts, "base", Cost())
    assert len(engine.scored) == 2


def test_sides_are_never_swapped(cache):
    engine = FakeEngine()
    for use in ("computed", "cached"):
        pair = score_pairs(engine, cache, PROMPTS[:1], GREEDY, Cost())[0]
        assert pair.fine_tuned.text.startswith(" intent_"), use
        assert pair.base.text.startswith(" something"), use
        # The fake gives the base -3 and the fine-tuned model -4 nats per token of the other's response.
        assert pair.base_on_fine_tuned / len(pair.fine_tuned.token_ids) == pytest.approx(-3, abs=0.2), use
        assert pair.fine_tuned_on_base / len(pair.base.token_ids) == pytest.approx(-4, abs=0.2), use


def test_a_known_response_is_not_generated_again(cache):
    generate(FakeEngine(), cache, PROMPTS, "base", GREEDY, Cost())
    engine, cost = FakeEngine(), Cost()
    pairs = score_pairs(engine, cache, PROMPTS, GREEDY, cost)
    assert {side for side, _ in engine.answered} == {"fine_tuned"}
    assert pairs == [reference(p) for p in PROMPTS]
    assert cost == Cost(model_calls=30, cache_hits=0)


def test_only_new_prompts_cost_model_calls(cache):
    score_pairs(FakeEngine(), cache, PROMPTS[:4], GREEDY, Cost())
    engine, cost = FakeEngine(), Cost()
    assert score_pairs(engine, cache, PROMPTS, GREEDY, cost) == [reference(p) for p in PROMPTS]
    assert {text for _, text in engine.answered} == set(TEXTS[4:])
    assert cost == Cost(model_calls=24, cache_hits=4)


def test_a_killed_run_keeps_its_finished_batches(cache):
    with pytest.raises(RuntimeError, match="killed"):
        score_pairs(FakeEngine(batch_size=3, fail_after=2), cache, PROMPTS, GREEDY, Cost())
    engine, cost = FakeEngine(), Cost()
    assert score_pairs(engine, cache, PROMPTS, GREEDY, cost) == [reference(p) for p in PROMPTS]
    assert cost == Cost(model_calls=16, cache_hits=6)
    assert len(engine.answered) == len(engine.scored) == 8


def test_equal_prompts_are_scored_once(cache):
    engine = FakeEngine()
    pairs = score_pairs(engine, cache, [PROMPTS[0], PROMPTS[1], PROMPTS[0]], GREEDY, Cost())
    assert pairs == [reference(PROMPTS[i]) for i in (0, 1, 0)]
    assert len(engine.answered) == len(engine.scored) == 4


def test_progress_ends_with_the_number_of_missing_prompts(cache):
    score_pairs(FakeEngine(), cache, PROMPTS[:3], GREEDY, Cost())
    seen = []
    score_pairs(FakeEngine(), cache, PROMPTS, GREEDY, Cost(), lambda *step: seen.append(step))
    assert seen == [(4, 7), (7, 7)]


def test_progress_of_chunks_is_that_of_all_of_them(cache):
    score_pairs(FakeEngine(), cache, PROMPTS[4:6], GREEDY, Cost())
    seen = []
    progress = chunk_progress(lambda *step: seen.append(step), len(PROMPTS))
    for chunk in (PROMPTS[:4], PROMPTS[4:6], PROMPTS[6:]):
        score_pairs(FakeEngine(batch_size=2), cache, chunk, GREEDY, Cost(), progress(len(chunk)))
    assert seen == [(2, 10), (4, 10), (6, 8), (8, 8)], "those in the cache count until it was asked"


def test_responses_come_in_the_order_of_the_prompts_and_then_from_the_cache(cache):
    first = generate(FakeEngine(), cache, PROMPTS, "fine_tuned", GREEDY, Cost())
    assert first == [reference(p).fine_tuned for p in PROMPTS]
    engine, cost = FakeEngine(), Cost()
    assert generate(engine, cache, PROMPTS, "fine_tuned", GREEDY, cost) == first
    assert engine.answered == []
    assert cost == Cost(model_calls=0, cache_hits=10)


def test_equal_prompts_are_answered_once(cache):
    engine, cost = FakeEngine(), Cost()
    responses = generate(engine, cache, [PROMPTS[0], PROMPTS[1], PROMPTS[0]], "base", GREEDY, cost)
    assert responses == [reference(PROMPTS[i]).base for i in (0, 1, 0)]
    assert len(engine.answered) == cost.model_calls == 2


def test_a_killed_generation_keeps_its_finished_batches(cache):
    with pytest.raises(RuntimeError, match="killed"):
        generate(FakeEngine(batch_size=3, fail_after=1), cache, PROMPTS, "base", GREEDY, Cost())
    cost = Cost()
    generate(FakeEngine(), cache, PROMPTS, "base", GREEDY, cost)
    assert cost == Cost(model_calls=7, cache_hits=3)


def test_a_sampled_response_belongs_to_its_seed(cache):
    twice = [PROMPTS[0], PROMPTS[0]]
    first, second = generate(FakeEngine(), cache, twice, "base", SAMPLING, Cost(), seeds=[1, 2])
    assert first != second
    engine = FakeEngine()
    assert generate(engine, cache, twice, "base", SAMPLING, Cost(), seeds=[2, 1]) == [second, first]
    assert engine.answered == []


@pytest.mark.parametrize(
    ("engine", "side", "decoding"),
    [(FakeEngine("other"), "base", GREEDY), (FakeEngine(), "fine_tuned", GREEDY), (FakeEngine(), "base", Decoding(63))],
)
def test_another_model_side_or_decoding_is_not_answered_from_the_cache(cache, engine, side, decoding):
    generate(FakeEngine(), cache, PROMPTS[:1], "base", GREEDY, Cost())
    cost = Cost()
    generate(engine, cache, PROMPTS[:1], side, decoding, cost)
    assert cost == Cost(model_calls=1, cache_hits=0)


class TestBeforeStop:
    """A response is cut before a stop, and so are its tokens."""

    WORDS = ("It is", " 4.", "\nQ", "uestion:", " what", "\n")

    def decode(self, ids: list[int]) -> str:
        return "".join(self.WORDS[i] for i in ids)

    def test_the_first_stop_counts_and_a_token_that_holds_its_beginning_goes(self) -> None:
        ids, logprobs = [0, 1, 2, 3, 4], [-1.0, -2.0, -3.0, -4.0, -5.0]
        found = before_stop(ids, logprobs, ("what", "Question:"), self.decode)
        assert found == ("It is 4.\n", [0, 1], [-1.0, -2.0])

    def test_without_one_there_is_nothing_to_cut(self) -> None:
        assert before_stop([0, 1], [-1.0, -2.0], ("\nQuestion:",), self.decode) is None

    def test_a_response_that_is_a_stop_is_empty(self) -> None:
        assert before_stop([5, 0], [-1.0, -2.0], ("\n",), self.decode) == ("", [], [])
