"""What a model can do and has forgotten: which answers are right, and how it predicts general text.

A worked answer's number is found as lm-evaluation-harness does in its task ``gsm8k``, version 3: *strict* takes the
number after the first ``#### ``, the format of GSM8K's own answers (Cobbe et al. 2021, arXiv 2110.14168); *flexible*,
for models that were never shown that format, takes the last number of the response.

Retention shows that the distillation made a model forget something; by kind of text it shows what."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

import yaml

from tuneshift_dag.method import perplexity

SCALES = (0.4, 0.6, 0.8, 1.0)
"""Parts of an adapter's update at which skill and general text are measured."""
# Of the general text for that, one in so many; the scale that is chosen is measured on all of it.
_SAMPLED = 6
Metric = Literal["exact_match", "numeric"]
TITLES: dict[Metric, str] = {"exact_match": "exact match", "numeric": "numeric answers"}
_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_NUMBER = re.compile(r"-?([0-9]+(\.[0-9]+)?|\.[0-9]+)")


def mark(metric: Metric, response: str, expected: str) -> tuple[bool, bool | None]:
    """Whether a response is right: by the metric (strict, for ``numeric``), and by its flexible form if it has one."""
    if metric == "exact_match":
        return response.strip() == expected.strip(), None
    number = expected_number(expected)
    return strict_number(response) == number, flexible_number(response) == number


def strict_number(response: str) -> str | None:
    """The number after the first ``#### ``, normalized; None without one."""
    found = _STRICT.search(response)
    return _normalize(found[1]) if found else None


def flexible_number(response: str) -> str | None:
    """The last number of the response, normalized; None without one."""
    found = _FLEXIBLE.findall(response)
    return _normalize(found[-1][0] or found[-1][1]) if found else None


def expected_number(answer: str) -> str | None:
    """The number of a held-out answer: what follows its last ``#### ``, or all of it; None when that is no number."""
    number = _normalize(answer.strip())
    return number if _NUMBER.fullmatch(number) else None


def next_question(template: str) -> str:
    """Where a response is over because the model asks itself the next question: a line that opens as the template does.
    Else the last number would be that of another question; the harness stops at ``Question:``."""
    before = template.split("{prompt}")[0]
    opening = before.rstrip().rsplit("\n", 1)[-1]
    if "#### ".startswith(opening):  # then what follows it must tell it from the line of a number
        opening += before[len(before.rstrip()) :][:1]
    return "" if "#### ".startswith(opening) else f"\n{opening}"


def _normalize(text: str) -> str:
    """What the harness compares: no thousands separators or dollar signs, nothing up to ``#### ``, no final point."""
    text = re.sub(r"(?s).*#### ", "", text.replace(",", "").replace("$", ""))
    return re.sub(r"\.$", "", text)


@dataclass(frozen=True)
class Retention:
    """How well a model predicts a text of ``tokens`` tokens (of its own) and ``bytes`` bytes (UTF-8). ``perplexity`` is
    per token, and so compares models with one tokenizer only; ``bits_per_byte`` compares any two."""

    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int


@cache
def general_texts() -> dict[str, list[str]]:
    """The packaged texts by kind: prose, explanations, code, dialogue, letters and lists, German, Spanish, French."""
    texts: dict[str, list[str]] = yaml.safe_load((files("tuneshift_dag") / "general_text.yaml").read_text("utf-8"))
    return texts


def sampled_texts() -> list[str]:
    """A part of them, of every kind."""
    return [text for kind in general_texts().values() for text in kind][::_SAMPLED]


def texts_to_score() -> int:
    """How many general texts an evaluation scores: all of them before and after, and a part at each other scale."""
    return 2 * sum(map(len, general_texts().values())) + (len(SCALES) - 1) * len(sampled_texts())


def retention(texts: Sequence[str], tokens: Sequence[Sequence[int]], logprobs: Sequence[float]) -> Retention:
    """Of all texts together, each scored alone: its token ids and its log-likelihood (nats). Longer ones count more."""
    total, count = math.fsum(logprobs), sum(map(len, tokens))
    size = sum(len(text.encode()) for text in texts)
    found = perplexity(total, count)
    if found is None:
        raise ValueError("no text")
    return Retention(found, -total / math.log(2) / size, count, size)
