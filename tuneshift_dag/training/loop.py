"""The training loop: its settings, its optimizer, and a state that it goes on from.

A step may be divided into several forward passes, and each of these among the processes of a group. Every part's loss
is weighted by its tokens, so that the step's gradient is that of all its examples at once."""

import logging
import math
import os
import pickle
import random
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import bitsandbytes
import torch
from peft import PeftModel

from tuneshift_dag import TuneshiftError
from tuneshift_dag.models.memory import is_out_of_memory, release_unused
from tuneshift_dag.training.batches import (
    TokenizedExample,
    balanced_epochs,
    chunks,
    collate,
    length_bucketed_batches,
    mean_loss,
)
from tuneshift_dag.training.processes import add_over_processes, is_first_process, own_share
from tuneshift_dag.training.rehearsal import HeldTo, Rehearsal, divergence
from tuneshift_dag.training.whitening import bake, whiten

_LOG = logging.getLogger("tuneshift_dag")
# Writing a checkpoint takes at most this share of the training's time.
_SHARE = 0.02


@dataclass(frozen=True)
class LoraTraining:
    """Hyper-parameters of one LoRA training; the paper doesn't publish its own values.

    An optimizer step is on ``batch_size`` times ``gradient_accumulation`` examples. ``gradient_checkpointing`` computes
    all but each layer's input again for the backward pass (arXiv 1604.06174). ``retain`` is the
    weight of the rehearsal beside the responses' loss."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    learning_rate: float = 5e-4
    epochs: int = 5
    batch_size: int = 16
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    optimizer: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    balance: Literal["response", "none"] = "none"
    retain: float = 0.0
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    validation_fraction: float = 0.05
    seed: int = 0


@dataclass
class TrainingCurve:
    """What the training reported: one row per step and per epoch, and the response tokens seen over all steps. The
    adapter is that after ``kept_epoch``, the one with the lowest loss on the pairs held back. ``cut`` responses were
    longer than the limit, and ``left_out`` pairs had no room in it."""

    steps: list[dict[str, float]] = field(default_factory=list)
    epochs: list[dict[str, float | None]] = field(default_factory=list)
    kept_epoch: int = 0
    response_tokens: int = 0
    seconds: float = 0.0
    cut: int = 0
    left_out: int = 0


class TrainingCheckpoint:
    """A file with the state of one training, written every ``every`` seconds, or less often when writing takes long.
    Its name alone says which training it is, so it must follow from all examples and settings."""

    def __init__(self, file: Path, every: float = 60) -> None:
        self.file = file
        self.every = every
        self._next = time.monotonic() + every

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last, on the CPU; None when there is none, or none that can be read."""
        if not self.file.exists():
            return None
        try:
            state = dict(torch.load(self.file, map_location="cpu", weights_only=True))
            if missing := {"kept", "draws"} - state.keys():
                raise EOFError(f"an older version wrote it, without {', '.join(sorted(missing))}")
            return state
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            warnings.warn(f"{self.file} can't be read, so the training starts anew: {error}", stacklevel=2)
            return None

    def save(self, state: Callable[[], dict[str, Any]]) -> None:
        """Write ``state()``, when it is time to; a reader sees the old file or the new one."""
        started = time.monotonic()
        if started < self._next:
            return
        partial = self.file.with_name(f"{self.file.name}.partial")
        torch.save(state(), partial)
        os.replace(partial, self.file)
        ended = time.monotonic()
        self._next = ended + max(self.every, (ended - started) / _SHARE)


