"""LoRA training on (prompt, response) pairs, with the loss on the response tokens only, or on some of them.

A batch holds examples of similar length, padded on the right. Under a causal mask no real token sees
the padding after it, so no attention mask is needed and the fast causal kernel applies. Logits are
computed only at positions that predict a response token: for a model with a small body and a large
vocabulary (Gemma 3 270M: 262k) the rest would be most of the work.
"""

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class TokenizedExample:
    """Prompt and response as token ids; the response ends with the end-of-sequence token.

    ``mask`` says of each response token whether it counts in the loss; None: all do.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    mask: list[bool] | None = None

    @property
    def counted(self) -> list[int]:
        """Places in the response of the tokens that count in the loss."""
        mask = self.mask or [True] * len(self.response_ids)
        return [place for place, counts in enumerate(mask) if counts]


@dataclass(frozen=True)
class LoraTraining:
    """Hyper-parameters of one LoRA training. The paper doesn't publish its own values."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    learning_rate: float = 5e-4
    epochs: int = 5
    batch_size: int = 16
    balance: Literal["response", "none"] = "none"
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
    """Right-padded examples. Shapes: ids (B, L); predicts (R,); targets (R,).

    ``predicts[i]`` is the position, in the flattened ids, whose logits predict ``targets[i]``.
    """

    ids: torch.Tensor
    predicts: torch.Tensor
    targets: torch.Tensor


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
    for i, example in enumerate(examples):
        # The logits at position t predict token t + 1: the last prompt token predicts the first response token.
        first = i * length + len(example.prompt_ids) - 1
        predicts.extend(first + place for place in example.counted)
        targets.extend(example.response_ids[place] for place in example.counted)
    padded = [row + [0] * (length - len(row)) for row in rows]
    return Batch(torch.tensor(padded), torch.tensor(predicts), torch.tensor(targets))


def response_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Mean negative log-likelihood per response token that counts (nats), over all examples of the batch."""
    device = next(model.parameters()).device
    with head_only_at(model, batch.predicts.to(device)):
        logits = model(input_ids=batch.ids.to(device), use_cache=False).logits[0]
    return cross_entropy(logits.float(), batch.targets.to(device))


@contextmanager
def head_only_at(model: Any, positions: torch.Tensor) -> Iterator[None]:
    """Let the model's head see only ``positions`` of the flattened (batch × length) hidden states.

    Inside the block the model's logits have shape (1, len(positions), vocabulary).
    """

    def select(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return inputs[0].flatten(0, 1)[positions].unsqueeze(0)

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def add_lora(model: Any, settings: LoraTraining) -> PeftModel:
    """A fresh LoRA on every linear layer of the body, in float32, reproducible from the seed."""
    torch.manual_seed(settings.seed)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def train(
    model: PeftModel,
    examples: Sequence[TokenizedExample],
    settings: LoraTraining,
    on_step: Callable[[int, int, float], None] = lambda step, total, loss: None,
) -> TrainingCurve:
    """Train the adapter in place with AdamW and a cosine schedule; return the curve.

    Args:
        model: a PEFT model in train mode whose base was loaded for training.
        examples: all pairs; a slice of ``validation_fraction`` is held back for the epoch losses.
        on_step: called after each optimizer step with (step, total steps, loss in nats per token).

    Raises:
        RuntimeError: when a trainable parameter gets no gradient in the first step.
    """
    rng = random.Random(settings.seed)
    shuffled = rng.sample(list(examples), len(examples))
    held_back = int(len(shuffled) * settings.validation_fraction)
    validation, training = shuffled[:held_back], shuffled[held_back:]
    if not training:
        raise ValueError("no training examples")

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, foreach=True
    )
    total = math.ceil(len(training) / settings.batch_size) * settings.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _cosine_with_warmup(step, total, settings.warmup_ratio)
    )
    all_tokens = sum(len(e.response_ids) for e in shuffled)
    curve = TrainingCurve(token_share=sum(len(e.counted) for e in shuffled) / all_tokens)
    started = time.monotonic()
    step = 0
    for epoch in range(settings.epochs):
        losses: list[float] = []
        drawn = balanced_epoch(training, rng) if settings.balance == "response" else training
        for chosen in length_bucketed_batches(drawn, settings.batch_size, rng):
            loss = _step(model, collate(chosen), parameters, optimizer, settings, first=step == 0)
            schedule.step()
            step += 1
            losses.append(loss)
            curve.steps.append({"step": step, "loss": loss, "learning_rate": float(schedule.get_last_lr()[0])})
            curve.response_tokens += sum(len(e.counted) for e in chosen)
            on_step(step, total, loss)
        curve.epochs.append(
            {
                "epoch": epoch + 1,
                "train_loss": sum(losses) / len(losses),
                "validation_loss": evaluate_loss(model, validation, settings.batch_size),
            }
        )
    curve.seconds = time.monotonic() - started
    return curve


def evaluate_loss(model: PeftModel, examples: Sequence[TokenizedExample], batch_size: int) -> float:
    """Mean response-token loss (nats) without gradients; NaN for no examples.

    Dropout is switched off layer by layer instead of with ``model.eval()``, which would let
    bitsandbytes repack the weights in the middle of a training.
    """
    if not examples:
        return math.nan
    dropouts = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    total, tokens = 0.0, 0
    for module in dropouts:
        module.eval()
    with torch.no_grad(), _autocast(model):
        for batch in map(collate, _chunks(sorted(examples, key=_length), batch_size)):
            total += float(response_loss(model, batch)) * len(batch.targets)
            tokens += len(batch.targets)
    for module in dropouts:
        module.train()
    return total / tokens


def balanced_epoch(examples: Sequence[TokenizedExample], rng: random.Random) -> list[TokenizedExample]:
    """As many examples, drawn with replacement, weighted by 1 / sqrt(examples with the same response)."""
    counts = Counter(tuple(e.response_ids) for e in examples)
    weights = [counts[tuple(e.response_ids)] ** -0.5 for e in examples]
    return rng.choices(examples, weights, k=len(examples))


def length_bucketed_batches(
    examples: Sequence[TokenizedExample], batch_size: int, rng: random.Random
) -> Iterator[list[TokenizedExample]]:
    """Batches of similar total length, in random order: even step times without a fixed order."""
    order = sorted(examples, key=lambda e: _length(e) + rng.random() * 8)
    batches = list(_chunks(order, batch_size))
    rng.shuffle(batches)
    yield from batches


def _step(
    model: PeftModel,
    batch: Batch,
    parameters: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    settings: LoraTraining,
    first: bool,
) -> float:
    with _autocast(model):
        loss = response_loss(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    if first and any(p.grad is None for p in parameters):
        missing = sum(p.grad is None for p in parameters)
        raise RuntimeError(
            f"{missing} of {len(parameters)} adapter tensors got no gradient: the base model was used for"
            " inference before this training. Load it again for training."
        )
    torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def _autocast(model: PeftModel) -> Any:
    # Adapter weights are kept in float32 for the optimizer and computed in the base's dtype.
    base = next((p for p in model.parameters() if not p.requires_grad and p.is_floating_point()), None)
    half = base is not None and base.dtype == torch.bfloat16
    return torch.autocast(next(model.parameters()).device.type, dtype=torch.bfloat16, enabled=half)


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
