"""Token selection: train on the response tokens that the fine-tuned model knows better than its base does.

TiTok (arXiv 2510.04682) calls log p_fine-tuned(token) - log p_base(token) a token's excess, and trains on the top
share of each response. The excess is known for the source's tokens, and the target is trained on its own: their UTF-8
bytes are what both tokenizations of a text have in common. Every byte takes the excess of its source token, and a
target token the mean over its bytes.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class ScoredTokens:
    """A response as token ids of the source, each with its excess (nats)."""

    ids: list[int]
    excess: list[float]


class TokenBytes:
    """The bytes of a text that each token of a tokenizer stands for."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        byte_level = backend is not None and "ByteLevel" in str(backend.decoder)
        self._spell = _byte_level() if byte_level else _sentencepiece

    def __call__(self, ids: Sequence[int]) -> list[bytes]:
        """One item for each token; a special token is no part of the text and has no bytes."""
        names = self.tokenizer.convert_ids_to_tokens(list(ids))
        return [b"" if i in self._special else self._spell(name) for i, name in zip(ids, names, strict=True)]


def select_tokens(
    source: Sequence[bytes], excess: Sequence[float], target: Sequence[bytes], share: float
) -> list[bool] | None:
    """Which target tokens of a response are in its top ``share`` by excess: at least one, of equals the first.

    None when the two don't spell the same text (a character that was cut off in the middle).

    Args:
        source: bytes of each source token, see `TokenBytes`.
        excess: of each source token, in nats.
        target: bytes of each target token.
        share: above 0, at most 1.
    """
    by_byte = [value for piece, value in zip(source, excess, strict=True) for _ in piece]
    spelled, wanted = b"".join(source), b"".join(target)
    # SentencePiece tokenizers put a space before a text, which is no part of it.
    if spelled == b" " + wanted:
        by_byte = by_byte[1:]
    elif wanted == b" " + spelled:
        by_byte = by_byte[:1] + by_byte
    elif spelled != wanted:
        return None
    values: dict[int, float] = {}
    end = 0
    for i, piece in enumerate(target):
        start, end = end, end + len(piece)
        if start < end:
            values[i] = _mean(by_byte[start:end])
    ranked = sorted(values, key=lambda i: (-values[i], i))
    chosen = set(ranked[: max(1, round(share * len(ranked)))])
    return [i in chosen for i in range(len(target))]


def _mean(values: Sequence[float]) -> float:
    """The mean; of equal values it is that value to the last bit, so that ties stay ties."""
    return values[0] if min(values) == max(values) else fmean(values)


def _byte_level() -> Callable[[str], bytes]:
    """Of GPT-2's kind of vocabulary: one character stands for one byte; an added token is written out."""
    # The graph's definitions import this module, and the library takes seconds.
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    known = {character: byte for byte, character in bytes_to_unicode().items()}

    def spell(name: str) -> bytes:
        return bytes(map(known.__getitem__, name)) if known.keys() >= set(name) else name.encode()

    return spell


def _sentencepiece(name: str) -> bytes:
    """Of SentencePiece's kind: ▁ stands for a space, and bytes without a token of their own are named."""
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", name)
    return bytes([int(byte[1], 16)]) if byte else name.replace("▁", " ").encode()
