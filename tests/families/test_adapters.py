"""Every kind of adapter that PEFT loads and can switch off: both sides of the engine equal PEFT's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.families.table import tiny_checkpoint
from tuneshift_dag import TuneshiftError
from tuneshift_dag.engines.local import LocalEngine
from tuneshift_dag.method import SIDES
from tuneshift_dag.models.references import resolve_adapter, resolve_model

PROMPTS = [[7, 9, 11, 13, 15, 17, 19, 21, 23], [40, 41, 42]]
RESPONSES = [[5, 6, 7, 8], [100, 101]]
SETTINGS: dict[str, Any] = {"r": 4, "lora_alpha": 16, "task_type": "CAUSAL_LM", "init_lora_weights": False}
ATTENTION = ["q_proj", "v_proj"]
KINDS: dict[str, tuple[str, Any]] = {
    "lora": ("llama", LoraConfig(**SETTINGS, target_modules="all-linear")),
    "regex": ("llama", LoraConfig(**SETTINGS, target_modules=r".*\.self_attn\.(q|v)_proj")),
    "rslora": ("llama", LoraConfig(**SETTINGS, target_modules=ATTENTION, use_rslora=True)),
    "dora": ("llama", LoraConfig(**SETTINGS, target_modules=ATTENTION, use_dora=True)),
    "patterns": (
        "llama",
        LoraConfig(**SETTINGS, target_modules=ATTENTION, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 64}),
    ),
    "layers": ("llama", LoraConfig(**SETTINGS, target_modules=ATTENTION, layers_to_transform=[1])),
    "lora_bias": ("llama", LoraConfig(**SETTINGS, target_modules=ATTENTION, lora_bias=True)),
    "embeddings": ("llama", LoraConfig(**SETTINGS, target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "head_saved": ("llama", LoraConfig(**SETTINGS, target_modules=ATTENTION, modules_to_save=["lm_head"])),
    "both_saved": (
        "llama",
        LoraConfig(**SETTINGS, target_modules=ATTENTION, modules_to_save=["embed_tokens", "lm_head"]),
    ),
    "trainable_tokens": ("llama", LoraConfig(**SETTINGS, target_modules=ATTENTION, trainable_token_indices=[7, 40])),
    "conv1d": ("gpt2", LoraConfig(**SETTINGS, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "experts": (
        "qwen3_moe",
        LoraConfig(**SETTINGS, target_modules=ATTENTION, target_parameters=["mlp.experts.gate_up_proj"]),
    ),
    "loha": ("llama", LoHaConfig(target_modules=ATTENTION, r=4, init_weights=False)),
    "lokr": ("llama", LoKrConfig(target_modules=ATTENTION, r=4, init_weights=False)),
    "oft": ("llama", OFTConfig(target_modules=ATTENTION, oft_block_size=8, r=0, init_weights=False)),
    "boft": ("llama", BOFTConfig(target_modules=ATTENTION, boft_block_size=8, init_weights=False)),
    "hra": ("llama", HRAConfig(target_modules=ATTENTION, r=4, init_weights=False)),
    "vera": ("llama", VeraConfig(target_modules=ATTENTION, r=4, init_weights=False)),
    "adalora": ("llama", AdaLoraConfig(**SETTINGS, target_modules=ATTENTION, init_r=4, target_r=4, total_step=9)),
    "ia3": (
        "llama",
        IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
        ),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_equal_peft(kind: str, tmp_path: Path) -> None:
    family, config = KINDS[kind]
    tiny_checkpoint(family, tmp_path / "base")
    torch.manual_seed(1)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:  # what was saved whole, or isn't random yet
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    check_against_peft(tmp_path)


def check_against_peft(home: Path) -> None:
    engine = LocalEngine(resolve_model("base", home, "b"), resolve_adapter("adapter", home, "a"), "none", "float32")
    check = engine.check_adapter(PROMPTS)
    assert check.problems == []
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    if len(engine.tokenizer) > base.config.vocab_size:
        base.resize_token_embeddings(len(engine.tokenizer))
    tuned = PeftModel.from_pretrained(base, home / "adapter").eval()
    for side in SIDES:
        scores = dict(item for batch in engine.score(PROMPTS, RESPONSES, side) for item in batch)
        for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            ids = torch.tensor([prompt + response])
            with torch.inference_mode():
                if side == "base":
                    with tuned.disable_adapter():
                        logits = tuned(input_ids=ids).logits
                else:
                    logits = tuned(input_ids=ids).logits
            steps = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = float(steps.gather(1, torch.tensor(response)[:, None]).sum())
            assert scores[i] == pytest.approx(expected, rel=1e-4, abs=1e-3), side


def test_tokens_that_the_fine_tune_added(tmp_path: Path) -> None:
    """Their rows are in the adapter, and the tokenizer that knows them lies beside it."""
    tiny_checkpoint("llama", tmp_path / "base")
    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer.add_tokens([f"<{n}>" for n in range(model.config.vocab_size)], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer))
    config = LoraConfig(**SETTINGS, target_modules=ATTENTION, modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    engine = LocalEngine(
        resolve_model("base", tmp_path, "b"), resolve_adapter("adapter", tmp_path, "a"), "none", "float32"
    )
    added = engine.encode("<3> is where?", templated=True)
    assert added[0] >= 256 and len(added) == len(" is where?") + 1
    assert engine.check_adapter([added, *PROMPTS]).problems == []
    tuned = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    ((_, score),) = next(iter(engine.score([added], [RESPONSES[0]], "fine_tuned")))
    with torch.inference_mode():
        logits = tuned(input_ids=torch.tensor([added + RESPONSES[0]])).logits
    steps = logits[0, len(added) - 1 : -1].log_softmax(-1)
    assert score == pytest.approx(float(steps.gather(1, torch.tensor(RESPONSES[0])[:, None]).sum()), rel=1e-4, abs=1e-3)


def test_an_adapter_of_another_model_is_refused_by_what_has_no_place(tmp_path: Path) -> None:
    tiny_checkpoint("llama", tmp_path / "base")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "base", num_hidden_layers=1)
    config = LoraConfig(**SETTINGS, target_modules=ATTENTION)
    get_peft_model(other, config).save_pretrained(tmp_path / "adapter")
    engine = LocalEngine(
        resolve_model("base", tmp_path, "b"), resolve_adapter("adapter", tmp_path, "a"), "none", "float32"
    )
    with pytest.raises(TuneshiftError, match=r"can't put this adapter on base: 4 adapted layers .*layers\.1"):
        engine.check_adapter(PROMPTS)


def test_a_generator_whose_chat_template_takes_no_lone_user_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama", tmp_path / "base")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('A system message must come first') }}")
    engine = LocalEngine(resolve_model("base", tmp_path, "b"), None, "none", "float32")
    with pytest.raises(TuneshiftError, match=r"base: its chat template refuses .*must come first.*to continuation"):
        engine.chat_ids("more, please")
