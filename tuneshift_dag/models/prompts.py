"""Prompts as token ids, and the text at the boundary of prompt and response.

Raw templates get the special tokens that the tokenizer puts in front of a text, once; chat templates write their own. A
special token's name inside a user's prompt is tokenized as text. SentencePiece tokenizers (Llama 2, Mistral) put a
space before a text and take one away when they decode: a response is read and written here as what continues a prompt.
"""

import re
from functools import lru_cache
from itertools import dropwhile, pairwise
from typing import Any

from tuneshift_dag import TuneshiftError
from tuneshift_dag.method import PromptFormat
from tuneshift_dag.models.capabilities import opening, turn_end

# Stands for a message: letters alone, which no template takes for anything else.
_PROBE = "tuneshiftprobe"


def prompt_ids(tokenizer: Any, format: PromptFormat, prompt: str) -> list[int]:
    """Token ids of what a model sees before its response. `TuneshiftError` when the tokenizer has no chat template, or
    one that can't show the messages."""
    raw = format.template is not None
    text = prompt.join(format.around()) if raw else chat_text(tokenizer, format, prompt)
    ids = _with_names_as_text(tokenizer, format, prompt, text) or _plain(tokenizer, text)
    if not raw:
        return ids
    first = opening(tokenizer)
    return [*first, *dropwhile(first.__contains__, ids)]


def opening_ids(tokenizer: Any, format: PromptFormat) -> list[int]:
    """Token ids of a chat up to where the user's message begins; errors as of `prompt_ids`."""
    return _plain(tokenizer, _frame(tokenizer, format)[0])


def chat_text(tokenizer: Any, format: PromptFormat, message: str) -> str:
    """The chat template with the system message and a user's, up to the place of the answer."""
    if not tokenizer.chat_template:
        raise TuneshiftError(
            f"{format.key}: 'chat' needs a chat template, and the tokenizer in {tokenizer.name_or_path} has none. Set"
            f' {format.key} to a raw template that holds {{prompt}}, such as "{{prompt}}\\n".'
        )
    try:
        how = {"tokenize": False, "add_generation_prompt": True}
        text = str(tokenizer.apply_chat_template(format.messages(message), **how, **format.arguments))
    except Exception as error:  # a template may raise anything
        system = "" if format.system is None else " without `system` (its text can stand in a raw template)"
        raise TuneshiftError(
            f"{format.key}: the chat template of {tokenizer.name_or_path} refuses {format}: {error}. Ask it{system}, or"
            f" set {format.key} to a raw template that holds {{prompt}}."
        ) from error
    for what, said in (("prompt", message), ("system message", format.system or "")):
        if said.strip() not in text:
            raise TuneshiftError(
                f"{format.key}: the chat template of {tokenizer.name_or_path} doesn't show the {what} {said!r}. Set"
                f" {format.key} to a raw template that holds it."
            )
    return text


def foreign_names(tokenizer: Any, source: Any, format: PromptFormat) -> list[str]:
    """Names of special tokens in a raw template that the ``source``'s tokenizer knows and this one takes for text."""
    foreign = _special_names(source) - _special_names(tokenizer)
    return sorted(name for name in foreign if name in (format.template or ""))


def end_id(tokenizer: Any, format: PromptFormat) -> int:
    """The token that ends a response: in a chat the one that ends the model's turn, else the tokenizer's."""
    turn = turn_end(tokenizer, **format.arguments) if format.template is None else None
    return int(tokenizer.eos_token_id if turn is None else turn)


def continuation_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that continues another one: without a space that the tokenizer would put before it, and with
    names of special tokens as text."""
    places = [0, *_cuts(tokenizer, text), len(text)]
    return [number for start, end in pairwise(places) for number in _continued(tokenizer, text[start:end])]


def _continued(tokenizer: Any, text: str) -> list[int]:
    ids = _plain(tokenizer, text)
    if not _adds_space(tokenizer):
        return ids
    line, both = _plain(tokenizer, "\n"), _plain(tokenizer, f"\n{text}")
    return both[len(line) :] if both[: len(line)] == line else ids


def response_text(tokenizer: Any, ids: list[int], names: bool = True) -> str:
    """The text of a response as it continues its prompt, with the space that it begins with if it does, and special
    tokens by their ``names``, or without them."""
    before, length = _before(tokenizer)
    return _decoded(tokenizer, [*before, *ids], names)[length:]


@lru_cache(maxsize=4)
def _before(tokenizer: Any) -> tuple[tuple[int, ...], int]:
    """A text that a response may continue, and its length once decoded."""
    ids = tuple(_plain(tokenizer, "a"))
    return ids, len(_decoded(tokenizer, list(ids), True))


def _decoded(tokenizer: Any, ids: list[int], names: bool) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=not names, clean_up_tokenization_spaces=False))


def _with_names_as_text(tokenizer: Any, format: PromptFormat, prompt: str, text: str) -> list[int]:
    """Token ids of ``text``, with the names of special tokens that stand in the prompt itself as text; [] without any.

    A special token ends a piece of text for its tokenizer. So the pieces are tokenized apart, a name as its first
    character and the rest: no tokenizer joins what it sees apart."""
    if not _cuts(tokenizer, prompt):
        return []
    before, after = _frame(tokenizer, format)
    if not (text.startswith(before) and text.endswith(after)):
        return []
    cuts = [len(before) + cut for cut in _cuts(tokenizer, text[len(before) : len(text) - len(after)])]
    if not cuts:
        return []
    ids = _plain(tokenizer, text[: cuts[0]])
    for start, end in pairwise([*cuts, len(text)]):
        ids += _continued(tokenizer, text[start:end])
    return ids


def _cuts(tokenizer: Any, text: str) -> list[int]:
    """The places after the first characters of the names of special tokens in a text."""
    if _first_characters(tokenizer).isdisjoint(text):
        return []
    # With the longest first, of two names that begin alike the one that is there is found.
    names = sorted((name for name in _special_names(tokenizer) if name in text), key=len, reverse=True)
    return [name.start() + 1 for name in re.finditer("|".join(map(re.escape, names)), text)] if names else []


def _frame(tokenizer: Any, format: PromptFormat) -> tuple[str, str]:
    if format.template is not None:
        return format.around()
    before, _, after = chat_text(tokenizer, format, _PROBE).rpartition(_PROBE)
    return before, after


def _plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


@lru_cache(maxsize=4)
def _special_names(tokenizer: Any) -> frozenset[str]:
    named = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return frozenset(name for name in named.union(tokenizer.all_special_tokens) if name.strip())


@lru_cache(maxsize=4)
def _first_characters(tokenizer: Any) -> frozenset[str]:
    """Few prompts hold one, and there may be thousands of names."""
    return frozenset(name[:1] for name in _special_names(tokenizer))


@lru_cache(maxsize=4)
def _adds_space(tokenizer: Any) -> bool:
    line = _plain(tokenizer, "\n")
    return _plain(tokenizer, "a") != _plain(tokenizer, "\na")[len(line) :]
