"""What makes what out of date: the inputs of every asset, and the version of the code and settings that make it.

An asset is out of date when its code version, or that of an input's data, isn't what it was made with.
"""

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterable
from functools import reduce
from operator import getitem
from typing import Any, Literal, NamedTuple

from tuneshift_dag.config import Transfer
from tuneshift_dag.config.schema import TransferConfig
from tuneshift_dag.config.schema_models import Models, Vllm
from tuneshift_dag.method import PromptFormat
from tuneshift_dag.method.evaluation import general_texts
from tuneshift_dag.method.filters import KEEP_RULES
from tuneshift_dag.models import encoder
from tuneshift_dag.models.references import file_hash

Rounds = Literal["same", "earlier", "all", "none"]
"""Of which rounds an input is read: of the one that is made, of those before it, of all, or it has none."""

INPUTS: dict[str, tuple[tuple[str, Rounds], ...]] = {
    "seed_set": (),
    # round_seeds of round_01 are drawn by seed_set, those of a later round by filtered_dataset of the round before.
    "synthetic_prompts": (("seed_set", "none"), ("round_seeds", "same"), ("synthetic_prompts", "earlier")),
    "scored_pairs": (("synthetic_prompts", "same"),),
    "filtered_dataset": (("scored_pairs", "same"),),
    "threshold_report": (("scored_pairs", "all"), ("filtered_dataset", "all")),
    "rehearsal_set": (),
    "distilled_model": (("filtered_dataset", "all"), ("rehearsal_set", "none")),
    "evaluation": (("distilled_model", "none"),),
    "diversity_map": (("synthetic_prompts", "all"), ("filtered_dataset", "all")),
    "comparison": (("scored_pairs", "all"), ("rehearsal_set", "none")),
}
"""What each asset is made from: assets, and of which rounds. See `inputs_of`."""

_SOURCE = ("source", "engine", "models", "prompt_template")
_DRAWS = tuple(
    f"generator.{key}" for key in ("calls_per_round", "seeds_per_call", "original_seeds_per_call", "balance")
)
_TRAINING = ("distill", "target", "prompt_template", "seed", "models.compute_dtype")
_COMPARED = ("heldout", "labelled", "tasks", "encoder")


class _Uses(NamedTuple):
    sections: tuple[str, ...]
    """Dotted keys of ``transfer.yaml``; `seed_similarity` is what that column depends on."""
    others: tuple[str, ...] = ()
    """What it reads beside: see `_read`."""
    code: int = 1
    """Raised by hand when the meaning of the code that makes the asset changes."""


_USES = {
    "seed_set": _Uses(("generator", "seed", "response", *_SOURCE), ("seeds",), code=3),
    "synthetic_prompts": _Uses(("generator", "models", "seed"), ("heldout_prompts",), code=2),
    "scored_pairs": _Uses(("response", "seed_similarity", *_SOURCE)),
    "filtered_dataset": _Uses(("filter", "target_pairs", "seed", *_DRAWS), code=3),
    "threshold_report": _Uses(("filter",)),
    "rehearsal_set": _Uses(("target.base", "models", "seed")),
    "distilled_model": _Uses(_TRAINING),
    "evaluation": _Uses(("evaluation", "target", *_SOURCE), ("heldout", "tasks", "general_text", "checked"), code=2),
    "diversity_map": _Uses((), ("encoder",), code=2),
    "comparison": _Uses(("compare", "filter", "evaluation", "models", "source", *_TRAINING), _COMPARED, code=3),
}

# Where a server is and how it is asked doesn't change what it answers, nor does where a model lies or who trains it.
_HOW_TO_ASK = {"base_url", "allow_insecure", "api_key_env", "concurrency", "timeout_seconds", "max_retries"}
_HOW_TO_SERVE = Vllm.model_fields.keys() - {"extra_args"}
_WITHOUT_EFFECT: Any = {
    "engine": {"server": _HOW_TO_ASK, "ray": True, "vllm": True},
    "generator": {"server": _HOW_TO_ASK | _HOW_TO_SERVE},
    "models": {"device_map", "workers"},
    "distill": {"processes", "keep"},
    "evaluation": {"keeps_skill", "keeps_general_text", "allow_code"},
}


def inputs_of(transfer: Transfer, asset: str) -> tuple[tuple[str, Rounds], ...]:
    """`INPUTS` of an asset, as far as this transfer has them. (Those of its `loops` are other transfers'.)"""
    absent = {"scored_pairs"} if asset == "comparison" and transfer.loops else set()
    absent |= set() if transfer.rehearses else {"rehearsal_set"}
    return tuple(source for source in INPUTS[asset] if source[0] not in absent)


