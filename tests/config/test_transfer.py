import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import tuneshift_dag.method
from tests.conftest import write_jsonl
from tuneshift_dag.config.transfer import find_transfers, load_transfer
from tuneshift_dag.errors import TuneshiftError

SERVED = {
    "type": "openai",
    "server": {"base_url": "http://127.0.0.1:8000/v1"},
    "base": {"model": "base"},
    "fine_tuned": {"model": "skill"},
}


def test_a_valid_folder_loads(transfer_folder):
    transfer = load_transfer(transfer_folder)
    assert transfer.name == "banking"
    assert transfer.seeds == ["Where is my card?", "Why was I charged twice?"]
    assert transfer.heldout == [("Is my transfer late?", "intent_1")]
    assert transfer.round_keys == ["round_01", "round_02"]
    assert (transfer.config.filter.rule, transfer.config.filter.threshold) == ("both", 1.5)


def test_the_held_out_file_is_optional(transfer_folder):
    (transfer_folder / "heldout.jsonl").unlink()
    assert load_transfer(transfer_folder).heldout == []


def test_transfers_are_the_folders_with_a_transfer_yaml(transfer_folder):
    (transfer_folder.parent / "notes").mkdir()
    assert find_transfers(transfer_folder.parent) == [transfer_folder]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("filter.treshold", 1.5, ["filter.treshold", "1.5", "correct its spelling"]),
        ("rounds", "many", ["rounds", "'many'", "valid integer"]),
        ("rounds", 0, ["rounds", "found 0", "greater than or equal to 1"]),
        ("models.quantization", "int8", ["models.quantization", "'int8'", "'nf4', 'fp4' or 'none'"]),
        ("filter", {"threshold": 0.9}, ["filter", "threshold 0.9", "'both'", "above 1"]),
        ("filter", {"threshold": 1, "rule": "ratio"}, ["filter", "threshold 1.0", "'ratio'", "above 1"]),
        ("filter", {"rule": "ifd"}, ["filter", "threshold 1.5", "'ifd'", "between 0 and 1"]),
        ("filter", {"rule": "top_excess"}, ["filter", "'top_excess'", "needs filter.keep", "0.5"]),
        ("filter", {"rule": "random", "keep": 2.5}, ["filter", "keep 2.5", "whole number"]),
        ("filter", {"rule": "random", "keep": 0.5, "threshold": 2}, ["filter", "threshold 2", "'random'", "remove it"]),
        ("filter", {"rule": "unfiltered", "threshold": 2}, ["filter", "threshold 2", "'unfiltered'", "remove it"]),
        ("filter", {"keep": 0.5}, ["filter", "keep 0.5", "'both'", "remove it", "top_excess"]),
        ("filter", {"rule": "random", "keep": 2000}, ["filter.keep 2000", "target_pairs 1000", "raise it"]),
        ("filter", {"rule": "top_excess", "keep": 1.0, "max_repetition": 0}, ["filter.max_repetition", "0"]),
        ("filter", {"refusals": ["no way", " "]}, ["filter", "empty phrase", "remove it"]),
        ("filter", {"target": "avoid_easy"}, ["target and target_share belong together", "0.25"]),
        ("filter", {"target_share": 0.5}, ["target and target_share belong together", "target: avoid_easy"]),
        ("filter", {"target": "easy", "target_share": 0.5}, ["filter.target", "'prefer_easy' or 'avoid_easy'"]),
        ("filter", {"target": "avoid_easy", "target_share": 1}, ["filter.target_share", "found 1", "less than 1"]),
        (
            "filter",
            {"rule": "unfiltered", "target": "avoid_easy", "target_share": 0.5},
            ["filter", "target 'avoid_easy'", "'unfiltered'", "remove it"],
        ),
        ("filter", {"discriminator": {"threshold": 1}}, ["filter.discriminator.threshold", "found 1", "less than 1"]),
        ("filter", {"discriminator": {"steps": 0}}, ["filter.discriminator.steps", "found 0", "greater than or equal"]),
        ("filter.discriminator", 0.5, ["filter.discriminator", "found 0.5"]),
        (
            "filter",
            {"rule": "unfiltered", "discriminator": {}},
            ["filter", "discriminator", "'unfiltered'", "remove it"],
        ),
        ("response.samples", -1, ["response.samples", "found -1", "greater than or equal to 0"]),
        ("response", {"samples": 5, "agreement": 1.5}, ["response.agreement", "1.5", "less than or equal to 1"]),
        ("response", {"agreement": 0.6, "top_p": 0.9}, ["agreement and top_p without samples", "add samples: 5"]),
        ("distill.token_mask", 0, ["distill.token_mask", "found 0", "greater than 0"]),
        ("distill.token_mask", 70, ["distill.token_mask", "found 70", "less than or equal to 1"]),
        ("distill.optimizer", "sgd", ["distill.optimizer", "'sgd'", "'adamw' or 'paged_adamw_8bit'"]),
        ("distill.gradient_accumulation", 0, ["distill.gradient_accumulation", "found 0"]),
        ("models.device_map", "cuda:0", ["models.device_map", "'cuda:0'", "'auto' or 'single'"]),
        ("evaluation.metric", "numbers", ["evaluation.metric", "'numbers'", "'exact_match' or 'numeric'"]),
        ("prompt_template", "Query:", ["prompt_template", "'Query:'", "must contain {prompt}"]),
        ("prompt_template", "{prompt} {prompt}", ["prompt_template", "exactly once"]),
        ("source", {"base": "models/tiny-base"}, ["source.adapter", "missing", "Add it"]),
        ("source.base", "models/tiny base", ["source.base", "'models/tiny base'", "doesn't exist"]),
        ("target.base", "./nowhere", ["target.base", "'./nowhere'", "hub id"]),
        ("generator.model", "package://no_such_package", ["generator.model", "pip install no-such-package"]),
        ("source.adapter", "./nowhere", ["source.adapter", "nowhere", "Put the PEFT adapter there"]),
        ("engine.type", "openai", ["engine", "server must be given with type 'openai'"]),
        ("engine", {"server": {"base_url": "http://a/v1"}}, ["engine", "only then", "type is 'local'"]),
        ("engine.cross_scores", False, ["engine", "cross_scores", "type 'openai'"]),
        ("engine", {**SERVED, "server": {"base_url": "a:8000"}}, ["engine.server.base_url", "'a:8000'", "http://"]),
        ("engine", {**SERVED, "fine_tuned": {"model": "base"}}, ["engine", "both 'base'", "--lora-modules"]),
        ("engine", {**SERVED, "server": {"base_url": "http://a/v1", "concurrency": 0}}, ["concurrency", "found 0"]),
        ("engine", {"ray": {"actors": 4}}, ["engine", "ray has no meaning", "'local'", "set type: ray"]),
        ("engine", {"type": "ray", "cross_scores": False}, ["engine", "cross_scores", "cost 'ray' little"]),
        ("engine", {"type": "ray", "ray": {"actors": 0}}, ["engine.ray.actors", "found 0"]),
        ("engine", {"type": "ray", "ray": {"gpus_per_actor": 1.5}}, ["engine.ray.gpus_per_actor", "whole number"]),
        (
            "engine",
            {"type": "ray", "ray": {"address": "ray://a:1"}},
            ["engine.ray.address", "'ray://a:1'", "host:port"],
        ),
        ("generator.server", {"base_url": "http://me:secret@a/v1"}, ["generator.server.base_url", "api_key_env"]),
        (
            "generator",
            {"model": "m", "server": {"base_url": "http://a/v1"}, "quantization": "nf4"},
            ["generator", "quantization 'nf4'", "generator.server", "remove one"],
        ),
    ],
)
def test_a_bad_setting_names_file_key_value_and_repair(transfer_folder, edit_config, key, value, words):
    edit_config(key, value)
    with pytest.raises(TuneshiftError) as error:
        load_transfer(transfer_folder)
    for word in [str(transfer_folder / "transfer.yaml"), *words]:
        assert word in str(error.value)


