"""What differs between model families, decided in one place: attention, the decode loop, the output head, what ends a
response, which layers take LoRA, the size of keys and values; and whether the weights are all there, and finite. A
``config`` is transformers' `PretrainedConfig`."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.masking_utils import eager_mask
from transformers.pytorch_utils import Conv1D

from tuneshift_dag import TuneshiftError

GROUPED_ATTENTION = "grouped_eager"
"""The name by which transformers finds `grouped_attention`."""
# Families whose attention is softmax(q·k · scale, soft-capped, + mask)·v and nothing else.
_PLAIN_ATTENTION = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2"}
)
OWN_LOOP = _PLAIN_ATTENTION | {
    "cohere", "falcon", "glm4", "gpt2", "gpt_neox", "granite", "mixtral", "opt", "phi", "qwen2_moe", "qwen3_moe",
    "stablelm",
}  # fmt: skip
"""Families that the decode loop was proven on (tests/families): what they keep of a text are keys and values alone. All
others go through transformers' own `generate`."""
# Layers of this kind decide which expert works, or whether one does.
_ROUTERS = ("gate", "router", "shared_expert_gate")
_SENTINEL = "tuneshift"
_LOG = logging.getLogger("tuneshift_dag")


def attention_of(folder: Path) -> str | None:
    """What transformers calls the kernel; None leaves the choice to it: the fastest that the family supports."""
    if torch.cuda.is_available():
        return None
    return GROUPED_ATTENTION if AutoConfig.from_pretrained(folder).model_type in _PLAIN_ATTENTION else None


def keys_values_bytes(config: Any, itemsize: int, in_8_bits: bool = False) -> int:
    """Bytes of the keys and values of one token in all layers. ``itemsize``: bytes of a number in the compute dtype;
    ``in_8_bits``: whether they are kept as `tuneshift_dag.engines.kv_cache` does with ``int8``. Layers without keys and
    values count as if they had some."""
    text = config.get_text_config()
    all_heads = getattr(text, "num_attention_heads", None) or 1
    heads = getattr(text, "num_key_value_heads", None) or all_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // all_heads
    # Compressed keys (DeepSeek) are kept as they are used.
    width = max(width, getattr(text, "qk_nope_head_dim", 0) + getattr(text, "qk_rope_head_dim", 0))
    # In 8 bits every head has a scale as well.
    kept = width + itemsize if in_8_bits else width * itemsize
    return int(text.num_hidden_layers * 2 * heads * kept)


def experts_bytes(model: Any) -> int:
    """Bytes of experts that are fused into one parameter, which bitsandbytes doesn't quantize."""
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.dim() == 3)


@lru_cache(maxsize=4)
def opening(tokenizer: Any) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts in front of a text."""
    whole, plain = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    return tuple(whole[: whole.index(plain[0])]) if plain and plain[0] in whole else ()


def start_ids(tokenizer: Any) -> list[int]:
    """What a model's texts start with. Without such a token (GPT-2, SmolLM2) it is what ends the text before."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return list(opening(tokenizer)) or [start]


def end_ids(tokenizer: Any, *folders: Path) -> frozenset[int]:
    """Tokens that end a response: the tokenizer's, those of the models' settings, and those that end a turn in its chat
    templates."""
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    turns = [turn_end(tokenizer), *(turn_end(tokenizer, chat_template=name) for name in templates)]
    named = {tokenizer.eos_token_id, *turns} - {None}
    return frozenset(named.union(*map(settings_end_ids, folders)))


def settings_end_ids(folder: Path) -> list[int]:
    """The end tokens that a model's ``generation_config.json`` names, or else its ``config.json``, as in `generate`."""
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        settings = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        parts = [settings, settings.get("text_config") or {}]
        named = [part.get("eos_token_id") for part in parts if isinstance(part, dict)]
        found = [i for ids in named for i in (ids if isinstance(ids, list) else [ids])]
        if ends := [i for i in found if isinstance(i, int) and not isinstance(i, bool)]:
            return ends
    return []