def code_version(transfer: Transfer, asset: str) -> str:
    """Hash of all that makes an asset another one, beside its inputs (16 characters).

    That is its code, the settings that it uses, with the fingerprint of weights, tokenizer or adapter in the place of
    each reference (which stands for a hub model that was never fetched), the examples and other files that it reads,
    and the number of rounds if it reads all of them: fewer rounds change none that is left.
    """
    uses = _USES[asset]
    settings = _settings(transfer)
    for key, fingerprint in transfer.fingerprints.items():
        section, name = key.split(".")
        settings[section][name] = fingerprint.value or settings[section][name]
    if transfer.max_prompt_characters is None:
        settings["generator"]["max_prompt_characters"] = None  # the default has no effect
    used = _of_training(settings) if uses.sections == _TRAINING else _chosen(settings, uses.sections)
    if asset == "synthetic_prompts" and transfer.max_prompt_characters is None:
        # Contexts limit the prompts. (A limit in characters is far below any, so that older versions stay valid.)
        used |= _chosen(settings, ("source.base", "target.base", "response.max_new_tokens"))
    if asset == "rehearsal_set":
        format = transfer.config.target_format
        used["texts"] = [transfer.config.distill.retain.texts, format.arguments if format.template is None else None]
    code = (uses.code, _training_code(transfer.config) if "distill" in uses.sections else 0)
    rounds = len(transfer.round_keys) if any(of == "all" for _, of in INPUTS[asset]) else None
    return _hash([code, used, [_read(transfer, name) for name in uses.others], rounds])[:16]


def training_version(transfer: Transfer) -> str:
    """Names a trained adapter in the store by the settings that make another one of the same pairs (12 characters), the
    same in every release. Weights are compared apart, by their fingerprint."""
    return _hash([_training_code(transfer.config), _of_training(_settings(transfer))])[:12]


def chain_version(transfer: Transfer) -> str:
    """Changes with what decides whether generator and target can do their work (16 characters): their files, how they
    are loaded, asked and trained, and the packages that do it."""
    keys = [key for key in transfer.fingerprints if not key.startswith("source")]
    files = {key: transfer.fingerprints[key].value or transfer.reference(key) for key in keys}
    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    settings = _settings(transfer)
    used = _chosen(settings, ("models", "generator")) | _of_training(settings)
    return _hash([2, files, used, packages])[:16]  # the number is raised when the preflight finds more than it did


def _read(transfer: Transfer, name: str) -> Any:
    if name == "tasks":
        return tasks_hash(transfer)
    if name == "general_text":
        return general_texts()
    if name == "checked":
        settings = transfer.config.evaluation
        return [transfer.config.distill.keep, settings.keeps_skill, settings.keeps_general_text]
    if name == "encoder":
        return encoder.missing_packages() is None  # installing it makes out of date what was made without
    if name == "heldout_prompts":
        return [prompt for prompt, _ in transfer.heldout]
    return list(getattr(transfer, name))


def tasks_hash(transfer: Transfer) -> str:
    if not transfer.config.evaluation.task_folder:
        return ""
    folder = (transfer.folder / transfer.config.evaluation.task_folder).expanduser()
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        # Python and editors write files of their own there.
        if file.is_file() and not re.search(r"(^|/)(\.|__pycache__/)", name):
            digest.update(f"{name}\0{file_hash(file)}\n".encode())
    return digest.hexdigest()


def _training_code(config: TransferConfig) -> int:
    # Balanced drawing has changed three times, and how a target is held to what it knew twice: those models aren't
    # current.
    return (1 if config.distill.balance == "none" else 4) + 2 * (config.distill.retain.weight > 0)


def _settings(transfer: Transfer) -> dict[str, Any]:
    """The settings as they are hashed: without what has no effect, and with what stands for the same as one value."""
    config = transfer.config
    dump = config.model_dump(mode="json", exclude=_WITHOUT_EFFECT)
    if dump["engine"]["type"] == "ray":
        dump["engine"]["type"] = "local"  # whose results are the same
    if config.engine.vllm.extra_args:
        dump["engine"]["vllm"] = config.engine.vllm.extra_args
    # How many prompts are answered at once doesn't change what a prompt is answered. (Not left out of the dump, so
    # that versions from when it counted stay valid.)
    dump["models"]["batch_size"] = Models.model_fields["batch_size"].default
    if dump["models"]["compute_dtype"] == "auto":
        dump["models"]["compute_dtype"] = "bfloat16"  # which it is, but on old machines
    source, target = _format(config.source_format), _format(config.target_format)
    dump["source"].pop("prompt", None)
    dump["target"].pop("prompt", None)
    dump["prompt_template"] = source
    if target != source:
        dump["target"]["prompt"] = target
    if transfer.stops:
        dump["response"]["stop"] = dump["evaluation"]["stop"] = list(transfer.stops)
    dump["seed_similarity"] = transfer.seeds if "seed_similarity" in config.rules else None
    if config.filter.rule in KEEP_RULES and config.filter.threshold > 1:
        dump["filter"]["rounds"] = config.rounds  # which share the number
    return dump


def _format(format: PromptFormat) -> Any:
    """A prompt format as it is hashed: a raw template by its text, however it is spelled."""
    own = {"system": format.system, "arguments": format.arguments}
    return str(format) if format.template is not None else own


def _of_training(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that a training depends on: of the prompt formats only the target's."""
    target = {**settings["target"]}
    own = {"target": target, "prompt_template": target.pop("prompt", settings["prompt_template"])}
    return _chosen({**settings, **own}, _TRAINING)


def _chosen(settings: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: reduce(getitem, key.split("."), settings) for key in keys}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
