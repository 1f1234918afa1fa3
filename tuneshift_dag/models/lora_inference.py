"""LoRA layers with fewer operations, for inference only.

PEFT computes ``result.clone() + lora_B(lora_A(x)) * scaling`` in five operations, which gradients need. Without
gradients two do: one product down to the rank, and one that adds the product back up to the base layer's output.
"""

import types
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from tuneshift_dag.training.lora_layers import is_plain


def shorten(model: torch.nn.Module) -> None:
    """Give every plain LoRA layer with one adapter a shorter forward; DoRA and the like stay as they are."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and is_plain(module):
            module.forward = types.MethodType(_forward, module)


def _forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = module.base_layer(x)
    if module.disable_adapters:
        return result
    (name,) = module.active_adapters
    low = module.lora_A[name](x).flatten(0, -2)
    result.view(-1, result.shape[-1]).addmm_(low, module.lora_B[name].weight.t(), alpha=module.scaling[name])
    return result
