"""Whether the files of an adapter are whole, and of a kind that can be switched off, before anything is loaded. Each
check raises `TuneshiftError` for a key of ``transfer.yaml``. Importing this imports no torch."""

import re
from pathlib import Path
from typing import Any

from tuneshift_dag import TuneshiftError
from tuneshift_dag.models.checks import FLOATS, WRITES_TEXT, parsed_json, read_json, tensors_of

_TASKS = {
    "SEQ_CLS": "it sorts texts into classes",
    "TOKEN_CLS": "it sorts tokens into classes",
    "SEQ_2_SEQ_LM": "it belongs to an encoder-decoder",
    "QUESTION_ANS": "it marks answers in a text",
    "FEATURE_EXTRACTION": "it turns texts into vectors",
}
# Those that tests/families tries, both on and off.
_KINDS = ("LORA", "ADALORA", "BOFT", "HRA", "IA3", "LOHA", "LOKR", "OFT", "VERA")
# Starts of a LoRA training that leave the base's weights alone. PEFT's others (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ)
# take from the base what they put into the adapter.
_HARMLESS_STARTS = {"none", "true", "false", "gaussian", "eva", "orthogonal", "mica"}
_CONVERTED_BY_PEFT = ("pissa", "olora", "corda", "lora_ga")
# Wrappers that leave their name in tensors' names, and who they are.
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "module.": "DistributedDataParallel",
}
_WRAPPED = re.compile(
    r"(?:^|\.)(_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.)|^(?:base_model\.model\.)?(module\.)"
)
_CHANGES_BASE = "which changes the base also when the adapter is switched off"
_NO_SWITCH = dict.fromkeys(("layer_replication", "kasa_config"), _CHANGES_BASE) | {
    "alora_invocation_tokens": "so it isn't applied to what stands before them"
}
_WHOLE_MODEL = "merge it into its base and name the whole model as source.fine_tuned"


def check_adapter_folder(path: Path, key: str) -> dict[str, Any]:
    """Of a PEFT adapter; returns its ``adapter_config.json``. `check_finite` looks at the weights."""
    config_file, weights = path / "adapter_config.json", path / "adapter_model.safetensors"
    if path.is_file():
        raise TuneshiftError(f"{key}: {path} is a file. Name the folder of the PEFT adapter.")
    if not path.is_dir():
        raise TuneshiftError(f"{key}: the adapter folder {path} doesn't exist. Put the PEFT adapter there.")
    config = adapter_config(path, key) if config_file.is_file() else {}
    of_mlx = any((path / name).is_file() for name in ("adapters.safetensors", "adapters.npz"))
    if "peft_type" not in config and (of_mlx or "fine_tune_type" in config):
        raise TuneshiftError(
            f"{key}: {path} is an adapter of MLX, which PEFT can't read. Run `mlx_lm.fuse --model BASE --adapter-path"
            f" {path} --dequantize --save-path OUT`, and name OUT, which is a whole model, as source.fine_tuned."
        )
    if not config_file.is_file():
        raise TuneshiftError(f"{key}: {_instead_of_an_adapter(path)}")
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".pkl"})
    if pickles and not weights.is_file():
        raise TuneshiftError(
            f"{key}: {path} holds a pickle adapter ({', '.join(pickles)}), which can run code when it is loaded. Save"
            " it again with `model.save_pretrained(folder, safe_serialization=True)`."
        )
    if not weights.is_file():
        raise TuneshiftError(f"{key}: {weights} is missing.")
    if problem := _adapter_problem(config):
        raise TuneshiftError(f"{key}: {config_file} says {problem}")
    _check_tensors(weights, key)
    return config


def adapter_config(path: Path, key: str) -> dict[str, Any]:
    """An adapter's ``adapter_config.json``, in UTF-8, UTF-16 or UTF-32, with or without a byte-order mark."""
    return parsed_json(path / "adapter_config.json", key, lambda data: data)


