"""``tuneshift new``: a transfer folder from an adapter, example prompts and the names of the models.

Everything is checked before the folder appears, and the finished folder is loaded once like any other transfer.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast, get_args

import typer

from tuneshift_dag import TuneshiftError
from tuneshift_dag.config import Transfer, examples, files
from tuneshift_dag.config.examples import Rows
from tuneshift_dag.config.schema_models import Mode
from tuneshift_dag.models.adapter_checks import check_adapter_folder
from tuneshift_dag.models.checks import check_links
from tuneshift_dag.models.references import TOKENIZER_FILES, Reference, hub_id_of, is_hub_id

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", *TOKENIZER_FILES)


@dataclass
class Answers:
    """What `tuneshift new` needs to know. Empty means: not said; paths are relative to the working folder."""

    adapter: str = ""
    base: str = ""
    target: str = ""
    template: str = ""
    seeds: str = ""
    heldout: str = ""
    generator: str = ""
    mode: Mode = "chat"
    instruction: str = ""
    description: str = ""
    copy_adapter: bool = True
    fine_tuned: str = ""
    """A whole model, in the place of the adapter."""
    typed_seeds: tuple[str, ...] = ()
    """Prompts typed in a terminal, instead of a file."""


def create(root: Path, name: str, given: Answers) -> Transfer:
    """Write ``root/name`` and return the transfer in it; or `TuneshiftError`, and nothing is written."""
    folder = check_name(root, name)
    if absent := missing(given):
        raise TuneshiftError(f"{', '.join(absent)} missing: give them, or run this in a terminal to be asked.")
    if given.adapter and given.fine_tuned:
        raise TuneshiftError("--adapter and --fine-tuned: give one of them, an adapter or a whole model.")
    if given.adapter:
        check_adapter(given.adapter)
    named = named_base(given.adapter)
    if not given.base and not _usable(named):
        said = "a whole model doesn't say it" if given.fine_tuned else "the adapter doesn't say it"
        said = f"adapter_config.json names {named!r}, which is no model here" if named else said
        raise TuneshiftError(f"--base missing: {said}. Give the model that was fine-tuned.")
    adapter = _local_folder(given.adapter)
    copied = adapter if given.copy_adapter else None
    config = _config(
        replace(
            given,
            adapter="adapter" if copied else str(adapter or given.adapter),
            fine_tuned=given.fine_tuned and _model(given.fine_tuned, "--fine-tuned"),
            base=check_base(given.base or named, given.adapter),
            target=_model(given.target, "--target"),
            generator=_model(given.generator or given.target, "--generator"),
            template=check_template(given.template),
        )
    )
    seed_rows: Rows = [(f"prompt {n}", {"prompt": seed}) for n, seed in enumerate(given.typed_seeds, 1)]
    seed_rows = read_examples(_path(given.seeds), "--seeds") if given.seeds else seed_rows
    heldout_rows = read_examples(_path(given.heldout), "--heldout") if given.heldout else []
    seeds, heldout = examples.check_examples(seed_rows, heldout_rows)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".new-") as staging:
            made = Path(staging) / name
            made.mkdir()
            (made / "transfer.yaml").write_text(config, "utf-8")
            _write_jsonl(made / "seeds.jsonl", [{"prompt": prompt} for prompt in seeds], seed_rows)
            if heldout:
                pairs = [{"prompt": prompt, "response": response} for prompt, response in heldout]
                _write_jsonl(made / "heldout.jsonl", pairs, heldout_rows)
            if copied:
                (made / "adapter").mkdir()
                check_links(copied, f"--adapter {given.adapter}")
                for file in (name for name in _ADAPTER_FILES if (copied / name).is_file()):
                    shutil.copyfile(copied / file, made / "adapter" / file)
            try:
                files.load_transfer(made)
            except TuneshiftError as error:
                raise TuneshiftError(str(error).replace(str(made), str(folder))) from error
            made.rename(folder)
    except (OSError, UnicodeEncodeError) as error:
        raise TuneshiftError(f"{folder} can't be written: {error}.") from error
    return files.load_transfer(folder)


def missing(given: Answers) -> list[str]:
    """Flags without which no folder can be written."""
    tuned = given.adapter or given.fine_tuned
    needed = {"--adapter": tuned, "--target": given.target, "--template": given.template}
    return [flag for flag, value in {**needed, "--seeds": given.seeds or given.typed_seeds}.items() if not value]


def ask_for_the_rest(given: Answers) -> Answers:
    """Ask in the terminal for what no flag said; a wrong answer is explained and asked for again."""
    told = replace(given)
    if not told.fine_tuned and not told.adapter:
        told.adapter = _ask("Adapter (PEFT folder or hub id; empty for a whole model)", check_adapter, "")
    if not told.adapter and not told.fine_tuned:
        told.fine_tuned = _ask("Fine-tuned model (hub id, folder or package://…)", lambda v: _model(v, "--fine-tuned"))
    if not told.base:
        named = named_base(told.adapter)
        question, default = "Its base model (hub id, folder or package://…)", named if _usable(named) else None
        told.base = _ask(question, lambda value: check_base(value, told.adapter), default)
    told.target = told.target or _ask("Target base", lambda value: _model(value, "--target"))
    if not told.generator:
        told.generator = _ask("Model that writes prompts", lambda value: _model(value, "--generator"), told.target)
        modes = "chat (an instruct model), continuation (a base model), by_response (a fixed set of answers)"
        told.mode = cast(Mode, _ask(f"Its mode: {modes}", _check_mode, told.mode))
    question = "Prompt template, as in the adapter's training, \\n for a new line (or: chat, its own)"
    told.template = told.template or _ask(question, check_template)
    if not told.seeds and not told.typed_seeds:
        question = "File of example prompts (.jsonl, .csv, .txt; empty to type them)"
        told.seeds = _ask(question, _examples("--seeds"), "")
        told.typed_seeds = () if told.seeds else _type_seeds()
    told.heldout = told.heldout or _ask("Held-out file (empty for none)", _examples("--heldout"), "")
    return told


def check_name(root: Path, name: str) -> Path:
    """The folder to be written; `TuneshiftError` when its name can't be used or it is there."""
    problem = files.name_problem(name)
    if problem:
        better = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_") or "my_skill"
        better = f"{better}_skill" if files.name_problem(better) else better
        raise TuneshiftError(f"NAME {name!r}: {problem}. Take one such as {better!r}.")
    if os.path.lexists(root / name):
        raise TuneshiftError(f"{root / name} exists already, and nothing is overwritten. Choose another NAME.")
    for other in root.glob("*/transfer.yaml"):
        if other.parent.name.lower() == name.lower():
            raise TuneshiftError(f"NAME {name!r}: {other.parent} differs only in case. Choose another NAME.")
    return root / name