def test_a_later_key_changes_a_version_only_when_it_is_set(transfer_folder, edit_config):
    before = json.dumps([1, {"evaluation": {"bootstrap_samples": 2000, "max_new_tokens": 32}}], sort_keys=True)
    assert load_transfer(transfer_folder).version("evaluation") == hashlib.sha256(before.encode()).hexdigest()[:12]
    edit_config("evaluation.metric", "exact_match")
    assert load_transfer(transfer_folder).version("evaluation") == hashlib.sha256(before.encode()).hexdigest()[:12]
    (transfer_folder / "heldout.jsonl").unlink()
    edit_config("evaluation.metric", "numeric")
    assert load_transfer(transfer_folder).version("evaluation") != hashlib.sha256(before.encode()).hexdigest()[:12]


def test_samples_change_the_version_of_what_they_change_and_agreement_that_of_the_filter(transfer_folder, edit_config):
    def versions() -> dict[str, str]:
        transfer = load_transfer(transfer_folder)
        return {name: transfer.version(name) for name in ("response", "filter")} | {"pairs": transfer.samples_version()}

    before = versions()
    old = json.dumps([1, {"response": {"max_new_tokens": 64}}], sort_keys=True)
    assert before["response"] == hashlib.sha256(old.encode()).hexdigest()[:12]
    assert before["pairs"] == "" and load_transfer(transfer_folder).guards.agreement is None
    edit_config("response", {"samples": 5})
    sampled = versions()
    assert sampled["response"] == before["response"], "the seeds' greedy responses are the same"
    assert sampled["pairs"] != before["pairs"] and sampled["filter"] != before["filter"]
    edit_config("response.agreement", 0.8)
    stricter = versions()
    assert stricter["filter"] != sampled["filter"] and stricter["pairs"] == sampled["pairs"]
    assert load_transfer(transfer_folder).guards.agreement == 0.8
    for key, value in (("response.temperature", 1.0), ("response.top_p", 0.9), ("response.samples", 6), ("seed", 1)):
        was = versions()["pairs"]
        edit_config(key, value)
        assert versions()["pairs"] != was, key


