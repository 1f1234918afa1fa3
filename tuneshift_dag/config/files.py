"""Reading a transfer folder: ``transfer.yaml``, the models that it names, and its examples (``examples.py``).

Here bad input is turned into an error with its repair. Nothing here loads a model.
"""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from tuneshift_dag import TuneshiftError
from tuneshift_dag.config import Transfer, has_lines
from tuneshift_dag.config.examples import (
    HELD_OUT_SHAPE,
    SEED_SHAPE,
    check_examples,
    half_character,
    pairs_of,
    read_jsonl,
    read_text,
    short,
    with_system,
)
from tuneshift_dag.config.schema import Evaluation, TransferConfig
from tuneshift_dag.config.schema_models import Server
from tuneshift_dag.method.evaluation import expected_number
from tuneshift_dag.models.adapter_checks import adapter_config, has_tokenizer
from tuneshift_dag.models.checks import tokens_without_row
from tuneshift_dag.models.references import Kind, Reference, hub_id_of

# Schemas and catalogs that there are in every database of ours (its file is tuneshift.duckdb).
_DUCKDBS_OWN = {"cache", "main", "temp", "system", "tuneshift", "information_schema", "pg_catalog"}
# Keys and a rule that an old transfer.yaml may have, and why they are gone.
_LONGEST_NAME = 100
_TAKEN_OUT = {
    "ifd": "it kept no better pairs, for more scores",
    "filter.target": "it was never shown to help",
    "filter.target_share": "it was never shown to help",
    "filter.discriminator": "it learned hardly more than how the seeds are written",
    "distill.prompt_weight": "distill.retain keeps more of what the target knew, at no less skill",
    "distill.token_mask": "models trained with it were right half as often",
    "response.samples": "a lower filter.threshold does as well for nothing, so lower that instead",
}
# What went with another key, which is named once for all.
_WENT_WITH = dict.fromkeys(("response.agreement", "response.temperature", "response.top_p"), "response.samples")


def load_transfer(folder: Path) -> Transfer:
    """Read and check a transfer folder without loading a model or asking the hub. `TuneshiftError` names the file, the
    key, the value and the repair."""
    try:
        return _load(folder)
    except OSError as error:  # a name that is too long, a folder that can't be read, a cache that can't be written
        what = f"{short(error.filename)} can't be used: {error.strerror}"
        raise TuneshiftError(
            f"{folder / 'transfer.yaml'}: {what}. Correct the path or its permissions; TUNESHIFT_CACHE moves the cache."
        ) from error


def _load(folder: Path) -> Transfer:
    config_file = folder / "transfer.yaml"
    if problem := name_problem(folder.resolve().name):
        raise TuneshiftError(f"{folder}: rename the folder: {problem}.")
    _refuse_twin(folder.resolve(), _folders(folder.resolve().parent))
    config = _read_config(config_file)
    seed_rows = read_jsonl(folder / "seeds.jsonl", SEED_SHAPE)
    heldout_file = folder / "heldout.jsonl"
    heldout_rows = read_jsonl(heldout_file, HELD_OUT_SHAPE) if heldout_file.exists() else []
    seeds, heldout = check_examples(seed_rows, heldout_rows)
    config = with_system(config, [*seed_rows, *heldout_rows], config_file)
    for (at, _), seed in zip(seed_rows, seeds, strict=True):
        if config.generator.format == "list" and has_lines(seed):
            raise TuneshiftError(
                f"{at}: a prompt of several lines doesn't fit into a numbered list ({config_file}: generator.format"
                " 'list'). Set generator.format to blocks or json, or leave it out."
            )
    _check_tasks(config.evaluation, config_file, folder)
    for prompt, response in heldout if config.evaluation.metric == "numeric" else ():
        if expected_number(response) is None:
            raise TuneshiftError(
                f"{heldout_file}: the response to {prompt!r} gives no number (found {response!r}), which"
                " evaluation.metric 'numeric' compares. End it with '#### ' and the number, or write the number alone."
            )
    labelled = _read_labelled(config, config_file, folder, heldout)
    for named in _references(config, folder, f"{config_file}: ").values():
        named.check()
        # An adapter on the hub is looked at when it is first needed.
        if named.kind == "adapter" and not named.is_on_hub:
            _check_base_of_adapter(named, config.source.base)
    pairs = {"heldout.jsonl": heldout, str(config.compare and config.compare.labelled): labelled}
    texts = {"seeds.jsonl": seeds} | {name: [text for pair in found for text in pair] for name, found in pairs.items()}
    _check_tokens(config, folder, texts)
    return _with_fingerprints(Transfer(folder.resolve(), config, seeds, heldout, labelled))