def check_adapter(value: str) -> None:
    """`TuneshiftError` when a folder can't be used; a hub id is checked when it is first fetched. None is sound too."""
    if not value:
        return
    folder = _path(value)
    if not folder.exists() and is_hub_id(value):
        return
    check_adapter_folder(folder, "--adapter")


def named_base(adapter: str) -> str:
    """The base model that a local adapter says it was trained on; empty when it doesn't say or is on the hub."""
    folder = _local_folder(adapter)
    config = check_adapter_folder(folder, "--adapter") if folder else {}
    named = str(config.get("base_model_name_or_path") or "")
    return named if Path(named).exists() else hub_id_of(named)


def check_base(value: str, adapter: str) -> str:
    """The source base as the transfer's folder sees it; `TuneshiftError` when the adapter is of another one."""
    named = named_base(adapter)
    if named and not files.is_same_base(named, value):
        raise TuneshiftError(
            f"--base {value!r}: the adapter was trained on {named!r} ({Path(adapter) / 'adapter_config.json'}). Give"
            " that; if they are the same weights under two names, set base_model_name_or_path in that file to yours."
        )
    return _model(value, "--base")


def check_template(value: str) -> str:
    """The template with ``\\n`` as line breaks, which a shell passes as backslash and n."""
    text = value.replace("\\n", "\n")
    if text != "chat" and text.count("{prompt}") != 1:
        raise TuneshiftError(
            f"--template {value!r} must contain {{prompt}} exactly once: it is all that a model sees before its"
            " answer, for example 'Question: {prompt}\\nAnswer:'. Or give 'chat' for the models' own chat templates."
        )
    return text


def read_examples(file: Path, flag: Literal["--seeds", "--heldout"]) -> Rows:
    """Rows of a JSONL file, a CSV file with a header, or (seeds only) a text file with one prompt a line."""
    if not file.is_file():
        raise TuneshiftError(f"{flag} {str(file)!r}: there is no such file.")
    suffix = file.suffix.lower()
    if suffix == ".jsonl":
        return examples.read_jsonl(file, examples.SEED_SHAPE if flag == "--seeds" else examples.HELD_OUT_SHAPE)
    if suffix == ".csv":
        rows = examples.read_csv(file, ["prompt"] if flag == "--seeds" else ["prompt", "response"])
    elif suffix == ".txt" and flag == "--seeds":
        lines = enumerate(examples.read_text(file).split("\n"), 1)
        rows = [(f"{file}:{number}", {"prompt": line}) for number, line in lines if line.strip()]
    else:
        kinds = ".jsonl, .csv or .txt" if flag == "--seeds" else ".jsonl or .csv"
        raise TuneshiftError(f"{flag} {str(file)!r}: must be a {kinds} file.")
    if not rows:
        raise TuneshiftError(f"{flag} {str(file)!r}: no examples in it.")
    return rows


def _model(value: str, flag: str) -> str:
    """A model reference that means the same in the transfer's folder as it does here."""
    is_path = not value.startswith("package://") and _path(value).exists()
    reference = Reference(str(_path(value).resolve()) if is_path else value, Path.cwd(), flag)
    reference.check()
    reference.check_loadable()
    return reference.text


def _usable(reference: str) -> bool:
    try:
        _model(reference, "")
    except TuneshiftError:
        return False
    return bool(reference)


