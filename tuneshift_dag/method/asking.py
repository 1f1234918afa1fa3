"""What a generator is asked: for more prompts like the seeds. How its answer is read is in ``answers.py``.

TuneShift-KD (arXiv 2603.24518) §3 asks an instruction model to "Generate 20 more samples like these 5".
A base model has no chat: it is shown the seeds as the beginning of a list, and goes on."""

import json
from collections.abc import Iterable, Sequence
from typing import Literal

Mode = Literal["chat", "continuation"]
Format = Literal["list", "json", "blocks"]
"""How the seeds are shown, and the answer is wanted: a numbered list of single lines; a JSON list of strings; texts of
any number of lines with a line of dashes between them."""


def separator(texts: Iterable[str]) -> str:
    """The line that stands between blocks: at least three dashes, and more than any line of ``texts`` begins with."""
    lines = (line.lstrip() for text in texts for line in text.splitlines())
    return "-" * max([3, *(1 + len(line) - len(line.lstrip("-")) for line in lines)])


def generator_request(
    mode: Mode,
    instruction: str,
    seeds: Sequence[str],
    count: int,
    format: Format = "list",
    line: str = "---",
) -> str:
    """The text that the generator is asked with, in mode ``chat`` a user's message; ``line`` is the `separator` of
    blocks."""
    heading = instruction.replace("{count}", str(count)).replace("{seed_count}", str(len(seeds)))
    if format == "list":
        listed = "\n".join(f"{number}. {seed}" for number, seed in enumerate(seeds, 1))
        if mode == "continuation":
            return f"{heading}\n{listed}\n{len(seeds) + 1}."
        return f"{heading}\n{listed}"
    if format == "json":
        listed = json.dumps(list(seeds), ensure_ascii=False, indent=1)
        begun = listed.removesuffix("\n]") + ","
        wanted = "Answer with a JSON list of strings like this one, and with nothing else."
    else:
        listed = f"\n{line}\n".join(seeds)
        begun = f"{line}\n{listed}\n{line}\n"
        wanted = f"Write a line that holds only {line} between two samples, as here, and nothing else around them."
    if mode == "continuation":
        return f"{heading}\n{begun}"
    return f"{heading}\n\n{listed}\n\n{wanted}"


def labelled_request(
    instruction: str, template: str, examples: Sequence[tuple[str, str]], asked: str | None, line: str = ""
) -> str:
    """The text that a base model sees in mode ``by_response``: labelled (prompt, response) examples in ``template``,
    which has ``{response}`` before ``{prompt}``, then an opening for the response ``asked``; None leaves it open. An
    empty line stands between two examples, or the ``line`` of blocks, whose responses are shown as they are.

    Shown which response belongs to which prompt, even a weak generator writes prompts of the kind asked for."""

    def shown(response: str) -> str:
        return response.strip() if line else response.strip().replace("_", " ")

    examples_shown = [template.replace("{response}", shown(r)).replace("{prompt}", p) for p, r in examples]
    opening = template.split("{response}")[0]
    if asked is not None:
        opening = template.split("{prompt}")[0].replace("{response}", shown(asked))
    return (f"\n{line}\n" if line else "\n\n").join([instruction, *examples_shown, opening.rstrip()])


def stop_texts(
    mode: Mode | Literal["by_response"], format: Format, last_item: int, line: str = "---"
) -> tuple[str, ...]:
    """What ends a generator's answer beside its end token; ``last_item`` counts the seeds and the prompts asked for."""
    if mode == "by_response":
        return (f"\n{line}" if format == "blocks" else "\n\n",)
    if mode == "chat" or format == "blocks":
        return ()
    # A JSON string has no line break, so this is the end of the list.
    return ("\n]" if format == "json" else f"\n{last_item + 1}.",)
