"""Pairs as token ids, what an epoch and a step hold of them, and the loss of a batch, which is on the response tokens.

Examples are padded on the right: under a causal mask no real token sees the padding, so no attention mask is needed and
the fast causal kernel applies. Logits are computed only where they predict a token that counts: with a small body and a
large vocabulary (Gemma 3 270M: 262k) the rest would be most of the work."""

import random
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from tuneshift_dag.method import PromptFormat
from tuneshift_dag.models.prompts import continuation_ids, end_id, prompt_ids

T = TypeVar("T")
RARE = 0.25
# Logits turned into float32 at once on a CPU, in elements: 2 MB.
_FLOAT_AT_ONCE = 1 << 19


@dataclass(frozen=True)
class TokenizedExample:
    """Prompt and response as token ids, the response with its end-of-sequence token."""

    prompt_ids: list[int]
    response_ids: list[int]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


Examples = Sequence[TokenizedExample]


@dataclass(frozen=True)
class Batch:
    """Right-padded examples. Shapes: ids (B, L); predicts and targets (N,).

    ``predicts[i]`` is the position, in the flattened ids, whose logits predict ``targets[i]``: all response tokens."""

    ids: torch.Tensor
    predicts: torch.Tensor
    targets: torch.Tensor


def tokenize_example(tokenizer: Any, format: PromptFormat, prompt: str, response: str) -> TokenizedExample:
    """The prompt is tokenized alone, as for generation, so that the response begins at the same token boundary."""
    response_ids = [*continuation_ids(tokenizer, response), end_id(tokenizer, format)]
    return TokenizedExample(prompt_ids(tokenizer, format, prompt), response_ids)


def cut_to(example: TokenizedExample, length: int) -> TokenizedExample | None:
    """The example with at most ``length`` tokens, the response cut; None when its prompt leaves no room for any."""
    if len(example) <= length:
        return example
    response = example.response_ids[: max(0, length - len(example.prompt_ids))]
    return replace(example, response_ids=response) if response else None


def balanced_epochs(examples: Examples, epochs: int, rng: random.Random) -> list[list[TokenizedExample]]:
    """As many examples for every epoch, of each response in proportion to the square root of how many have it: rare
    ones aren't crowded out, and common ones still show most of their prompts.

    A response with fewer examples than `RARE` of the mean over responses has no more draws an example than one with
    that many: what a source model gave once is more often its mistake than a rare skill. With systematic sampling over
    all epochs an example whose share of the draws is 2.3 is drawn two or three times; with independent draws a fifth to
    a third of the examples would never be seen."""
    counts = Counter(tuple(e.response_ids) for e in examples)
    least = RARE * len(examples) / len(counts)
    # Response by response, so that each gets its share exactly.
    ordered = sorted(rng.sample(list(examples), len(examples)), key=lambda e: e.response_ids)
    ends = list(accumulate(max(counts[tuple(e.response_ids)], least) ** -0.5 for e in ordered))
    draws, first = epochs * len(examples), rng.random()
    drawn = [ordered[bisect(ends, (first + i) / draws * ends[-1], hi=len(ends) - 1)] for i in range(draws)]
    return [drawn[epoch::epochs] for epoch in range(epochs)]


def length_bucketed_batches(examples: Examples, batch_size: int, rng: random.Random) -> list[list[TokenizedExample]]:
    """Batches of similar total length, in random order: even step times without a fixed order."""
    batches = list(chunks(sorted(examples, key=lambda e: len(e) + rng.random() * 8), batch_size))
    rng.shuffle(batches)
    return batches


def chunks(items: Sequence[T], size: int) -> Iterator[list[T]]:
    """``items`` in order, ``size`` at a time; the last ones may be fewer."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def collate(examples: Examples) -> Batch:
    """Pad examples on the right and note where the tokens that count are predicted."""
    rows = [e.prompt_ids + e.response_ids for e in examples]
    # The final token predicts nothing, so it is left out.
    length = max(map(len, rows)) - 1
    padded = [row[:-1] + [0] * (length + 1 - len(row)) for row in rows]
    places = [(i, len(e.prompt_ids) + place) for i, e in enumerate(examples) for place in range(len(e.response_ids))]
    # The logits at position t predict token t + 1.
    predicts = [i * length + place - 1 for i, place in places]
    targets = [rows[i][place] for i, place in places]
    return Batch(torch.tensor(padded), torch.tensor(predicts), torch.tensor(targets))


def mean_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Mean negative log-likelihood (nats) of the response tokens."""
    ids = batch.ids.to(next(model.parameters()).device)
    with head_only_at(model, batch.predicts):
        logits = model(input_ids=ids, use_cache=False).logits.squeeze(0)
    return mean_cross_entropy(logits, batch.targets.to(logits.device))


def head_only_at(model: Any, positions: torch.Tensor) -> RemovableHandle:
    """Within it the head sees only ``positions`` of the flattened (batch × length) hidden states; the model's logits
    have shape (1, len(positions), vocabulary)."""

    def select(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        # The head may be on another GPU than the embeddings.
        return inputs[0].flatten(0, 1)[positions.to(inputs[0].device)].unsqueeze(0)

    head: torch.nn.Module = model.get_output_embeddings()
    return head.register_forward_pre_hook(select)


def mean_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood (nats) of ``targets`` (N,) under the softmax of ``logits`` (N, V), in float32; the
    gradient is returned in the dtype of the logits.

    `torch.nn.functional.cross_entropy` on ``logits.float()`` writes three float32 tensors of their size, much of a
    training step of Gemma 3 270M. Here a few rows at a time are turned into float32, in the processor's cache."""
    loss: torch.Tensor = _MeanCrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return loss


class _MeanCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        totals = torch.cat([_log_sum_exp(rows) for rows in torch.split(logits, rows_at_once(logits))])
        ctx.save_for_backward(logits, targets, totals)
        return (totals - logits.gather(1, targets[:, None])[:, 0].float()).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets, totals = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        scale = outputs[0] / len(targets)
        size = rows_at_once(logits)
        parts = (torch.split(part, size) for part in (logits, targets, totals, gradient))
        for rows, right, total, out in zip(*parts, strict=True):
            softmax = rows.to(torch.float32, copy=True).sub_(total[:, None]).exp_()
            softmax.scatter_add_(1, right[:, None], softmax.new_full((len(right), 1), -1.0))
            out.copy_(softmax.mul_(scale))
        return gradient, None


def _log_sum_exp(logits: torch.Tensor) -> torch.Tensor:
    """`torch.logsumexp` in float32; that one allocates two more tensors of this size."""
    values = logits.to(torch.float32, copy=True)
    most = values.amax(1, keepdim=True)
    return values.sub_(most).exp_().sum(1).log_() + most[:, 0]


def rows_at_once(logits: torch.Tensor) -> int:
    """Rows of logits (N, V) that are turned into float32 together: on a CPU as many as its cache holds."""
    return max(1, _FLOAT_AT_ONCE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
