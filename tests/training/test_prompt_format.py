"""Adapters that were really trained, each in another prompt format, are told apart by how they answer."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.training.tiny import TINY
from tuneshift_dag.engines.local import LocalEngine
from tuneshift_dag.method import PromptFormat
from tuneshift_dag.method.format_detection import best_fit, fits
from tuneshift_dag.models.references import ModelFiles
from tuneshift_dag.training.batches import tokenize_example
from tuneshift_dag.training.loop import LoraTraining, train
from tuneshift_dag.training.lora import add_lora

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
THINGS = ["card", "loan", "rate", "fee", "limit", "phone", "order", "garden"]
SETTINGS = LoraTraining(rank=8, alpha=16, epochs=25, batch_size=8, learning_rate=5e-3, validation_fraction=0.0)
FORMATS = {
    "raw": PromptFormat("Request: {prompt}\nCode:"),
    "chat": PromptFormat(),
    "gemma": PromptFormat("<start_of_turn>user\n{prompt}<end_of_turn>\n<start_of_turn>model\n"),
    "alpaca": PromptFormat("### Instruction:\n{prompt}\n\n### Response:\n"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    folder = tmp_path_factory.mktemp("base")
    words = {word: number for number, word in enumerate([*NAMES, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    made = Tokenizer(models.BPE(words, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(NAMES)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", chat_template=CHATML)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(**{**TINY, "vocab_size": len(words)}, initializer_range=0.1)
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # so that its answers can be taught by an adapter alone
        model.get_input_embeddings().weight.mul_(4)
        model.get_output_embeddings().weight.mul_(4)
    model.save_pretrained(folder)
    return ModelFiles("org/tiny", folder, "tiny")


@pytest.mark.parametrize("name", FORMATS)
def test_the_format_that_an_adapter_was_trained_with_is_named(name: str, base: ModelFiles, tmp_path: Path) -> None:
    made_with, tokenizer = FORMATS[name], PreTrainedTokenizerFast.from_pretrained(base.path)
    pairs = [
        (f"{ask} is my {thing}?", f" {ask[:2]}{len(thing)}") for ask in ("Where", "When", "How") for thing in THINGS
    ]
    model = LlamaForCausalLM.from_pretrained(base.path).requires_grad_(False).train()
    tuned = add_lora(model, SETTINGS)
    train(tuned, [tokenize_example(tokenizer, made_with, *pair) for pair in pairs], SETTINGS)
    tuned.save_pretrained(tmp_path, save_embedding_layers=False)
    engine = LocalEngine(base, ModelFiles("adapter", tmp_path, name), "none", "float32")
    seeds = [prompt for prompt, _ in pairs[::6]]
    # Nobody can guess a raw template of somebody's own.
    for configured in [made_with, *(() if name == "raw" else FORMATS.values())]:
        best = best_fit(fits(engine, seeds, configured, 8))
        assert best.format == made_with, (str(configured), str(best))