def turn_end(tokenizer: Any, **arguments: Any) -> int | None:
    """The token of its own that the chat template, given ``arguments``, puts after what an assistant has said; None
    without template or one."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SENTINEL}]
    for chat in (turns, [{"role": "system", "content": "?"}, *turns]) if tokenizer.chat_template else ():
        try:
            text = str(tokenizer.apply_chat_template(chat, tokenize=False, **arguments))
        except Exception:  # a template may want a system message; who chats with it is told of all else
            continue
        first = next(iter(tokenizer(text.rpartition(_SENTINEL)[2].lstrip(), add_special_tokens=False).input_ids), None)
        token = tokenizer.added_tokens_decoder.get(first)
        return first if token is not None and token.content.strip() else None
    return None


def linear_layers(model: Any) -> tuple[list[str], list[str]]:
    """Names of the linear layers of the language model that take LoRA, and of the linear layers that don't: those of
    vision and audio towers, routers, those of a Mamba block whose weights its kernel takes past the adapter, and the
    output head."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    inside = {id(module) for module in decoder.modules()}
    takes: list[str] = []
    others: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            parent, _, last = name.rpartition(".")
            block = model.get_submodule(parent)
            mamba = last in ("out_proj", "dt_proj") and hasattr(block, "A_log") and hasattr(block, "D")
            own = id(module) in inside and module is not head and last not in _ROUTERS and not mamba
            (takes if own else others).append(name)
    return takes, others


def head_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of hidden states (N, D), as the models of `OWN_LOOP` compute them after their bodies."""
    config = model.config.get_text_config()
    logits: torch.Tensor = model.get_output_embeddings()(hidden)
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / divisor
    cap = getattr(config, "final_logit_softcapping", None)
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


def has_own_loop(model: Any) -> bool:
    """Whether the decode loop serves a loaded model: its family is one of `OWN_LOOP` (which ALiBi's masks don't fit),
    and its head is computed as `head_logits` does."""
    if model.config.model_type not in OWN_LOOP or getattr(model.config, "alibi", False):
        return False
    ids = torch.tensor([[1, 2, 3]], device=model.device)
    with torch.inference_mode():
        own = model(input_ids=ids, use_cache=False).logits[0].float()
        with head_inputs(model, torch.arange(3)) as captured:
            model(input_ids=ids, use_cache=False)
        ours = head_logits(model, captured[0]).float().to(own.device)
    return torch.allclose(own, ours, atol=0.1, rtol=0.02)


def read_whole(folder: Path, **options: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained`, without its random numbers for weights that the files lack.

    Raises:
        TuneshiftError: transformers can't load the model, or finds no tensor, or one of another shape, for a weight.
    """
    how = {**options, "output_loading_info": True, "ignore_mismatched_sizes": True}  # else it names no tensor
    try:
        model, found = AutoModelForCausalLM.from_pretrained(folder, **how)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever settings, files and machines that don't go together lead to
        told = " ".join(str(error).split())[:300]
        raise TuneshiftError(
            f"{folder}: transformers can't load this model here ({type(error).__name__}: {told}). Compare its"
            " config.json and generation_config.json with those of where it is from, or name another model."
        ) from error
    missing, other = sorted(found["missing_keys"]), sorted(found["mismatched_keys"])
    problem = f"there is no tensor for {len(missing)} of its weights, such as {missing[0]!r}" if missing else ""
    if other:
        name, there, expected = other[0]
        problem = f"{name} is of shape {tuple(there)}, and by config.json of {tuple(expected)}"
    if problem:
        raise TuneshiftError(
            f"{folder}: {problem}: its weights and its config.json aren't of one model. Download all of it again, or"
            " save it again with `model.save_pretrained(folder)`."
        )
    if unused := sorted(found["unexpected_keys"]):
        _LOG.warning(f"{folder}: {len(unused)} tensors have no place in the model, such as {unused[0]!r}.")
    loaded: PreTrainedModel = model
    return loaded


def check_finite(model: Any, name: str) -> None:
    """Raise `TuneshiftError` when the logits of the model of this name aren't finite: with the weight, or the dtype,
    that is to blame."""
    try:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[1, 2, 3]], device=model.device), use_cache=False).logits
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        told = " ".join(str(error).split())[:300]
        raise TuneshiftError(
            f"{name}: a forward pass fails ({type(error).__name__}: {told}). If it is in 4 bits, which not every kind"
            " of adapter takes, set models.quantization: none; else name another model or adapter."
        ) from error
    if logits.isfinite().all():
        return
    for weight_name, weight in model.named_parameters():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise TuneshiftError(
                f"{name}: the weight {weight_name} holds values that aren't finite (NaN or infinite), so nothing can be"
                " answered. The file is damaged, or its training diverged: fetch or save it again."
            )
    raise TuneshiftError(
        f"{name}: its activations overflow in {model.dtype}, so it can't answer. Set models.compute_dtype: float32."
    )


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
