"""Training throughput and loss against TRL's `SFTTrainer` on the target model."""

import math
import random
import tempfile
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import TRANSFER, ratio, spread, target_files
from tuneshift_dag.models.loading import load_for_training, load_tokenizer
from tuneshift_dag.training.batches import (
    TokenizedExample,
    collate,
    length_bucketed_batches,
    mean_loss,
    tokenize_example,
)
from tuneshift_dag.training.loop import LoraTraining, cosine_with_warmup, evaluate_loss, train
from tuneshift_dag.training.lora import add_lora

PAIRS, BATCH, REPETITIONS = 48, 16, 5
SETTINGS = LoraTraining(batch_size=BATCH, epochs=2, validation_fraction=0.0, warmup_ratio=0.05)


def _pairs() -> list[tuple[str, str]]:
    return [(query, f" {intent}") for query, intent in TRANSFER.heldout[:PAIRS]]


def training_vs_trl() -> dict[str, Any]:
    """Response tokens per second and final loss, same data, LoRA, dtype, batch size and schedule."""
    tokenizer = load_tokenizer(target_files())
    examples = [tokenize_example(tokenizer, TRANSFER.config.target_format, p, r) for p, r in _pairs()]
    tokens = sum(len(e.response_ids) for e in examples) * SETTINGS.epochs
    runs = {
        "ours": lambda: _ours(examples),
        "trl_default": lambda: _trl(checkpointing=True, group_by_length=False),
        "trl_tuned": lambda: _trl(checkpointing=False, group_by_length=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    losses: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPETITIONS):
        for name, run in runs.items():
            took, loss = run()
            seconds[name].append(took)
            losses[name].append(loss)
    return {
        **ratio(seconds["trl_default"], seconds["ours"]),
        "over_trl_tuned": ratio(seconds["trl_tuned"], seconds["ours"]),
        "response_tokens_per_second": {n: spread([tokens / s for s in v]) for n, v in seconds.items()},
        "last_epoch_loss": {name: spread(values) for name, values in losses.items()},
        "final_loss": final_losses(examples),
        "gradient_cosine": gradient_cosine(examples[:BATCH]),
    }


def _ours(examples: list[TokenizedExample]) -> tuple[float, float]:
    model = add_lora(load_for_training(target_files(), "none", torch.bfloat16), SETTINGS)
    started = time.perf_counter()
    curve = train(model, examples, SETTINGS)
    return time.perf_counter() - started, curve.epochs[-1]["train_loss"]


def _trl(checkpointing: bool, group_by_length: bool) -> tuple[float, float]:
    from peft import LoraConfig

    files = target_files()
    warmup = max(1, int(math.ceil(PAIRS / BATCH) * SETTINGS.epochs * SETTINGS.warmup_ratio))
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(
            AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.bfloat16),
            _pairs(),
            folder,
            num_train_epochs=SETTINGS.epochs,
            warmup_steps=warmup,
            gradient_checkpointing=checkpointing,
            train_sampling_strategy="group_by_length" if group_by_length else "random",
            peft_config=LoraConfig(
                r=SETTINGS.rank, lora_alpha=SETTINGS.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )
        started = time.perf_counter()
        trainer.train()
        took = time.perf_counter() - started
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    per_epoch = math.ceil(PAIRS / BATCH)
    return took, sum(losses[-per_epoch:]) / per_epoch


def _trainer(
    model: Any,
    pairs: list[tuple[str, str]],
    folder: str,
    peft_config: Any = None,
    optimizers: Any = (None, None),
    **own: Any,
) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    template = TRANSFER.config.prompt_template
    rows = [{"prompt": template.replace("{prompt}", p), "completion": r} for p, r in pairs]
    config = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        learning_rate=SETTINGS.learning_rate,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        completion_only_loss=True,
        bf16=True,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=SETTINGS.seed,
        **own,
    )
    return SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(target_files().path),
        peft_config=peft_config,
        optimizers=optimizers,
    )


def final_losses(examples: list[TokenizedExample]) -> dict[str, float]:
    """Loss over all pairs after training by each: same first weights, batches in the same order, same schedule.

    Six steps with another order or warm-up end tenths of a nat apart, which says nothing about either.
    """
    losses = {}
    rng = random.Random(SETTINGS.seed)
    shuffled = rng.sample(examples, len(examples))
    batches = [b for _ in range(SETTINGS.epochs) for b in length_bucketed_batches(shuffled, BATCH, rng)]
    pair_of = {tuple(e.prompt_ids): pair for e, pair in zip(examples, _pairs(), strict=True)}
    for name in ("ours", "trl"):
        model = add_lora(load_for_training(target_files(), "none", torch.bfloat16), SETTINGS)
        if name == "ours":
            train(model, examples, SETTINGS)
        else:
            optimizer = torch.optim.AdamW(
                [p for p in model.parameters() if p.requires_grad], lr=SETTINGS.learning_rate, weight_decay=0.0
            )
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: cosine_with_warmup(step, len(batches), SETTINGS.warmup_ratio)
            )
            in_order = [pair_of[tuple(e.prompt_ids)] for batch in batches for e in batch]
            with tempfile.TemporaryDirectory() as folder:
                _trainer(
                    model,
                    in_order,
                    folder,
                    optimizers=(optimizer, schedule),
                    num_train_epochs=1,
                    gradient_checkpointing=False,
                    train_sampling_strategy="sequential",
                ).train()
        losses[name] = evaluate_loss(model, examples, BATCH)
    return losses


def gradient_cosine(examples: list[TokenizedExample]) -> float:
    """Cosine of our batched gradient with that of one unpadded example at a time."""
    gradients = []
    for batched in (True, False):
        model = add_lora(load_for_training(target_files(), "none", torch.float32), SETTINGS)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at the start, which would leave no gradient for A
                torch.nn.init.normal_(parameter, std=0.01, generator=torch.Generator().manual_seed(len(name)))
        if batched:
            mean_loss(model, collate(examples)).backward()
        else:
            total = sum(len(e.response_ids) for e in examples)
            for example in examples:
                (mean_loss(model, collate([example])) * len(example.response_ids) / total).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    return float(torch.cosine_similarity(*gradients, dim=0))
