"""What the method asks of whatever runs the models: the records and the protocols, no implementation."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Side = Literal["base", "fine_tuned"]
SIDES: tuple[Side, Side] = ("base", "fine_tuned")
CHUNK_SIZE = 1024
"""`Scorer.chunk_size` of an engine that works on one batch after the other: 32 batches of 32."""
WHOLE_ROUND = 1 << 20
"""That of models that take turns in memory: each is loaded at most twice for all that is given at once."""


@dataclass(frozen=True)
class PromptFormat:
    """How a model is asked: by a raw ``template``, which holds ``{prompt}`` once and may hold ``{system}``, or without
    one by the model's own chat template, to which the ``arguments`` go."""

    template: str | None = None
    system: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    key: str = field(default="prompt_template", compare=False)
    """The key of ``transfer.yaml`` that says so, for messages."""

    def around(self) -> tuple[str, str]:
        """What a raw template puts before and after a prompt; nothing of a chat."""
        before, _, after = (self.template or "").partition("{prompt}")
        if self.system is None:
            return before, after
        return before.replace("{system}", self.system), after.replace("{system}", self.system)

    def messages(self, prompt: str) -> list[dict[str, str]]:
        """The prompt as a chat, after the system message if there is one."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": prompt}]

    def __str__(self) -> str:
        if self.template is not None:
            return "{prompt}".join(self.around())
        return "chat" if self.system is None else f"chat, system message {self.system!r}"


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen. ``temperature`` 0 is greedy, and then the rest has no effect."""

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    """The one prompt's sampling seed; `TextModel.generate` takes one for each prompt instead."""
    stops: tuple[str, ...] = ()
    """Texts before the first of which a response ends, beside the model's end tokens."""

    def key(self) -> str:
        """The part of a cache key that these settings make up."""
        stops = "|".join(self.stops)
        if self.temperature == 0:
            # Once a response kept the text that it was stopped at.
            return f"greedy|{self.max_new_tokens}|{f'before|{stops}' if stops else ''}"
        return f"{self.temperature}|{self.top_k}|{self.top_p}|{self.seed}|{self.max_new_tokens}|{stops}"


@dataclass(frozen=True)
class Response:
    """A generated response. ``token_ids`` include the end token if there is one; ``sum_logprob`` adds up their raw
    log-probabilities (nats) under the model that wrote them; ``eos_logprob`` is the end token's, None if truncated or
    ended by one of `Decoding.stops`, of which neither text nor tokens hold anything."""

    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    sum_logprob: float
    eos_logprob: float | None


@dataclass(frozen=True)
class Pair:
    """Both models' responses to one prompt, and each one's log-likelihood (nats) of the other's, if it was computed."""

    base: Response
    fine_tuned: Response
    base_on_fine_tuned: float | None
    fine_tuned_on_base: float | None


@dataclass(frozen=True)
class AdapterCheck:
    """``problems`` must stop the run, ``warnings`` must not. The figures are None for models on a server."""

    problems: list[str]
    warnings: list[str]
    largest_logit_difference: float | None
    delta_norm: float | None

    @staticmethod
    def confidence_warnings(what: str, base: float, fine_tuned: float) -> list[str]:
        """Of the mean log-probabilities of ``what`` on the seeds: the fine-tuned model should be the surer one."""
        warning = (
            f"the fine-tuned model isn't more confident than the base on the seeds (mean log-probability of {what}"
            f" {fine_tuned:.2f} against {base:.2f}): are these seeds of the task it was tuned for?"
        )
        return [warning] if fine_tuned <= base else []


class TextModel(Protocol):
    """One base model, with its adapter (if any) on (``fine_tuned``) or off (``base``)."""

    def fingerprint(self, side: Side) -> str:
        """Changes when, and only when, something changes that can change this side's output."""

    def encode(self, text: str, templated: bool = False) -> list[int]:
        """Token ids of a text that is gone on from, after what the model's texts start with; of one that is
        ``templated`` alone."""

    def check_answers(self, prompts: Sequence[list[int]]) -> list[str]:
        """Problems, each in words: what it answers isn't what the model's plain forward pass gives."""
        return []

    def generate(
        self, prompts: Sequence[list[int]], side: Side, decoding: Decoding, seeds: Sequence[int] | None = None
    ) -> Iterator[list[tuple[int, Response]]]:
        """Responses in batches as they finish, each with the index of its prompt. For sampling, ``seeds`` has one
        number per prompt that makes its random choices its own."""


