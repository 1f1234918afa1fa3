"""Tiny random models and examples for them."""

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from tuneshift_dag.training.batches import TokenizedExample
from tuneshift_dag.training.loop import LoraTraining, train
from tuneshift_dag.training.lora import add_lora

SETTINGS = LoraTraining(rank=4, alpha=8, epochs=2, batch_size=4, learning_rate=1e-2, validation_fraction=0.25)
ONE_STEP = replace(SETTINGS, epochs=1, batch_size=16, validation_fraction=0.0, max_grad_norm=1e9)
TEXTS = [[1, *range(10 + i, 30 + 2 * i)] for i in range(8)]
TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY)).requires_grad_(False).train()


def tiny_soft_capped_model() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    config = Gemma2Config(
        **TINY,
        head_dim=16,
        final_logit_softcapping=0.5,
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(config).requires_grad_(False).train()


def tiny_gemma() -> Gemma3ForCausalLM:
    """Two layers of which one attends to a sliding window, as in Gemma 3."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        **TINY,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    return Gemma3ForCausalLM(config).requires_grad_(False).train()


def with_lora(model, settings: LoraTraining):
    """A LoRA whose B isn't zero, as it is at the start: that would leave no gradient for A."""
    adapted = add_lora(model, settings)
    for number, (name, parameter) in enumerate(adapted.named_parameters()):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    return adapted


def examples(count: int) -> list[TokenizedExample]:
    rng = random.Random(1)
    return [
        TokenizedExample(
            [rng.randrange(3, 128) for _ in range(rng.randint(2, 12))],
            [*(rng.randrange(3, 128) for _ in range(rng.randint(1, 5))), 2],
        )
        for _ in range(count)
    ]


def reference_loss(model, chosen: list[TokenizedExample]) -> torch.Tensor:
    """One unpadded example at a time: cross entropy of the response tokens and nothing else."""
    total, tokens = torch.zeros(()), 0
    for e in chosen:
        logits = model(input_ids=torch.tensor([e.prompt_ids + e.response_ids]), use_cache=False).logits[0]
        predicted = logits[len(e.prompt_ids) - 1 : -1]
        total = total + cross_entropy(predicted, torch.tensor(e.response_ids), reduction="sum")
        tokens += len(e.response_ids)
    return total / tokens


def one_step(settings: LoraTraining, build=tiny_model, texts: Sequence[list[int]] = ()) -> tuple[float, torch.Tensor]:
    """The loss and the gradients of the one step of a training on 16 examples."""
    model = with_lora(build(), settings)
    seen: list[torch.Tensor] = []

    def keep(optimizer, args, kwargs) -> None:
        seen.append(torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]))

    handle = register_optimizer_step_pre_hook(keep)
    try:
        curve = train(model, examples(16), settings, texts=texts)
    finally:
        handle.remove()
    [gradients], [step] = seen, curve.steps
    return step["loss"], gradients
