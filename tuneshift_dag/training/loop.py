"""The training loop: a LoRA on (prompt, response) pairs, its settings, its optimizer, and a state that it goes on from.

A step may be divided into several forward passes, and each of these among the processes of a group. Every part's loss
is weighted by its tokens, so that the step's gradient is that of all its examples at once."""

import math
import os
import pickle
import random
import time
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import bitsandbytes
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from peft.tuners.lora.bnb import Linear4bit
from torch.autograd.function import once_differentiable

from tuneshift_dag import TuneshiftError
from tuneshift_dag.models.capabilities import linear_layers
from tuneshift_dag.models.loading import is_plain
from tuneshift_dag.training.batches import (
    TokenizedExample,
    balanced_epochs,
    chunks,
    collate,
    length_bucketed_batches,
    losses,
    with_prompt_places,
)
from tuneshift_dag.training.processes import add_over_processes, is_first_process, own_share

# Writing a checkpoint takes at most this share of the training's time.
_SHARE = 0.02


@dataclass(frozen=True)
class LoraTraining:
    """Hyper-parameters of one LoRA training; the paper doesn't publish its own values.

    An optimizer step is on ``batch_size`` times ``gradient_accumulation`` examples. ``gradient_checkpointing`` computes
    all but each layer's input again for the backward pass (arXiv 1604.06174). ``prompt_weight`` is that of the prompts'
    tokens beside the responses'."""

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
    prompt_weight: float = 0.0
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    validation_fraction: float = 0.05
    seed: int = 0


@dataclass
class TrainingCurve:
    """What the training reported: one row per step and per epoch, and the response tokens seen over all steps."""

    steps: list[dict[str, float]] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)
    response_tokens: int = 0
    seconds: float = 0.0


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
            return dict(torch.load(self.file, map_location="cpu", weights_only=True))
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


