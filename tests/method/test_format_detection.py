"""Which prompt format a fine-tune was made with, by how it answers in each; tests/training has really trained ones."""

from collections.abc import Iterator, Sequence

import pytest

from tests.fake_engine import FakeEngine
from tuneshift_dag import TuneshiftError
from tuneshift_dag.method import Decoding, PromptFormat, Response, Side
from tuneshift_dag.method.format_detection import Fit, best_fit, candidates, fits

SEEDS = ["Where is it?", "Who was it?"]
OWN = PromptFormat("Customer: {prompt}\nTopic:")
CONFIGURED = candidates(PromptFormat("{prompt} ->", key="source.prompt"))


class Tuned(FakeEngine):
    """Sure in one format of what to answer and where to end; in others less so, and in brackets sure to say nothing."""

    def __init__(
        self, made_with: PromptFormat, seeds: Sequence[str] = SEEDS, sure: float = -0.05, chats: bool = True
    ) -> None:
        super().__init__()
        self.made_with, self.seeds, self.sure, self.chats = made_with, seeds, sure, chats

    def prompt_ids(self, prompt: str, format: PromptFormat) -> list[int]:
        if format.template is None and not self.chats:
            raise TuneshiftError("no chat template")
        return super().prompt_ids(prompt, format)

    def _answer(self, ids: list[int], side: Side, decoding: Decoding, seed: int = 0) -> Response:
        if ids in [self.prompt_ids(seed, self.made_with) for seed in self.seeds]:
            sure, end, text = self.sure, -0.004, " yes"
        else:
            sure, end, text = (0.0, -1e-6, "") if ids[0] == ord("[") else (-0.04, -0.1, "yes")
        return Response(text, [*self.encode(text), 0], "stop", sure * len(text) + end, end)


@pytest.mark.parametrize("made_with", [OWN, *CONFIGURED[:-1]], ids=str)
def test_the_format_of_the_training_is_found_whichever_is_configured(made_with: PromptFormat) -> None:
    engine = Tuned(made_with)
    assert best_fit(fits(engine, SEEDS, made_with)).format == made_with
    if made_with != OWN:  # which nobody can guess
        found = fits(engine, SEEDS, OWN)
        assert found[0].format == OWN
        if made_with != CONFIGURED[0]:
            assert best_fit(found).format == made_with


def test_a_half_trained_model_is_told_by_the_end_of_its_answers() -> None:
    engine = Tuned(CONFIGURED[4], sure=-0.06)
    assert best_fit(fits(engine, SEEDS, OWN)).format == CONFIGURED[4]


def test_the_configured_format_stays_unless_another_is_clearly_better() -> None:
    close = [Fit(OWN, 0.05, 5.0, 0.02), Fit(CONFIGURED[4], 0.04, 5.0, 0.02)]
    assert best_fit(close) is close[0] and close[1].doubt < close[0].doubt
    clear = [close[0], Fit(CONFIGURED[4], 0.04, 5.0, 0.002)]
    assert best_fit(clear) is clear[1]
    assert best_fit([Fit(OWN, 0.0, 5.0, 0.0), Fit(CONFIGURED[4], 0.0, 9.0, 0.0)]).format == OWN, "less is rounding"


def test_what_can_t_be_written_or_comes_to_the_same_is_left_out() -> None:
    formats = [fit.format for fit in fits(Tuned(OWN, chats=False), SEEDS, CONFIGURED[3])]
    assert formats[0] == CONFIGURED[3] and formats.count(CONFIGURED[3]) == 1
    assert all(format.template for format in formats)


def test_a_system_message_that_is_configured_is_tried_in_a_chat_too() -> None:
    system = PromptFormat(system="Sort.")
    assert best_fit(fits(Tuned(system), SEEDS, PromptFormat("{system} {prompt}", "Sort."))).format == system


def test_without_scores_of_the_base_the_surprise_itself_counts() -> None:
    engine = Tuned(CONFIGURED[4])
    engine.cross_scores = False
    found = fits(engine, SEEDS, OWN)
    assert best_fit(found).format == CONFIGURED[4] and found[0].base is None
    assert "of the base" not in str(found[0])


def test_half_of_an_adapter_tells_formats_apart_in_which_the_whole_is_as_sure() -> None:
    made_with, rival = CONFIGURED[4], CONFIGURED[5]
    engine = Halved(made_with)
    own, other = (fit for fit in fits(engine, SEEDS, rival) if fit.format in (made_with, rival))
    assert own.own == other.own and own.end == other.end, "or this shows nothing"
    assert best_fit(fits(engine, SEEDS, rival)).format == made_with
    assert best_fit(fits(engine, SEEDS, made_with)).format == made_with
    engine.half = False
    assert best_fit(fits(engine, SEEDS, rival)).format == rival


class Halved(FakeEngine):
    """As sure in every format, which half of the adapter isn't."""

    half = True

    def __init__(self, made_with: PromptFormat) -> None:
        super().__init__()
        self.made_with = [self.prompt_ids(seed, made_with) for seed in SEEDS]

    @property
    def halved(self) -> "Halved | None":
        return self if self.half else None

    def _answer(self, ids: list[int], side: Side, decoding: Decoding, seed: int = 0) -> Response:
        return Response("yes", [*self.encode("yes"), 0], "stop", -0.01, -0.001)

    def score(
        self, prompts: Sequence[list[int]], responses: Sequence[list[int]], side: Side
    ) -> Iterator[list[tuple[int, float]]]:
        of_half = [-1.0 if ids in self.made_with else -4.0 for ids in prompts]
        yield list(enumerate([-20.0] * len(prompts) if side == "base" else of_half))
