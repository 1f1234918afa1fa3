"""A LoRA that writes where general text is quiet.

Of the texts that the target wrote itself, a layer's inputs x mostly lie in a few directions; an update in these changes
whatever the model does. So the update is B (A P) x, where P damps them: with C, the mean of x xᵀ, it is proportional to
(C + floor)^(-1/2). A step of the optimizer is then small in a loud direction, and as large as ever in a quiet one. What
comes out, B and A P, is an ordinary LoRA.

Steps in the null space of C alone: arXiv 2103.07113; the same for edits of single facts: arXiv 2410.02355."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.bnb import Linear4bit
from torch.nn.utils import parametrize

from tuneshift_dag.training.batches import head_only_at
from tuneshift_dag.training.rehearsal import padded

_TEXTS = 64
"""Texts whose inputs are looked at, all in one pass."""
_DIRECTIONS = 128
"""Loudest directions that have a factor of their own; the others of a layer share one."""
_FLOOR = 0.05
"""What is added to the energy of each direction, as a part of the mean over directions."""


class Whitened(torch.nn.Module):
    """A P in the place of A (rank, in), as `torch.nn.utils.parametrize` asks for it."""

    directions: torch.Tensor
    apart: torch.Tensor
    factor: torch.Tensor

    def __init__(self, inputs: torch.Tensor) -> None:
        """``inputs`` of the layer (tokens, in)."""
        super().__init__()
        tokens, width = inputs.shape
        with torch.autocast(inputs.device.type, enabled=False):
            rows = inputs.float()
            _, values, directions = torch.svd_lowrank(rows, min(_DIRECTIONS, tokens, width))
            energy, whole = values**2 / tokens, rows.square().sum() / tokens
        others = width - len(energy)
        rest = (whole - energy.sum()).clamp_min(0) / max(1, others)
        floor = _FLOOR * whole / width
        factors, factor = (energy + floor).rsqrt(), (rest + floor).rsqrt()
        # So that a random A stays as large as it was.
        scale = ((factors.square().sum() + others * factor.square()) / width).rsqrt()
        self.register_buffer("directions", directions, persistent=False)
        self.register_buffer("apart", (factors - factor) * scale, persistent=False)
        self.register_buffer("factor", factor * scale, persistent=False)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return weight * self.factor + ((weight @ self.directions) * self.apart) @ self.directions.T


@torch.no_grad()
def whiten(
    model: Any, texts: Sequence[list[int]], seed: int, autocast: Callable[[], AbstractContextManager[Any]]
) -> None:
    """The LoRA of every linear layer that ``texts`` (token ids, two or more of each) pass through; the same for the
    same seed. (That of experts whose weights are one tensor stays as it is.)"""
    ids, places = padded(texts[:_TEXTS])
    # A text's first token is always the same, and its inputs are many times as large as all others.
    places = places[places % ids.shape[1] > 0]
    device = next(model.parameters()).device
    found: dict[Any, Whitened] = {}
    last: list[Any] = [None, None]

    def look(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0] is not last[0]:  # queries, keys and values have one input
            rows = inputs[0].flatten(0, -2)
            rows = rows[places.to(rows.device)] if len(rows) == ids.numel() else rows  # of an expert its own
            last[:] = inputs[0], Whitened(rows) if len(rows) else None
        if last[1] is not None:
            found.setdefault(layer, last[1])

    layers = [module for module in model.modules() if isinstance(module, Linear | Linear4bit)]
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    with torch.random.fork_rng(list(range(torch.cuda.device_count()))), model.disable_adapter(), autocast():
        torch.manual_seed(seed)
        with head_only_at(model, torch.tensor([0])):
            model(input_ids=ids.to(device), use_cache=False)
    for hook in hooks:
        hook.remove()
    for layer, whitened in found.items():
        (a,) = layer.lora_A.values()
        parametrize.register_parametrization(a, "weight", whitened)


def bake(model: torch.nn.Module) -> None:
    """Make A P the weight of A, as it is saved."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