def test_a_filter_is_described_with_all_that_it_asks(transfer_folder, edit_config):
    assert load_transfer(transfer_folder).describe_filter() == "`both`, threshold 1.5"
    edit_config("filter", {"rule": "random", "keep": 0.5, "target": "avoid_easy", "target_share": 0.25})
    edit_config("response", {"samples": 8})
    assert load_transfer(transfer_folder).describe_filter() == (
        "`random`, keep 0.5; `avoid_easy` of the target, share 0.25; at least 0.5 of 8 samples agree"
    )
    edit_config("filter", {"rule": "unfiltered"})
    assert load_transfer(transfer_folder).describe_filter() == "`unfiltered`"


def test_a_held_out_answer_without_a_number_is_named(transfer_folder, edit_config):
    edit_config("evaluation.metric", "numeric")
    with pytest.raises(TuneshiftError) as error:
        load_transfer(transfer_folder)
    for word in [str(transfer_folder / "heldout.jsonl"), "'intent_1'", "evaluation.metric", "#### "]:
        assert word in str(error.value)


@pytest.mark.parametrize("key", ["api_key_env", "api_key"])
def test_an_api_key_in_the_file_is_refused_and_not_shown(transfer_folder, edit_config, key):
    edit_config("engine", {**SERVED, "server": {"base_url": "http://a/v1", key: "sk-secret"}})
    with pytest.raises(TuneshiftError, match=f"engine.server.{key}") as error:
        load_transfer(transfer_folder)
    assert "sk-secret" not in str(error.value)


def test_a_served_source_needs_a_tokenizer_and_no_weights(transfer_folder, edit_config):
    edit_config("engine", SERVED)
    edit_config("source.base", "served/tiny-base")
    folder = transfer_folder / "served" / "tiny-base"
    folder.mkdir(parents=True)
    with pytest.raises(TuneshiftError, match=r"source.base: .*tiny-base holds no tokenizer"):
        load_transfer(transfer_folder)
    (folder / "tokenizer.json").write_text("{}")
    assert load_transfer(transfer_folder).config.engine.type == "openai"


def test_a_rule_without_its_scores_is_refused(transfer_folder, edit_config):
    edit_config("engine", {**SERVED, "cross_scores": False})
    edit_config("filter.rule", "cross_ratio")
    with pytest.raises(TuneshiftError, match=r"filter.rule 'cross_ratio' needs .*engine.cross_scores"):
        load_transfer(transfer_folder)
    edit_config("filter.rule", "both")
    edit_config("compare", {"arms": ["both", "top_excess"]})
    with pytest.raises(TuneshiftError, match=r"compare.arms: 'top_excess' needs .*engine.cross_scores"):
        load_transfer(transfer_folder)
    edit_config("compare", {})
    edit_config("distill.token_mask", 0.7)
    with pytest.raises(TuneshiftError, match=r"distill.token_mask 0.7 needs .*engine.cross_scores.*remove it"):
        load_transfer(transfer_folder)


