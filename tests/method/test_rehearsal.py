"""Texts that a model writes by itself, with a fake model and a cache in memory."""

import pytest

from tests.fake_engine import FakeEngine
from tuneshift_dag.method import PromptFormat
from tuneshift_dag.method.rehearsal import TOKENS, conversations, rehearsal_texts
from tuneshift_dag.method.scoring import Cost
from tuneshift_dag.store import Store
from tuneshift_dag.store.cache import ResponseCache

RAW, CHAT = PromptFormat("Query: {prompt}"), PromptFormat(system="Sort.")


@pytest.fixture
def cache(store: Store) -> ResponseCache:
    return ResponseCache(store)


def written(cache: ResponseCache, format: PromptFormat, seed: int = 0, engine: FakeEngine | None = None):
    return rehearsal_texts(engine or FakeEngine(), cache, 6, format, seed, Cost())


def test_a_text_begins_with_what_starts_texts_and_each_has_a_seed_of_its_own(cache):
    engine = FakeEngine()
    texts = written(cache, RAW, engine=engine)
    assert len({text.response for text in texts}) == 6
    assert {side for side, _ in engine.answered} == {"base"}
    for text in texts:
        assert (text.kind, text.prompt, text.prompt_tokens) == ("start", "", len("<s>"))
        assert text.token_ids[: text.prompt_tokens] == engine.opening(None)
        assert 1 < len(text.token_ids) - text.prompt_tokens <= TOKENS
    assert not {text.response for text in written(cache, RAW, seed=1)} & {text.response for text in texts}


def test_half_of_a_chat_are_answers_to_questions_of_its_own_without_the_system_message(cache):
    engine = FakeEngine()
    texts = written(cache, CHAT, engine=engine)
    assert [text.kind for text in texts] == ["start"] * 3 + ["chat"] * 3
    for text in texts[3:]:
        prompt = "".join(map(chr, text.token_ids[: text.prompt_tokens]))
        assert prompt == f"<user>{text.prompt}</user>" and text.prompt.startswith("1. Is")
    assert not any("Sort." in prompt for _, prompt in engine.answered)


def test_what_was_written_before_is_in_the_cache(cache):
    cost = Cost()
    first = written(cache, CHAT)
    again = rehearsal_texts(FakeEngine(), cache, 6, CHAT, 0, cost)
    assert again == first and cost.model_calls == 0 and cost.cache_hits == 9


def test_other_questions_come_from_another_seed(cache):
    ours, theirs = (conversations(FakeEngine(), cache, 4, CHAT, seed, Cost()) for seed in (0, -1))
    assert not {text.prompt for text in ours} & {text.prompt for text in theirs}
