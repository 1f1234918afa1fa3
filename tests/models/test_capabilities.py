"""The CPU attention equals transformers' own."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from tuneshift_dag.models.capabilities import GROUPED_ATTENTION

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (LlamaConfig(**SIZES), LlamaForCausalLM),
        # A soft cap, and a sliding window shorter than the sequence.
        (Gemma2Config(**SIZES, sliding_window=4), Gemma2ForCausalLM),
    ],
    ids=["llama", "gemma2"],
)
def test_logits_equal_those_of_eager_attention_with_padding_and_a_cache(config, kind) -> None:
    torch.manual_seed(0)
    model = kind(config).eval()
    ids = torch.randint(3, 64, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    results = []
    for name in ("eager", GROUPED_ATTENTION):
        model.set_attn_implementation(name)
        with torch.inference_mode():
            first = model(ids[:, :7], attention_mask=mask[:, :7], position_ids=positions[:, :7], use_cache=True)
            second = model(
                ids[:, 7:],
                attention_mask=mask,
                position_ids=positions[:, 7:],
                past_key_values=first.past_key_values,
            )
        results.append(torch.cat([first.logits, second.logits], 1)[mask.bool()])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
