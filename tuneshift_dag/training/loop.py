"""LoRA training on (prompt, response) pairs, with the loss on the response tokens only, or on some of them.

With `LoraTraining.prompt_weight` a few tokens of each prompt count a little too: they keep the model near the language
that it knew, which an answer of a few tokens doesn't.

A batch holds examples of similar length, padded on the right. Under a causal mask no real token sees
the padding after it, so no attention mask is needed and the fast causal kernel applies. Logits are
computed only at positions that predict a response token: for a model with a small body and a large
vocabulary (Gemma 3 270M: 262k) the rest would be most of the work.

A step may be divided into several forward passes (`LoraTraining.gradient_accumulation`), and each of these among the
processes of a group (`tuneshift_dag.training.processes`). Every part's loss is weighted by its tokens, so that the
step's gradient is that of all its examples at once.
"""

import math
import random
import time
import warnings
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal, TypeVar

import bitsandbytes
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tuneshift_dag.training.checkpoint import TrainingCheckpoint
from tuneshift_dag.training.lora_layers import shorten
from tuneshift_dag.training.loss import mean_cross_entropy

T = TypeVar("T")
Optimizer = Literal["adamw", "paged_adamw_8bit"]
RARE = 0.25
PROMPT_TOKENS = 4
"""Tokens of a prompt that are predicted in one step: each costs the head as much as one of the response."""


@dataclass(frozen=True)
class TokenizedExample:
    """Prompt and response as token ids; the response ends with the end-of-sequence token.

    ``mask`` says of each response token whether it counts in the loss; None: all do. ``prompt_places`` are the places
    in the prompt of tokens that are predicted too.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    mask: list[bool] | None = None
    prompt_places: Sequence[int] = ()

    @property
    def counted(self) -> list[int]:
        """Places in the response of the tokens that count in the loss."""
        mask = self.mask or [True] * len(self.response_ids)
        return [place for place, counts in enumerate(mask) if counts]


@dataclass(frozen=True)
class LoraTraining:
    """Hyper-parameters of one LoRA training. The paper doesn't publish its own values.

    An optimizer step is on ``batch_size`` times ``gradient_accumulation`` examples. ``gradient_checkpointing`` keeps
    only each layer's input for the backward pass, and computes the rest again (arXiv 1604.06174). With ``shuffle`` off,
    every epoch takes the examples in the order given, for batches whose make-up matters.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    learning_rate: float = 5e-4
    epochs: int = 5
    batch_size: int = 16
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    optimizer: Optimizer = "adamw"
    balance: Literal["response", "none"] = "none"
    prompt_weight: float = 0.0
    shuffle: bool = True
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    validation_fraction: float = 0.05
    seed: int = 0


@dataclass
class TrainingCurve:
    """What the training reported: one row per logged step and per epoch.

    ``response_tokens`` are those that counted in the loss, over all steps; ``token_share`` is their share of all
    response tokens of the dataset.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)
    response_tokens: int = 0
    token_share: float = 1.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Batch:
    """Right-padded examples. Shapes: ids (B, L); predicts and targets (R,); prompt_predicts and prompt_targets (P,).

    ``predicts[i]`` is the position, in the flattened ids, whose logits predict ``targets[i]``, a token of a response;
    the same for the tokens of prompts that count.
    """

    ids: torch.Tensor
    predicts: torch.Tensor
    targets: torch.Tensor
    prompt_predicts: torch.Tensor
    prompt_targets: torch.Tensor


def tokenize_example(tokenizer: Any, template: str, prompt: str, response: str) -> TokenizedExample:
    """Token ids of a rendered prompt and of its response plus the end-of-sequence token.

    The prompt is tokenized alone, exactly as it is for generation, so that the response begins at
    the same token boundary in training and in use.
    """
    prompt_ids = tokenizer(template.replace("{prompt}", prompt)).input_ids
    response_ids = tokenizer(response, add_special_tokens=False).input_ids
    return TokenizedExample(prompt_ids, [*response_ids, tokenizer.eos_token_id])


def collate(examples: Sequence[TokenizedExample]) -> Batch:
    """Pad examples on the right and note where the response tokens that count are predicted."""
    # The final token predicts nothing, so it is left out.
    rows = [(e.prompt_ids + e.response_ids)[:-1] for e in examples]
    length = max(map(len, rows))
    predicts: list[int] = []
    targets: list[int] = []
    prompt_predicts: list[int] = []
    prompt_targets: list[int] = []
    for i, example in enumerate(examples):
        # The logits at position t predict token t + 1: the last prompt token predicts the first response token.
        first = i * length + len(example.prompt_ids) - 1
        predicts.extend(first + place for place in example.counted)
        targets.extend(example.response_ids[place] for place in example.counted)
        prompt_predicts.extend(i * length + place - 1 for place in example.prompt_places)
        prompt_targets.extend(example.prompt_ids[place] for place in example.prompt_places)
    padded = [row + [0] * (length - len(row)) for row in rows]
    # Integers also when there are none.
    places = (torch.tensor(p, dtype=torch.long) for p in (predicts, targets, prompt_predicts, prompt_targets))
    return Batch(torch.tensor(padded), *places)


def losses(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean negative log-likelihood (nats) of the response tokens that count, and of the prompts'; 0 where none do."""
    device = next(model.parameters()).device
    with head_only_at(model, torch.cat([batch.predicts, batch.prompt_predicts])):
        logits = model(input_ids=batch.ids.to(device), use_cache=False).logits.squeeze(0)
    parts = torch.split(logits, [len(batch.targets), len(batch.prompt_targets)])
    targets = (batch.targets, batch.prompt_targets)
    response, prompt = (
        mean_cross_entropy(part, t.to(part.device)) if len(t) else part.new_zeros((), dtype=torch.float32)
        for part, t in zip(parts, targets, strict=True)
    )
    return response, prompt


