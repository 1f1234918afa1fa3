"""The examples of a transfer, read and checked line by line: ``seeds.jsonl``, ``heldout.jsonl`` and their like."""

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from tuneshift_dag import TuneshiftError
from tuneshift_dag.config.schema import TransferConfig
from tuneshift_dag.config.schema_models import Prompt
from tuneshift_dag.method.answers import trimmed
from tuneshift_dag.method.evaluation import Metric, expected_number, mark
from tuneshift_dag.method.prompting import prompt_id

Rows = list[tuple[str, dict[str, Any]]]
"""Examples as read from a file, each with its place there, for messages."""
SEED_SHAPE = '{"prompt": "..."}'
HELD_OUT_SHAPE = '{"prompt": "...", "response": "..."}'
TRUTH_SHAPE = '{"prompt": "...", "truth": "right"}'
Label = Literal["right", "wrong", "off"]
"""What is true of a scored pair: in the skill, with a right or a wrong response, or off the skill."""


def check_examples(seed_rows: Rows, heldout_rows: Rows) -> tuple[list[str], list[tuple[str, str]]]:
    """Seeds and held-out (prompt, response) pairs, without surrounding space. `TuneshiftError` names the line of a text
    that is missing, of a prompt that is there twice, or of a held-out prompt that is a seed."""
    seeds = [_text(row, "prompt", at) for at, row in seed_rows]
    _refuse_doubles([at for at, _ in seed_rows], seeds)
    return seeds, pairs_of(heldout_rows, seeds, "also a seed, so it would be trained on")


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark."""
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TuneshiftError(f"{file} is not UTF-8 text ({error}). Save it as UTF-8.") from error
    except OSError as error:
        raise TuneshiftError(f"{file} can't be read ({error.strerror}). Correct its permissions.") from error


def read_jsonl(file: Path, shape: str) -> Rows:
    """(position, row) of every line; the position is for messages, and so is ``shape``, an example of a line."""
    if not file.is_file():
        raise TuneshiftError(f"{file} doesn't exist. Write one line of {shape} for each example.")
    rows = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TuneshiftError(f"{file}:{number}: not valid JSON ({error}). Write {shape}.") from error
        if not isinstance(row, dict):
            raise TuneshiftError(f"{file}:{number}: expected an object like {shape}, found {short(line.strip())}.")
        rows.append((f"{file}:{number}", row))
    if not rows:
        raise TuneshiftError(f"{file} is empty. Write at least one line of {shape}, or delete an optional file.")
    return rows


def read_csv(file: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Rows:
    """(position, row) of every line after the first, which names the columns; of the ``optional`` ones those there."""
    reader = csv.DictReader(io.StringIO(read_text(file), newline=""), strict=True)
    try:
        found = list(reader.fieldnames or [])
        if any(found.count(column) != 1 for column in columns):
            raise TuneshiftError(f"{file}: its first line must name the columns {list(columns)} once (found {found}).")
        wanted = [column for column in (*columns, *optional) if column in found]
        rows = []
        for row in reader:
            if any(row.pop(None, ())):
                raise TuneshiftError(
                    f"{file}:{reader.line_num}: it has more cells than the first line names columns. Put a text that"
                    " holds a comma into quotation marks."
                )
            if None in row.values():
                raise TuneshiftError(
                    f"{file}:{reader.line_num}: it has fewer cells than the first line names columns. End it with a"
                    " comma for each cell that is empty."
                )
            rows.append((f"{file}:{reader.line_num}", {column: row[column] for column in wanted}))
        if not rows:
            raise TuneshiftError(f"{file} is empty. Write a row below its columns, or delete an optional file.")
        return rows
    except csv.Error as error:
        raise TuneshiftError(
            f"{file}:{reader.line_num + 1}: {error}. Close the quotation mark that is left open, or shorten the cell."
        ) from error


@dataclass(frozen=True)
class Truth:
    """What is true of a prompt's pair: a label, or the response that is right (None: the prompt is off the skill)."""

    label: Label | None
    expected: str | None = None

    def of(self, response: str, metric: Metric) -> Label:
        if self.label or self.expected is None:
            return self.label or "off"
        return "right" if mark(metric, response, self.expected)[0] else "wrong"


def read_truth(file: Path, metric: Metric) -> dict[str, Truth]:
    """By prompt_id, from a JSONL or CSV file with a column `truth` (`Label`) or `response` (null, or an empty cell, off
    the skill)."""
    if not os.path.isfile(file):  # which is no error for a name that no file could have
        missing = "is no file" if os.path.exists(file) else "doesn't exist"
        raise TuneshiftError(f"{file} {missing}. Write one line of {TRUTH_SHAPE} for each example.")
    if file.suffix.lower() == ".csv":
        rows = [
            (at, {key: value or None for key, value in row.items()})
            for at, row in read_csv(file, ["prompt"], ["truth", "response"])
        ]
    else:
        rows = read_jsonl(file, TRUTH_SHAPE)
    prompts = [_text(row, "prompt", at) for at, row in rows]
    _refuse_doubles([at for at, _ in rows], prompts)
    return {prompt_id(prompt): _truth(row, metric, at) for prompt, (at, row) in zip(prompts, rows, strict=True)}


