"""Every family goes the whole way: preflight, scores and responses equal to transformers' own, a training step, and its
adapter saved and loaded again."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.families.table import FAMILIES, MULTIMODAL, VARIANTS, tiny_checkpoint
from tuneshift_dag.engines import generic
from tuneshift_dag.engines.local import LocalEngine
from tuneshift_dag.method import SIDES, Decoding
from tuneshift_dag.models.capabilities import OWN_LOOP, linear_layers
from tuneshift_dag.models.loading import load_for_inference, load_for_training
from tuneshift_dag.models.references import resolve_adapter, resolve_model
from tuneshift_dag.training.batches import TokenizedExample
from tuneshift_dag.training.loop import LoraTraining, train
from tuneshift_dag.training.lora import add_lora

# Of unequal lengths: the shorter ones are padded where a family's loop pads.
PROMPTS = [[7, 9, 11, 13, 15, 17, 19, 21, 23], [40, 41, 42], [90, 80, 70, 60, 50]]
RESPONSES = [[5, 6, 7, 8], [100, 101], [33, 34, 35]]
NEW_TOKENS = 6
# What a model's own file may ask `generate` for, and what an answer to a prompt must not depend on.
ASKED = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "num_beams": 3, "forced_eos_token_id": 0}
ASKED |= {"suppress_tokens": list(range(100, 200)), "do_sample": True, "max_length": 4, "stop_strings": ["a"]}


def random_lora(family: str, folder: Path, adapter: Path) -> None:
    """A LoRA on the layers that take one, with weights that change the answers."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    takes, _ = linear_layers(model)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=takes, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(adapter)


@pytest.fixture(scope="module", params=[*FAMILIES, *VARIANTS, *MULTIMODAL])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LocalEngine:
    home = tmp_path_factory.mktemp("family")
    base = tiny_checkpoint(request.param, home / "base")
    random_lora(request.param, base, home / "adapter")
    (base / "generation_config.json").write_text(json.dumps(ASKED))
    files = (resolve_model("base", home, "source.base"), resolve_adapter("adapter", home, "source.adapter"))
    return LocalEngine(*files, "none", "float32")


def reference(engine: LocalEngine, side: str) -> torch.nn.Module:
    """The model as transformers and PEFT load it, by themselves."""
    model = AutoModelForCausalLM.from_pretrained(engine.base.path)
    model.generation_config = GenerationConfig()
    return (PeftModel.from_pretrained(model, engine.adapter.path) if side == "fine_tuned" else model).eval()


def test_a_source_of_this_family(engine: LocalEngine) -> None:
    check = engine.check_adapter(PROMPTS)
    assert check.problems == []
    config = engine.model.config
    assert (engine._loop is generic) == (config.model_type not in OWN_LOOP or getattr(config, "alibi", False))
    for side in SIDES:
        plain = reference(engine, side)
        scores = dict(item for batch in engine.score(PROMPTS, RESPONSES, side) for item in batch)
        answers = dict(item for batch in engine.generate(PROMPTS, side, Decoding(NEW_TOKENS)) for item in batch)
        for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            expected = log_likelihood(plain, prompt, response)
            assert scores[i] == pytest.approx(expected, rel=1e-4, abs=1e-4), side
            ids = torch.tensor([prompt])
            with torch.inference_mode():
                how = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=0, pad_token_id=0)
                own = plain.generate(inputs=ids, attention_mask=torch.ones_like(ids), generation_config=how)
            assert answers[i].token_ids == own[0, len(prompt) :].tolist(), side
            likelihood = log_likelihood(plain, prompt, answers[i].token_ids)
            assert answers[i].sum_logprob == pytest.approx(likelihood, rel=1e-4, abs=1e-4), side


def log_likelihood(model: torch.nn.Module, prompt: list[int], response: list[int]) -> float:
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0].float()
    steps = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return math.fsum(steps.gather(1, torch.tensor(response)[:, None])[:, 0].tolist())


def test_a_target_of_this_family(engine: LocalEngine, tmp_path: Path) -> None:
    settings = LoraTraining(rank=4, epochs=1, batch_size=2, learning_rate=1e-2, validation_fraction=0, retain=0.3)
    model = add_lora(load_for_training(engine.base, "none", torch.float32), settings)
    towers = [n for n, p in model.named_parameters() if p.requires_grad and ("vision" in n or "audio" in n)]
    assert towers == []
    examples = [TokenizedExample(p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    curve = train(model, examples, settings, texts=PROMPTS)  # raises when an adapter tensor gets no gradient
    assert [math.isfinite(step["loss"]) for step in curve.steps] == [True, True]
    assert all(p.isfinite().all() for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "adapter")
    again = load_for_inference(
        engine.base, resolve_adapter("adapter", tmp_path, "distilled adapter"), "none", torch.float32
    )
    with torch.inference_mode():
        ids = torch.tensor([PROMPTS[0]])
        torch.testing.assert_close(
            again(input_ids=ids).logits, model.eval()(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )


def test_the_documentation_names_the_families_of_the_own_loop_and_each_was_tried() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8")
    listed = page.partition("own decode loop answers and scores:")[2].partition("(the names of")[0]
    assert sorted(listed.replace("\n", " ").strip().split(", ")) == sorted(OWN_LOOP)
    assert FAMILIES.keys() >= OWN_LOOP