def train(
    model: PeftModel,
    examples: Sequence[TokenizedExample],
    settings: LoraTraining,
    on_step: Callable[[int, int, float], None] = lambda step, total, loss: None,
    checkpoint: TrainingCheckpoint | None = None,
    texts: Sequence[list[int]] = (),
) -> TrainingCurve:
    """Train the adapter in place with AdamW and a cosine schedule; return the curve. Where a forward pass runs out of
    memory it is halved, and the step done again in more passes.

    In a process group each process must call this with the same arguments; all end with the same adapter and curve.

    Args:
        model: a PEFT model in train mode whose base was loaded for training.
        examples: all pairs; a slice of ``validation_fraction`` is held back for the epoch losses.
        on_step: called after each optimizer step with (step, total steps, loss in nats per token).
        checkpoint: what an earlier call began and a later one goes on with; the result is that of one call, to the bit.
        texts: token ids of what the model wrote itself, for ``settings.retain``.

    Raises:
        RuntimeError: when a trainable parameter gets no gradient in the first step.
        TuneshiftError: when a loss, a gradient or a weight isn't finite, naming the step.
    """
    rng = random.Random(settings.seed)
    shuffled = rng.sample(list(examples), len(examples))
    held_back = int(len(shuffled) * settings.validation_fraction)
    validation, training = shuffled[:held_back], shuffled[held_back:]
    if not training:
        raise ValueError("no training examples")

    pairs_a_step = settings.batch_size * settings.gradient_accumulation
    total = math.ceil(len(training) / pairs_a_step) * settings.epochs
    texts = texts if settings.retain else ()
    known = whiten(model, texts, lambda: _autocast(model)) if texts else []
    optimizer, curve = _Optimizer(model, settings, total), TrainingCurve()
    saved = checkpoint.load() if checkpoint else None
    if saved is not None:
        optimizer.load_state(saved)
        vars(curve).update(saved["curve"])
    started = time.monotonic() - curve.seconds
    step, done = 0, len(curve.steps)
    rehearsal = Rehearsal(texts, total, settings.seed, known) if texts else None
    if rehearsal:
        rehearsal.remember(model, done, lambda: _autocast(model))
    balanced = settings.balance == "response"
    epochs = balanced_epochs(training, settings.epochs, rng) if balanced else [training] * settings.epochs
    for epoch, drawn in enumerate(epochs):
        first = step
        for chosen in length_bucketed_batches(drawn, pairs_a_step, rng):
            step += 1
            if step <= done:
                continue  # it was only drawn, so that the next ones are those of a training in one go
            held = rehearsal.of_step(step - 1, settings.retain) if rehearsal else HeldTo([], 0.0)
            if settings.dropout and torch.distributed.is_initialized():
                # Each process draws for passes of its own, so its state isn't that of the first one.
                torch.manual_seed(settings.seed * total + step + torch.distributed.get_rank() * total**2)
            loss = _backward(model, chosen, held, settings, optimizer, first=step == done + 1)
            _check_finite(loss, "loss", step, model)
            _check_finite(optimizer.step(), "norm of the gradient", step, model)
            _check_finite(optimizer.norm(), _WEIGHTS, step, model)
            next_rate = float(optimizer.schedule.get_last_lr()[0])
            curve.steps.append({"step": step, "loss": loss, "learning_rate": next_rate})
            curve.response_tokens += sum(len(e.response_ids) for e in chosen)
            curve.seconds = time.monotonic() - started
            on_step(step, total, loss)
            if checkpoint and is_first_process():
                checkpoint.save(lambda: {**optimizer.state(), "curve": vars(curve)})
        if len(curve.epochs) <= epoch:
            train_loss = sum(row["loss"] for row in curve.steps[first:step]) / (step - first)
            validation_loss = evaluate_loss(model, validation, settings.batch_size) if validation else None
            if validation_loss is not None:
                _check_finite(validation_loss, "loss on the pairs held back", step, model)
            best = min(
                (found for row in curve.epochs if (found := row["validation_loss"]) is not None), default=math.inf
            )
            curve.epochs.append({"epoch": epoch + 1, "train_loss": train_loss, "validation_loss": validation_loss})
            if validation_loss is None or validation_loss < best:
                curve.kept_epoch = epoch + 1
                optimizer.keep()
    if curve.kept_epoch < len(epochs):
        optimizer.take_kept()
    bake(model)
    curve.seconds = time.monotonic() - started
    return curve


_WEIGHTS = "norm of the adapter's weights"


def evaluate_loss(model: PeftModel, examples: Sequence[TokenizedExample], batch_size: int) -> float:
    """Mean response-token loss (nats) of one example or more, without gradients."""
    # Not `model.eval()`, which would let bitsandbytes repack the weights in the middle of a training.
    dropouts = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    shares = own_share(list(chunks(sorted(examples, key=len), batch_size)))
    total, tokens = 0.0, 0
    for module in dropouts:
        module.eval()
    with torch.no_grad(), _autocast(model):
        for batch in map(collate, shares):
            total += float(mean_loss(model, batch)) * len(batch.targets)
            tokens += len(batch.targets)
    for module in dropouts:
        module.train()
    sums = torch.tensor([total, tokens], dtype=torch.float64, device=next(model.parameters()).device)
    add_over_processes([sums])
    return float(sums[0] / sums[1])


