import math
from collections.abc import Iterator, Sequence

import pytest

from tests.fakes import FakeEngine
from tuneshift_dag.method import discriminator
from tuneshift_dag.method.discriminator import EACH_A_STEP, NO, YES, ask, identity, scores, training_batches
from tuneshift_dag.method.engine import Side
from tuneshift_dag.method.scoring import Cost
from tuneshift_dag.store.cache import ResponseCache
from tuneshift_dag.store.database import Store

SEEDS = [f"seed {i}" for i in range(5)]
GENERATED = [f"generated {i}" for i in range(20)]


class Judge(FakeEngine):
    """log P(yes) is in the prompt; P(no) is 0.1."""

    def score(
        self, prompts: Sequence[list[int]], responses: Sequence[list[int]], side: Side
    ) -> Iterator[list[tuple[int, float]]]:
        for batch in super().score(prompts, responses, side):
            yield [(i, self._log_p(prompts[i], responses[i])) for i, _ in batch]

    def _log_p(self, prompt: list[int], response: list[int]) -> float:
        text = "".join(map(chr, prompt))
        return float(text.split()[0]) if response == self.encode(YES) else math.log(0.1)


def test_every_step_has_as_many_seeds_as_generated_prompts_each_in_turn() -> None:
    batches = training_batches(SEEDS, GENERATED, steps=3)
    assert [len(batch) for batch in batches] == [2 * EACH_A_STEP] * 3
    for batch in batches:
        assert [answer for _, answer in batch] == [YES] * EACH_A_STEP + [NO] * EACH_A_STEP
    asked = [question for batch in batches for question, answer in batch if answer == YES]
    assert asked == [ask(SEEDS[i % 5]) for i in range(3 * EACH_A_STEP)]
    others = [question for batch in batches for question, answer in batch if answer == NO]
    assert others == [ask(GENERATED[i % 20]) for i in range(3 * EACH_A_STEP)]


@pytest.mark.parametrize(("seeds", "generated"), [([], GENERATED), (SEEDS, [])])
def test_one_kind_alone_teaches_nothing(seeds: list[str], generated: list[str]) -> None:
    with pytest.raises(ValueError, match="needs seeds and generated prompts"):
        training_batches(seeds, generated, steps=1)


def test_a_prompt_may_hold_braces() -> None:
    assert ask("a {prompt} {0}").startswith("a {prompt} {0}\n")


def test_whatever_makes_another_discriminator_gives_another_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(
        base: str = "base", seeds: list[str] = SEEDS, generated: list[str] = GENERATED, steps: int = 2, seed: int = 0
    ):
        return identity(base, training_batches(seeds, generated, steps), seed)

    found = [of(), of("other"), of(seeds=SEEDS[:4]), of(generated=GENERATED[1:]), of(steps=3), of(seed=1)]
    monkeypatch.setitem(discriminator.LORA, "rank", 4)
    found.append(of())
    monkeypatch.undo()
    assert len(set(found)) == len(found)
    assert of() == found[0]


def test_a_score_is_the_share_of_yes_of_both_answers(store: Store) -> None:
    probabilities = [0.1, 0.3, 0.9]
    prompts = [f"{math.log(p)} is log P(yes)" for p in probabilities]
    found = scores(Judge(), ResponseCache(store), prompts, Cost())
    assert found == pytest.approx([p / (p + 0.1) for p in probabilities])


def test_a_certain_discriminator_is_no_overflow(store: Store) -> None:
    assert scores(Judge(), ResponseCache(store), ["-2000 no", "0 yes"], Cost()) == [0.0, pytest.approx(10 / 11)]


def test_scores_are_asked_once_of_the_trained_side(store: Store) -> None:
    engine, cost, progress = Judge(), Cost(), []
    prompts = [f"-{i} prompt" for i in range(6)]
    first = scores(engine, ResponseCache(store), prompts, cost, lambda done, total: progress.append((done, total)))
    assert len(engine.scored) == cost.model_calls == 12
    assert {side for side, _ in engine.scored} == {"fine_tuned"}
    assert progress[-1] == (12, 12)
    assert scores(engine, ResponseCache(store), prompts, cost) == first
    assert (len(engine.scored), cost.cache_hits) == (12, 12)
