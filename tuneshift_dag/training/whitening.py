"""A LoRA that writes where general text is quiet.

Of the texts that the target wrote itself, a layer's inputs x mostly lie in a few directions; an update in these changes
whatever the model does. So the update is B (A P) x, where P damps them: with C, the mean of x xᵀ, P is a root of
(C + floor)⁻¹. A step of the optimizer is then small in a loud direction, and as large as ever in a quiet one. What
comes out, B and A P, is an ordinary LoRA.

Steps in the null space of C alone: arXiv 2103.07113; the same for edits of single facts: arXiv 2410.02355."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.bnb import Linear4bit
from torch.nn.utils import parametrize

from tuneshift_dag.training.processes import add_over_processes, own_share
from tuneshift_dag.training.rehearsal import Remembered, padded, remembered

_TEXTS = 128
"""Texts whose inputs are looked at, all in one pass."""
_FLOOR = 0.05
"""What is added to the energy of each direction, as a part of the mean over directions."""
_WIDEST = 4096
"""Inputs of more numbers than this are damped one by one: the matrix takes the square of their width."""


class Whitened(torch.nn.Module):
    """A P in the place of A (rank, in), as `torch.nn.utils.parametrize` asks for it."""

    p: torch.Tensor
    """(in, in), or (in,) for a diagonal one, in the dtype that the model computes in."""

    def __init__(self, inputs: torch.Tensor) -> None:
        """``inputs`` of the layer (tokens, in). In a group every process has all of them, and multiplies its share."""
        super().__init__()
        tokens, width = inputs.shape
        with torch.autocast(inputs.device.type, enabled=False):
            rows = inputs.float()
            energy = rows.square().sum(0) / tokens
            floor = _FLOOR * energy.mean()
            if width > _WIDEST:
                p = (energy + floor).rsqrt()
            else:
                own = own_share(rows)
                moment = (own.T @ own).div_(tokens)
                add_over_processes([moment])
                moment.diagonal().add_(floor)
                # Of its inverse any root will do, and this one takes the least time.
                root, one = torch.linalg.cholesky(moment), torch.eye(width, device=rows.device)
                p = torch.linalg.solve_triangular(root, one, upper=False)
        # A random A stays as large as it was.
        self.register_buffer("p", (p * (width**0.5 / p.norm())).to(inputs.dtype), persistent=False)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        a = weight.to(self.p.dtype)
        return (a * self.p if self.p.dim() == 1 else a @ self.p).to(weight.dtype)


@torch.no_grad()
def whiten(
    model: Any, texts: Sequence[list[int]], autocast: Callable[[], AbstractContextManager[Any]]
) -> list[Remembered]:
    """The LoRA of every linear layer that ``texts`` (token ids, two or more of each) pass through. (That of experts
    whose weights are one tensor stays as it is.) What the model predicts in those that it has looked at."""
    texts = texts[:_TEXTS]
    ids, places = padded(texts)
    # A text's first token is always the same, and its inputs are many times as large as all others.
    places = places[places % ids.shape[1] > 0]
    found: dict[Any, Whitened] = {}
    last: list[Any] = [None, None]

    def look(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0] is not last[0]:  # queries, keys and values have one input
            rows = inputs[0].flatten(0, -2)
            rows = rows[places.to(rows.device)] if len(rows) == ids.numel() else rows  # of an expert its own
            # A layer that gets nothing, or what has overflowed, says nothing of directions.
            size = float(rows.float().square().sum())
            last[:] = inputs[0], Whitened(rows) if 0 < size < math.inf else None
        if last[1] is not None:
            found.setdefault(layer, last[1])

    layers = [module for module in model.modules() if isinstance(module, Linear | Linear4bit)]
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    # Some bases have dropout of their own: a training that goes on must begin as it did.
    with torch.random.fork_rng(list(range(torch.cuda.device_count()))):
        torch.manual_seed(0)
        with model.disable_adapter(), autocast():
            predicted = remembered(model, texts)
    for hook in hooks:
        hook.remove()
    for layer, whitened in found.items():
        (a,) = layer.lora_A.values()
        parametrize.register_parametrization(a, "weight", whitened)
    return predicted


def bake(model: torch.nn.Module) -> None:
    """Make A P the weight of A, as it is saved."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
