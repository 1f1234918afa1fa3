"""LoRA layers with fewer operations, for training.

PEFT turns the layer's input into float32, autocast turns it back, and scaling, product and sum are operations of their
own, each with a gradient. Here ``result + scaling * (x A^T) B^T`` is one operation with its gradients written out. The
adapter's weights stay in float32, and are used in the dtype of the layer's output, as under autocast.
"""

import types
from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.bnb import Linear4bit
from torch.autograd.function import once_differentiable

from tuneshift_dag.models.loading import is_plain


def shorten(model: torch.nn.Module) -> None:
    """Give every plain LoRA layer with one adapter the shorter forward; with dropout, DoRA and the like none."""
    for module in model.modules():
        if not isinstance(module, Linear | Linear4bit) or not is_plain(module):
            continue
        if all(isinstance(dropout, torch.nn.Identity) for dropout in module.lora_dropout.values()):
            module.forward = types.MethodType(_forward, module)


def _forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = module.base_layer(x)
    if module.disable_adapters:
        return result
    (name,) = module.active_adapters
    updated: torch.Tensor = _AddUpdate.apply(  # type: ignore[no-untyped-call]
        result, x, module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]
    )
    return updated


class _AddUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, result: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Shapes: result (..., out), x (..., in), a (rank, in), b (out, rank)."""
        rows, a, b = x.flatten(0, -2).to(result.dtype), a.to(result.dtype), b.to(result.dtype)
        low = rows @ a.T
        ctx.save_for_backward(rows, low, a, b)
        ctx.scaling, ctx.x_shape, ctx.x_dtype = scaling, x.shape, x.dtype
        return torch.addmm(result.flatten(0, -2), low, b.T, alpha=scaling).view_as(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, low, a, b = ctx.saved_tensors
        gradient = outputs[0].flatten(0, -2)
        of_low = (gradient @ b).mul_(ctx.scaling)
        of_x = (of_low @ a).view(ctx.x_shape).to(ctx.x_dtype) if ctx.needs_input_grad[1] else None
        of_b = (gradient.T @ low).float().mul_(ctx.scaling)
        return outputs[0], of_x, (of_low.T @ rows).float(), of_b, None