def test_a_server_cannot_train_a_discriminator(transfer_folder, edit_config):
    edit_config("filter.discriminator", {})
    edit_config("engine", SERVED)
    with pytest.raises(TuneshiftError, match=r"filter.discriminator .*engine.type is 'openai'.*remove it, or set"):
        load_transfer(transfer_folder)
    edit_config("engine", {"type": "ray"})
    assert load_transfer(transfer_folder).config.filter.discriminator.threshold == 0.5


def test_a_discriminators_threshold_makes_no_other_discriminator(transfer_folder, edit_config):
    assert load_transfer(transfer_folder).discriminator_version() == ""
    versions = []
    for value in ({}, {"threshold": 0.2}, {"steps": 10}):
        edit_config("filter.discriminator", value)
        versions.append(load_transfer(transfer_folder).discriminator_version())
    write_jsonl(transfer_folder / "seeds.jsonl", [{"prompt": "Where is my card?"}])
    versions.append(load_transfer(transfer_folder).discriminator_version())
    assert versions[0] == versions[1] and len(set(versions)) == 3


def test_a_served_generator_is_a_name_and_no_reference(transfer_folder, edit_config):
    edit_config("generator.model", "gpt-4o")
    edit_config("generator.server", {"base_url": "https://api.openai.com/v1", "api_key_env": "OPENAI_API_KEY"})
    version = load_transfer(transfer_folder).version("generator")
    edit_config("generator.server.base_url", "https://proxy/v1")
    assert load_transfer(transfer_folder).version("generator") == version
    edit_config("generator.server.revision", "2")
    assert load_transfer(transfer_folder).version("generator") != version


def test_neither_a_cluster_nor_the_batch_size_changes_a_version(transfer_folder, edit_config):
    sections = ("engine", "models")
    versions = {load_transfer(transfer_folder).version(*sections)}
    edit_config("models.batch_size", 7)
    versions.add(load_transfer(transfer_folder).version(*sections))
    for engine in ({"type": "ray"}, {"type": "ray", "ray": {"actors": 8, "gpus_per_actor": 0.5}}):
        edit_config("engine", engine)
        versions.add(load_transfer(transfer_folder).version(*sections))
    assert len(versions) == 1


def test_what_runs_each_step(transfer_folder, edit_config):
    def ran(asset):
        transfer = load_transfer(transfer_folder)
        return transfer.models_of(asset), transfer.engine_of(asset)

    base = load_transfer(transfer_folder).config.source.base
    assert ran("filtered_dataset") == (None, None)
    assert ran("scored_pairs") == (base, "local")
    edit_config("engine", {"type": "ray", "ray": {"actors": 4, "gpus_per_actor": 0.5}})
    assert ran("scored_pairs")[1] == ran("synthetic_prompts")[1] == "ray, 4 actors × 0.5 GPU"
    edit_config("engine", SERVED)
    edit_config("target.base", "other/target")
    served, address = SERVED["base"]["model"], SERVED["server"]["base_url"]
    assert ran("scored_pairs") == (served, f"openai, 32 requests at once, {address}")
    assert ran("evaluation")[0] == f"{served}, other/target"
    assert ran("synthetic_prompts") == (load_transfer(transfer_folder).config.generator.model, "local")
    assert ran("distilled_model") == ("other/target", "local")
    edit_config("generator.server", {"base_url": "http://b/v1", "concurrency": 8})
    assert ran("synthetic_prompts")[1] == "openai, 8 requests at once, http://b/v1"


@pytest.mark.parametrize("name", ["cache", "Temp", "tuneshift"])
def test_a_name_that_the_database_has_itself_is_refused(transfer_folder, name):
    folder = transfer_folder.rename(transfer_folder.with_name(name))
    with pytest.raises(
        TuneshiftError, match=f"rename the folder: the database has something of its own named '{name}'"
    ):
        load_transfer(folder)


def test_every_bad_setting_is_named_at_once(transfer_folder, edit_config):
    edit_config("rounds", 0)
    edit_config("distill.rank", "high")
    with pytest.raises(TuneshiftError, match=r"(?s)rounds: .*\n.*distill\.rank: "):
        load_transfer(transfer_folder)


def test_the_difference_rule_allows_a_threshold_below_one(transfer_folder, edit_config):
    edit_config("filter", {"rule": "difference", "threshold": 0.5})
    assert load_transfer(transfer_folder).config.filter.threshold == 0.5


