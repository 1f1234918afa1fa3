"""Attention for CPUs, under a name by which transformers finds it."""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

GROUPED_ATTENTION = "grouped_eager"


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for CPUs: plain matrix products that don't copy shared keys and values.

    Transformers' eager version repeats keys and values for each query head that shares them, and its fused version is
    slower still on a CPU at one query per row. Here the query heads of a group become rows of one product. A decode
    step of Gemma 3 270M at batch 32 on two cores: 260 ms fused, 99 ms eager, 76 ms this one.

    Shapes: query (B, H, L, D); key and value (B, K, S, D) with H a multiple of K; mask (B, 1, L, S).
    The softmax is taken in float32. Returns (B, L, H, D) and no weights."""
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    rows = query.reshape(batch, key.shape[1], groups * length, width)
    scores = torch.matmul(rows, key.transpose(2, 3)) * (width**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        masked = scores.view(batch, key.shape[1], groups, length, -1) + attention_mask[:, :, None, :, : key.shape[2]]
        scores = masked.view_as(scores)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = torch.nn.functional.dropout(weights, p=dropout, training=module.training)
    mixed = torch.matmul(weights, value).view(batch, heads, length, width)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED_ATTENTION, grouped_attention)
AttentionMaskInterface.register(GROUPED_ATTENTION, eager_mask)
