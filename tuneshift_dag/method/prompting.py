"""Which prompts are the same, nearly the same or new, and how varied a set of them is."""

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from rapidfuzz import process
from rapidfuzz.distance import Indel

from tuneshift_dag.method.answers import trimmed

Reason = Literal["empty", "overlong", "seed", "held_out", "duplicate", "near_duplicate"]
UNSPACED = (
    "\u0e00-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf"  # Thai, Lao, Tibetan, Burmese, Khmer, Tai
    "\u3005-\u3007\u3040-\u312f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"  # Japanese, Chinese
    "\ua9e0-\ua9ff\uaa60-\uaadf\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
"""Characters of scripts that put no spaces between words, for a character class: each counts as a word."""
_UNSPACED = re.compile(f"[{UNSPACED}]")
# Marks carry meaning in code and formulas: a call or an index, a bracket beside an operator, indented or fenced lines.
# "card(s)" is neither.
_CODE = re.compile(
    r"\w[(\[](?!e?s\))|[+*/^=<>×÷]\s*[(\[]|[)\]]\s*[+*/^=<>×÷]|[)\]]\s*-\s*\d|\d\s*-\s*[(\[]"
    r"|\n[ \t]+\S|(?:^|\n)[ \t]*(?:```|~~~)"
)
_SUPERSCRIPT = re.compile(r"[⁰¹²³⁴-⁹]")
# What isn't said by a number: "1,000" is "1000", "5.00" is "5" and "09" is "9".
_SILENT = re.compile(r"(?<=\d),(?=\d{3}(?!\d))|(?<=\d)\.0+(?![\d.])|(?<![\d.,])0+(?=\d)")
_TOKEN = re.compile(r"\d+|(?P<sign>(?<![^\s(\[])-(?=\d))|[^\W\d_]+|[^\w\s]")


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
    """What makes two prompts the same: lower case, no punctuation marks, single spaces. Other symbols stay: "3+4" and
    "3-4" are different questions. In code and formulas every character stays."""
    if _CODE.search(prompt):
        return "\n".join(line.rstrip() for line in trimmed(unicodedata.normalize("NFC", prompt)).split("\n"))
    return _plain(prompt)


def _plain(prompt: str) -> str:
    text = re.sub(r"['’]", "", _fold(prompt))
    return " ".join(re.sub(r"[.,;:!?\"“”‘…()\[\]]", " ", text).split())


def _fold(prompt: str) -> str:
    """One spelling of what is written in several ways, but a power is no digit."""
    text = _SUPERSCRIPT.sub(lambda power: f"^{unicodedata.digit(power[0])}", prompt)
    return unicodedata.normalize("NFKC", text).lower()


def prompt_id(prompt: str) -> str:
    """First 16 hex digits of the SHA-256 of the normalized prompt."""
    return hashlib.sha256(normalize(prompt).encode()).hexdigest()[:16]


class PromptPool:
    """Decides which generated prompts are new: two are the same when they are equal after `normalize`, nearly so when
    the F-measure of their longest common word subsequence (ROUGE-L, as in Stanford Alpaca's pipeline) exceeds
    ``near_duplicate`` and they have the same numbers and mathematical signs in the same order."""

    def __init__(self, near_duplicate: float, overlong: Callable[[str], bool]) -> None:
        self.near_duplicate = near_duplicate
        self.overlong = overlong
        self._reason: dict[str, Reason] = {}
        self._known: defaultdict[str, list[str]] = defaultdict(list)
        self._characters: dict[str, str] = {}

    def add(self, prompts: Iterable[str], reason: Reason) -> None:
        """Prompts that must not be accepted again, with the reason to give."""
        for prompt in prompts:
            self._add(prompt, reason)

    def sort(self, items: Sequence[str]) -> tuple[list[Accepted], list[Rejected]]:
        """Split a generated list into new prompts (which join the pool) and rejected ones."""
        accepted, rejected = [], []
        for position, item in enumerate(items):
            reason = self._why_not(item)
            if reason:
                rejected.append(Rejected(position, item, reason))
            else:
                accepted.append(Accepted(position, item, prompt_id(item)))
                self._add(item, "duplicate")
        return accepted, rejected

    def _why_not(self, prompt: str) -> Reason | None:
        text = normalize(prompt)
        if not text:
            return "empty"
        if self.overlong(prompt):
            return "overlong"
        if text in self._reason:
            return self._reason[text]
        # Of two sequences' lengths and longest common subsequence, Indel's similarity is ROUGE-L's F-measure.
        nearest = process.extractOne(
            self._spell(prompt),
            self._known[_counted(prompt)],
            scorer=Indel.normalized_similarity,
            score_cutoff=self.near_duplicate,
        )
        return "near_duplicate" if nearest and nearest[1] > self.near_duplicate else None

    def _add(self, prompt: str, reason: Reason) -> None:
        if (text := normalize(prompt)) not in self._reason:
            self._reason[text] = reason
            self._known[_counted(prompt)].append(self._spell(prompt))

    def _spell(self, prompt: str) -> str:
        """A prompt with one character for each word: the library compares characters much faster than words."""
        return "".join(self._characters.setdefault(word, chr(len(self._characters))) for word in _words(prompt))


def _words(prompt: str) -> list[str]:
    """Words in lower case without marks around them; characters of scripts without spaces; in code every sign too."""
    if _CODE.search(prompt):
        return re.findall(r"\w+|[^\w\s]", _apart(_fold(prompt)))
    words = (_bare(word) for word in _apart(_plain(_SILENT.sub("", prompt))).split())
    return [word for word in words if word]


def _apart(text: str) -> str:
    return _UNSPACED.sub(r" \g<0> ", text)


def _bare(word: str) -> str:
    """Without the marks of other languages than English, which `normalize` leaves, and without invisible characters."""
    if word.isascii():
        return word
    return "".join(c for c in word if c.isascii() or not unicodedata.category(c).startswith(("P", "Cf")))


def _counted(prompt: str) -> str:
    """The numbers and mathematical signs of a prompt, in order, and in code the brackets and other signs: prompts that
    differ in them are never nearly the same."""
    tokens = list(_TOKEN.finditer(_SILENT.sub("", _fold(prompt))))
    words, is_code = ["", *(token[0] for token in tokens), ""], bool(_CODE.search(prompt))

    def counts(place: int, sign: str, is_signed: bool) -> bool:
        if sign.isdecimal() or is_signed or unicodedata.category(sign[0]) == "Sm":
            return True
        if sign == "%" and words[place].isdecimal():
            return True
        if sign in "-*/^" and _is_operand(words[place]) and _is_operand(words[place + 2]):
            return True
        return is_code and not sign[0].isalpha() and sign not in ".,;:?!\"'`"

    return " ".join(t[0] for place, t in enumerate(tokens) if counts(place, t[0], t["sign"] is not None))


def _is_operand(token: str) -> bool:
    """A number, the letter of a variable, or a bracket of a formula."""
    return token.isdecimal() or (len(token) == 1 and (token.isalpha() or token in "()[]"))


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
        yield from pairwise(_apart(_plain(prompt)).split())
