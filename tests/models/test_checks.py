"""What is refused before any weights are loaded, and in which words."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tuneshift_dag import TuneshiftError
from tuneshift_dag.models.adapter_checks import check_adapter_folder
from tuneshift_dag.models.checks import check_finite, tokens_without_row
from tuneshift_dag.models.references import Reference

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 167832240\n"
A, B = "base_model.model.model.layers.0.q_proj.lora_A.weight", "base_model.model.model.layers.0.q_proj.lora_B.weight"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that were passed are remembered by content."""
    monkeypatch.setenv("TUNESHIFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(transfer_folder: Path) -> Path:
    return transfer_folder / "models" / "tiny-base"


@pytest.fixture
def adapter(transfer_folder: Path) -> Path:
    folder = transfer_folder / "adapter"
    save_file({A: torch.ones(2, 4), B: torch.ones(4, 2)}, folder / "adapter_model.safetensors")
    return folder


def edit(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def check(reference: Path, kind: Any = "model") -> None:
    Reference(str(reference), reference, "transfer.yaml: the.key", kind).check()
    if kind == "model":
        Reference(str(reference), reference, "transfer.yaml: the.key").check_loadable()


def refusal(reference: Path, kind: Any = "model") -> str:
    """What is said of a model, an adapter or a tokenizer, as one line."""
    with pytest.raises(TuneshiftError) as error:
        check(reference, kind)
    told = str(error.value)
    assert told.startswith("transfer.yaml: the.key: ") and str(reference) in told and "\n" not in told
    return told


class TestWeights:
    @pytest.mark.parametrize(
        ("damage", "told"),
        [
            (lambda data: POINTER, "is a git-lfs pointer, not the file itself. Run `git lfs pull`"),
            (lambda data: data[: len(data) // 2], "is cut off"),
            (lambda data: data[:-1], "is cut off"),
            (lambda data: data[:4], "is cut off"),
            (lambda data: b"", "is empty"),
            (lambda data: b"<!DOCTYPE html><html><body>Log in</body></html>", "no safetensors file"),
            (lambda data: data + b"\0" * 8, "damaged"),
            (lambda data: data[:8] + b"x" + data[9:], "damaged"),
        ],
    )
    @pytest.mark.parametrize("kind", ["model", "adapter"])
    def test_that_are_not_whole_are_named(self, model: Path, adapter: Path, kind: str, damage: Any, told: str) -> None:
        folder, name = (model, "model") if kind == "model" else (adapter, "adapter_model")
        file = folder / f"{name}.safetensors"
        file.write_bytes(damage(file.read_bytes()))
        found = refusal(folder, kind)
        assert str(file) in found and told in found

    def test_of_a_missing_shard(self, model: Path) -> None:
        (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
        assert "model-00001-of-00002.safetensors, but no model.safetensors" in refusal(model)
        shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
        assert "names 2 files, of which 1 aren't there, such as model-00002-of-00002.safetensors" in refusal(model)
        (model / "model-00002-of-00002.safetensors").write_bytes(POINTER)
        assert "model-00002-of-00002.safetensors is a git-lfs pointer" in refusal(model)
        shutil.copy(model / "model-00001-of-00002.safetensors", model / "model-00002-of-00002.safetensors")
        check(model)
        for outside in ("../elsewhere.safetensors", str(model / "model-00001-of-00002.safetensors")):
            (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": outside}}))
            assert f"names {outside!r}, outside of its folder" in refusal(model)
        (model / "model.safetensors.index.json").write_text("{}")
        assert "has no weight_map" in refusal(model)

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "chat_template.jinja"])
    @pytest.mark.parametrize("kind", ["model", "adapter"])
    def test_that_are_links_to_somewhere_else_are_refused(
        self, model: Path, adapter: Path, tmp_path: Path, kind: str, name: str
    ) -> None:
        folder = model if kind == "model" else adapter
        (tmp_path / "private").write_text("{}")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / "private")
        assert f"{folder / name} is a link to {tmp_path / 'private'}" in refusal(folder, kind)

    def test_that_are_links_within_are_read(self, model: Path, tmp_path: Path) -> None:
        (model / "config.json").rename(model / "settings.json")
        (model / "config.json").symlink_to("settings.json")
        (tmp_path / "named").symlink_to(model)
        check(tmp_path / "named")

    @pytest.mark.parametrize(
        ("content", "told"), [(POINTER, "git-lfs pointer"), (b"", "is empty"), (b"PK\x03\x04", "no GGUF file")]
    )
    def test_of_a_gguf_file(self, tmp_path: Path, content: bytes, told: str) -> None:
        (tmp_path / "weights.gguf").write_bytes(content)
        assert told in refusal(tmp_path / "weights.gguf")

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"])
    def test_a_tokenizer_may_be_a_pointer_too(self, model: Path, name: str) -> None:
        (model / name).write_bytes(POINTER)
        assert f"{name} is a git-lfs pointer" in refusal(model)
        assert f"{name} is a git-lfs pointer" in refusal(model, "tokenizer")

    def test_a_tokenizer_that_is_cut_off(self, model: Path) -> None:
        (model / "tokenizer.json").write_text('{"model": {"vocab": {"a": 1,')
        assert "tokenizer.json is cut off" in refusal(model)

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
    def test_that_are_quantized_without_a_word_in_the_settings(self, model: Path, dtype: torch.dtype) -> None:
        save_file({"a.weight": torch.ones(2).to(dtype)}, model / "model.safetensors")
        assert "a.weight is in " in refusal(model) and "Name the 16-bit model" in refusal(model)
        # A mask or a number of positions isn't a weight.
        save_file({"a.weight": torch.ones(2), "a.mask": torch.ones(2, dtype=torch.uint8)}, model / "model.safetensors")
        check(model)

    @pytest.mark.parametrize(
        ("content", "told"), [(POINTER, "is a git-lfs pointer"), (b"", "is empty"), (b"<html>", "is not valid JSON")]
    )
    @pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
    def test_settings_may_be_a_pointer_too(self, model: Path, name: str, content: bytes, told: str) -> None:
        (model / name).write_bytes(content)
        assert f"{name} {told}" in refusal(model)


class TestModels:
    @pytest.mark.parametrize(
        ("settings", "told"),
        [
            ({"model_type": "t5", "is_encoder_decoder": True}, "t5 is an encoder-decoder"),
            ({"model_type": "bart", "is_encoder_decoder": True}, "bart is an encoder-decoder"),
            (
                {"architectures": ["LlamaForSequenceClassification"]},
                "LlamaForSequenceClassification'], which doesn't write",
            ),
            (
                {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
                "BertForMaskedLM'], which doesn't write text",
            ),
            ({"architectures": ["LlamaForTokenClassification"]}, "which doesn't write text"),
            ({"architectures": ["MistralModel"]}, "MistralModel'], which doesn't write text"),
            ({"architectures": ["Qwen2ForRewardModel"]}, "which doesn't write text"),
            ({"model_type": "vit"}, "doesn't load model_type 'vit'"),
            ({"model_type": "llava"}, "doesn't load model_type 'llava'"),
            ({"model_type": "llama99"}, "'llama99' is unknown to transformers 5."),
            ({"model_type": None}, "names no model_type"),
            (
                {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "modeling.Mine"}},
                "code of its own (modeling.Mine)",
            ),
            (
                {"model_type": "mine", "architectures": ["MyModel"], "auto_map": {"AutoModel": "m.My"}},
                "code of its own",
            ),
            ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized with gptq"),
            ({"quantization_config": {"quant_method": "awq"}}, "quantized with awq"),
            ({"quantization_config": {"quant_method": "fp8"}}, "Name the 16-bit model"),
            ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "bitsandbytes 8-bit"),
            ({"quantization_config": {"group_size": 64, "bits": 4}}, "a method that isn't named (MLX?)"),
            ({"text_config": {"quantization_config": {"quant_method": "mxfp4"}}}, "quantized with mxfp4"),
            ({"compression_config": {"quant_method": "compressed-tensors"}}, "quantized with compressed-tensors"),
        ],
    )
    def test_of_other_kinds_are_refused(self, model: Path, settings: dict[str, Any], told: str) -> None:
        edit(model / "config.json", **settings)
        found = refusal(model)
        assert str(model / "config.json") in found and told in found

    @pytest.mark.parametrize(
        "settings",
        [
            {"architectures": ["LlamaForCausalLM"]},
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]},
            {"model_type": "phi3", "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}},
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}},
            {"quantization_config": None},
        ],
    )
    def test_that_write_text_are_accepted(self, model: Path, settings: dict[str, Any]) -> None:
        edit(model / "config.json", **settings)
        check(model)

    @pytest.mark.parametrize(
        ("content", "told"),
        [
            (b'\xef\xbb\xbf{"model_type": "llama"}', "UTF-8 without a byte-order mark"),
            ('{"model_type": "llama"}'.encode("utf-16"), "is not valid JSON"),
            (b'{"model_type": "llama"', "is not valid JSON"),
            (b"[" * 100_000, "is not valid JSON"),
            (b"[]", "must hold a JSON object; found list"),
        ],
    )
    def test_settings_that_transformers_cannot_read(self, model: Path, content: bytes, told: str) -> None:
        (model / "config.json").write_bytes(content)
        assert told in refusal(model)

    def test_with_an_adapter_beside_or_instead_of_them(self, model: Path, adapter: Path) -> None:
        assert "is an adapter, not a whole model" in refusal(adapter)
        shutil.copy(adapter / "adapter_config.json", model)
        assert "holds an adapter beside the model" in refusal(model)

    def test_a_verdict_is_of_the_content(self, model: Path) -> None:
        """The installed transformers is asked once, and again about other settings."""
        check(model)
        edit(model / "config.json", model_type="llama99")
        assert "unknown" in refusal(model)
        assert "unknown" in refusal(model)


