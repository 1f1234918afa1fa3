"""Asking a generator for more prompts like the seeds, reading its answer, and which of them are new and how varied.

TuneShift-KD (arXiv 2603.24518) §3 asks an instruction model to "Generate 20 more samples like these 5".
A base model has no chat: it is shown the seeds as the beginning of a numbered list, and goes on."""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from rapidfuzz import process
from rapidfuzz.distance import Indel

Reason = Literal["empty", "overlong", "seed", "held_out", "duplicate", "near_duplicate"]
Mode = Literal["chat", "continuation"]
_ITEM = re.compile(r"^\s*(?:\d+\s*[.):]|[-*•])\s*(.*)$")


@dataclass(frozen=True)
class Rejected:
    position: int
    prompt: str
    reason: Reason


@dataclass(frozen=True)
class Accepted:
    position: int
    prompt: str
    prompt_id: str


def normalize(prompt: str) -> str:
    """Lower case, no punctuation marks, single spaces: what makes two prompts the same. Other symbols stay: "3+4" and
    "3-4" are different questions."""
    text = re.sub(r"['’]", "", unicodedata.normalize("NFKC", prompt).lower())
    return " ".join(re.sub(r"[.,;:!?\"“”‘…()\[\]]", " ", text).split())


def prompt_id(prompt: str) -> str:
    """First 16 hex digits of the SHA-256 of the normalized prompt."""
    return hashlib.sha256(normalize(prompt).encode()).hexdigest()[:16]


def generator_request(
    mode: Mode, instruction: str, seeds: Sequence[str], count: int, render_chat: Callable[[str], str]
) -> str:
    """The text that the generator sees; ``render_chat`` wraps a message in its chat template (mode ``chat`` only)."""
    heading = instruction.replace("{count}", str(count)).replace("{seed_count}", str(len(seeds)))
    listed = "\n".join(f"{number}. {seed}" for number, seed in enumerate(seeds, 1))
    if mode == "continuation":
        return f"{heading}\n{listed}\n{len(seeds) + 1}."
    return render_chat(f"{heading}\n{listed}")


def parse_list(text: str, mode: Mode, finished: bool) -> list[str]:
    """The items of a generated numbered or bulleted list. In ``continuation`` the text begins inside the first one.
    Unless the generator stopped by itself (``finished``), the last one may be cut off and is left out."""
    lines = text.split("\n")
    if mode == "continuation":
        lines[0] = f"1. {lines[0]}"
    if not finished:
        lines = lines[:-1]
    items = [match.group(1) for line in lines if (match := _ITEM.match(line))]
    return [_unquote(item.strip()) for item in items]


def _unquote(item: str) -> str:
    match = re.fullmatch(r'"([^"]*)"|“([^”]*)”', item)
    return (match.group(1) or match.group(2) or "").strip() if match else item


def labelled_request(instruction: str, template: str, examples: Sequence[tuple[str, str]], asked: str | None) -> str:
    """The text that a base model sees in mode ``by_response``: labelled (prompt, response) examples in ``template``,
    which has ``{response}`` before ``{prompt}``, then an opening for the response ``asked``; None leaves it open.

    Shown which response belongs to which prompt, even a weak generator writes prompts of the kind asked for."""
    shown = [template.replace("{response}", _readable(r)).replace("{prompt}", p) for p, r in examples]
    opening = template.split("{response}")[0]
    if asked is not None:
        opening = template.split("{prompt}")[0].replace("{response}", _readable(asked))
    return "\n\n".join([instruction, *shown, opening.rstrip()])


def parse_labelled(text: str, template: str, asked: bool, finished: bool) -> list[str]:
    """The prompt that a generator wrote after `labelled_request`: one line, or nothing usable."""
    if not asked:
        marker = template.split("{response}")[1].split("{prompt}")[0].strip()
        _, found, text = text.partition(marker)
        if not found:
            return []
    line, newline, _ = text.lstrip().partition("\n")
    return [_unquote(line.strip())] if newline or finished else []


def _readable(response: str) -> str:
    return response.strip().replace("_", " ")


class PromptPool:
    """Decides which generated prompts are new: two are the same when they are equal after `normalize`, nearly so when
    the F-measure of their longest common word subsequence (ROUGE-L, as in Stanford Alpaca's pipeline) exceeds
    ``near_duplicate``."""

    def __init__(self, near_duplicate: float, max_characters: int) -> None:
        self.near_duplicate = near_duplicate
        self.max_characters = max_characters
        self._reason: dict[str, Reason] = {}
        self._known: list[str] = []
        self._characters: dict[str, str] = {}

    def add(self, prompts: Iterable[str], reason: Reason) -> None:
        """Prompts that must not be accepted again, with the reason to give."""
        for prompt in prompts:
            self._add(normalize(prompt), reason)

    def sort(self, items: Sequence[str]) -> tuple[list[Accepted], list[Rejected]]:
        """Split a generated list into new prompts (which join the pool) and rejected ones."""
        accepted, rejected = [], []
        for position, item in enumerate(items):
            reason = self._why_not(item)
            if reason:
                rejected.append(Rejected(position, item, reason))
            else:
                accepted.append(Accepted(position, item, prompt_id(item)))
                self._add(normalize(item), "duplicate")
        return accepted, rejected

    def _why_not(self, prompt: str) -> Reason | None:
        text = normalize(prompt)
        if not text:
            return "empty"
        if len(prompt) > self.max_characters:
            return "overlong"
        if text in self._reason:
            return self._reason[text]
        # Of two sequences' lengths and longest common subsequence, Indel's similarity is ROUGE-L's F-measure.
        nearest = process.extractOne(
            self._spell(text), self._known, scorer=Indel.normalized_similarity, score_cutoff=self.near_duplicate
        )
        return "near_duplicate" if nearest and nearest[1] > self.near_duplicate else None

    def _add(self, text: str, reason: Reason) -> None:
        if text not in self._reason:
            self._reason[text] = reason
            self._known.append(self._spell(text))

    def _spell(self, text: str) -> str:
        """A prompt with one character for each word: the library compares characters much faster than words."""
        return "".join(self._characters.setdefault(word, chr(len(self._characters))) for word in text.split())


def distinct_bigrams(prompts: Iterable[str]) -> float | None:
    """Different bigrams over all (distinct-2 of Li et al., arXiv 1510.03055), less as a set grows; None without any."""
    found = list(_bigrams(prompts))
    return len(set(found)) / len(found) if found else None


def novel_bigrams(prompts: Iterable[str], known: Iterable[str]) -> float | None:
    """Share of the different bigrams of ``prompts`` that no ``known`` prompt has; None without any."""
    mine, before = set(_bigrams(prompts)), set(_bigrams(known))
    return len(mine - before) / len(mine) if mine else None


def mean_similarity(vectors: NDArray[np.float32]) -> float | None:
    """Mean cosine similarity of all pairs of rows (unit vectors, (n, d)); None for fewer than two. A set of any size is
    measured alike, unlike by bigrams."""
    count = len(vectors)
    if count < 2:
        return None
    # The squared length of the sum counts every ordered pair once and each row with itself, so no pair is looked at.
    total = vectors.sum(axis=0, dtype=np.float64)
    return float((total @ total - count) / (count * (count - 1)))


def _bigrams(prompts: Iterable[str]) -> Iterator[tuple[str, str]]:
    for prompt in prompts:
        yield from pairwise(normalize(prompt).split())
