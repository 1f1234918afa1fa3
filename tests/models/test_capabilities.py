"""The attention for CPUs equals transformers' own, and what a head gives is checked."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from tuneshift_dag import TuneshiftError
from tuneshift_dag.models.capabilities import GROUPED_ATTENTION, check_finite

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


def test_a_model_that_overflows_is_refused() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes)).eval()
    check_finite(model, "some/model")
    model.lm_head.weight.data.fill_(6e4)
    check_finite(model, "some/model")
    with pytest.raises(TuneshiftError, match=r"some/model: its activations overflow in torch\.float16.* float32"):
        check_finite(model.half(), "some/model")