def add_lora(model: Any, settings: LoraTraining) -> PeftModel:
    """A fresh LoRA on every linear layer of the language model that takes one, in float32, reproducible from the
    seed."""
    torch.manual_seed(settings.seed)
    if settings.gradient_checkpointing:
        with warnings.catch_warnings():
            # It was renamed in a later transformers than the oldest that is supported.
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": False})
    sizes = {"r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout}
    # The output head is no part of PEFT's "all-linear".
    head = model.get_output_embeddings()
    left_out = [name for name in linear_layers(model)[1] if model.get_submodule(name) is not head] or None
    chosen = LoraConfig(target_modules="all-linear", exclude_modules=left_out, task_type="CAUSAL_LM", **sizes)
    adapted = get_peft_model(model, chosen)
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
        checkpoint: what an earlier call began and a later one goes on with; the result is that of one call, but for the
            draws of dropout.

    Raises:
        RuntimeError: when a trainable parameter gets no gradient in the first step.
        TuneshiftError: when a loss or gradient isn't finite, naming the step.
    """
    rng, prompt_rng = random.Random(settings.seed), random.Random(settings.seed)
    shuffled = rng.sample(list(examples), len(examples))
    held_back = int(len(shuffled) * settings.validation_fraction)
    validation, training = shuffled[:held_back], shuffled[held_back:]
    if not training:
        raise ValueError("no training examples")

    pairs_a_step = settings.batch_size * settings.gradient_accumulation
    total = math.ceil(len(training) / pairs_a_step) * settings.epochs
    optimizer, curve = _Optimizer(model, settings, total), TrainingCurve()
    saved = checkpoint.load() if checkpoint else None
    if saved is not None:
        optimizer.load_state(saved)
        vars(curve).update(saved["curve"])
    started = time.monotonic() - curve.seconds
    step, done = 0, len(curve.steps)
    balanced = settings.balance == "response"
    epochs = balanced_epochs(training, settings.epochs, rng) if balanced else [training] * settings.epochs
    for epoch, drawn in enumerate(epochs):
        first = step
        for chosen in length_bucketed_batches(drawn, pairs_a_step, rng):
            if settings.prompt_weight:
                # Before the step is divided, so that the division changes nothing.
                chosen = [with_prompt_places(example, prompt_rng) for example in chosen]
            step += 1
            if step <= done:
                continue  # it was only drawn, so that the next ones are those of a training in one go
            loss = _backward(model, chosen, settings, optimizer, first=step == done + 1)
            if not math.isfinite(loss):
                raise TuneshiftError(_diverged(f"loss is {loss}", step, model))
            norm = optimizer.step()
            if not math.isfinite(norm):
                raise TuneshiftError(_diverged(f"norm of the gradient is {norm}", step, model))
            next_rate = float(optimizer.schedule.get_last_lr()[0])
            curve.steps.append({"step": step, "loss": loss, "learning_rate": next_rate})
            curve.response_tokens += sum(len(e.response_ids) for e in chosen)
            curve.seconds = time.monotonic() - started
            on_step(step, total, loss)
            if checkpoint and is_first_process():
                checkpoint.save(lambda: {**optimizer.state(), "curve": vars(curve)})
        if len(curve.epochs) <= epoch:
            train_loss = sum(row["loss"] for row in curve.steps[first:step]) / (step - first)
            validation_loss = evaluate_loss(model, validation, settings.batch_size)
            curve.epochs.append({"epoch": epoch + 1, "train_loss": train_loss, "validation_loss": validation_loss})
    curve.seconds = time.monotonic() - started
    return curve


def evaluate_loss(model: PeftModel, examples: Sequence[TokenizedExample], batch_size: int) -> float:
    """Mean response-token loss (nats) without gradients; NaN for no examples."""
    if not examples:
        return math.nan
    # Not `model.eval()`, which would let bitsandbytes repack the weights in the middle of a training.
    dropouts = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    shares = own_share(list(chunks(sorted(examples, key=len), batch_size)))
    total, tokens = 0.0, 0
    for module in dropouts:
        module.eval()
    with torch.no_grad(), _autocast(model):
        for batch in map(collate, shares):
            total += float(losses(model, batch)[0]) * batch.response_tokens
            tokens += batch.response_tokens
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

    def state(self) -> dict[str, Any]:
        """What a training needs to go on; its examples and their order follow from its arguments."""
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        return {"parameters": [parameter.detach() for parameter in self.parameters], **parts}

    def load_state(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        for name, part in self._parts.items():
            part.load_state_dict(state[name])


def _backward(
    model: PeftModel, chosen: list[TokenizedExample], settings: LoraTraining, optimizer: _Optimizer, first: bool
) -> float:
    """Gradients of the mean loss over all tokens that count of ``chosen``, in passes of ``batch_size``; the responses'
    part of that loss. Passes have unequal tokens, so each is weighted by its share of them."""
    tokens = sum(len(e.response_ids) for e in chosen)
    prompt_tokens = sum(len(e.prompt_places) for e in chosen)
    loss = torch.zeros((), device=next(model.parameters()).device)
    shares = [share for share in map(own_share, chunks(chosen, settings.batch_size)) if share]
    for share in shares:
        batch = collate(share)
        with _autocast(model):
            response, prompt = losses(model, batch)
            part = response * (batch.response_tokens / tokens)
            of_prompts = prompt * (settings.prompt_weight * batch.prompt_tokens / max(1, prompt_tokens))
        optimizer.scaler.scale(part + of_prompts).backward()  # type: ignore[no-untyped-call]
        loss += part.detach().to(loss.device)
    missing = sum(p.grad is None for p in optimizer.parameters)
    if first and shares and missing:
        raise RuntimeError(
            f"{missing} of {len(optimizer.parameters)} adapter tensors got no gradient: the base model was used for"
            " inference before this training. Load it again for training."
        )
    for parameter in optimizer.parameters:
        if parameter.grad is None:  # this process's share of the step was empty
            parameter.grad = torch.zeros_like(parameter)
    add_over_processes([loss, *(parameter.grad for parameter in optimizer.parameters)])
    return loss.item()


def _diverged(what: str, step: int, model: PeftModel) -> str:
    return (
        f"the training stopped: at step {step} the {what}, so nothing of it was saved. At the first step the base model"
        f" overflows in {_base_dtype(model)}: set models.compute_dtype: float32. Later it has diverged: lower"
        " distill.learning_rate."
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