class PromptWriter(TextModel, Protocol):
    """Writes new prompts."""

    def chat_ids(self, message: str) -> list[int]:
        """Token ids of a user's message in the model's own chat template, ready for the answer; `TuneshiftError` when
        it has none."""


class Scorer(TextModel, Protocol):
    """Answers prompts on both sides, and scores what was answered."""

    cross_scores: bool
    """Whether `pairs` gives cross scores."""

    @property
    def one_at_a_time(self) -> bool:
        """Whether base and fine-tuned are two models that take turns in memory: all that one answers is then asked of
        it together, and `pairs` is given both responses of every prompt."""
        return False

    @property
    def halved(self) -> "Scorer | None":
        """The same models with half of the adapter's update; None where that can't be had."""
        return None

    chunk_size: int = CHUNK_SIZE
    """Prompts of a large round that `pairs` is given at once. It sorts them by length; all are in memory until then."""

    def session(self) -> AbstractContextManager[None]:
        """While it is open, what the engine starts for one call stays for the next one."""
        return nullcontext()

    def prompt_ids(self, prompt: str, format: PromptFormat) -> list[int]:
        """Token ids of a prompt as the model is to see it; `TuneshiftError` when it can't be asked so."""

    def check_adapter(self, prompts: Sequence[list[int]]) -> AdapterCheck:
        """Whether the adapter is applied and changes the base's answers to prompts."""

    def pairs(
        self, prompts: Sequence[list[int]], known: Sequence[dict[Side, Response]], decoding: Decoding
    ) -> Iterator[list[tuple[int, Pair]]]:
        """Both sides' responses and cross scores, in batches as they finish. Responses that are ``known`` of a prompt
        aren't generated again."""

    def pairs_in_turns(
        self, prompts: Sequence[list[int]], known: Sequence[dict[Side, Response]]
    ) -> Iterator[list[tuple[int, Pair]]]:
        """`pairs` of two models that take turns: all responses are ``known``. The fine-tuned model, which gave the last
        of them, is there still."""
        on_base: dict[int, float] = {}
        for batch in self.score(prompts, [k["base"].token_ids for k in known], "fine_tuned"):
            on_base.update(batch)
        for batch in self.score(prompts, [k["fine_tuned"].token_ids for k in known], "base"):
            yield [(i, Pair(known[i]["base"], known[i]["fine_tuned"], value, on_base[i])) for i, value in batch]

    def score(
        self, prompts: Sequence[list[int]], responses: Sequence[list[int]], side: Side
    ) -> Iterator[list[tuple[int, float]]]:
        """Log-likelihoods (nats) of given responses, each after its prompt, in batches as they finish. An empty prompt
        stands for none: the model sees only what starts its texts."""


class Target(Scorer, Protocol):
    """A model that can also be let write without being asked, and weaken its adapter."""

    def opening(self, format: PromptFormat | None) -> list[int]:
        """Token ids that a text starts with; of a chat ``format`` those up to where a user's message begins."""

    def scaled(self, scale: float) -> "Target":
        """The same model, already loaded or not, with its adapter's update times ``scale``."""


class Engine(PromptWriter, Scorer, Protocol):
    """A model that is loaded here or on a cluster: it can do both."""


def before_stop(
    ids: list[int], logprobs: list[float], stops: Sequence[str], decode: Callable[[list[int]], str]
) -> tuple[str, list[int], list[float]] | None:
    """Text, token ids and log-probabilities of a response up to the first of ``stops`` in its text; None without one.

    A token that holds the beginning of the stop is left out, for its log-probability is also that of the stop."""
    text = decode(ids)
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    if not found:
        return None
    kept = next(n for n in range(len(ids), -1, -1) if len(decode(ids[:n])) <= min(found))
    return text[: min(found)], ids[:kept], logprobs[:kept]


def perplexity(sum_logprob: float, n_tokens: int) -> float | None:
    """PPL(y | x) = exp(-1/|y| Σ log p(y_t | x, y_<t)), TuneShift-KD (arXiv 2603.24518) §3; None for no tokens."""
    if not n_tokens:
        return None
    try:
        return math.exp(-sum_logprob / n_tokens)
    except OverflowError:
        return math.inf