def response_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Mean negative log-likelihood per response token that counts (nats), over all examples of the batch."""
    return losses(model, batch)[0]


@contextmanager
def head_only_at(model: Any, positions: torch.Tensor) -> Iterator[None]:
    """Let the model's head see only ``positions`` of the flattened (batch × length) hidden states.

    Inside the block the model's logits have shape (1, len(positions), vocabulary).
    """

    def select(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        # The head may be on another GPU than the embeddings.
        return inputs[0].flatten(0, 1)[positions.to(inputs[0].device)].unsqueeze(0)

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def add_lora(model: Any, settings: LoraTraining) -> PeftModel:
    """A fresh LoRA on every linear layer of the body, in float32, reproducible from the seed."""
    torch.manual_seed(settings.seed)
    if settings.gradient_checkpointing:
        with warnings.catch_warnings():
            # It was renamed in a later transformers than the oldest that is supported.
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": False})
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    shorten(adapted)
    return adapted


def train(
    model: PeftModel,
    examples: Sequence[TokenizedExample],
    settings: LoraTraining,
    on_step: Callable[[int, int, float], None] = lambda step, total, loss: None,
    checkpoint: TrainingCheckpoint | None = None,
) -> TrainingCurve:
    """Train the adapter in place with AdamW and a cosine schedule; return the curve.

    In a process group each process must call this with the same arguments; all end with the same adapter and curve.

    Args:
        model: a PEFT model in train mode whose base was loaded for training.
        examples: all pairs; a slice of ``validation_fraction`` is held back for the epoch losses.
        on_step: called after each optimizer step with (step, total steps, loss in nats per token).
        checkpoint: where the training goes on that an earlier call began, and is kept for a later one. The result is
            that of one call, but for the draws of dropout.

    Raises:
        RuntimeError: when a trainable parameter gets no gradient in the first step, or its loss isn't finite.
    """
    rng = random.Random(settings.seed)
    prompt_rng = random.Random(settings.seed)
    shuffled = rng.sample(list(examples), len(examples)) if settings.shuffle else list(examples)
    held_back = int(len(shuffled) * settings.validation_fraction)
    validation, training = shuffled[:held_back], shuffled[held_back:]
    if not training:
        raise ValueError("no training examples")

    optimizer = _Optimizer(model, settings)
    pairs_a_step = settings.batch_size * settings.gradient_accumulation
    total = math.ceil(len(training) / pairs_a_step) * settings.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer.adamw, lambda step: _cosine_with_warmup(step, total, settings.warmup_ratio)
    )
    all_tokens = sum(len(e.response_ids) for e in shuffled)
    curve = TrainingCurve(token_share=sum(len(e.counted) for e in shuffled) / all_tokens)
    started = time.monotonic()
    done = _resume(checkpoint, optimizer, schedule, curve)
    step = 0
    balanced = settings.balance == "response"
    epochs = balanced_epochs(training, settings.epochs, rng) if balanced else [training] * settings.epochs
    for epoch, drawn in enumerate(epochs):
        first = step
        batches = (
            length_bucketed_batches(drawn, pairs_a_step, rng) if settings.shuffle else _chunks(drawn, pairs_a_step)
        )
        for chosen in batches:
            if settings.prompt_weight:
                # Before the step is divided, so that the division changes nothing.
                chosen = [_with_prompt_places(example, prompt_rng) for example in chosen]
            step += 1
            if step <= done:
                continue  # it was only drawn, so that the next ones are those of a training in one go
            loss = _backward(model, chosen, settings, optimizer, first=step == done + 1)
            optimizer.step()
            schedule.step()
            curve.steps.append({"step": step, "loss": loss, "learning_rate": float(schedule.get_last_lr()[0])})
            curve.response_tokens += sum(len(e.counted) for e in chosen)
            on_step(step, total, loss)
            if checkpoint and is_first_process():
                checkpoint.save(lambda: _state(optimizer, schedule, curve, curve.seconds + time.monotonic() - started))
        if len(curve.epochs) > epoch:
            continue
        losses = [row["loss"] for row in curve.steps[first:step]]
        curve.epochs.append(
            {
                "epoch": epoch + 1,
                "train_loss": sum(losses) / len(losses),
                "validation_loss": evaluate_loss(model, validation, settings.batch_size),
            }
        )
    curve.seconds += time.monotonic() - started
    return curve


def _state(
    optimizer: "_Optimizer", schedule: torch.optim.lr_scheduler.LambdaLR, curve: TrainingCurve, seconds: float
) -> dict[str, Any]:
    """What a training needs to go on; its examples and their order follow from its arguments."""
    return {
        "parameters": [parameter.detach() for parameter in optimizer.parameters],
        "optimizer": optimizer.adamw.state_dict(),
        "scaler": optimizer.scaler.state_dict(),
        "schedule": schedule.state_dict(),
        "curve": {**vars(curve), "seconds": seconds},
    }


def _resume(
    checkpoint: TrainingCheckpoint | None,
    optimizer: "_Optimizer",
    schedule: torch.optim.lr_scheduler.LambdaLR,
    curve: TrainingCurve,
) -> int:
    """Put everything into the state that was saved last; how many steps were done by then."""
    state = checkpoint.load() if checkpoint else None
    if state is None:
        return 0
    with torch.no_grad():
        for parameter, saved in zip(optimizer.parameters, state["parameters"], strict=True):
            parameter.copy_(saved)
    optimizer.adamw.load_state_dict(state["optimizer"])
    optimizer.scaler.load_state_dict(state["scaler"])
    schedule.load_state_dict(state["schedule"])
    vars(curve).update(state["curve"])
    return len(curve.steps)


def evaluate_loss(model: PeftModel, examples: Sequence[TokenizedExample], batch_size: int) -> float:
    """Mean response-token loss (nats) without gradients; NaN for no examples.

    Dropout is switched off layer by layer instead of with ``model.eval()``, which would let
    bitsandbytes repack the weights in the middle of a training.
    """
    if not examples:
        return math.nan
    dropouts = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    chunks = list(_chunks(sorted(examples, key=_length), batch_size))
    total, tokens = 0.0, 0
    for module in dropouts:
        module.eval()
    with torch.no_grad(), _autocast(model):
        for batch in map(collate, _own_share(chunks)):
            total += float(response_loss(model, batch)) * len(batch.targets)
            tokens += len(batch.targets)
    for module in dropouts:
        module.train()
    sums = torch.tensor([total, tokens], dtype=torch.float64, device=next(model.parameters()).device)
    _add_over_processes([sums])
    return float(sums[0] / sums[1])


def balanced_epochs(
    examples: Sequence[TokenizedExample], epochs: int, rng: random.Random
) -> list[list[TokenizedExample]]:
    """As many examples for every epoch, of each response in proportion to the square root of how many have it.

    So rare responses aren't crowded out, and common ones still show most of their prompts. A response with fewer
    examples than `RARE` of the mean over responses has no more draws an example than one with that many: what a source
    model gave once is more often its mistake than a rare skill.

    Systematic sampling over all epochs: an example whose share of the draws is 2.3 is drawn two or three times. With
    independent draws a fifth to a third of the examples would never be seen.
    """
    counts = Counter(tuple(e.response_ids) for e in examples)
    least = RARE * len(examples) / len(counts)
    # Response by response, so that each gets its share exactly.
    ordered = sorted(rng.sample(list(examples), len(examples)), key=lambda e: e.response_ids)
    ends = list(accumulate(max(counts[tuple(e.response_ids)], least) ** -0.5 for e in ordered))
    draws, first = epochs * len(examples), rng.random()
    drawn = [ordered[bisect(ends, (first + i) / draws * ends[-1], hi=len(ends) - 1)] for i in range(draws)]
    return [drawn[epoch::epochs] for epoch in range(epochs)]


def _with_prompt_places(example: TokenizedExample, rng: random.Random) -> TokenizedExample:
    # The first token is predicted by none.
    places = range(1, len(example.prompt_ids))
    return replace(example, prompt_places=sorted(rng.sample(places, min(PROMPT_TOKENS, len(places)))))


def length_bucketed_batches(
    examples: Sequence[TokenizedExample], batch_size: int, rng: random.Random
) -> Iterator[list[TokenizedExample]]:
    """Batches of similar total length, in random order: even step times without a fixed order."""
    order = sorted(examples, key=lambda e: _length(e) + rng.random() * 8)
    batches = list(_chunks(order, batch_size))
    rng.shuffle(batches)
    yield from batches


class _Optimizer:
    """AdamW on the adapter's parameters, with gradient clipping and, in float16, a scaled loss.

    Gradients too small for float16 would be zero; `torch.amp.GradScaler` multiplies the loss before the backward pass,
    divides the gradients after it, and leaves a step out when one has overflowed.
    """

    def __init__(self, model: PeftModel, settings: LoraTraining) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.max_grad_norm = settings.max_grad_norm
        options: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
        self.adamw: torch.optim.Optimizer = (
            bitsandbytes.optim.PagedAdamW8bit(self.parameters, **options)
            if settings.optimizer == "paged_adamw_8bit"
            else torch.optim.AdamW(self.parameters, foreach=True, **options)
        )
        device = next(model.parameters()).device.type
        self.scaler = torch.amp.GradScaler(device, enabled=_base_dtype(model) == torch.float16)

    def step(self) -> None:
        self.scaler.unscale_(self.adamw)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.scaler.step(self.adamw)
        self.scaler.update()
        self.adamw.zero_grad(set_to_none=True)


def _backward(
    model: PeftModel, chosen: list[TokenizedExample], settings: LoraTraining, optimizer: _Optimizer, first: bool
) -> float:
    """Gradients of the mean loss over all counted tokens of ``chosen``, in passes of ``batch_size``; that loss.

    Means of passes with unequal tokens must not be averaged: each pass is weighted by its share of the tokens. The loss
    of the prompts has its part in the gradients and none in what is returned.
    """
    tokens = sum(len(e.counted) for e in chosen)
    prompt_tokens = sum(len(e.prompt_places) for e in chosen)
    loss = torch.zeros((), device=next(model.parameters()).device)
    shares = [share for share in map(_own_share, _chunks(chosen, settings.batch_size)) if share]
    for share in shares:
        batch = collate(share)
        with _autocast(model):
            response, prompt = losses(model, batch)
            part = response * (len(batch.targets) / tokens)
            of_prompts = prompt * (settings.prompt_weight * len(batch.prompt_targets) / max(1, prompt_tokens))
        optimizer.scaler.scale(part + of_prompts).backward()  # type: ignore[no-untyped-call]
        loss += part.detach().to(loss.device)
    if first and shares and any(p.grad is None for p in optimizer.parameters):
        missing = sum(p.grad is None for p in optimizer.parameters)
        raise RuntimeError(
            f"{missing} of {len(optimizer.parameters)} adapter tensors got no gradient: the base model was used for"
            " inference before this training. Load it again for training."
        )
    _add_over_processes([loss, *_gradients(optimizer.parameters)])
    if first and not loss.isfinite():
        raise RuntimeError(
            f"the first loss is {loss.item()}: the base model overflows in {_base_dtype(model)}. Set"
            " models.compute_dtype: float32."
        )
    return loss.item()


def _gradients(parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """One for each parameter: zeros in a process whose share of a step was empty."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def is_first_process() -> bool:
    """Whether this is the first process of its group, or the only one."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _own_share(items: Sequence[T]) -> Sequence[T]:
    """What this process does of ``items``: all of them, or one of as many as the group has processes."""
    if not torch.distributed.is_initialized():
        return items
    return items[torch.distributed.get_rank() :: torch.distributed.get_world_size()]


def _add_over_processes(tensors: list[torch.Tensor]) -> None:
    """Replace each tensor by its sum over the processes of the group, in one exchange."""
    if not torch.distributed.is_initialized():
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    for tensor, added in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(added.view_as(tensor))


def _base_dtype(model: PeftModel) -> torch.dtype | None:
    """Of the frozen weights that aren't 4-bit."""
    return next((p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point()), None)


def _autocast(model: PeftModel) -> Any:
    # Adapter weights are kept in float32 for the optimizer and computed in the base's dtype.
    dtype = _base_dtype(model)
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(next(model.parameters()).device.type, dtype=dtype if half else torch.bfloat16, enabled=half)


def _cosine_with_warmup(step: int, total: int, warmup_ratio: float) -> float:
    warmup = max(1, int(total * warmup_ratio))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _length(example: TokenizedExample) -> int:
    return len(example.prompt_ids) + len(example.response_ids)


def _chunks(items: Sequence[TokenizedExample], size: int) -> Iterator[list[TokenizedExample]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
