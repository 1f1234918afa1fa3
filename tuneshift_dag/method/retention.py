"""Retention: how well a model still predicts general text. What the distillation made it forget shows here.

The text is small (`tuneshift_dag/general_text.yaml`, twenty paragraphs): it shows that something was lost, not what.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import yaml

from tuneshift_dag.method.engine import perplexity


@dataclass(frozen=True)
class Retention:
    """How well a model predicts a text of ``tokens`` tokens (of its own) and ``bytes`` bytes (UTF-8).

    ``perplexity`` is per token, and so compares models with one tokenizer only; ``bits_per_byte`` compares any two.
    """

    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int


def general_texts() -> list[str]:
    """The packaged paragraphs: prose, code, dialogue, lists, letters, some Spanish and German."""
    texts: list[str] = yaml.safe_load((files("tuneshift_dag") / "general_text.yaml").read_text("utf-8"))
    return texts


def retention(texts: Sequence[str], tokens: Sequence[Sequence[int]], logprobs: Sequence[float]) -> Retention:
    """Of all texts together, each scored alone: longer ones count for more.

    Args:
        tokens: token ids of each text.
        logprobs: their log-likelihoods, in nats.
    """
    total, count = math.fsum(logprobs), sum(map(len, tokens))
    size = sum(len(text.encode()) for text in texts)
    found = perplexity(total, count)
    if found is None:
        raise ValueError("no text")
    return Retention(found, -total / math.log(2) / size, count, size)
