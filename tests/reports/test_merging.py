"""A merged model answers as the base with its adapter does, loaded by plain transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from tests.families.table import tiny_checkpoint, tiny_tokenizer
from tests.families.test_families import random_lora
from tuneshift_dag import TuneshiftError
from tuneshift_dag.engines.local import LocalEngine
from tuneshift_dag.method import Decoding, Side
from tuneshift_dag.models.references import resolve_adapter, resolve_model
from tuneshift_dag.reports.export import merge, scale_adapter

CHAT = "{% for m in messages %}<turn>{{ m['content'] }}<turn_end>{% endfor %}"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    base = tiny_checkpoint("llama", tmp_path / "base")
    tiny_tokenizer(base, CHAT)
    random_lora("llama", base, tmp_path / "adapter")
    return tmp_path


def test_plain_transformers_gives_the_same_answers(home: Path) -> None:
    config = home / "base" / "config.json"  # of a machine that had what this one hasn't
    config.write_text(json.dumps({**json.loads(config.read_text()), "attn_implementation": "flash_attention_2"}))
    base, adapter = resolve_model("base", home, "b"), resolve_adapter("adapter", home, "a")
    merge(base, adapter.path, home / "merged")
    engine = LocalEngine(base, adapter, "none", "float32")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(home / "merged"),
        AutoTokenizer.from_pretrained(home / "merged"),
    )
    assert tokenizer.chat_template == CHAT
    assert sorted(model.generation_config.eos_token_id) == sorted(engine.ends), "the end of a turn too"
    ids = engine.encode("Where is it?")
    ((_, answer),) = next(iter(engine.generate([ids], "fine_tuned", Decoding(8))))
    given = torch.tensor([ids])
    with torch.inference_mode():
        found = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=8, do_sample=False)
    assert found[0, len(ids) :].tolist() == answer.token_ids


def test_a_scale_in_the_weights_is_the_scale_that_was_measured(home: Path) -> None:
    base, adapter = resolve_model("base", home, "b"), resolve_adapter("adapter", home, "a")
    whole = LocalEngine(base, adapter, "none", "float32")
    half = whole.scaled(0.5)
    assert not whole._loaded, "a step that finds all in the cache loads nothing"
    shutil.copytree(home / "adapter", home / "baked")
    scale_adapter(home / "baked", 0.5)
    baked = LocalEngine(base, resolve_adapter("baked", home, "a"), "none", "float32")
    ids, answer = [whole.encode("Where is it?")], [[5, 9, 12]]

    def scored(engine: LocalEngine, side: Side = "fine_tuned") -> float:
        return next(iter(engine.score(ids, answer, side)))[0][1]

    assert scored(half) == pytest.approx(scored(baked), abs=1e-5)
    assert abs(scored(half) - scored(whole)) > 1e-3 and abs(scored(half) - scored(whole, "base")) > 1e-3
    assert scored(half, "base") == scored(whole, "base")
    assert half.model is whole.model, "it isn't loaded twice"
    assert half.fingerprint("fine_tuned") != whole.fingerprint("fine_tuned")
    assert whole.scaled(1.0).fingerprint("fine_tuned") == whole.fingerprint("fine_tuned")
    assert half.fingerprint("base") == whole.fingerprint("base")


def test_weights_in_4_bits_are_not_merged_into(home: Path) -> None:
    four = BitsAndBytesConfig(load_in_4bit=True)
    AutoModelForCausalLM.from_pretrained(home / "base", quantization_config=four).save_pretrained(home / "small")
    tiny_tokenizer(home / "small")
    with pytest.raises(TuneshiftError, match=r"small: its weights are in 4 bits.*target\.base"):
        merge(resolve_model("small", home, "b"), home / "adapter", home / "merged")
    assert not (home / "merged").exists()
