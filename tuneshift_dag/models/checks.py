"""Whether the files of a model or an adapter are whole, and of a kind that can be used, before anything is loaded. Each
check raises `TuneshiftError` for a key of ``transfer.yaml``. Importing this imports no torch."""

import importlib.metadata
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from tuneshift_dag import TuneshiftError

# Names of classes that write text, as config.json and PEFT give them.
_WRITES_TEXT = re.compile(r"CausalLM|LMHead|ForConditionalGeneration|Decoder\b")
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
# numpy's type for the bits of a number, and those that are all set in NaN and infinity alone.
_EXPONENTS = {
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F32": ("<u4", 0x7F800000),
    "F64": ("<u8", 0x7FF0 << 48),
}
_CHANGES_BASE = "which changes the base also when the adapter is switched off"
_NO_SWITCH = dict.fromkeys(("layer_replication", "kasa_config"), _CHANGES_BASE) | {
    "alora_invocation_tokens": "so it isn't applied to what stands before them"
}
_WHOLE_MODEL = "merge it into its base and name the whole model as source.fine_tuned"


def check_model_folder(path: Path, key: str) -> None:
    """Of a model in the Hugging Face layout, as far as can be seen without transformers (`check_architecture`)."""
    config_file = path / "config.json"
    if (path / "adapter_config.json").is_file():
        if not config_file.is_file():
            raise TuneshiftError(f"{key}: {path} is an adapter, not a whole model. Name a model here.")
        raise TuneshiftError(
            f"{key}: {path} holds an adapter beside the model, which would be attached to it whenever it is loaded."
            " Move adapter_config.json and adapter_model.safetensors to a folder of their own."
        )
    if not config_file.is_file():
        raise TuneshiftError(f"{key}: {config_file} is missing; {path} is not a model folder.")
    check_config(config_file, key)
    if (ends := path / "generation_config.json").is_file():
        read_json(ends, key)
    quantized = bool(read_json(config_file, key).get("quantization_config"))
    for file in _weights(path, key):
        tensors = tensors_of(file, key)[1]
        small = (n for n, t in tensors.items() if n.endswith(".weight") and t["dtype"] not in _EXPONENTS)
        if not quantized and (name := next(small, None)):
            raise TuneshiftError(
                f"{key}: {file}: {name} is in {tensors[name]['dtype']}, so the weights are quantized, and config.json"
                " doesn't say how. Name the 16-bit model that they were made from: models.quantization makes it small."
            )
    named = any((path / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt"))
    if not named and not any(path.glob("*.model")):
        raise TuneshiftError(
            f"{key}: {path} holds no tokenizer. Save its base's with"
            " `AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)`."
        )


def check_links(path: Path, key: str) -> None:
    """Of any folder: none of its files is a link to one outside, which isn't this model's. (A snapshot in the hub's
    cache holds links into the cache's folder of the repository.)"""
    home = path.resolve().parents[1] if path.resolve().parent.name == "snapshots" else path.resolve()
    for file in path.iterdir():
        if file.is_symlink() and not file.resolve().is_relative_to(home):
            raise TuneshiftError(f"{key}: {file} is a link to {file.resolve()}, outside. Put the file itself there.")


def check_config(file: Path, key: str) -> None:
    """Of a model's ``config.json``: it must be of a model that writes text, in weights that can be used."""
    config = read_json(file, key)
    text = config.get("text_config")
    parts = [config, text] if isinstance(text, dict) else [config]
    named = str(config.get("architectures") or "")
    if config.get("is_encoder_decoder"):
        raise TuneshiftError(
            f"{key}: {file}: {config.get('model_type')} is an encoder-decoder. Name a causal language model, which has"
            " a decoder alone."
        )
    # With code of its own it is refused for that.
    if named and not config.get("auto_map") and not _WRITES_TEXT.search(named):
        raise TuneshiftError(
            f"{key}: {file}: its architecture is {named}, which doesn't write text. Name a causal"
            " language model ('…ForCausalLM')."
        )
    for part in parts:
        settings = part.get("quantization_config") or part.get("compression_config") or part.get("quantization")
        if settings and not (isinstance(settings, dict) and settings.get("load_in_4bit")):
            method = settings.get("quant_method") if isinstance(settings, dict) else settings
            kind = "bitsandbytes 8-bit" if method == "bitsandbytes" else method or "a method that isn't named (MLX?)"
            raise TuneshiftError(
                f"{key}: {file}: its weights are quantized with {kind}, and only those of bitsandbytes in 4 bits can be"
                " used. Name the 16-bit model that they were made from: models.quantization makes it small."
            )


def check_architecture(file: Path, key: str) -> None:
    """Of a model's ``config.json``: the installed transformers must load it, without code of its own. Imports torch."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    config = read_json(file, key)
    kind, installed = config.get("model_type"), importlib.metadata.version("transformers")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        if CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise TuneshiftError(
                f"{key}: {file}: AutoModelForCausalLM of transformers {installed} doesn't load model_type {kind!r}."
                " Name a causal language model."
            )
        try:
            AutoConfig.from_pretrained(file.parent)
        except Exception as error:  # whatever a wrong value leads to
            told = " ".join(str(error).split())[:300]
            raise TuneshiftError(
                f"{key}: {file}: transformers {installed} can't read it ({type(error).__name__}: {told}). Take"
                " config.json from where the model is from, or name another model."
            ) from error
    elif code := config.get("auto_map"):
        code = code.get("AutoModelForCausalLM", code) if isinstance(code, dict) else code
        raise TuneshiftError(
            f"{key}: {file}: model_type {kind!r} needs code of its own ({code}), and code that comes with a model is"
            f" never run. Name a model that transformers {installed} has the code of."
        )
    elif not kind:
        raise TuneshiftError(f"{key}: {file} names no model_type. Take config.json from where the model is from.")
    else:
        raise TuneshiftError(
            f"{key}: {file}: model_type {kind!r} is unknown to transformers {installed}, which is installed. A newer"
            " one may know it (`pip install -U transformers`); else name another model."
        )


def check_gguf(file: Path, key: str) -> None:
    if not _start(file, key).startswith(b"GGUF"):
        raise TuneshiftError(f"{key}: {file} is no GGUF file, or a damaged one. Download it again.")


def check_tokenizer_file(file: Path, key: str) -> None:
    """Of one of a tokenizer's files, whose JSON may be too long to be read each time."""
    start = _start(file, key)
    with file.open("rb") as handle:
        handle.seek(max(0, file.stat().st_size - 64))
        end = handle.read().strip()
    if file.suffix == ".json" and (start.strip()[:1] not in (b"{", b"[") or end[-1:] not in (b"}", b"]")):
        raise TuneshiftError(f"{key}: {file} is cut off, or no JSON in UTF-8. Download or save it again.")


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
    return _json(path / "adapter_config.json", key, lambda data: data)


def check_finite(file: Path, key: str) -> None:
    """Of a safetensors file: no number in it is NaN or infinite. Reads all of it."""
    begin, tensors = tensors_of(file, key)
    data = np.memmap(file, np.uint8, "r")
    for name, tensor in tensors.items():
        if tensor["dtype"] not in _EXPONENTS:
            continue
        (start, end), (bits, exponent) = tensor["data_offsets"], _EXPONENTS[tensor["dtype"]]
        numbers = data[begin + start : begin + end].view(bits)
        # In pieces, since each makes a copy.
        if any(((numbers[i : i + 2**20] & exponent) == exponent).any() for i in range(0, len(numbers), 2**20)):
            raise TuneshiftError(
                f"{key}: {file}: {name} holds numbers that are NaN or infinite: its training went astray, or the file"
                " is damaged. Take an earlier checkpoint, or train it again, for example at a lower learning rate."
            )


def tensors_of(file: Path, key: str) -> tuple[int, dict[str, Any]]:
    """The byte at which a safetensors file's numbers begin, and of each tensor ``dtype``, ``shape`` and
    ``data_offsets`` from there; `TuneshiftError` when the file isn't whole."""
    start = _start(file, key)
    try:
        with safe_open(file, "np"):  # which holds the header against the file's size
            pass
    except (SafetensorError, OSError) as error:
        raise TuneshiftError(
            f"{key}: {file} is cut off, damaged or no safetensors file ({error}). Download or copy it again."
        ) from error
    length = int.from_bytes(start[:8], "little")
    with file.open("rb") as handle:
        handle.seek(8)
        header: dict[str, Any] = json.loads(handle.read(length))
    return 8 + length, {name: tensor for name, tensor in header.items() if name != "__metadata__"}


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


def embedding_rows(folder: Path, key: str) -> int | None:
    """How many embeddings a model's ``config.json`` says that it has; None when it, or the file, doesn't."""
    config = read_json(folder / "config.json", key) if (folder / "config.json").is_file() else {}
    text_config = config.get("text_config")
    rows = (text_config if isinstance(text_config, dict) else config).get("vocab_size")
    return rows if isinstance(rows, int) else None


def tokens_without_row(folder: Path, key: str) -> dict[str, int]:
    """Tokens that were added to a model's tokenizer, but not to its embeddings, which have no row of their number."""
    tokenizer, more, rows = folder / "tokenizer.json", folder / "added_tokens.json", embedding_rows(folder, key)
    if rows is None:
        return {}
    added = read_json(more, key) if more.is_file() else {}
    try:
        if tokenizer.is_file():
            with tokenizer.open(encoding="utf-8") as handle:
                text = handle.read(2**21)  # of what may be many megabytes: the list comes before the vocabulary
                text += "" if '"vocab"' in text else handle.read()
            if found := re.search(r'"added_tokens"\s*:\s*(?=\[)', text):
                tokens, _ = json.JSONDecoder().raw_decode(text, found.end())
                added |= {token["content"]: token["id"] for token in tokens}
        return {str(token): int(number) for token, number in added.items() if number >= rows}
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise TuneshiftError(
            f"{key}: {tokenizer} or added_tokens.json beside it isn't a tokenizer's ({type(error).__name__}: {error})."
            " Download or save them again."
        ) from error


def read_json(file: Path, key: str) -> dict[str, Any]:
    """The object in a JSON file that transformers reads too: UTF-8 without a byte-order mark."""
    return _json(file, key, bytes.decode)


def _json(file: Path, key: str, decode: Callable[[bytes], str | bytes]) -> dict[str, Any]:
    _start(file, key)
    try:
        value = json.loads(decode(file.read_bytes()))
    except (ValueError, RecursionError) as error:
        raise TuneshiftError(
            f"{key}: {file} is not valid JSON ({error}). Download it again, or save it as UTF-8 without a byte-order"
            " mark."
        ) from error
    if not isinstance(value, dict):
        raise TuneshiftError(f"{key}: {file} must hold a JSON object; found {type(value).__name__}.")
    return value


def _start(file: Path, key: str) -> bytes:
    """The first bytes of a file; `TuneshiftError` when they are of something that stands for it."""
    with file.open("rb") as handle:
        start = handle.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise TuneshiftError(
            f"{key}: {file} is a git-lfs pointer, not the file itself. Run `git lfs pull` there, or download the file."
        )
    if not start:
        raise TuneshiftError(f"{key}: {file} is empty. Download or copy it again.")
    return start


def _weights(path: Path, key: str) -> list[Path]:
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        found = ", ".join(sorted(file.name for file in path.glob("*.safetensors")))
        lacking = f"{found}, but no model.safetensors(.index.json)" if found else "no *.safetensors weights"
        raise TuneshiftError(
            f"{key}: {path} holds {lacking} (pickles are never loaded). Download all of it, or save the model again"
            " with `model.save_pretrained(folder)`."
        )
    shards = read_json(index, key).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise TuneshiftError(f"{key}: {index} has no weight_map. Download it again.")
    names = sorted(set(map(str, shards.values())))
    if outside := [name for name in names if ".." in Path(name).parts or Path(name).is_absolute()]:
        raise TuneshiftError(f"{key}: {index} names {outside[0]!r}, outside of its folder. Download the model again.")
    if absent := [name for name in names if not (path / name).is_file()]:
        raise TuneshiftError(
            f"{key}: {index} names {len(names)} files, of which {len(absent)} aren't there, such as {absent[0]}."
            " Download the model again, or save it again with `model.save_pretrained(folder)`."
        )
    return [path / name for name in names]


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
    if task not in (None, "", "CAUSAL_LM") or (not task and "For" in whole and not _WRITES_TEXT.search(whole)):
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
    small = [name for name, tensor in tensors.items() if tensor["dtype"] not in _EXPONENTS]
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
