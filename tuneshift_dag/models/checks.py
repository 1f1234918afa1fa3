"""Whether the files of a model are whole, and of a kind that can be used, before anything is loaded. Each
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
WRITES_TEXT = re.compile(r"CausalLM|LMHead|ForConditionalGeneration|Decoder\b")
# By the name of a number's type numpy's for its bits, and those that are all set in NaN and infinity alone.
FLOATS = {
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F32": ("<u4", 0x7F800000),
    "F64": ("<u8", 0x7FF0 << 48),
}


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
        small = (n for n, t in tensors.items() if n.endswith(".weight") and t["dtype"] not in FLOATS)
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
    if named and not config.get("auto_map") and not WRITES_TEXT.search(named):
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


def check_finite(file: Path, key: str) -> None:
    """Of a safetensors file: no number in it is NaN or infinite. Reads all of it."""
    begin, tensors = tensors_of(file, key)
    data = np.memmap(file, np.uint8, "r")
    for name, tensor in tensors.items():
        if tensor["dtype"] not in FLOATS:
            continue
        (start, end), (bits, exponent) = tensor["data_offsets"], FLOATS[tensor["dtype"]]
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
    return parsed_json(file, key, bytes.decode)


def parsed_json(file: Path, key: str, decode: Callable[[bytes], str | bytes]) -> dict[str, Any]:
    """The object in a JSON file whose bytes `json.loads` takes once they are decoded."""
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
