"""The short forward of a LoRA layer gives the outputs and the gradients of PEFT's own."""

from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from tuneshift_dag.training.lora import shorten

WIDTH, ROWS = 64, 5


class Tiny(torch.nn.Module):
    """Two layers; the first one's input has no gradient, the second one's has."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second = (self._layer(kind) for _ in range(2))

    @staticmethod
    def _layer(kind: str) -> torch.nn.Module:
        plain = torch.nn.Linear(WIDTH, WIDTH)
        if kind == "float32":
            return plain
        if kind == "bfloat16":
            return plain.to(torch.bfloat16)
        layer = bitsandbytes.nn.Linear4bit(WIDTH, WIDTH, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.load_state_dict(plain.state_dict())
        layer.support_avx512bf16_for_cpu = False
        return layer.to("cpu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["first", "second"], init_lora_weights=False, **settings)
    return get_peft_model(Tiny(kind), config).train()


def outputs_and_gradients(model: Any, kind: str) -> list[torch.Tensor]:
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    x = torch.randn(2, ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind != "float32"):
        out = model(x)
    out.float().square().sum().backward()
    return [out.detach().float(), *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "nf4"])
def test_outputs_and_gradients_are_those_of_peft(kind: str) -> None:
    expected = outputs_and_gradients(adapted(kind), kind)
    model = adapted(kind)
    shorten(model)
    found = outputs_and_gradients(model, kind)
    assert len(found) == len(expected) == 5
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        scale = float(theirs.abs().max())
        # bfloat16 has eight bits, and PEFT rounds in other places.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=scale * (1e-5 if kind == "float32" else 3e-2))


def is_short(module: LoraLayer) -> bool:
    return "forward" in vars(module)


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_other_kinds_of_layer_keep_the_forward_of_peft(settings: dict[str, Any]) -> None:
    plain, other = adapted("float32"), adapted("float32", **settings)
    for model in (plain, other):
        shorten(model)
    assert all(is_short(m) for m in plain.modules() if isinstance(m, LoraLayer))
    assert not any(is_short(m) for m in other.modules() if isinstance(m, LoraLayer))


def test_a_disabled_adapter_changes_nothing() -> None:
    model = adapted("float32")
    shorten(model)
    x = torch.randn(ROWS, WIDTH)
    with model.disable_adapter():
        assert torch.equal(
            model(x), model.get_base_model().second.base_layer(torch.tanh(model.get_base_model().first.base_layer(x)))
        )
