"""A whole fine-tuned model in the place of an adapter: the merged adapter gives the same pairs, also when the two
models take turns in memory."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.families.table import tiny_checkpoint
from tuneshift_dag.engines.local import LocalEngine
from tuneshift_dag.method import Decoding, Pair, scoring
from tuneshift_dag.method.scoring import Cost
from tuneshift_dag.models.references import resolve_adapter, resolve_model
from tuneshift_dag.store import Store
from tuneshift_dag.store.cache import ResponseCache

PROMPTS = [[7, 9, 11, 13, 15, 17, 19, 21, 23], [40, 41, 42], [90, 80, 70, 60, 50]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    tiny_checkpoint("llama", folder / "base")
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config)
    adapted.save_pretrained(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / "merged")
    return folder


def merged(home: Path) -> LocalEngine:
    files = resolve_model("base", home, "b"), resolve_model("merged", home, "m")
    return LocalEngine(files[0], None, "none", "float32", fine_tuned=files[1])


def pairs(engine: LocalEngine, store: Store, cost: Cost) -> list[Pair]:
    return scoring.score_pairs(engine, ResponseCache(store), PROMPTS, Decoding(6), cost)


def assert_same(found: list[Pair], expected: list[Pair]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a.base.token_ids, a.fine_tuned.token_ids) == (b.base.token_ids, b.fine_tuned.token_ids)
        for name in ("base_on_fine_tuned", "fine_tuned_on_base"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-4, abs=1e-3)


def test_a_merged_model_gives_the_pairs_of_its_adapter(home: Path, tmp_path: Path) -> None:
    adapter = LocalEngine(resolve_model("base", home, "b"), resolve_adapter("adapter", home, "a"), "none", "float32")
    expected = pairs(adapter, Store(tmp_path / "a.duckdb"), Cost())
    whole = merged(home)
    assert whole.check_adapter(PROMPTS).problems == []
    assert not whole.one_at_a_time
    assert_same(pairs(whole, Store(tmp_path / "b.duckdb"), Cost()), expected)
    assert whole.fingerprint("base") == adapter.fingerprint("base"), "the base's responses are shared"


def test_models_that_take_turns_are_loaded_at_most_twice(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pairs(merged(home), Store(tmp_path / "a.duckdb"), Cost())
    engine, loads = merged(home), []
    load = LocalEngine._load
    monkeypatch.setattr(LocalEngine, "_load", lambda self, files: (loads.append(files.reference), load(self, files))[1])
    monkeypatch.setattr(engine, "_fits", False)
    store, cost = Store(tmp_path / "b.duckdb"), Cost()
    assert_same(pairs(engine, store, cost), expected)
    assert len(engine._loaded) == 1
    assert sorted(loads) == ["base", "base", "merged"]
    assert cost.model_calls == 4 * len(PROMPTS)
    again = Cost()
    assert_same(pairs(engine, store, again), expected)
    assert (again.model_calls, len(loads)) == (0, 3)


def test_a_model_of_another_vocabulary_is_refused(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "merged", tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    saved = json.loads(file.read_text("utf-8"))
    vocabulary = saved["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(saved), "utf-8")
    other = resolve_model("other", tmp_path, "m")
    engine = LocalEngine(resolve_model("base", home, "b"), None, "none", "float32", fine_tuned=other)
    assert "2 tokens, such as 'a', have other ids" in engine.check_adapter(PROMPTS).problems[0]


@pytest.mark.parametrize("rows", [384, 264])
def test_a_fine_tune_with_more_or_fewer_rows_than_tokens(home: Path, tmp_path: Path, rows: int) -> None:
    """Its embeddings were padded, or cut to the tokenizer's tokens; the base's are 320."""
    model = AutoModelForCausalLM.from_pretrained(home / "merged")
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(home / "base").save_pretrained(tmp_path / "other")
    other = resolve_model("other", tmp_path, "m")
    engine = LocalEngine(resolve_model("base", home, "b"), None, "none", "float32", fine_tuned=other)
    found = engine.check_adapter(PROMPTS)
    assert found.problems == [] and found.largest_logit_difference