@pytest.mark.parametrize(("keep", "shared"), [(12, True), (0.5, False)])
def test_rounds_are_in_the_version_of_a_filter_that_shares_a_number_among_them(
    transfer_folder, edit_config, keep, shared
):
    edit_config("filter", {"rule": "top_excess", "keep": keep})
    before = load_transfer(transfer_folder).version("filter")
    edit_config("rounds", 3)
    assert (load_transfer(transfer_folder).version("filter") != before) == shared


def test_a_round_without_a_pair_would_end_the_loop(transfer_folder, edit_config):
    edit_config("filter", {"rule": "top_excess", "keep": 2})
    assert load_transfer(transfer_folder).config.filter.cut == 2
    edit_config("rounds", 3)
    with pytest.raises(TuneshiftError, match=r"transfer\.yaml: filter\.keep 2 leaves some of the 3 rounds"):
        load_transfer(transfer_folder)


def test_a_missing_transfer_yaml_says_what_a_transfer_is(tmp_path):
    with pytest.raises(TuneshiftError, match=r"transfer\.yaml doesn't exist.*seeds\.jsonl"):
        load_transfer(tmp_path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"source: [", "not valid YAML.*line 1"),
        (b"rounds: 2\nfilter: {}\nfilter:\n  rule: ratio", "key 'filter' is there twice; keep one of them\n.*line 3"),
        (b"filter:\n  rule: ratio\n  rule: both", "key 'rule' is there twice.*\n.*line 3"),
        (b"- a list", "must be a mapping of keys; found list"),
        (b"", "must be a mapping"),
        (b"description: caf\xe9", "UTF-8"),
    ],
)
def test_a_transfer_yaml_that_is_no_mapping_is_refused(transfer_folder, content, complaint):
    (transfer_folder / "transfer.yaml").write_bytes(content)
    with pytest.raises(TuneshiftError, match=rf"(?s)transfer\.yaml.*{complaint}"):
        load_transfer(transfer_folder)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("seeds.jsonl", b"", r"is empty\. Write at least one line of .*prompt"),
        ("seeds.jsonl", b'{"prompt": "a"}\n\n{"text": "b"}\n', r":3: 'prompt' must be a non-empty string"),
        ("seeds.jsonl", b'{"prompt": " "}\n', r":1: 'prompt' must be a non-empty string \(found ' '\)"),
        ("seeds.jsonl", b'{"prompt": "a"}\n{"prompt": \n', r":2: not valid JSON.*Write .*prompt"),
        ("seeds.jsonl", b'"a"\n', r":1: expected an object like .* found '\"a\"'"),
        ("seeds.jsonl", b'{"prompt": "caf\xe9"}\n', r"UTF-8"),
        ("heldout.jsonl", b"\n", r"is empty\..*delete an optional file"),
        ("heldout.jsonl", b'{"prompt": "a"}\n', r":1: 'response' must be a non-empty string \(found None\)"),
        ("heldout.jsonl", b'{"prompt": "a", "response": 3}\n', r":1: 'response' must be .*\(found 3\)"),
    ],
)
def test_a_bad_example_file_names_its_line_and_repair(transfer_folder, name, content, complaint):
    (transfer_folder / name).write_bytes(content)
    with pytest.raises(TuneshiftError, match=rf"(?s){name}.*{complaint}"):
        load_transfer(transfer_folder)


def test_a_missing_seeds_file_says_how_to_write_one(transfer_folder):
    (transfer_folder / "seeds.jsonl").unlink()
    with pytest.raises(TuneshiftError, match=r"seeds\.jsonl doesn't exist\. Write one line of"):
        load_transfer(transfer_folder)


def test_a_line_ends_at_a_line_feed_only(transfer_folder):
    prompt = "first\u2028second\x85third"
    (transfer_folder / "seeds.jsonl").write_text(json.dumps({"prompt": prompt}, ensure_ascii=False), "utf-8")
    assert load_transfer(transfer_folder).seeds == [prompt]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("seeds.jsonl", [{"prompt": "Where is it?"}, {"prompt": "where is it"}]),
        ("heldout.jsonl", [{"prompt": p, "response": "x"} for p in ("Where is it?", "where is it")]),
    ],
)
def test_two_examples_with_the_same_prompt_are_refused(transfer_folder, name, rows):
    write_jsonl(transfer_folder / name, rows)
    with pytest.raises(TuneshiftError, match=rf"{name}:2"):
        load_transfer(transfer_folder)


@pytest.mark.parametrize("name", ["my transfer", "my-transfer"])
def test_a_folder_name_that_cannot_name_an_asset_group_is_refused(transfer_folder, name):
    folder = transfer_folder.rename(transfer_folder.with_name(name))
    with pytest.raises(TuneshiftError, match=name):
        load_transfer(folder)


