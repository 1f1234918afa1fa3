"""The LoRA that is trained: on which layers, and a forward pass with fewer operations than PEFT's."""

import types
import warnings
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from peft.tuners.lora.bnb import Linear4bit
from torch.autograd.function import once_differentiable

from tuneshift_dag.models.capabilities import linear_layers
from tuneshift_dag.models.loading import is_plain

if TYPE_CHECKING:
    from tuneshift_dag.training.loop import LoraTraining


def add_lora(model: Any, settings: "LoraTraining") -> PeftModel:
    """A fresh LoRA on every linear layer of the language model that takes one, in float32, reproducible from the
    seed."""
    torch.manual_seed(settings.seed)
    sizes = {"r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout}
    # The output head is no part of PEFT's "all-linear".
    head = model.get_output_embeddings()
    left_out = [name for name in linear_layers(model)[1] if model.get_submodule(name) is not head] or None
    chosen = LoraConfig(target_modules="all-linear", exclude_modules=left_out, task_type="CAUSAL_LM", **sizes)
    with warnings.catch_warnings():
        # Checkpointing was renamed in a later transformers than the oldest that is supported, and PEFT asks for it.
        warnings.simplefilter("ignore", FutureWarning)
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        adapted = get_peft_model(model, chosen)
    shorten(adapted)
    return adapted


def shorten(model: torch.nn.Module) -> None:
    """Give every plain LoRA layer without dropout a forward pass with fewer operations.

    PEFT casts the layer's input to float32 and autocast casts it back; scaling, product and sum each have a gradient.
    Here result + scaling * (x A^T) B^T is one operation, in the dtype of the layer's output, and the weights float32.
    """
    for module in model.modules():
        if not isinstance(module, Linear | Linear4bit) or not is_plain(module):
            continue
        if all(isinstance(dropout, torch.nn.Identity) for dropout in module.lora_dropout.values()):
            module.forward = types.MethodType(_lora_forward, module)


def _lora_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = module.base_layer(x)
    if module.disable_adapters:
        return result
    (name,) = module.active_adapters
    updated: torch.Tensor = _AddUpdate.apply(  # type: ignore[no-untyped-call]
        result, x, module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]
    )
    # Not within the function: some families go on in place.
    return updated.view_as(result)


class _AddUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, result: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Shapes: result (..., out), x (..., in), a (rank, in), b (out, rank); returns (N, out)."""
        rows, a, b = x.flatten(0, -2).to(result.dtype), a.to(result.dtype), b.to(result.dtype)
        ctx.scaling, ctx.x_shape, ctx.x_dtype, ctx.result_shape = scaling, x.shape, x.dtype, result.shape
        # A float32 result, of a layer after a LayerNorm, stays so: the backward pass, without autocast, has to match.
        with torch.autocast(x.device.type, enabled=False):
            low = rows @ a.T
            ctx.save_for_backward(rows, low, a, b)
            return torch.addmm(result.flatten(0, -2), low, b.T, alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, low, a, b = ctx.saved_tensors
        gradient = outputs[0]
        of_low = (gradient @ b).mul_(ctx.scaling)
        of_x = (of_low @ a).view(ctx.x_shape).to(ctx.x_dtype) if ctx.needs_input_grad[1] else None
        of_b = (gradient.T @ low).float().mul_(ctx.scaling)
        return gradient.view(ctx.result_shape), of_x, (of_low.T @ rows).float(), of_b, None
