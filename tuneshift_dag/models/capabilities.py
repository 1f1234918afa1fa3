"""What differs between model families: attention, the output head as the model itself computes it, the size of keys and
values, what texts start with. A ``config`` is transformers' `PretrainedConfig`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig
from transformers.masking_utils import eager_mask

from tuneshift_dag import TuneshiftError

GROUPED_ATTENTION = "grouped_eager"
# Families whose attention is softmax(q·k · scale, soft-capped, + mask)·v and nothing else.
_PLAIN_ATTENTION = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3", "gemma3_text", "phi3", "olmo2"}
)


def attention_of(folder: Path) -> str:
    """What transformers calls the kernel: the fused one, but on a CPU plain products where the family allows them."""
    if torch.cuda.is_available():
        return "sdpa"
    return GROUPED_ATTENTION if AutoConfig.from_pretrained(folder).model_type in _PLAIN_ATTENTION else "sdpa"


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


def keys_values_bytes(config: Any, itemsize: int, in_8_bits: bool = False) -> int:
    """Bytes of the keys and values of one token in all layers. ``itemsize``: bytes of a number in the compute dtype;
    ``in_8_bits``: whether they are kept as `tuneshift_dag.engines.kv_cache` does with ``int8``."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # In 8 bits every head has a scale as well.
    kept = width + itemsize if in_8_bits else width * itemsize
    return int(text.num_hidden_layers * 2 * heads * kept)


def start_ids(tokenizer: Any) -> list[int]:
    """What a model's texts start with. Without such a token (GPT-2, SmolLM2) it is what ends the text before."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return list(tokenizer("").input_ids) or [start]


def head_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of hidden states (N, D), as the model itself computes them after its body."""
    logits: torch.Tensor = model.get_output_embeddings()(hidden)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@contextmanager
def head_inputs(model: Any, positions: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Collect the head's input at ``positions`` (of batch × length); the head itself sees one position."""
    captured: list[torch.Tensor] = []

    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        # The head may be on another GPU than the embeddings.
        captured.append(inputs[0].flatten(0, 1)[positions.to(inputs[0].device)])
        return inputs[0][0, :1].contiguous()  # (1, D): for (1, 1, D) the head would copy its weight

    with model.get_output_embeddings().register_forward_pre_hook(hook, prepend=True):
        yield captured


def check_head(model: Any) -> None:
    """Raise `TuneshiftError` when the model overflows in its dtype, `RuntimeError` when `head_logits` differs from its
    own logits."""
    ids = torch.tensor([[1, 2, 3]], device=model.device)
    with torch.inference_mode():
        own = model(input_ids=ids, use_cache=False).logits[0].float()
        with head_inputs(model, torch.arange(3)) as captured:
            model(input_ids=ids, use_cache=False)
        ours = head_logits(model, captured[0]).float().to(own.device)
    if not own.isfinite().all():
        raise TuneshiftError(
            f"{model.config.model_type}: its activations overflow in {model.dtype}, so it can't answer. Set"
            " models.compute_dtype: float32."
        )
    if not torch.allclose(own, ours, atol=0.1, rtol=0.02):
        raise RuntimeError(
            f"{model.config.model_type}: its logits aren't a linear head with an optional soft cap, so given"
            " responses can't be scored with this engine."
        )
