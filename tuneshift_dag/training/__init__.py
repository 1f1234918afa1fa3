"""LoRA training end to end: load a base, train its LoRA, save it in PEFT format. Importing this imports no torch."""

import gc
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tuneshift_dag import TuneshiftError
from tuneshift_dag.models.memory import gpu_count

if TYPE_CHECKING:
    from tuneshift_dag.config import Transfer
    from tuneshift_dag.config.schema import TransferConfig
    from tuneshift_dag.models.references import ModelFiles
    from tuneshift_dag.training.batches import TokenizedExample
    from tuneshift_dag.training.loop import TrainingCurve

_LOG = logging.getLogger("tuneshift_dag")
OnStep = Callable[[int, int, float], None]
"""Called after each optimizer step with (step, total steps, loss in nats per token)."""


def training_problem(transfer: "Transfer", gpus: int | None = None) -> str | None:
    """What ``distill`` asks for that isn't here, with its repair; None when all is. ``gpus`` None: PyTorch is asked."""
    file, distill = transfer.folder / "transfer.yaml", transfer.config.distill
    gpus = gpu_count() if gpus is None else gpus
    if distill.optimizer == "paged_adamw_8bit" and not gpus:
        return (
            f"{file}: distill.optimizer: 'paged_adamw_8bit' needs CUDA, and PyTorch sees no GPU here. Set it to adamw,"
            " or train on a machine with a GPU."
        )
    if gpus and distill.processes > gpus:
        return (
            f"{file}: distill.processes: {distill.processes} processes need a GPU each, and PyTorch sees {gpus}. Set it"
            f" to {gpus} or less."
        )
    return None


def check_training(transfer: "Transfer") -> None:
    """Raise TuneshiftError with `training_problem`, if there is one."""
    if problem := training_problem(transfer):
        raise TuneshiftError(problem)


def distill(
    transfer: "Transfer",
    pairs: list[tuple[str, str]],
    texts: list[list[int]] | None,
    folder: Path,
    on_step: OnStep,
) -> "TrainingCurve":
    """Train the target on (prompt, response) pairs; ``folder`` appears only when the training is done. One that was
    ended before goes on where it was, at most a minute back, or 50 times what it takes to write its state.

    ``texts`` are token ids of what the target wrote itself, which ``distill.retain`` holds it to; None takes the
    prompts in their place, for a trial."""
    import torch

    from tuneshift_dag.models.loading import load_tokenizer
    from tuneshift_dag.models.references import resolve_model
    from tuneshift_dag.training.batches import cut_to, tokenize_example
    from tuneshift_dag.training.processes import in_processes

    config, count = transfer.config, transfer.config.distill.processes
    if not gpu_count():
        count = max(count, config.models.workers or 1)
    files = resolve_model(transfer.reference("target.base"), transfer.folder, "target.base")
    tokenizer = load_tokenizer(files)
    whole = [tokenize_example(tokenizer, config.target_format, p, r) for p, r in pairs]
    fitting = [cut_to(example, config.distill.max_length) for example in whole]
    examples = [example for example in fitting if example is not None]
    cut = sum(len(after) < len(before) for before, after in zip(whole, fitting, strict=True) if after is not None)
    left_out = len(whole) - len(examples)
    if cut or left_out:
        limit = f"distill.max_length {config.distill.max_length}"
        _LOG.warning(f"{cut} of {len(whole)} responses are cut to {limit} tokens, {left_out} pairs have no room in it")
    if not examples:
        raise TuneshiftError(
            f"{transfer.folder / 'transfer.yaml'}: distill.max_length: {config.distill.max_length} tokens have no room"
            f" for any of {len(whole)} prompts and its response. Raise it."
        )
    if texts is None:
        texts = [example.prompt_ids for example in examples]
    checkpoint = checkpoint_file(folder, files.fingerprint)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as staging:
        partial = Path(staging) / "adapter"
        if count == 1:
            curve = _train_into(on_step, partial, config, files, examples, texts, checkpoint)
        else:
            # What released models leave to this process would be missing on the first GPU.
            gc.collect()
            torch.cuda.empty_cache()
            inputs = (partial, config, files, examples, texts, checkpoint)
            curve = in_processes(count, _train_into, *inputs, on_message=on_step)
        # The database is on the disk as soon as it names this adapter, and then the adapter must be, too.
        _sync(*partial.iterdir(), partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        _sync(folder.parent)
    checkpoint.unlink(missing_ok=True)
    curve.cut, curve.left_out = cut, left_out
    return curve


def _sync(*paths: Path) -> None:
    """Wait until files, or the names in folders, are on the disk."""
    for path in paths:
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def checkpoint_file(folder: Path, fingerprint: str) -> Path:
    """Beside ``folder``, named by the whole fingerprint of the base: that of a hub model begins with its account."""
    name = hashlib.sha256(fingerprint.encode()).hexdigest()[:16]
    return folder.with_name(f".{folder.name}-{name}.checkpoint")


def _train_into(
    on_step: OnStep,
    folder: Path,
    config: "TransferConfig",
    files: "ModelFiles",
    examples: "list[TokenizedExample]",
    texts: list[list[int]],
    checkpoint: Path,
) -> "TrainingCurve":
    """Train, and save the adapter to ``folder``; in a group its first process does."""
    import torch

    from tuneshift_dag.models.capabilities import check_finite
    from tuneshift_dag.models.loading import assert_trainable_layout, dtype_name, load_for_training
    from tuneshift_dag.training.loop import LoraTraining, TrainingCheckpoint, train
    from tuneshift_dag.training.lora import add_lora
    from tuneshift_dag.training.processes import is_first_process

    asked = config.distill.model_dump(exclude={"quantization", "processes", "retain", "keep"})
    settings = LoraTraining(seed=config.seed, retain=config.distill.retain.weight, **asked)
    dtype = getattr(torch, dtype_name(config.models.compute_dtype))
    device_map = "single" if torch.distributed.is_initialized() else config.models.device_map
    model = load_for_training(files, config.distill.quantization, dtype, device_map)
    check_finite(model, files.reference)
    model = add_lora(model, settings)
    assert_trainable_layout(model)
    curve = train(model, examples, settings, on_step, TrainingCheckpoint(checkpoint), texts)
    assert_trainable_layout(model)
    model.peft_config["default"].base_model_name_or_path = config.target.base
    if is_first_process():
        # The embeddings aren't trained; looking for changed ones would need the base's config from a hub.
        model.save_pretrained(folder, save_embedding_layers=False)
    del model
    gc.collect()
    return curve
