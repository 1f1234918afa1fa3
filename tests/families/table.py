"""Families of causal language models as tiny random checkpoints, and a tokenizer for them.

A family is the name that transformers knows its configuration by and what makes it small. Sizes are multiples of 64,
which bitsandbytes wants.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 320
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_HEADS = {"head_dim": 16}
_SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
_LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "head_dim": 16,
}
_MAMBA2 = {"mamba_d_state": 16, "mamba_d_head": 16, "mamba_n_heads": 8, "mamba_d_ssm": 128, "mamba_chunk_size": 8}
_GPT2 = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_inner": 128, "n_positions": 256}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 64, "decoder_sparse_step": 1},
    "qwen3": _HEADS,
    "qwen3_moe": {**_EXPERTS, **_HEADS, "decoder_sparse_step": 1},
    "qwen3_next": {**_EXPERTS, **_LINEAR_ATTENTION, "shared_expert_intermediate_size": 64, "decoder_sparse_step": 1},
    "qwen3_5_text": _LINEAR_ATTENTION,
    "gemma": _HEADS,
    "gemma2": {**_HEADS, "sliding_window": 6, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_HEADS, **_SLIDING},
    "phi": {},
    "phi3": {},
    "phimoe": {**_LOCAL_EXPERTS},
    "gpt2": _GPT2,
    "gptj": {**_GPT2, "rotary_dim": 8},
    "gpt_bigcode": _GPT2,
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 6},
    "gpt_neox": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "falcon_h1": {**_MAMBA2, "head_dim": 16, "mamba_n_groups": 1},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 8},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "stablelm": {},
    "starcoder2": {"sliding_window": 6},
    "olmo": {},
    "olmo2": {},
    "olmo3": {**_SLIDING},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.2},
    "granitemoe": {**_LOCAL_EXPERTS, "logits_scaling": 4.0},
    "granitemoehybrid": {
        **_MAMBA2, **_LOCAL_EXPERTS, "layer_types": ["mamba", "attention"], "mamba_expand": 2, "mamba_n_groups": 1,
        "shared_intermediate_size": 128, "logits_scaling": 4.0,
    },
    "bamba": {**_MAMBA2, "attn_layer_indices": [1], "mamba_n_groups": 1},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, **_SLIDING, **_HEADS},
    "glm": _HEADS,
    "glm4": _HEADS,
    "glm4_moe": {
        **_HEADS, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1,
    },
    "smollm3": {"no_rope_layers": [1, 0]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 64},
    "gpt_oss": {**_LOCAL_EXPERTS, **_HEADS, **_SLIDING},
    "deepseek_v3": {
        "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    },
    "mixtral": _LOCAL_EXPERTS,
    "nemotron": _HEADS,
    "exaone4": {**_HEADS, **_SLIDING},
    "ernie4_5": _HEADS,
    "hunyuan_v1_dense": _HEADS,
    "mamba": {"state_size": 8, "time_step_rank": 8},
    "mamba2": {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "jamba": {
        "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8,
        "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False,
    },
    "recurrent_gemma": {
        "lru_width": 64, "block_types": ["recurrent", "attention"], "attention_window_size": 6, **_HEADS,
    },
    "rwkv": {"attention_hidden_size": 64},
    "seed_oss": _HEADS,
    "apertus": {},
    "arcee": {},
    "minimax": {**_LOCAL_EXPERTS, **_HEADS, "layer_types": ["linear_attention", "full_attention"], "block_size": 8},
}  # fmt: skip
# A model type of the above with what its loop doesn't serve.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon_alibi": ("falcon", {"alibi": True, "new_decoder_architecture": False, "multi_query": False}),
}
MULTIMODAL: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**COMMON, **_HEADS, **_SLIDING},
        "vision_config": {
            "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14,
        },
        "mm_tokens_per_image": 4, "image_token_index": 2, "boi_token_index": 2, "eoi_token_index": 2,
    },
}  # fmt: skip


def tiny_tokenizer(folder: Path, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Bytes, and three special tokens; saved to ``folder``."""
    special = ["<end>", "<turn>", "<turn_end>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *letters])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_checkpoint(family: str, folder: Path) -> Path:
    """A random model of a family, with a tokenizer, saved to ``folder``."""
    torch.manual_seed(0)
    kind, own = VARIANTS.get(family) or (family, FAMILIES.get(family, {}))
    config = AutoConfig.for_model(kind, **(MULTIMODAL.get(family) or {**COMMON, **own}))
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder
