"""Reading the prompts that a generator wrote, in the form that it was asked for (``asking.py``) or another one.

Single lines are read from a numbered or bulleted list. Prompts of several lines keep their lines; whatever was asked
for, the answer may be a JSON list, blocks or numbered items, since generators answer as they are used to."""

import json
import re
from collections.abc import Sequence
from typing import Any

from tuneshift_dag.method.asking import Format, Mode

# No item: a number with a fraction, a time, a negative number, a line of dashes or stars, bold text.
_ITEM = re.compile(r"^\s*(?:(?:\*\*)?\d+\s*[.):](?!\d)(?:\*\*)?|[-•](?![-\d])|\*(?!\s*\*))\s*(.*)$")
_INVISIBLE = " \t\u200b\u200c\u200d\u2060\ufeff"
_NUMBERED = re.compile(r"\s*(?:#+\s*|\*\*)?(\d{1,4})\s*[.):](?:\*\*)?(?:\s+(.*)|)$")
# A fence may stand behind the number of an item; what opens with backticks has none behind them.
_FENCE = re.compile(r"\s*(?:\d+\s*[.):]\s+)?(?:(`{3,})[^`]*|(~{3,}).*)$")
# A list of strings or objects, or the first of objects that stand one in a line.
_JSON_START = re.compile(r"""(?:^|:)[ \t]*(?:\[\s*(?=["'{\[])|(?={\s*["']))""", re.MULTILINE)
# A quote ends a string only where JSON goes on behind it: others stand inside, as forgetful writers leave them.
_JSON_TOKEN = re.compile(
    r"""(?P<quote>["'])(?P<text>(?:\\.|[^\\])*?)(?P=quote)(?=\s*(?:(?P<key>:)|,\s*(?:["'{}\]]|$)|[\]}]|$))"""
    r"""|(?P<open>["'])|(?P<mark>[{}\[\]])""",
    re.DOTALL,
)
_OPENING = re.compile(r"\s*[^\n]*\s*(?:```\w*\s*)?")
_WHOLE_FENCE = re.compile(r"\s*(`{3,}|~{3,})[^\n`]*\n(.*)\n\s*\1\s*", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


def trimmed(text: str) -> str:
    """A prompt without the blank lines around it. A single line loses the space around it too; of several, the first
    keeps its indentation."""
    text = re.sub(r"\A(?:[^\S\n]*\n)+", "", text.rstrip())
    return text if "\n" in text else text.strip()


def read_answer(text: str, mode: Mode, format: Format, finished: bool, count: int, line: str = "---") -> list[str]:
    """The prompts of an answer to a `generator_request` for ``count`` of them.

    Unless the generator stopped by itself (``finished``), the last one may be cut off and is left out."""
    if format == "list":
        return parse_list(text, mode, finished)[:count]
    return _parse_texts(text, mode, format, finished, count, line)[:count]


def parse_list(text: str, mode: Mode, finished: bool) -> list[str]:
    """The items of a generated numbered or bulleted list. In ``continuation`` the text begins inside the first one."""
    lines = text.split("\n")
    if mode == "continuation":
        lines[0] = f"1. {lines[0]}"
    if not finished:
        lines = lines[:-1]
    items = [match.group(1) for line in lines if (match := _ITEM.match(line))]
    return [_unquote(item.strip().strip(_INVISIBLE)) for item in items]


def parse_labelled(text: str, template: str, asked: bool, finished: bool, line: str = "") -> list[str]:
    """The prompt that a generator wrote after `labelled_request`: one line, or all up to the ``line`` of blocks; or
    nothing usable."""
    if not asked:
        marker = template.split("{response}")[1].split("{prompt}")[0].strip()
        _, found, text = text.partition(marker)
        if not found:
            return []
    if line:
        lines = text.replace("\r\n", "\n").split("\n")
        ends = _separators(lines, line)
        before, behind = template.split("{prompt}")
        lines[0] = lines[0].removeprefix(before[len(before.rstrip()) :])
        prompt = "\n".join(lines[: ends[0]] if ends else lines)
        prompt, ended, _ = prompt.partition(behind) if behind.strip() else (prompt, "", "")
        return [trimmed(prompt)] if ends or ended or finished else []
    first, newline, _ = text.lstrip().partition("\n")
    return [_unquote(first.strip())] if newline or finished else []


def _unquote(item: str) -> str:
    match = re.fullmatch(r'"([^"]*)"|“([^”]*)”', item)
    return (match.group(1) or match.group(2) or "").strip() if match else item


def _parse_texts(text: str, mode: Mode, format: Format, finished: bool, count: int, line: str) -> list[str]:
    """The texts of an answer to a request for JSON or blocks, by the marks that are found in it."""
    text = text.replace("\r\n", "\n")
    if mode == "continuation" and format == "json":
        text = f"[{text}"
    lines = text.split("\n")
    ends, numbers = _separators(lines, line), _numbers(lines)
    json_at = _json_start(text, anywhere=format == "json" and not ends)
    # A base model goes on with a sample, and has no need to mark the end of it.
    alone = format == "blocks" and (mode == "continuation" or count == 1)
    if alone and numbers and "".join(lines[: numbers[0]]).strip():
        numbers = []  # of a list inside of it
    if format == "blocks" and ends:
        return _blocks(lines, ends, mode, finished)
    is_outside = json_at is not None and not (numbers and text.count("\n", 0, json_at) >= numbers[0])
    if is_outside and (found := _parse_json(text[json_at:], finished)):
        return found
    if not (ends or numbers) and (fenced := _WHOLE_FENCE.fullmatch(text)):
        lines = fenced[2].split("\n")
        ends, numbers = _separators(lines, line), _numbers(lines)
    if ends:
        return _blocks(lines, ends, mode, finished)
    if numbers:
        return _numbered_items(lines, numbers, finished)
    return [trimmed(text)] if alone and finished else []


def _json_start(text: str, anywhere: bool) -> int | None:
    """Where JSON begins; not ``anywhere`` only a list that the answer begins with, since blocks may hold JSON."""
    found = _JSON_START.search(text)
    if found and (anywhere or ("[" in found[0] and _OPENING.fullmatch(text, 0, found.start()))):
        return found.start()
    return None


def _outside_fences(lines: Sequence[str]) -> list[int]:
    """The numbers of the lines that no code fence encloses. A fence that is never closed encloses nothing."""
    outside, at = [], 0
    while at < len(lines):
        outside.append(at)
        if opening := _FENCE.match(lines[at]):
            fence = opening[1] or opening[2]
            closing = re.compile(rf"\s*{re.escape(fence[0])}{{{len(fence)},}}\s*")
            at = next((i for i in range(at + 1, len(lines)) if closing.fullmatch(lines[i])), at)
        at += 1
    return outside


def _separators(lines: Sequence[str], line: str) -> list[int]:
    """Numbers of the lines that hold only dashes, as many as ``line`` or more."""
    found = (i for i in _outside_fences(lines) if len(lines[i].strip()) >= len(line))
    return [i for i in found if not lines[i].strip().strip("-")]


def _blocks(lines: Sequence[str], ends: Sequence[int], mode: Mode, finished: bool) -> list[str]:
    bounds = zip([-1, *ends], [*ends, len(lines)], strict=True)
    blocks = [trimmed("\n".join(lines[start + 1 : end])) for start, end in bounds]
    if not finished:
        blocks = blocks[:-1]
    if mode == "chat" and blocks and re.fullmatch(r"[^\n]*[:：]", blocks[0]):
        blocks = blocks[1:]  # "Here are 20 more samples:"
    blocks = [block for block in blocks if block]
    # Some generators number the blocks as well.
    heads = [block.split("\n")[0] for block in blocks]
    if len(blocks) > 1 and len(_numbers(heads)) == len(blocks):
        return [_numbered_items(block.split("\n"), [0], True)[0] for block in blocks]
    return blocks


def _numbers(lines: Sequence[str]) -> list[int]:
    """Numbers of the lines where the items of a numbered list begin: each counts one more than the one before."""
    found: list[int] = []
    last = 0
    for i in _outside_fences(lines):
        match = _NUMBERED.match(lines[i])
        if match and (not found or int(match[1]) == last + 1):
            found.append(i)
            last = int(match[1])
    return found


def _numbered_items(lines: Sequence[str], numbers: Sequence[int], finished: bool) -> list[str]:
    bounds = list(zip(numbers, [*numbers[1:], len(lines)], strict=True))
    items = []
    for start, end in bounds if finished else bounds[:-1]:
        head, rest = _NUMBERED.match(lines[start]), list(lines[start + 1 : end])
        # Markdown indents what belongs to an item; a fence tells by how much.
        indents = [len(line) - len(line.lstrip()) for line in rest if line.strip()]
        fence = next((len(line) - len(line.lstrip()) for line in rest if _FENCE.match(line)), 0)
        if fence and min(indents) >= fence:
            rest = [line[fence:] for line in rest]
        items.append(_unquote(trimmed("\n".join([(head and head[2]) or "", *rest]))))
    return items


def _parse_json(text: str, finished: bool) -> list[str]:
    """The strings of a JSON list at the start of ``text``, or of the objects in it, also when it isn't quite JSON: with
    line breaks or quotes inside of strings, single quotes, a comma too many, or the end missing."""
    text = text.lstrip(": \t\n")
    try:
        found, end = json.JSONDecoder(strict=False).raw_decode(text)
        if isinstance(found, list) or not text[end:].lstrip(", \t\n").startswith("{"):
            return [trimmed(whole_characters(item)) for item in _strings(found)]
    except (ValueError, RecursionError):
        pass
    items: list[str] = []
    fields: dict[str, str] | None = None
    key = ""
    for token in _JSON_TOKEN.finditer(text):
        if token["mark"] == "{":
            fields = {}
        elif token["mark"] == "[":
            fields = fields or None  # a list in an object that has no other string
        elif token["mark"] == "}":
            items += _strings(fields or {})
            fields = None
        elif token["mark"] == "]" and fields is None:
            break
        elif token["open"]:  # it is never closed
            items += [_unescape(text[token.end() :])] if finished else []
            break
        elif token["key"] and fields is not None:
            key = token["text"]
        elif token["quote"] and fields is not None:
            fields[key] = _unescape(token["text"])
        elif token["quote"]:
            items.append(_unescape(token["text"]))
    return [trimmed(item) for item in [*items, *_strings(fields or {})]]


def _strings(value: Any) -> list[str]:
    """The strings in a list; of an object its ``prompt``, or its only string, or those of the lists in it."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        texts = [text for text in value.values() if isinstance(text, str)]
        if isinstance(value.get("prompt"), str):
            return [value["prompt"]]
        return texts if len(texts) == 1 else _strings([v for v in value.values() if isinstance(v, list)])
    return [text for item in value for text in _strings(item)] if isinstance(value, list) else []


def _unescape(text: str) -> str:
    """What a JSON string stands for; a backslash that means nothing in JSON stays."""

    def character(match: re.Match[str]) -> str:
        code = match[1]
        if len(code) > 1:
            return chr(int(code[1:], 16))
        return _ESCAPES.get(code, code if code in "\"'/\\" else match[0])

    return whole_characters(re.sub(r"\\(u[0-9a-fA-F]{4}|.)", character, text, flags=re.DOTALL))


def whole_characters(text: str) -> str:
    """The text with the two halves of a UTF-16 character made one, and a lone half replaced: it can't be stored."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