class TestAdapters:
    @pytest.mark.parametrize(
        ("settings", "told"),
        [
            ({"peft_type": "PREFIX_TUNING"}, "peft_type 'PREFIX_TUNING'; only adapters of the kinds LORA, "),
            ({"peft_type": None}, "peft_type None; only adapters of the kinds LORA, "),
            ({"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS' (it sorts texts into classes)"),
            ({"task_type": "SEQ_2_SEQ_LM"}, "task_type 'SEQ_2_SEQ_LM' (it belongs to an encoder-decoder)"),
            ({"task_type": "FEATURE_EXTRACTION"}, "task_type CAUSAL_LM"),
            ({"task_type": "OTHER"}, "task_type 'OTHER'. Name"),
            ({"task_type": ["CAUSAL_LM"]}, "task_type ['CAUSAL_LM']. Name"),
            (
                {"auto_mapping": {"base_model_class": "LlamaForSequenceClassification"}},
                "'LlamaForSequenceClassification'",
            ),
            ({"bias": "all"}, "bias 'all': the biases"),
            ({"bias": "lora_only"}, "stay in the base when the adapter is switched off"),
            ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication [[0, 2], [1, 3]], which changes the base"),
            ({"alora_invocation_tokens": [5, 7]}, "alora_invocation_tokens [5, 7], so it isn't applied to"),
            ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
            ({"init_lora_weights": "PiSSA_niter_16"}, "'pissa_niter_16', which takes from the base's weights"),
            ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
            ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
            ({"init_lora_weights": "lora_ga"}, "path_initial_model_for_weight_conversion"),
            ({"init_lora_weights": "loftq"}, "merge it into the base in memory"),
        ],
    )
    def test_of_other_kinds_are_refused(self, adapter: Path, settings: dict[str, Any], told: str) -> None:
        edit(adapter / "adapter_config.json", **settings)
        found = refusal(adapter, "adapter")
        assert str(adapter / "adapter_config.json") in found and told in found

    @pytest.mark.parametrize(
        "settings",
        [
            {"task_type": "CAUSAL_LM", "bias": "none", "init_lora_weights": True},
            {"task_type": None, "init_lora_weights": False, "lora_bias": True},
            {"task_type": None, "auto_mapping": {"base_model_class": "LlamaForCausalLM"}},
            {"task_type": None, "auto_mapping": {"base_model_class": "MyOwnWrapper"}},
            {"init_lora_weights": "gaussian"},
            {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
            {"init_lora_weights": "orthogonal"},
            {"use_dora": True, "modules_to_save": ["lm_head"], "trainable_token_indices": [1]},
        ],
    )
    def test_that_leave_the_base_alone_are_accepted(self, adapter: Path, settings: dict[str, Any]) -> None:
        edit(adapter / "adapter_config.json", **settings)
        check(adapter, "adapter")

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
    def test_settings_may_be_in_any_encoding_of_json(self, adapter: Path, encoding: str) -> None:
        config = {"peft_type": "LORA", "base_model_name_or_path": "someone/模型"}
        text = json.dumps(config, ensure_ascii=False, indent=1).replace("\n", "\r\n")
        (adapter / "adapter_config.json").write_bytes(text.encode(encoding))
        assert check_adapter_folder(adapter, "the.key") == config

    @pytest.mark.parametrize(
        ("content", "told"),
        [("{", "not valid JSON"), ("[]", "must hold a JSON object"), ('{"peft_type": "é"}', "not valid JSON")],
    )
    def test_settings_that_cannot_be_read(self, adapter: Path, content: str, told: str) -> None:
        (adapter / "adapter_config.json").write_text(content, "latin-1")
        assert told in refusal(adapter, "adapter")

    @pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
    def test_incomplete(self, adapter: Path, file: str) -> None:
        (adapter / file).unlink()
        assert f"{file} is missing" in refusal(adapter, "adapter")

    def test_as_pickles(self, adapter: Path) -> None:
        (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
        assert "adapter_model.bin), which can run code" in refusal(adapter, "adapter")

    def test_of_mlx(self, adapter: Path) -> None:
        (adapter / "adapter_config.json").write_text('{"fine_tune_type": "lora", "num_layers": 2}')
        assert "is an adapter of MLX" in refusal(adapter, "adapter")
        (adapter / "adapter_model.safetensors").rename(adapter / "adapters.safetensors")
        assert "mlx_lm.fuse --model BASE --adapter-path" in refusal(adapter, "adapter")
        (adapter / "adapter_config.json").unlink()
        assert "is an adapter of MLX" in refusal(adapter, "adapter")

    def test_a_whole_model_or_a_file_or_a_folder_of_checkpoints_instead(self, model: Path, adapter: Path) -> None:
        assert "is a whole model, not an adapter. Name it as source.fine_tuned" in refusal(model, "adapter")
        assert "is a file. Name the folder" in refusal(adapter / "adapter_model.safetensors", "adapter")
        for name in ("checkpoint-1000", "checkpoint-500"):
            shutil.copytree(adapter, model / name)
        found = refusal(model, "adapter")
        assert "but checkpoint-500, checkpoint-1000 in it. Name one of these" in found

    @pytest.mark.parametrize(
        ("name", "prefix", "wrapper"),
        [
            (A.replace("base_model.model.", "base_model.model.module."), "module.", "DistributedDataParallel"),
            (f"module.{A}", "module.", "DistributedDataParallel"),
            (f"_orig_mod.{A}", "_orig_mod.", "torch.compile"),
            (A.replace("layers.0.", "layers.0._orig_mod."), "_orig_mod.", "torch.compile"),
            (A.replace("layers.0.", "_fsdp_wrapped_module.layers.0."), "_fsdp_wrapped_module.", "FSDP"),
        ],
    )
    def test_named_by_a_wrapper(self, adapter: Path, name: str, prefix: str, wrapper: str) -> None:
        save_file({name: torch.ones(2, 4), B: torch.ones(4, 2)}, adapter / "adapter_model.safetensors")
        found = refusal(adapter, "adapter")
        assert f"1 tensors, such as {name!r}, have the prefix {prefix!r} of {wrapper}" in found
        # The repair that is told is one.
        told = re.search(r"`save_file\((.*), F\)`", found)
        assert told and list(eval(told[1], {"load_file": lambda _: {name: 0}, "F": ""})) == [A]

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
    def test_that_are_quantized(self, adapter: Path, dtype: torch.dtype) -> None:
        save_file({A: torch.ones(2, 4).to(dtype), B: torch.ones(4, 2)}, adapter / "adapter_model.safetensors")
        assert f"1 tensors, such as {A!r}, are in " in refusal(adapter, "adapter")

    def test_saved_in_part_by_zero_3(self, adapter: Path) -> None:
        save_file({A: torch.ones(0), B: torch.ones(4, 2)}, adapter / "adapter_model.safetensors")
        assert f"1 tensors are empty, such as {A!r}: DeepSpeed" in refusal(adapter, "adapter")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_with_a_number_that_is_none(self, adapter: Path, dtype: torch.dtype, value: float) -> None:
        tensors = {A: torch.full((2, 4), torch.finfo(dtype).max, dtype=dtype), B: torch.ones(4, 2, dtype=dtype)}
        file = adapter / "adapter_model.safetensors"
        save_file(tensors, file)
        check(adapter, "adapter")
        tensors[A][1, 3] = value
        save_file(tensors, file)
        found = refusal(adapter, "adapter")
        assert f"{file}: {A} holds numbers that are NaN or infinite" in found
        assert refusal(adapter, "adapter") == found, "also when it was looked at before"

    def test_whose_numbers_were_looked_at_once(self, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        check(adapter, "adapter")
        monkeypatch.setattr(np, "memmap", None)
        check(adapter, "adapter")
        with pytest.raises(TypeError):
            check_finite(adapter / "adapter_model.safetensors", "the.key")


class TestTokensWithoutARow:
    def test_are_those_that_the_embeddings_lack(self, model: Path) -> None:
        tokens = [{"id": 2, "content": "</s>"}, {"id": 4, "content": "[PAD]"}, {"id": 5, "content": 'a"b'}]
        text = json.dumps({"version": "1.0", "added_tokens": tokens, "model": {"vocab": {}}}, indent=2)
        (model / "tokenizer.json").write_text(text)
        assert tokens_without_row(model, "test") == {}, "the settings don't say how many there are"
        edit(model / "config.json", vocab_size=4)
        assert tokens_without_row(model, "test") == {"[PAD]": 4, 'a"b': 5}
        edit(model / "config.json", vocab_size=None, text_config={"vocab_size": 5})
        assert tokens_without_row(model, "test") == {'a"b': 5}

    def test_of_a_tokenizer_without_its_fast_form(self, model: Path) -> None:
        (model / "tokenizer.json").unlink()
        (model / "added_tokens.json").write_text('{"[PAD]": 4, "<s>": 3}')
        edit(model / "config.json", vocab_size=4)
        assert tokens_without_row(model, "test") == {"[PAD]": 4}
