"""Distillation end to end: load the target for training, train its LoRA, save it in PEFT format."""

import gc
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tuneshift_dag.errors import TuneshiftError
from tuneshift_dag.method.distillation import (
    LoraTraining,
    TokenizedExample,
    TrainingCurve,
    add_lora,
    tokenize_example,
    train,
)
from tuneshift_dag.method.token_selection import ScoredTokens, TokenBytes, select_tokens
from tuneshift_dag.resources.model_loading import assert_trainable_layout, load_for_training, load_tokenizer
from tuneshift_dag.resources.model_ref import resolve_model, resolve_tokenizer
from tuneshift_dag.transfer import Transfer


def distill(
    transfer: Transfer,
    pairs: list[tuple[str, str]],
    folder: Path,
    on_step: Callable[[int, int, float], None],
    excess: list[ScoredTokens] | None = None,
) -> TrainingCurve:
    """Train the target on (prompt, response) pairs; ``folder`` appears only when the training is done.

    Args:
        excess: for ``distill.token_mask``, the scored source tokens of each response.

    Raises:
        TuneshiftError: when ``excess`` can't be carried over to the target's tokens.
    """
    config = transfer.config
    files = resolve_model(config.target.base, transfer.folder, "target.base")
    tokenizer = load_tokenizer(files)
    settings = LoraTraining(seed=config.seed, **config.distill.model_dump(exclude={"quantization", "token_mask"}))
    examples = [tokenize_example(tokenizer, config.prompt_template, p, r) for p, r in pairs]
    if excess is not None:
        examples = _masked(transfer, tokenizer, examples, excess)
    base = load_for_training(files, config.distill.quantization, getattr(torch, config.models.compute_dtype))
    model = add_lora(base, settings)
    assert_trainable_layout(model)
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


def _masked(
    transfer: Transfer, tokenizer: Any, examples: list[TokenizedExample], excess: list[ScoredTokens]
) -> list[TokenizedExample]:
    """The examples with the tokens that ``distill.token_mask`` selects, and the end token.

    The end token is always trained on: it has no bytes by which the source's could be found, and a model that wasn't
    taught to stop answers nothing exactly. A response that the tokens don't spell is trained on as a whole.
    """
    config = transfer.config
    share = config.distill.token_mask
    assert share is not None
    source = load_tokenizer(resolve_tokenizer(config.source.base, transfer.folder, "source.base"))
    source_bytes, target_bytes = TokenBytes(source), TokenBytes(tokenizer)
    masks = [
        select_tokens(source_bytes(scored.ids), scored.excess, target_bytes(example.response_ids[:-1]), share)
        for example, scored in zip(examples, excess, strict=True)
    ]
    if all(mask is None for mask in masks):
        raise TuneshiftError(
            f"{transfer.folder / 'transfer.yaml'}: distill.token_mask {share:g}: the tokens of {config.source.base!r}"
            f" and of {config.target.base!r} don't spell the same text, so nothing can be selected. Remove token_mask."
        )
    return [
        example if mask is None else replace(example, mask=[*mask, True])
        for example, mask in zip(examples, masks, strict=True)
    ]
