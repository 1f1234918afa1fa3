"""Rehearsal: texts that the target wrote itself keep the adapted model near the one that it was.

Beside the responses' loss a step has the KL divergence from the model without its adapter to the adapted one, at a few
positions of a few texts that were sampled from the target's start token alone: context-free replay of what it knows
(arXiv 2505.13811), which needs no data from outside.

What the model predicts without its adapter is computed once, before the first step, for the texts that will be drawn.
It is kept as the hidden states that go into the head, which are small: the head, which isn't trained, makes the whole
distributions of them again. (The likeliest 1,024 of 262,144 tokens alone let a target forget the rare ones.)

A text is compared where these states have changed most, which costs no more than where chance falls: half of the
divergence is at a tenth of the positions. (Of whole memories, to rehearse what interferes most: arXiv 1908.04742.)"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tuneshift_dag.models.memory import in_batches
from tuneshift_dag.training.batches import head_only_at, rows_at_once
from tuneshift_dag.training.processes import own_share

EVERY = 2
"""Steps of which one rehearses, for all of them: a pass costs the same however little it holds, since 4-bit weights are
unpacked for it."""
TEXTS = 4
"""Texts of such a step."""
POSITIONS = 16
"""Positions of a text at which the models are compared, of all that precede a token: each costs the head as much as a
token of a response."""
_AT_ONCE = 16


@dataclass(frozen=True)
class Remembered:
    """What the model without its adapter predicts in one text: what goes into its head at each token but the last
    (tokens - 1, width)."""

    ids: list[int]
    states: torch.Tensor


@dataclass(frozen=True)
class HeldTo:
    """Texts of one step, and the weight of each of their positions in its loss."""

    texts: list[Remembered]
    weight: float


class Rehearsal:
    """The texts of every step, drawn from a seed, and what the model predicted in them before the training."""

    def __init__(self, texts: Sequence[list[int]], steps: int, seed: int, known: Sequence[Remembered] = ()) -> None:
        """``texts`` are token ids, two or more of each, with what starts them; of the first ones it is ``known`` what
        the model predicts."""
        rng = random.Random(seed)
        drawn = min(TEXTS, len(texts))
        self.steps = [rng.sample(range(len(texts)), 0 if step % EVERY else drawn) for step in range(steps)]
        self._texts = texts
        self._known = dict(enumerate(known))

    def remember(self, model: Any, first: int, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        """Compute what this process's share of the steps from number ``first`` on (from 0) needs; the model's adapter
        is off meanwhile."""
        needed = sorted({text for step in self.steps[first:] for text in own_share(step)} - self._known.keys())

        def work(batch: list[int]) -> list[Remembered]:
            with autocast():
                return remembered(model, [self._texts[needed[i]] for i in batch])

        # The embeddings of a text, and as much again in every layer, are most of what a row takes.
        width = model.get_input_embeddings().weight.shape[1]
        with torch.no_grad(), model.disable_adapter():
            lengths = [len(self._texts[text]) for text in needed]
            for batch, results in in_batches(lengths, _AT_ONCE, lambda length: 64 * length * width, work):
                self._known |= dict(zip((needed[i] for i in batch), results, strict=True))

    def of_step(self, step: int, weight: float) -> HeldTo:
        """What this process does of a step (from 0), as `remember` has computed it; ``weight`` is that of the mean over
        the positions of all processes."""
        drawn = self.steps[step]
        positions = sum(_compared(self._texts[text]) for text in drawn)
        return HeldTo([self._known[text] for text in own_share(drawn)], EVERY * weight / max(1, positions))


def _compared(ids: list[int]) -> int:
    return min(POSITIONS, len(ids) - 1)


def padded(texts: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, L), padded on the right (under a causal mask no real token sees that), and the places of all tokens
    but the last of each text in the flattened ids."""
    length = max(map(len, texts))
    ids = torch.tensor([text + [0] * (length - len(text)) for text in texts])
    return ids, torch.tensor([row * length + at for row, text in enumerate(texts) for at in range(len(text) - 1)])


def remembered(model: Any, texts: Sequence[list[int]]) -> list[Remembered]:
    """What the model as it is predicts in each text."""
    ids, places = padded(texts)
    seen: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        seen.append(inputs[0])
        return inputs[0][:, :1]  # the head itself has nothing to do

    head: torch.nn.Module = model.get_output_embeddings()
    with head_only_at(model, places), head.register_forward_pre_hook(keep):
        model(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    states = torch.split(seen[0].squeeze(0).cpu(), [len(text) - 1 for text in texts])
    return list(map(Remembered, texts, states))


def divergence(model: Any, texts: Sequence[Remembered]) -> torch.Tensor:
    """Sum of KL(model without adapter || model) in nats, over the whole vocabulary, at the positions of each text that
    have changed most."""
    ids, places = padded([text.ids for text in texts])
    with head_only_at(model, places), changed_most(model, texts):
        logits = model(input_ids=ids.to(next(model.parameters()).device), use_cache=False).logits.squeeze(0)
    apart: torch.Tensor = _Divergence.apply(logits)  # type: ignore[no-untyped-call]
    return apart


@contextmanager
def changed_most(model: Any, texts: Sequence[Remembered]) -> Iterator[None]:
    """Within it the head sees the states at the positions of each text that have changed most, and its output is twice
    as long: first from these, then, without gradients, from the known states there. So what follows the head (a soft
    cap, a scale) is the model's own for both."""
    known: list[torch.Tensor] = []

    def select(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        chosen: list[torch.Tensor] = []
        parts = torch.split(inputs[0].squeeze(0), [len(text.states) for text in texts])
        for text, states in zip(texts, parts, strict=True):
            before = text.states.to(states)
            most = (states.detach() - before).float().norm(dim=1).topk(_compared(text.ids)).indices
            chosen.append(states[most])
            known.append(before[most])
        return torch.cat(chosen).unsqueeze(0)

    def add_known(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], logits: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            before = module.forward(torch.cat(known).unsqueeze(0))
        return torch.cat([logits, before], dim=1)

    head: torch.nn.Module = model.get_output_embeddings()
    with head.register_forward_pre_hook(select), head.register_forward_hook(add_known):
        yield


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        """Sum over rows of KL(softmax(second half) || softmax(first half)) of logits (2N, V), in float32. A few rows at
        a time, in memory that is used again: fresh pages take longer than the arithmetic."""
        after, before = logits.chunk(2)
        total, gradient = torch.zeros((), device=logits.device), torch.zeros_like(logits)
        size = rows_at_once(logits)
        new, old, share, weight = (logits.new_empty((size, logits.shape[1]), dtype=torch.float32) for _ in range(4))
        for first in range(0, len(after), size):
            rows = slice(first, min(first + size, len(after)))
            n = rows.stop - first
            _log_softmax(after[rows], new[:n], weight[:n])
            _log_softmax(before[rows], old[:n], share[:n])
            gradient[rows] = weight[:n].sub_(share[:n])
            total += share[:n].mul_(old[:n].sub_(new[:n])).sum()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: torch.Tensor) -> torch.Tensor:
        gradient: torch.Tensor = ctx.saved_tensors[0]
        return gradient * outputs[0]


def _log_softmax(logits: torch.Tensor, log: torch.Tensor, softmax: torch.Tensor) -> None:
    """The log-softmax of logits (N, V) into ``log`` and the softmax into ``softmax``, both float32, for one exponential
    each."""
    log.copy_(logits)
    log.sub_(log.amax(1, keepdim=True))
    torch.exp(log, out=softmax)
    total = softmax.sum(1, keepdim=True)
    softmax.div_(total)
    log.sub_(total.log())