def load_all(root: Path) -> tuple[list[Transfer], dict[str, str]]:
    """The sound transfers under ``root``, and by name the error of each other one."""
    transfers: list[Transfer] = []
    broken: dict[str, str] = {}
    for folder in _folders(root):
        try:
            transfers.append(load_transfer(folder))
        except TuneshiftError as error:
            broken[folder.name] = str(error)
    return transfers, broken


def find_transfers(root: Path) -> list[Path]:
    """Folders under ``root`` that hold a ``transfer.yaml``, by name. `TuneshiftError` when two names differ only in
    case, which the database doesn't tell apart."""
    folders = _folders(root)
    for folder in folders:
        _refuse_twin(folder, folders)
    return folders


def refresh(transfer: Transfer, warn: Callable[[str], None]) -> Transfer:
    """The transfer with the hub's commits of now: what moved, or was never fetched, is downloaded. ``warn`` is told why
    when the hub can't be asked; the transfer then stays with what is here."""
    for named in _references(transfer.config, transfer.folder).values():
        if problem := named.refresh():
            warn(problem)
    transfer = _with_fingerprints(transfer)
    check_models(transfer)
    return transfer


def check_models(transfer: Transfer) -> None:
    """What `load_transfer` leaves out, since it may import torch: whether transformers can load the models."""
    for key, named in _references(transfer.config, transfer.folder, f"{transfer.folder / 'transfer.yaml'}: ").items():
        if named.kind == "model":
            replace(named, text=transfer.reference(key)).check_loadable()


def name_problem(name: str) -> str:
    """Why a transfer can't have this name, which is that of its schema in the database; empty if it can."""
    if not re.fullmatch(r"[A-Za-z0-9_]+", name):
        return "letters, digits and underscores only"
    if len(name) > _LONGEST_NAME:
        return f"{_LONGEST_NAME} characters at most"
    return f"the database has something of its own named {name!r}" if name.lower() in _DUCKDBS_OWN else ""


def is_same_base(reference: str, other: str) -> bool:
    """Whether two references end in the same name: a model may be named by hub id, package, or folder of any system."""
    paths = (hub_id_of(name).split("@")[0].replace("\\", "/") for name in (reference, other))
    one, two = (path.rstrip("/").rsplit("/", 1)[-1].lower() for path in paths)
    return one == two


def _folders(root: Path) -> list[Path]:
    try:
        found = sorted(path.parent for path in root.glob("*/transfer.yaml"))
        # A link to another one here is that one.
        own = {folder.resolve() for folder in found if not folder.is_symlink()}
        return [folder for folder in found if not (folder.is_symlink() and folder.resolve() in own)]
    except OSError as error:
        raise TuneshiftError(f"{root} can't be read ({error.strerror}). Correct its permissions.") from error


def _refuse_twin(folder: Path, others: list[Path]) -> None:
    for other in others:
        if other.name != folder.name and other.name.lower() == folder.name.lower():
            raise TuneshiftError(
                f"{folder} and {other}: these names differ only in case, which the database doesn't tell apart. Rename"
                " one of the two folders."
            )


def _references(config: TransferConfig, folder: Path, where: str = "") -> dict[str, Reference]:
    """What names weights, a tokenizer or an adapter, by key; a generator on a server of others is only a name there.
    In messages ``where`` stands before the key."""
    served: Kind = "tokenizer" if config.engine.type == "openai" else "model"
    key, tuned = config.source.tuned
    found: list[tuple[str, str, Kind]] = [
        ("source.base", config.source.base, served),
        (key, tuned, "adapter" if config.source.adapter else served),
        ("target.base", config.target.base, "model"),
    ]
    if not isinstance(config.generator.server, Server):
        found.append(("generator.model", config.generator.model, "model"))
    return {key: Reference(text, folder, f"{where}{key}", kind) for key, text, kind in found}


def _with_fingerprints(transfer: Transfer) -> Transfer:
    named = _references(transfer.config, transfer.folder)
    return replace(transfer, fingerprints={key: each.fingerprint() for key, each in named.items()})


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which the last one would count, and half a character."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._checked: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        seen = set()
        # Only as it was written: what has been merged into it may have the same keys.
        for key, _ in () if id(node) in self._checked else node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"the key {key.value!r} is there twice; keep one of them"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(str(key.value))
        self._checked.add(id(node))
        super().flatten_mapping(node)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        if half := half_character(str(value)):
            raise yaml.constructor.ConstructorError(None, None, half, node.start_mark)
        return value