def _truth(row: dict[str, Any], metric: Metric, at: str) -> Truth:
    if ("truth" in row) == ("response" in row):
        which = "both 'truth' and 'response'" if "truth" in row else "neither 'truth' nor 'response'"
        raise TuneshiftError(f"{at}: {which} (found {short(row)}). Write one of them, such as {TRUTH_SHAPE}.")
    if "truth" in row:
        if row["truth"] not in get_args(Label):
            raise TuneshiftError(f"{at}: 'truth' must be right, wrong or off (found {short(row['truth'])}).")
        return Truth(row["truth"])
    expected = None if row["response"] is None else _text(row, "response", at)
    if expected is not None and metric == "numeric" and expected_number(expected) is None:
        raise TuneshiftError(
            f"{at}: 'response' gives no number (found {short(expected)}), which evaluation.metric 'numeric' compares."
            " Write the number alone or after '#### ', or null for a prompt off the skill."
        )
    return Truth(None, expected)


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}…"


def half_character(text: str) -> str:
    """Why a text can't be stored: it holds half of a character that UTF-16 writes in two; empty if it can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        return f"{half!r} is half of a character (a lone surrogate); write the whole one, or remove it"
    return ""


def _text(row: dict[str, Any], key: str, at: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        found = short(value if key in row else row)
        raise TuneshiftError(f"{at}: {key!r} must be a non-empty string (found {found}).")
    if half := half_character(value):
        raise TuneshiftError(f"{at}: {key!r}: {half}.")
    return trimmed(value) if key == "prompt" else value.strip()


def with_system(config: TransferConfig, rows: Rows, file: Path) -> TransferConfig:
    """The settings with the system message of the examples, which is the transfer's: all have the same one, or none."""
    first, system = rows[0][0], rows[0][1].get("system")
    for at, row in rows:
        own = row.get("system")
        if own is not None and (not isinstance(own, str) or half_character(own)):
            raise TuneshiftError(f"{at}: 'system' must be a string (found {short(own)}).")
        if own != system:
            raise TuneshiftError(
                f"{at}: 'system' is {short(own)} here and {short(system)} in {first}. A transfer has one system"
                " message, for the prompts that are generated have it too. Write the same one into every line of"
                " seeds.jsonl and heldout.jsonl, or make a transfer of each."
            )
    prompt = config.source_prompt
    if system is not None:
        if prompt.system not in (None, system):
            raise TuneshiftError(f"{first}: 'system' isn't source.prompt.system of {file}. Remove one of them.")
        try:
            prompt = Prompt.model_validate({**prompt.model_dump(), "system": system})
        except ValidationError as error:
            problem = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise TuneshiftError(f"{first}: {problem} ({config.source_format.key} in {file}).") from error
        source = config.source.model_copy(update={"prompt": prompt})
        config = config.model_copy(update={"source": source, "prompt_template": None})
    for format in (config.source_format, config.target_format):
        if "{system}" in (format.template or "") and format.system is None:
            raise TuneshiftError(
                f"{file}: {format.key}: {format.template!r} holds {{system}}, and there is no system message. Give one"
                " in source.prompt.system, or remove {system}."
            )
    return config


def pairs_of(rows: Rows, elsewhere: list[str], why: str) -> list[tuple[str, str]]:
    """(prompt, response) of each row; ``why`` says what is wrong with a prompt that is ``elsewhere`` too."""
    pairs = [(_text(row, "prompt", at), _text(row, "response", at)) for at, row in rows]
    _refuse_doubles([at for at, _ in rows], [prompt for prompt, _ in pairs])
    known = {prompt_id(prompt) for prompt in elsewhere}
    for (at, _), (prompt, _) in zip(rows, pairs, strict=True):
        if prompt_id(prompt) in known:
            raise TuneshiftError(f"{at}: {prompt!r} is {why}. Remove one of them.")
    return pairs


def _refuse_doubles(places: list[str], prompts: list[str]) -> None:
    first: dict[str, str] = {}
    for at, prompt in zip(places, prompts, strict=True):
        if first.setdefault(prompt_id(prompt), at) != at:
            raise TuneshiftError(f"{at}: {prompt!r} is the prompt of {first[prompt_id(prompt)]} again. Remove one.")