def _path(value: str) -> Path:
    """With the home for ``~``, and as it is where there is no such user (`Path.expanduser` raises then)."""
    return Path(os.path.expanduser(value))


def _local_folder(adapter: str) -> Path | None:
    folder = _path(adapter)
    return folder.resolve() if adapter and folder.is_dir() else None


def _type_seeds() -> tuple[str, ...]:
    typer.echo("Five or more different prompts of the task, an empty line to end:", err=True)
    seeds: list[str] = []
    while line := typer.prompt(f"{len(seeds) + 1}", "", show_default=False, err=True):
        seeds.append(line)
    return tuple(seeds)


def _ask(question: str, check: Callable[[str], object], default: str | None = None) -> str:
    """An answer that passes ``check``, as it was typed."""

    def proc(value: str) -> str:
        try:
            check(value)
        except TuneshiftError as error:
            raise typer.BadParameter(str(error)) from error
        return value

    return str(typer.prompt(question, default, show_default=bool(default), value_proc=proc, err=True))


def _examples(flag: Literal["--seeds", "--heldout"]) -> Callable[[str], object]:
    def check(value: str) -> None:
        rows = read_examples(_path(value), flag) if value else []
        examples.check_examples(*((rows, []) if flag == "--seeds" else ([], rows)))

    return check


def _check_mode(value: str) -> None:
    if value not in get_args(Mode):
        raise TuneshiftError(f"one of {', '.join(get_args(Mode))}")


def _write_jsonl(file: Path, rows: list[dict[str, str]], given: Rows) -> None:
    """Rows, each with the system message that it was given with."""
    systems = [{"system": row["system"]} if row.get("system") is not None else {} for _, row in given]
    lines = [json.dumps({**row, **system}, ensure_ascii=False) for row, system in zip(rows, systems, strict=True)]
    file.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def _escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def _config(answers: Answers) -> str:
    """``transfer.yaml``. A JSON string is a YAML string, but for what YAML takes for ends of lines, or for nothing."""

    def text(value: str) -> str:
        return re.sub("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", _escaped, json.dumps(value, ensure_ascii=False))

    tuned = f"fine_tuned: {text(answers.fine_tuned)}" if answers.fine_tuned else f"adapter: {text(answers.adapter)}"
    raw, chat = f"\nprompt_template: {text(answers.template)}", ""
    if answers.template == "chat":
        raw, chat = " `chat` is the model's own chat template.", "\n  prompt: chat"
    threshold = _CLOSED if answers.mode == "by_response" else _OPEN
    return f"""\
# Every key and its default: docs/reference.md. A key that isn't here has its default.
description: {text(answers.description or f"From {answers.base} to {answers.target}.")}

source:
  base: {text(answers.base)}
  {tuned}{chat}
target:
  base: {text(answers.target)}
# All that a model sees before its answer: the very text that the adapter was trained with.{raw}

generator:
  model: {text(answers.generator)}
  temperature: 1.0        # lower: more fluent, and more doubles
{_GENERATOR[answers.mode].replace("INSTRUCTION", text(answers.instruction or _INSTRUCTION[answers.mode]))}
response:
  max_new_tokens: 64      # longer answers are cut off and not used
filter:
  rule: both
  threshold: {threshold:<13} # after a run, `tuneshift sweep` shows what others keep
rounds: 4                 # at most; fewer when target_pairs are reached
target_pairs: 1000

distill:
  learning_rate: 5.0e-4
  epochs: 5
evaluation:
  max_new_tokens: 64      # of an answer to a held-out prompt
"""


# Thresholds: what did best for answers of a fixed set (docs/evidence.md), and the paper's.
_CLOSED, _OPEN = 1.3, 1.5
_INSTRUCTION: dict[Mode, str] = {
    "chat": "Generate {count} more samples like these {seed_count}:",
    "continuation": "Different requests of one kind:",
    "by_response": "Different requests of one kind, each with its topic:",
}
_GENERATOR: dict[Mode, str] = {
    "chat": """\
  mode: chat              # for an instruct model; `continuation` for a base model
  instruction: INSTRUCTION
  calls_per_round: 16     # each asks for prompts_per_call prompts; doubles are dropped
  prompts_per_call: 20
""",
    "continuation": """\
  mode: continuation      # for a base model; `chat` for an instruct model
  instruction: INSTRUCTION  # the heading above the list: say what the prompts are
  calls_per_round: 40     # each asks for prompts_per_call prompts; doubles are dropped
  prompts_per_call: 8
  original_seeds_per_call: 2  # how many of the five shown are yours: more holds the subject, fewer explores
""",
    "by_response": """\
  mode: by_response       # for a fixed set of answers; else `continuation`, or `chat` for an instruct model
  instruction: INSTRUCTION  # the heading above the examples: say what the prompts are
  example_template: "Topic: {response}\\nQuestion: {prompt}"
  calls_per_round: 320    # each asks for one prompt
  prompts_per_call: 1
  seeds_per_call: 6
  original_seeds_per_call: 5  # how many of those shown are yours; the last has the answer that is asked for
  max_new_tokens: 64
""",
}
