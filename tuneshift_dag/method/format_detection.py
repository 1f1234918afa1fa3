"""Which prompt format was a fine-tune made with? The one in which the fine-tuned model answers with least doubt.

It answers the seeds in every candidate format. What a fine-tune has learned shows in formats that it wasn't made with,
too: it often gives the same answers there, about as surely. What tells them apart is how much of the base's surprise at
an answer is left, which doesn't depend on what the answer is, and how surely the answer ends where it does. Of an
adapter it is what half of its update leaves of that surprise: in its own format that is already enough for much of it,
however sure the whole one is elsewhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean

from tuneshift_dag import TuneshiftError
from tuneshift_dag.method import Decoding, PromptFormat, Response, Scorer

_INSTRUCTION = "### Instruction:\n{prompt}\n\n### Response:\n"
_PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_TEMPLATES = (
    "{prompt}\n",
    "Question: {prompt}\nAnswer:",
    _INSTRUCTION,
    f"{_PREAMBLE}\n\n{_INSTRUCTION}",
    "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n",
    "<start_of_turn>user\n{prompt}<end_of_turn>\n<start_of_turn>model\n",
    "<|start_header_id|>user<|end_header_id|>\n\n{prompt}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "[INST] {prompt} [/INST]",
)
# Of an answer, in tokens.
_LONGEST = 64
# Nats: less is rounding. And what a missing end counts as, which is far more than one that was learned.
_ROUNDING, _NO_END = 1e-4, 1.0
# Of six adapters whose format was known five were told by what was left of the surprise alone, and one needed the end.
# With more weight the end misleads: instruct models end well in their own chat template, whatever they were taught in.
_END_COUNTS = 0.25
# Another format must leave this much less doubt than the configured one: with the whole fine-tune, and with half of an
# adapter. (Half of three LoRAs of SmolLM2 left 0.30 to 0.59 of the doubt of the chat that was configured instead.)
_CLEARLY, _CLEARLY_OF_HALF = 0.5, 0.7


@dataclass(frozen=True)
class Fit:
    """How a fine-tuned model answers in a format: means over the seeds of the surprise (nats) at a token of its
    answers, its own, its base's and that of the base with half of the adapter's update, and at their end."""

    format: PromptFormat
    own: float
    base: float | None
    end: float
    half: float | None = None

    @property
    def doubt(self) -> float:
        whole = 1 if self.base is None else self.base + _ROUNDING
        if self.half is not None:
            return (self.half + _ROUNDING) / whole
        return (self.own + _ROUNDING) / whole * math.pow(self.end + _ROUNDING, _END_COUNTS)

    def __str__(self) -> str:
        base = "" if self.base is None else f" against {self.base:.2f} of the base"
        half = "" if self.half is None else f", {self.half:.2f} of half of the adapter"
        return f"surprise {self.own:.3f} nats a token{base}{half}, {self.end:.3f} at the end"


def candidates(configured: PromptFormat) -> list[PromptFormat]:
    """Formats that are worth a try, the configured one first."""
    chats = [PromptFormat(arguments=configured.arguments)]
    if configured.system is not None:
        chats.append(PromptFormat(system=configured.system, arguments=configured.arguments))
    return [configured, *chats, *map(PromptFormat, _TEMPLATES)]


def fits(scorer: Scorer, seeds: Sequence[str], configured: PromptFormat, longest: int = _LONGEST) -> list[Fit]:
    """How the source answers the seeds in each candidate format, with up to ``longest`` tokens; the configured one
    comes first. What the tokenizer can't write is left out, and so is what comes to the same tokens as another."""
    prompts: dict[tuple[tuple[int, ...], ...], PromptFormat] = {}
    for format in candidates(configured):
        try:
            asked = tuple(tuple(scorer.prompt_ids(seed, format)) for seed in seeds)
        except TuneshiftError:  # no chat template, or none that shows these messages
            continue
        prompts.setdefault(asked, format)
    rows = [list(ids) for asked in prompts for ids in asked]
    decoding = Decoding(min(longest, _LONGEST))
    responses: dict[int, Response] = dict(chain(*scorer.generate(rows, "fine_tuned", decoding)))
    answers = [responses[i].token_ids for i in range(len(rows))]
    base = dict(chain(*scorer.score(rows, answers, "base"))) if scorer.cross_scores else {}
    half = dict(chain(*scorer.halved.score(rows, answers, "fine_tuned"))) if scorer.halved else {}

    def fit(format: PromptFormat, rows: range) -> Fit:
        own, others, halves, ends = [], [], [], []
        for i in rows:
            response, tokens = responses[i], max(1, len(answers[i]))
            others.append(-base[i] / tokens if base else 1.0)
            # To say nothing, surely, is no answer.
            silent = not response.text.strip()
            own.append(others[-1] if silent else -response.sum_logprob / tokens)
            halves.append(others[-1] if silent or not half else -half[i] / tokens)
            ended = None if silent else response.eos_logprob
            ends.append(_NO_END if ended is None else min(_NO_END, -ended))
        halfway = fmean(halves) if half else None
        return Fit(format, fmean(own), fmean(others) if base else None, fmean(ends), halfway)

    count = len(seeds)
    return [fit(format, range(n * count, (n + 1) * count)) for n, format in enumerate(prompts.values())]


def best_fit(found: Sequence[Fit]) -> Fit:
    """The format that the fine-tune was most likely made with: the first, unless another leaves clearly less doubt."""
    least = min(found, key=lambda fit: fit.doubt)
    clearly = _CLEARLY if least.half is None else _CLEARLY_OF_HALF
    return least if least.doubt < clearly * found[0].doubt else found[0]
