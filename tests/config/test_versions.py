"""What makes what out of date, and that a trained adapter is found again."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_transfer_folder, write_jsonl
from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.config.schema import Retain
from tuneshift_dag.config.versions import INPUTS, code_version, training_version
from tuneshift_dag.models import encoder

Edit = Callable[[str, Any], None]
PACKAGED = Path(__file__).parents[2] / "transfers"
LOCAL_SERVER = {"base_url": "http://127.0.0.1:8000/v1"}
SERVED = {"type": "openai", "server": LOCAL_SERVER, "base": {"model": "base"}, "fine_tuned": {"model": "skill"}}
USES_MODELS = {"seed_set", "synthetic_prompts", "scored_pairs", "rehearsal_set", "evaluation", "comparison"}
USES_ADAPTER = USES_MODELS - {"synthetic_prompts", "rehearsal_set"}
TRAINS = {"distilled_model", "comparison"}
FILTERS = {"filtered_dataset", "threshold_report", "comparison"}


def versions(folder: Path) -> dict[str, str]:
    transfer = load_transfer(folder)
    return {asset: code_version(transfer, asset) for asset in INPUTS}


def changed(folder: Path, change: Callable[[], object]) -> set[str]:
    """The assets that a change makes out of date by themselves."""
    before = versions(folder)
    change()
    after = versions(folder)
    return {asset for asset in before if before[asset] != after[asset]}


@pytest.mark.parametrize(
    ("key", "value", "assets"),
    [
        ("description", "for people", set()),
        ("source.base", "models/copied-base", USES_ADAPTER),
        ("target.base", "models/copied-base", {"rehearsal_set", "evaluation", *TRAINS}),
        ("generator.model", "models/copied-base", {"seed_set", "synthetic_prompts"}),
        ("generator.temperature", 0.5, {"seed_set", "synthetic_prompts"}),
        ("generator.format", "json", {"seed_set", "synthetic_prompts"}),
        ("generator.max_prompt_tokens", 50, {"seed_set", "synthetic_prompts"}),
        ("generator.calls_per_round", 4, {"seed_set", "synthetic_prompts", "filtered_dataset"}),
        ("generator.balance", "none", {"seed_set", "synthetic_prompts", "filtered_dataset"}),
        ("prompt_template", "Q: {prompt}", {"seed_set", "scored_pairs", "evaluation", *TRAINS}),
        ("target.prompt", "chat", {"rehearsal_set", "evaluation", *TRAINS}),
        ("target.prompt", "Query: {prompt}\nIntent:", set()),
        ("engine", SERVED, {"seed_set", "scored_pairs", "evaluation", "comparison"}),
        ("models.quantization", "none", USES_MODELS),
        ("models.kv_cache_dtype", "int8", USES_MODELS),
        ("models.compute_dtype", "float16", USES_MODELS | TRAINS),
        ("response.max_new_tokens", 9, {"seed_set", "scored_pairs"}),
        ("filter.threshold", 2.0, FILTERS),
        ("filter.rule", "ratio", FILTERS),
        ("rounds", 3, {"threshold_report", "diversity_map", *TRAINS}),
        ("target_pairs", 500, {"filtered_dataset"}),
        ("distill.epochs", 1, TRAINS),
        ("distill.retain", {"weight": 0.5, "texts": 6}, TRAINS),
        ("distill.keep", 1.05, {"evaluation"}),
        ("evaluation.keeps_skill", 0.9, {"evaluation"}),
        ("distill.retain", {"texts": 100}, {"rehearsal_set", *TRAINS}),
        ("distill.gradient_accumulation", 4, TRAINS),
        ("distill.gradient_checkpointing", True, TRAINS),
        ("distill.optimizer", "paged_adamw_8bit", TRAINS),
        ("evaluation.bootstrap_samples", 500, {"evaluation", "comparison"}),
        ("compare", {}, {"comparison"}),
        ("compare", {"loop": True}, {"comparison"}),
        ("compare", {"arms": ["seed_similarity"]}, {"scored_pairs", "comparison"}),
        ("seed", 1, {"seed_set", "synthetic_prompts", "filtered_dataset", "rehearsal_set", *TRAINS}),
        # Defaults that are written down, and what changes no result.
        ("evaluation.metric", "exact_match", set()),
        ("generator.max_prompt_characters", 300, set()),
        ("filter", {"rule": "both", "threshold": 1.5}, set()),
        ("models.compute_dtype", "bfloat16", set()),
        ("models.batch_size", 7, set()),
        ("models.device_map", "single", set()),
        ("distill.processes", 4, set()),
        ("engine", {"type": "ray"}, set()),
        ("engine", {"type": "ray", "ray": {"actors": 8, "gpus_per_actor": 0.5}}, set()),
    ],
)
def test_a_setting_makes_out_of_date_what_uses_it(
    transfer_folder: Path, edit_config: Edit, key: str, value: Any, assets: set[str]
) -> None:
    copy = transfer_folder / "models" / "copied-base"
    shutil.copytree(transfer_folder / "models" / "tiny-base", copy)
    (copy / "tokenizer.json").write_text("{ }")
    adapter = transfer_folder / "adapter" / "adapter_config.json"
    adapter.write_text(json.dumps({"peft_type": "LORA"}))
    assert changed(transfer_folder, lambda: edit_config(key, value)) == assets


def test_prompts_without_a_limit_in_characters_depend_on_what_the_contexts_leave(
    transfer_folder: Path, edit_config: Edit
) -> None:
    write_jsonl(transfer_folder / "seeds.jsonl", [{"prompt": "Fix:\n  x"}])
    limited = changed(transfer_folder, lambda: edit_config("response.max_new_tokens", 9))
    assert limited == {"seed_set", "scored_pairs", "synthetic_prompts"}
    unlimited = changed(transfer_folder, lambda: edit_config("generator.max_prompt_characters", 300))
    assert unlimited == {"seed_set", "synthetic_prompts"}


def test_how_vllm_is_started_has_no_effect_and_its_other_arguments_have(
    transfer_folder: Path, edit_config: Edit
) -> None:
    prompts, pairs = {"seed_set", "synthetic_prompts"}, {"seed_set", "scored_pairs", "evaluation"}
    assert changed(transfer_folder, lambda: edit_config("generator.server", {"type": "vllm"})) == prompts
    assert changed(transfer_folder, lambda: edit_config("engine", {"type": "vllm"})) == pairs
    settings = [("command", ["a", "serve"]), ("gpu_memory_utilization", 0.5), ("tensor_parallel_size", 2)]
    for key, value in [*settings, ("max_model_len", 99), ("start_timeout_s", 9), ("concurrency", 2)]:
        for section in ("generator.server", "engine.vllm"):
            assert changed(transfer_folder, lambda k=f"{section}.{key}", v=value: edit_config(k, v)) == set()
    quantized = ["--quantization", "bitsandbytes"]
    assert changed(transfer_folder, lambda: edit_config("generator.server.extra_args", quantized)) == prompts
    assert changed(transfer_folder, lambda: edit_config("engine.vllm.extra_args", quantized)) == pairs


def test_how_a_server_is_asked_has_no_effect_and_its_revision_has(transfer_folder: Path, edit_config: Edit) -> None:
    edit_config("generator", {"model": "gpt-4o", "server": {"base_url": "https://api.openai.com/v1"}})
    edit_config("engine", SERVED)
    for section in ("generator", "engine"):
        for key, value in [
            ("base_url", "https://proxy/v1"),
            ("api_key_env", "KEY"),
            ("allow_insecure", True),
            ("concurrency", 2),
        ]:
            assert changed(transfer_folder, lambda k=f"{section}.server.{key}", v=value: edit_config(k, v)) == set()
    generator = changed(transfer_folder, lambda: edit_config("generator.server.revision", "2"))
    assert generator == {"seed_set", "synthetic_prompts"}
    assert changed(transfer_folder, lambda: edit_config("engine.server.revision", "2")) == USES_ADAPTER - {"comparison"}


def test_a_prompt_format_counts_for_the_model_that_is_asked_so(transfer_folder: Path, edit_config: Edit) -> None:
    asked = {"seed_set", "scored_pairs", "evaluation", "comparison"}
    trained = training_version(load_transfer(transfer_folder))

    def respell(source: Any, target: Any) -> set[str]:
        def change() -> None:
            for key, value in [("prompt_template", None), ("source.prompt", source), ("target.prompt", target)]:
                edit_config(key, value)

        return changed(transfer_folder, change)

    template = "Query: {prompt}\nIntent:"
    assert respell(template, None) == set(), "another spelling of the same"
    assert respell({"format": "raw", "template": template}, {"format": "raw", "template": template}) == set()
    assert respell("chat", template) == asked
    assert training_version(load_transfer(transfer_folder)) == trained
    assert respell({"format": "chat", "system": "Sort."}, template) == asked
    assert respell({"format": "chat", "system": "Sort."}, "chat") == {"rehearsal_set", "evaluation", *TRAINS}
    assert respell({"format": "chat", "system": "Sort."}, None) == {"evaluation", *TRAINS}
    changed_template = respell({"format": "chat", "system": "Sort.", "arguments": {"a": 1}}, None)
    assert changed_template == {"rehearsal_set"} | asked | TRAINS


def test_the_question_that_a_model_asks_itself_ends_its_responses_everywhere(
    transfer_folder: Path, edit_config: Edit
) -> None:
    write_jsonl(transfer_folder / "heldout.jsonl", [{"prompt": "1 + 1?", "response": "2"}])
    numeric = changed(transfer_folder, lambda: edit_config("evaluation.metric", "numeric"))
    assert numeric == {"seed_set", "scored_pairs", "evaluation", "comparison"}


def test_a_held_out_label_is_nothing_to_the_prompts(transfer_folder: Path) -> None:
    def held_out(prompt: str, response: str) -> Callable[[], None]:
        return lambda: write_jsonl(transfer_folder / "heldout.jsonl", [{"prompt": prompt, "response": response}])

    held_out("1 + 1?", "2")()
    assert "synthetic_prompts" not in changed(transfer_folder, held_out("1 + 1?", "3"))
    assert "synthetic_prompts" in changed(transfer_folder, held_out("1 + 2?", "3"))


def test_keep_and_threshold_are_one_setting(transfer_folder: Path, edit_config: Edit) -> None:
    edit_config("filter", {"rule": "random", "keep": 0.5})
    respelled = {"rule": "random", "threshold": 0.5}
    assert changed(transfer_folder, lambda: edit_config("filter", respelled)) == set()


@pytest.mark.parametrize(("threshold", "shared"), [(12, True), (0.5, False)])
def test_rounds_count_for_a_filter_that_shares_a_number_among_them(
    transfer_folder: Path, edit_config: Edit, threshold: float, shared: bool
) -> None:
    edit_config("filter", {"rule": "top_excess", "threshold": threshold})
    assert ("filtered_dataset" in changed(transfer_folder, lambda: edit_config("rounds", 3))) == shared


def test_a_file_makes_out_of_date_what_reads_it(
    transfer_folder: Path, edit_config: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, labelled = transfer_folder / "tasks", [{"prompt": "Late?", "response": "no"}]
    tasks.mkdir()
    edit_config("evaluation.task_folder", "tasks")
    edit_config("compare", {"labelled": "labelled.jsonl"})
    write_jsonl(transfer_folder / "labelled.jsonl", labelled)

    def write(name: str) -> set[str]:
        rows = [{"prompt": f"What is {name}?", "response": "it"}]
        return changed(transfer_folder, lambda: write_jsonl(transfer_folder / name, rows))

    assert write("seeds.jsonl") == {"seed_set"}
    assert write("heldout.jsonl") == {"synthetic_prompts", "evaluation", "comparison"}
    assert write("labelled.jsonl") == {"comparison"}
    assert write("tasks/mine.yaml") == {"evaluation", "comparison"}
    assert write("tasks/.mine.yaml.swp") == set()
    assert write("README.md") == set()
    lacking = "Run `pip install it`." if encoder.missing_packages() is None else None
    without = changed(transfer_folder, lambda: monkeypatch.setattr(encoder, "missing_packages", lambda: lacking))
    assert without == {"diversity_map", "comparison"}


def test_a_replaced_weights_folder_makes_out_of_date_what_uses_it(transfer_folder: Path) -> None:
    def overwrite(file: Path) -> set[str]:
        data = file.read_bytes() if file.exists() else b"{}"
        other = data[:-1] + b"\1" if file.suffix == ".safetensors" else data + b" "
        return changed(transfer_folder, lambda: file.write_bytes(other))

    base, adapter = transfer_folder / "models" / "tiny-base", transfer_folder / "adapter"
    trained = training_version(load_transfer(transfer_folder))
    for name in ("model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja", "generation_config.json"):
        assert overwrite(base / name) == USES_MODELS | TRAINS, name
    assert overwrite(base / "README.md") == set()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert overwrite(adapter / name) == USES_ADAPTER, name
    assert training_version(load_transfer(transfer_folder)) == trained


def test_a_served_source_counts_by_its_tokenizer(transfer_folder: Path, edit_config: Edit) -> None:
    edit_config("engine", SERVED)
    edit_config("target.base", "org/other")
    edit_config("generator.model", "org/other")
    base = transfer_folder / "models" / "tiny-base"
    assert changed(transfer_folder, lambda: (base / "model.safetensors").write_bytes(b"")) == set()
    assert changed(transfer_folder, lambda: (base / "tokenizer.json").write_text("{ }")) == USES_ADAPTER


def test_the_same_weights_elsewhere_are_the_same(transfer_folder: Path, edit_config: Edit) -> None:
    def move() -> None:
        (transfer_folder / "models").rename(transfer_folder / "bases")
        for key in ("source.base", "target.base", "generator.model"):
            edit_config(key, "bases/tiny-base")

    assert changed(transfer_folder, move) == set()


def test_two_transfers_of_the_same_content_have_the_same_versions(transfer_folder: Path, tmp_path: Path) -> None:
    assert versions(make_transfer_folder(tmp_path / "elsewhere", "other")) == versions(transfer_folder)


@pytest.mark.parametrize(
    ("name", "balanced", "plain"),
    [("meeting_slots", "0bc7009d62aa", "18c5a75e69f3"), ("banking_intents", "96d33262f56d", "4cf9b607598e")],
)
def test_adapters_that_were_trained_by_version_0_1_are_found(name: str, balanced: str, plain: str) -> None:
    transfer = load_transfer(PACKAGED / name)

    def version(**settings: Any) -> str:
        # As they are today, but for what came later.
        distill = transfer.config.distill.model_copy(update={"retain": Retain(weight=0), **settings})
        return training_version(replace(transfer, config=transfer.config.model_copy(update={"distill": distill})))

    assert version() == balanced
    assert version(balance="none") == plain


def test_a_training_is_named_by_its_settings_alone(transfer_folder: Path, edit_config: Edit) -> None:
    distill = {
        **{"quantization": "none", "rank": 16, "alpha": 32, "dropout": 0.0, "learning_rate": 5e-4, "epochs": 5},
        **{"batch_size": 16, "balance": "none", "warmup_ratio": 0.05, "weight_decay": 0.0, "max_grad_norm": 1.0},
        **{"validation_fraction": 0.05},
    }
    parts = {
        **{"distill": distill, "target": {"base": "models/tiny-base"}, "prompt_template": "Query: {prompt}\nIntent:"},
        **{"seed": 0, "models.compute_dtype": "bfloat16"},
    }
    edit_config("distill", {"retain": 0})
    before = hashlib.sha256(json.dumps([1, parts], sort_keys=True).encode()).hexdigest()[:12]
    assert training_version(load_transfer(transfer_folder)) == before
    for key, value in [("models.device_map", "single"), ("models.quantization", "none"), ("distill.processes", 4)]:
        edit_config(key, value)
        assert training_version(load_transfer(transfer_folder)) == before
    edit_config("distill.rank", 8)
    assert training_version(load_transfer(transfer_folder)) != before