def _read_config(file: Path) -> TransferConfig:
    if not file.is_file():
        raise TuneshiftError(f"{file} doesn't exist. A transfer is a folder with transfer.yaml and seeds.jsonl.")
    try:
        data = yaml.load(read_text(file), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise TuneshiftError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise TuneshiftError(f"{file} must be a mapping of keys; found {type(data).__name__}.")
    try:
        return TransferConfig.model_validate(data)
    except ValidationError as error:
        said = dict.fromkeys(_explain(file, problem) for problem in error.errors())
        raise TuneshiftError("\n".join(said)) from error


def _explain(file: Path, problem: Any) -> str:
    key = ".".join(map(str, problem["loc"]))
    last = key.rsplit(".", 1)[-1]
    # Somebody may have put an API key here.
    hidden = "key" in last or "--api-key" in problem["msg"]
    found = "a value that isn't shown" if hidden else short(problem["input"])
    what = f"{key} {found}" if last == "rule" else _WENT_WITH.get(key, key)
    if why := _TAKEN_OUT.get("ifd" if what.endswith(" 'ifd'") else what):
        return f"{file}: {what} was taken out, because {why} (docs/experiments.md); remove it."
    if problem["type"] == "extra_forbidden":
        return f"{file}: {key}: unknown key (value {found}). Remove it or correct its spelling."
    if problem["type"] == "missing":
        return f"{file}: {key}: missing. Add it."
    message = problem["msg"].removeprefix("Value error, ")
    return f"{file}: {key}: {message} (found {found})." if key else f"{file}: {message}."


def _check_tasks(settings: Evaluation, config_file: Path, folder: Path) -> None:
    """What can be seen without importing lm-evaluation-harness, which takes seconds."""
    if settings.tasks and importlib.util.find_spec("lm_eval") is None:
        raise TuneshiftError(
            f"{config_file}: evaluation.tasks {list(settings.tasks)} needs lm-evaluation-harness, which isn't"
            " installed: run `pip install 'tuneshift-dag[lm-eval]'`, or remove the key."
        )
    if settings.task_folder and not (folder / settings.task_folder).expanduser().is_dir():
        raise TuneshiftError(
            f"{config_file}: evaluation.task_folder: there is no folder {folder / settings.task_folder}. Correct it, or"
            " remove the key."
        )


def _read_labelled(
    config: TransferConfig, config_file: Path, folder: Path, heldout: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    if config.compare is None:
        return []
    if not heldout:
        raise TuneshiftError(
            f"{config_file}: compare: trained models are compared on {folder / 'heldout.jsonl'}, which doesn't exist."
            " Write it, or remove compare."
        )
    if config.compare.labelled is None:
        return []
    rows = read_jsonl((folder / config.compare.labelled).expanduser(), HELD_OUT_SHAPE)
    for at, row in rows:
        if row.get("system") not in (None, config.source_format.system):
            raise TuneshiftError(f"{at}: 'system' isn't that of seeds.jsonl. Write the same one there, or remove it.")
    return pairs_of(rows, [prompt for prompt, _ in heldout], "also in heldout.jsonl, so its answer would be trained on")


def _check_tokens(config: TransferConfig, folder: Path, texts: dict[str, list[str]]) -> None:
    """Refuse an example, of the ``texts`` by file, with a token that a model that is here has no embedding of."""
    found = _references(config, folder, f"{folder / 'transfer.yaml'}: ")
    if any(named.kind == "adapter" and has_tokenizer(named.path) for named in found.values()):
        del found["source.base"]  # the adapter has a tokenizer of its own, and may have its embeddings
    for key, named in found.items():
        file = None if named.kind == "adapter" else named.config_file()
        for token in tokens_without_row(file.parent, named.key) if file else ():
            for name, text in ((name, text) for name, those in texts.items() for text in those if token in text):
                raise TuneshiftError(
                    f"{folder / name}: {text!r} holds the token {token!r}, which the tokenizer of {key} ({named.text})"
                    " knows, but its embeddings have no row of. Write the text without it, or give the model the row"
                    " (`resize_token_embeddings`)."
                )


def _check_base_of_adapter(adapter: Reference, base: str) -> None:
    named = adapter_config(adapter.path, adapter.key).get("base_model_name_or_path")
    if named and not is_same_base(str(named), base):
        raise TuneshiftError(
            f"{adapter.key}: {adapter.path / 'adapter_config.json'} was trained on the base model {named!r}, but"
            f" source.base is {base!r}. Set source.base to the adapter's base; if they are the same weights under"
            " two names, set base_model_name_or_path in adapter_config.json to the value of source.base."
        )