def test_an_adapter_of_another_base_is_refused(transfer_folder):
    file = transfer_folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "someone/other-base"}))
    with pytest.raises(TuneshiftError, match=r"source\.adapter: .*'someone/other-base'.*models/tiny-base.*Set source"):
        load_transfer(transfer_folder)


def test_a_pickle_adapter_is_refused(transfer_folder):
    (transfer_folder / "adapter" / "adapter_model.safetensors").rename(transfer_folder / "adapter" / "weights.bin")
    with pytest.raises(TuneshiftError, match=r"transfer\.yaml: source\.adapter: .*weights\.bin"):
        load_transfer(transfer_folder)


def test_a_version_changes_with_its_sections_alone(transfer_folder, edit_config):
    before = load_transfer(transfer_folder)
    edit_config("filter.threshold", 2.0)
    after = load_transfer(transfer_folder)
    assert after.version("filter") != before.version("filter")
    assert after.version("generator", "source.base") == before.version("generator", "source.base")
    assert before.version("filter", code=2) != before.version("filter")


def test_a_token_mask_that_is_off_leaves_versions_as_they_were_before_there_was_one(transfer_folder, edit_config):
    without = load_transfer(transfer_folder)
    assert "token_mask" not in without.config.distill.model_dump()
    edit_config("distill.token_mask", None)
    assert load_transfer(transfer_folder).version("distill") == without.version("distill")
    edit_config("distill.token_mask", 0.7)
    assert load_transfer(transfer_folder).version("distill") != without.version("distill")


def test_keys_of_a_gpu_leave_versions_as_they_were_before_there_were_any(transfer_folder, edit_config):
    models = {"batch_size": 32, "compute_dtype": "bfloat16", "quantization": "nf4"}
    distill = {
        **{"quantization": "none", "rank": 16, "alpha": 32, "dropout": 0.0, "learning_rate": 5e-4, "epochs": 5},
        **{"batch_size": 16, "balance": "none", "warmup_ratio": 0.05, "weight_decay": 0.0, "max_grad_norm": 1.0},
        **{"validation_fraction": 0.05},
    }
    parts = json.dumps([1, {"models": models, "distill": distill}], sort_keys=True)
    before = hashlib.sha256(parts.encode()).hexdigest()[:12]
    assert load_transfer(transfer_folder).version("models", "distill") == before
    for key, value in [("models.device_map", "single"), ("models.compute_dtype", "bfloat16"), ("distill.processes", 4)]:
        edit_config(key, value)
        assert load_transfer(transfer_folder).version("models", "distill") == before
    versions = {before}
    for key, value in [
        ("distill.gradient_accumulation", 4),
        ("distill.gradient_checkpointing", True),
        ("distill.optimizer", "paged_adamw_8bit"),
        ("models.compute_dtype", "float16"),
        ("models.kv_cache_dtype", "int8"),
    ]:
        edit_config(key, value)
        versions.add(load_transfer(transfer_folder).version("models", "distill"))
    assert len(versions) == 6


def test_the_adapter_version_changes_with_its_weights(transfer_folder):
    transfer = load_transfer(transfer_folder)
    before = transfer.adapter_version()
    with (transfer_folder / "adapter" / "adapter_model.safetensors").open("ab") as handle:
        handle.write(b"\0")
    assert transfer.adapter_version() != before != ""


def test_loading_a_transfer_imports_no_torch(transfer_folder):
    code = "from tuneshift_dag.config.transfer import load_transfer; load_transfer(Path(sys.argv[1]))"
    assert _is_imported("torch", code, str(transfer_folder)) is False


def test_importing_the_definitions_imports_no_torch():
    assert _is_imported("torch", "import tuneshift_dag.definitions") is False


def test_the_method_imports_no_dagster():
    names = [file.stem for file in Path(tuneshift_dag.method.__path__[0]).glob("*.py")]
    assert "scoring" in names
    imports = "\n".join(f"import tuneshift_dag.method.{name}" for name in names if name != "__init__")
    assert _is_imported("dagster", imports) is False


def _is_imported(module: str, code: str, *arguments: str) -> bool:
    """Whether running ``code`` in a fresh process imports ``module``."""
    script = f"import sys\nfrom pathlib import Path\n{code}\nprint({module!r} in sys.modules)"
    output = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    return output.stdout.strip() == "True"