class _Optimizer:
    """AdamW on the adapter's parameters and its schedule, with gradient clipping and, in float16, a scaled loss: else
    small gradients would be zero. `torch.amp.GradScaler` leaves a step out when a gradient has overflowed."""

    def __init__(self, model: PeftModel, settings: LoraTraining, steps: int) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.rows = settings.batch_size
        """The most rows of a forward pass."""
        self.kept: list[torch.Tensor] = []
        self.max_grad_norm = settings.max_grad_norm
        options: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
        self.adamw: torch.optim.Optimizer = (
            bitsandbytes.optim.PagedAdamW8bit(self.parameters, **options)
            if settings.optimizer == "paged_adamw_8bit"
            else torch.optim.AdamW(self.parameters, foreach=True, **options)
        )
        device = next(model.parameters()).device.type
        self.scaler = torch.amp.GradScaler(device, enabled=_base_dtype(model) == torch.float16)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adamw, lambda step: cosine_with_warmup(step, steps, settings.warmup_ratio)
        )
        self._parts: dict[str, Any] = {"optimizer": self.adamw, "scaler": self.scaler, "schedule": self.schedule}

    def step(self) -> float:
        """Norm of the gradient before it was clipped. In float16 0 when it overflows: the step is left out then."""
        self.scaler.unscale_(self.adamw)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm))
        self.scaler.step(self.adamw)
        self.scaler.update()
        self.adamw.zero_grad(set_to_none=True)
        self.schedule.step()
        return norm if math.isfinite(norm) or not self.scaler.is_enabled() else 0.0

    def norm(self) -> float:
        """Norm of all weights of the adapter."""
        return float(torch.nn.utils.get_total_norm(parameter.detach() for parameter in self.parameters))

    def keep(self) -> None:
        """Keep a copy of the adapter as it is now."""
        self.kept = [parameter.detach().cpu().clone() for parameter in self.parameters]

    def take_kept(self) -> None:
        """Make the adapter what it was when it was last kept."""
        self._set(self.kept)

    def state(self) -> dict[str, Any]:
        """What a training needs to go on; its examples and their order follow from its arguments."""
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        device = self.parameters[0].device
        draws = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
        own = {"parameters": [parameter.detach() for parameter in self.parameters], "kept": self.kept, "draws": draws}
        return {**own, **parts}

    def load_state(self, state: dict[str, Any]) -> None:
        self._set(state["parameters"])
        self.kept = state["kept"]
        device = self.parameters[0].device
        if device.type == "cuda":
            torch.cuda.set_rng_state(state["draws"], device)
        else:
            torch.set_rng_state(state["draws"])
        for name, part in self._parts.items():
            part.load_state_dict(state[name])

    def _set(self, weights: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for parameter, weight in zip(self.parameters, weights, strict=True):
                parameter.copy_(weight)


def _backward(
    model: PeftModel,
    chosen: list[TokenizedExample],
    held: HeldTo,
    settings: LoraTraining,
    optimizer: _Optimizer,
    first: bool,
) -> float:
    """Gradients of the mean loss over all tokens that count of ``chosen``, and of how far the model has come from what
    it is ``held`` to; the responses' part of the loss."""
    # Shares of a group are the same whatever a process has memory for.
    own = [share for share in map(own_share, chunks(chosen, settings.batch_size)) if share]
    while True:
        try:
            loss = _gradients(model, chosen, own, held, settings, optimizer)
            break
        except Exception as error:
            if optimizer.rows == 1 or not is_out_of_memory(error):
                raise
        # Outside of the handler: there the traceback still holds the tensors.
        optimizer.adamw.zero_grad(set_to_none=True)
        release_unused()
        optimizer.rows //= 2
        _LOG.warning(f"a training pass ran out of memory: from now on at most {optimizer.rows} rows in each")
    missing = sum(p.grad is None for p in optimizer.parameters)
    if first and own and missing:
        raise RuntimeError(
            f"{missing} of {len(optimizer.parameters)} adapter tensors got no gradient: the base model was used for"
            " inference before this training. Load it again for training."
        )
    for parameter in optimizer.parameters:
        if parameter.grad is None:  # this process's share of the step was empty
            parameter.grad = torch.zeros_like(parameter)
    add_over_processes([loss, *(parameter.grad for parameter in optimizer.parameters)])
    return loss.item()


def _gradients(
    model: PeftModel,
    chosen: list[TokenizedExample],
    own: Sequence[Sequence[TokenizedExample]],
    held: HeldTo,
    settings: LoraTraining,
    optimizer: _Optimizer,
) -> torch.Tensor:
    """This process's part of the gradients and of the loss, in passes of at most ``optimizer.rows``. Passes have
    unequal tokens, so each is weighted by its share of all."""
    tokens = sum(len(e.response_ids) for e in chosen)
    loss = torch.zeros((), device=next(model.parameters()).device)
    for batch in (collate(part) for share in own for part in chunks(share, optimizer.rows)):
        with _autocast(model):
            part = mean_loss(model, batch) * (len(batch.targets) / tokens)
        optimizer.scaler.scale(part).backward()  # type: ignore[no-untyped-call]
        loss += part.detach().to(loss.device)
    for texts in chunks(held.texts, optimizer.rows):
        with _autocast(model):
            apart = divergence(model, texts) * held.weight
        optimizer.scaler.scale(apart).backward()  # type: ignore[no-untyped-call]
    return loss


def _check_finite(value: float, what: str, step: int, model: PeftModel) -> None:
    if not math.isfinite(value):
        dtype, why = _base_dtype(model), "It has diverged: lower distill.learning_rate."
        if step == 1 and dtype != torch.float32 and what != _WEIGHTS:
            why = f"The base model overflows in {dtype}: set models.compute_dtype: float32."
        raise TuneshiftError(
            f"the training stopped: at step {step} the {what} is {value}, so nothing of it was saved. {why}"
        )


def _base_dtype(model: PeftModel) -> torch.dtype | None:
    """Of the frozen weights that aren't 4-bit."""
    return next((p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point()), None)


def _autocast(model: PeftModel) -> Any:
    # Adapter weights are kept in float32 for the optimizer and computed in the base's dtype.
    dtype = _base_dtype(model)
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(next(model.parameters()).device.type, dtype=dtype if half else torch.bfloat16, enabled=half)


def cosine_with_warmup(step: int, total: int, warmup_ratio: float) -> float:
    warmup = max(1, int(total * warmup_ratio))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
