"""Distillation end to end: load the target for training, train its LoRA, save it in PEFT format."""

import gc
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from tuneshift_dag.method.distillation import (
    LoraTraining,
    TrainingCurve,
    add_lora,
    tokenize_example,
    train,
)
from tuneshift_dag.resources.model_loading import assert_trainable_layout, load_for_training, load_tokenizer
from tuneshift_dag.resources.model_ref import resolve_model
from tuneshift_dag.transfer import Transfer


def distill(
    transfer: Transfer,
    pairs: list[tuple[str, str]],
    folder: Path,
    on_step: Callable[[int, int, float], None],
) -> TrainingCurve:
    """Train the target on (prompt, response) pairs; ``folder`` appears only when the training is done."""
    config = transfer.config
    files = resolve_model(config.target.base, transfer.folder, "target.base")
    tokenizer = load_tokenizer(files)
    settings = LoraTraining(seed=config.seed, **config.distill.model_dump(exclude={"quantization"}))
    base = load_for_training(files, config.distill.quantization, getattr(torch, config.models.compute_dtype))
    model = add_lora(base, settings)
    assert_trainable_layout(model)
    examples = [tokenize_example(tokenizer, config.prompt_template, p, r) for p, r in pairs]
    curve = train(model, examples, settings, on_step)
    assert_trainable_layout(model)

    model.peft_config["default"].base_model_name_or_path = config.target.base
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    # The embeddings aren't trained; looking for changed ones would need the base's config from a hub.
    model.save_pretrained(partial, save_embedding_layers=False)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    del model, base
    gc.collect()
    return curve
