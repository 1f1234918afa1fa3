"""Training end to end: load a base for training, train its LoRA, save it in PEFT format."""

import gc
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tuneshift_dag.config.transfer import Transfer
from tuneshift_dag.models.loading import (
    DeviceMap,
    Quantization,
    assert_trainable_layout,
    dtype_name,
    load_for_training,
    load_tokenizer,
)
from tuneshift_dag.models.references import ModelFiles, resolve_model
from tuneshift_dag.training.checkpoint import TrainingCheckpoint
from tuneshift_dag.training.loop import (
    LoraTraining,
    TokenizedExample,
    TrainingCurve,
    add_lora,
    is_first_process,
    tokenize_example,
    train,
)
from tuneshift_dag.training.processes import in_processes


def distill(
    transfer: Transfer,
    pairs: list[tuple[str, str]],
    folder: Path,
    on_step: Callable[[int, int, float], None],
) -> TrainingCurve:
    """Train the target on (prompt, response) pairs; ``folder`` appears only when the training is done.

    One that was ended before goes on where it was, at most a minute back, or 50 times what it takes to write its state.
    """
    config = transfer.config
    files = resolve_model(config.target.base, transfer.folder, "target.base")
    tokenizer = load_tokenizer(files)
    loading = {"quantization", "processes"}
    settings = LoraTraining(seed=config.seed, **config.distill.model_dump(exclude=loading))
    examples = [tokenize_example(tokenizer, config.prompt_template, p, r) for p, r in pairs]
    count = config.distill.processes
    job = _Job(
        files,
        config.target.base,
        config.distill.quantization,
        dtype_name(config.models.compute_dtype),
        config.models.device_map if count == 1 else "single",
        settings,
        examples,
        _checkpoint(folder, files),
    )
    return _train_into(folder, job, count, on_step)


def _checkpoint(folder: Path, base: ModelFiles) -> Path:
    return folder.with_name(f".{folder.name}-{base.fingerprint[:8]}.checkpoint")


def _train_into(folder: Path, job: "_Job", count: int, on_step: Callable[[int, int, float], None]) -> TrainingCurve:
    """Train in ``count`` processes; the adapter is complete before ``folder`` is there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as staging:
        partial = Path(staging) / "adapter"
        if count == 1:
            curve = _run(on_step, job, partial)
        else:
            # What released models leave to this process would be missing on the first GPU.
            gc.collect()
            torch.cuda.empty_cache()
            curve = in_processes(count, _run_in_group, job, partial, on_message=lambda message: on_step(*message))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    TrainingCheckpoint(job.checkpoint).remove()
    return curve


@dataclass(frozen=True)
class _Job:
    """All that a process needs to train."""

    files: ModelFiles
    reference: str
    quantization: Quantization
    dtype: str
    device_map: DeviceMap
    settings: LoraTraining
    examples: list[TokenizedExample]
    checkpoint: Path


def _run_in_group(send: Callable[[Any], None], job: _Job, folder: Path) -> TrainingCurve:
    return _run(lambda *progress: send(progress), job, folder)


def _run(on_step: Callable[[int, int, float], None], job: _Job, folder: Path) -> TrainingCurve:
    """Train, and save the adapter to ``folder``; in a group its first process does."""
    base = load_for_training(job.files, job.quantization, getattr(torch, job.dtype), job.device_map)
    model = add_lora(base, job.settings)
    assert_trainable_layout(model)
    curve = train(model, job.examples, job.settings, on_step, TrainingCheckpoint(job.checkpoint))
    assert_trainable_layout(model)
    model.peft_config["default"].base_model_name_or_path = job.reference
    if is_first_process():
        # The embeddings aren't trained; looking for changed ones would need the base's config from a hub.
        model.save_pretrained(folder, save_embedding_layers=False)
    del model, base
    gc.collect()
    return curve
