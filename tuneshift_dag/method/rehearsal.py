"""Texts that a model writes without being asked anything: a sample of what it knows, with no data from outside.

From its start token alone a model samples what it was pre-trained on (context-free replay, arXiv 2505.13811). A chat
model is also given the opening of a user's turn: it writes the question itself (Magpie, arXiv 2406.08464), and is then
asked it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tuneshift_dag.method import Decoding, PromptFormat, Target, scoring
from tuneshift_dag.method.scoring import Cache, Cost, OnProgress

TOKENS = 64
"""The most that is sampled of a text, and of a question."""
Kind = Literal["start", "chat"]


@dataclass(frozen=True)
class Text:
    """``prompt`` is empty for kind ``start``. ``token_ids`` hold the prompt, or what starts a text, and then the
    response from place ``prompt_tokens`` on."""

    kind: Kind
    prompt: str
    response: str
    token_ids: list[int]
    prompt_tokens: int


def rehearsal_texts(
    model: Target,
    cache: Cache,
    count: int,
    format: PromptFormat,
    seed: int,
    cost: Cost,
    on_progress: OnProgress = lambda done, total: None,
) -> list[Text]:
    """At most ``count`` texts of the base model, sampled at temperature 1 from its whole vocabulary; for a chat
    ``format`` half of them are answers to questions of its own. Empty ones are left out."""
    chats = count // 2 if format.template is None else 0
    start, number = model.opening(None), count - chats
    written = _sample(model, cache, [start] * number, f"start|{seed}", cost, on_progress)
    texts = [Text("start", "", text, [*start, *ids], len(start)) for text, ids in written if len(ids) > 1]
    return texts + (conversations(model, cache, chats, format, seed, cost, on_progress) if chats else [])


def conversations(
    model: Target,
    cache: Cache,
    count: int,
    format: PromptFormat,
    seed: int,
    cost: Cost,
    on_progress: OnProgress = lambda done, total: None,
) -> list[Text]:
    """At most ``count`` answers of a base model with a chat template to different questions that it wrote itself,
    without the ``format``'s system message: that is of the skill."""
    format = replace(format, system=None)
    opened = _sample(model, cache, [model.opening(format)] * count, f"question|{seed}", cost, on_progress)
    questions = list(dict.fromkeys(text.strip() for text, _ in opened if text.strip()))
    asked = [model.prompt_ids(question, format) for question in questions]
    answers = _sample(model, cache, asked, f"answer|{seed}", cost, on_progress)
    return [
        Text("chat", question, text, [*prompt, *ids], len(prompt))
        for question, prompt, (text, ids) in zip(questions, asked, answers, strict=True)
        if ids
    ]


def _sample(
    model: Target, cache: Cache, prompts: Sequence[list[int]], name: str, cost: Cost, on_progress: OnProgress
) -> list[tuple[str, list[int]]]:
    """Text and token ids of a response to each prompt, with a sampling seed of its own that follows from ``name``."""
    seeds = [scoring.sampling_seed(f"rehearsal|{name}|{number}") for number in range(len(prompts))]
    decoding = Decoding(TOKENS, temperature=1.0)
    responses = scoring.generate(model, cache, prompts, "base", decoding, cost, seeds, on_progress)
    return [(response.text, response.token_ids) for response in responses]