def has_tokenizer(folder: Path) -> bool:
    """Whether an adapter's folder holds a tokenizer of its own."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"))


def chat_template_of(folder: Path, key: str) -> str | None:
    """The chat template in the folder of an adapter that holds no tokenizer; None without one."""
    file, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        return file.read_text("utf-8-sig")
    template = read_json(settings, key).get("chat_template") if settings.is_file() else None
    return template if isinstance(template, str) else None


def _instead_of_an_adapter(path: Path) -> str:
    inside = sorted((file.parent.name for file in path.glob("*/adapter_config.json")), key=lambda n: (len(n), n))
    if inside:
        return f"{path} holds no adapter_config.json, but {', '.join(inside)} in it. Name one of these."
    if (path / "config.json").is_file():
        return f"{path} is a whole model, not an adapter. Name it as source.fine_tuned instead of source.adapter."
    return f"{path / 'adapter_config.json'} is missing; {path} is not a PEFT adapter folder."


def _adapter_problem(config: dict[str, Any]) -> str:
    """Why an adapter can't be used, after "it says"; empty if it can."""
    kind, task, bias = config.get("peft_type"), config.get("task_type"), config.get("bias")
    if kind not in _KINDS:
        return (
            f"peft_type {kind!r}; only adapters of the kinds {', '.join(_KINDS)} can be used, which one loaded model"
            f" switches on and off. Train one of these, or, if PEFT can merge this kind, {_WHOLE_MODEL}."
        )
    # Without a task PEFT notes the model's class, which may also be somebody's own.
    mapping = config.get("auto_mapping")
    whole = str(mapping.get("base_model_class") or "") if isinstance(mapping, dict) else ""
    if task not in (None, "", "CAUSAL_LM") or (not task and "For" in whole and not WRITES_TEXT.search(whole)):
        what = f"task_type {task!r}" if task else f"base_model_class {whole!r}"
        why = f" ({_TASKS[str(task)]})" if str(task) in _TASKS else ""
        return f"{what}{why}. Name an adapter of a model that writes text (task_type CAUSAL_LM)."
    if bias not in (None, "none"):
        return (
            f"bias {bias!r}: the biases that were trained stay in the base when the adapter is switched off. Train it"
            f" with bias 'none', or {_WHOLE_MODEL}."
        )
    for setting, why in _NO_SWITCH.items():
        if config.get(setting):
            return f"{setting} {config[setting]!r}, {why}. Train it without, or {_WHOLE_MODEL}."
    start = str(config.get("init_lora_weights", True)).lower()
    if start in _HARMLESS_STARTS:
        return ""
    repair = "In its training, merge it into the base in memory and name the whole model as source.fine_tuned."
    if start.startswith(_CONVERTED_BY_PEFT):
        repair = (
            "In its training, save it with `save_pretrained(folder, path_initial_model_for_weight_conversion=START)`,"
            " where START is the adapter as it was saved before the first step."
        )
    return (
        f"init_lora_weights {start!r}, which takes from the base's weights what the adapter begins with: without the"
        f" adapter it isn't the base model. {repair}"
    )


def _check_tensors(weights: Path, key: str) -> None:
    """That an adapter's tensors are named as PEFT names them, and not empty."""
    tensors = tensors_of(weights, key)[1]
    wrapped = {name: found for name in tensors if (found := _WRAPPED.search(name))}
    if wrapped:
        name, found = next(iter(wrapped.items()))
        prefix = found[1] or found[2]
        raise TuneshiftError(
            f"{key}: {weights}: {len(wrapped)} tensors, such as {name!r}, have the prefix {prefix!r} of"
            f" {_WRAPPERS[prefix]}, with which PEFT finds no place for them. Save the model that is inside the wrapper,"
            f" or rename them: `save_file({{k.replace({prefix!r}, ''): v for k, v in load_file(F).items()}}, F)` of"
            " safetensors.torch."
        )
    small = [name for name, tensor in tensors.items() if tensor["dtype"] not in FLOATS]
    if small:
        raise TuneshiftError(
            f"{key}: {weights}: {len(small)} tensors, such as {small[0]!r}, are in {tensors[small[0]]['dtype']}, so the"
            " adapter is quantized, and PEFT would read them as they are. Name the adapter that it was made from."
        )
    if empty := [name for name, tensor in tensors.items() if 0 in tensor["shape"]]:
        raise TuneshiftError(
            f"{key}: {weights}: {len(empty)} tensors are empty, such as {empty[0]!r}: DeepSpeed ZeRO-3 saved its own"
            " part alone. Gather the weights before saving (stage3_gather_16bit_weights_on_model_save)."
        )
