import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tuneshift_dag.method
from tests.conftest import write_jsonl
from tuneshift_dag import TuneshiftError
from tuneshift_dag.config.files import find_transfers, is_same_base, load_all, load_transfer
from tuneshift_dag.config.versions import code_version
from tuneshift_dag.method import PromptFormat

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


def test_names_that_differ_only_in_case_are_refused(transfer_folder):
    twin = shutil.copytree(transfer_folder, transfer_folder.with_name("Banking"))
    shutil.copytree(transfer_folder, transfer_folder.with_name("other"))
    for read in (lambda: find_transfers(twin.parent), lambda: load_transfer(transfer_folder)):
        with pytest.raises(TuneshiftError, match=r"banking.*differ only in case.*Rename one") as error:
            read()
        assert str(twin) in str(error.value)
    transfers, broken = load_all(twin.parent)
    assert [transfer.name for transfer in transfers] == ["other"] and broken.keys() == {"Banking", "banking"}


def test_a_broken_transfer_costs_no_other(transfer_folder, edit_config):
    other = shutil.copytree(transfer_folder, transfer_folder.with_name("other"))
    shutil.copytree(transfer_folder, transfer_folder.with_name("my-transfer"))
    edit_config("rounds", 0)
    transfers, broken = load_all(other.parent)
    assert [transfer.folder for transfer in transfers] == [other]
    assert broken.keys() == {"banking", "my-transfer"}
    assert "rounds: " in broken["banking"] and "rename the folder" in broken["my-transfer"]


def test_the_same_transfer_with_fewer_rounds_and_another_training(transfer_folder, edit_config):
    edit_config("rounds", 4)
    transfer = load_transfer(transfer_folder)
    assert transfer.with_rounds(2).round_keys == ["round_01", "round_02"]
    assert transfer.with_rounds(9).round_keys == transfer.round_keys
    variant = transfer.with_training(7, 1)
    assert (variant.config.seed, variant.config.distill.epochs) == (7, 1)
    assert (variant.seeds, variant.fingerprints) == (transfer.seeds, transfer.fingerprints)


def test_references_have_fingerprints_of_what_is_here(transfer_folder, edit_config):
    transfer = load_transfer(transfer_folder)
    values = {key: found.value for key, found in transfer.fingerprints.items()}
    assert values.keys() == {"source.base", "source.adapter", "target.base", "generator.model"}
    assert values["source.base"] == values["target.base"] != values["source.adapter"]
    edit_config("target.base", "someone/never-fetched")
    edit_config("generator", {"model": "gpt-4o", "server": {"base_url": "http://a/v1"}})
    transfer = load_transfer(transfer_folder)
    assert "generator.model" not in transfer.fingerprints
    assert transfer.fingerprints["target.base"] == ("", None)
    assert transfer.reference("target.base") == "someone/never-fetched"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("filter.treshold", 1.5, ["filter.treshold", "1.5", "correct its spelling"]),
        ("generator.format", "yaml", ["generator.format", "'yaml'", "'list', 'json' or 'blocks'"]),
        ("generator", {"model": "m", "mode": "by_response", "format": "json"}, ["generator", "'json'", "use blocks"]),
        ("generator", {"model": "m", "max_prompt_tokens": 9, "max_prompt_characters": 99}, ["9 and", "99", "remove"]),
        ("rounds", "many", ["rounds", "'many'", "valid integer"]),
        ("rounds", 0, ["rounds", "found 0", "greater than or equal to 1"]),
        ("models.quantization", "int8", ["models.quantization", "'int8'", "'nf4', 'fp4' or 'none'"]),
        ("filter", {"threshold": 0.9}, ["filter", "threshold 0.9", "'both'", "above 1"]),
        ("filter", {"threshold": 1, "rule": "ratio"}, ["filter", "threshold 1 ", "'ratio'", "above 1"]),
        ("filter", {"rule": "difference", "threshold": 0}, ["filter.threshold", "found 0", "greater than 0"]),
        ("filter", {"rule": "top_excess"}, ["filter", "'top_excess'", "needs filter.threshold", "0.5"]),
        ("filter", {"rule": "random", "keep": 2.5}, ["filter", "threshold 2.5", "'random'", "whole number"]),
        ("filter", {"rule": "random", "threshold": 2.5}, ["filter", "threshold 2.5", "'random'", "whole number"]),
        (
            "filter",
            {"rule": "random", "keep": 0.5, "threshold": 2},
            ["filter", "keep 0.5 and threshold 2", "remove one"],
        ),
        ("filter", {"rule": "unfiltered", "threshold": 2}, ["filter", "threshold 2", "'unfiltered'", "remove it"]),
        ("filter", {"keep": 0.5}, ["filter", "keep 0.5", "'both'", "remove it", "top_excess"]),
        ("filter", {"rule": "unfiltered", "keep": 0.5}, ["filter", "keep 0.5", "'unfiltered'", "remove it"]),
        ("filter", {"rule": "random", "keep": 2000}, ["filter.threshold 2000", "target_pairs 1000", "raise it"]),
        ("filter", {"rule": "top_excess", "keep": 1.0, "max_repetition": 0}, ["filter.max_repetition", "0"]),
        ("filter", {"refusals": ["no way", " "]}, ["filter", "empty phrase", "remove it"]),
        ("distill.optimizer", "sgd", ["distill.optimizer", "'sgd'", "'adamw' or 'paged_adamw_8bit'"]),
        ("distill.gradient_accumulation", 0, ["distill.gradient_accumulation", "found 0"]),
        ("models.device_map", "cuda:0", ["models.device_map", "'cuda:0'", "'auto' or 'single'"]),
        ("evaluation.metric", "numbers", ["evaluation.metric", "'numbers'", "'exact_match' or 'numeric'"]),
        ("prompt_template", "Query:", ["prompt_template", "'Query:'", "must hold {prompt} exactly once"]),
        ("prompt_template", "{prompt} {prompt}", ["prompt_template", "exactly once"]),
        ("prompt_template", "Q: {{prompt}}", ["prompt_template", "{{prompt}}", "write {prompt}"]),
        ("prompt_template", "{system}\n{prompt}", ["prompt_template", "{system}", "there is no system message"]),
        ("prompt_template", None, ["neither prompt_template nor source.prompt"]),
        ("source.prompt", "chat", ["prompt_template 'Query: {prompt}", "source.prompt", "remove one"]),
        ("target.prompt", "Chat", ["target.prompt", "{prompt} exactly once", "the word chat", "'Chat'"]),
        ("target.prompt", ["chat"], ["target.prompt", "['chat']"]),
        ("target.prompt", {"system": "Be brief."}, ["target.prompt.format", "missing"]),
        ("target.prompt", {"format": "chatml"}, ["target.prompt.format", "'chatml'", "'raw' or 'chat'"]),
        ("target.prompt", {"format": "raw"}, ["target.prompt", "{prompt} exactly once"]),
        ("target.prompt", {"format": "chat", "template": "{prompt}"}, ["target.prompt", "'{prompt}'", "remove it"]),
        ("target.prompt", {"format": "chat", "sytem": "x"}, ["target.prompt.sytem", "correct its spelling"]),
        ("target.prompt", {"format": "chat", "arguments": {"tokenize": True}}, ["target.prompt", "arguments tokenize"]),
        ("target.prompt", {"format": "raw", "template": "{prompt}", "system": "x"}, ["target.prompt", "put {system}"]),
        ("target.prompt", "{system} {prompt}", ["target.prompt", "holds {system}", "source.prompt.system"]),
        (
            "target.prompt",
            {"format": "raw", "template": "{prompt}", "arguments": {"a": 1}},
            ["target.prompt", "arguments are for format: chat"],
        ),
        (
            "source",
            {"base": "models/tiny-base"},
            ["source: needs source.adapter", "source.fine_tuned", "neither is given"],
        ),
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
        ("engine", {"vllm": {}}, ["engine", "vllm has no meaning", "'local'", "set type: vllm"]),
        ("engine", {"type": "vllm", "base": {"model": "base"}}, ["engine", "base must be given with type 'openai'"]),
        (
            "engine",
            {"type": "vllm", "vllm": {"extra_args": ["--host=0.0.0.0", "--max_num_seqs", "8"]}},
            ["engine.vllm.extra_args", "--host: set by the run", "127.0.0.1", "remove it"],
        ),
        ("generator.server", {"type": "vllm", "tensor_parallel_size": 0}, ["generator.server.tensor_par", "found 0"]),
        ("generator.server", {"type": "sglang"}, ["generator.server", "type 'sglang' is none of openai, vllm"]),
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
        *(
            (
                "generator.server",
                {"base_url": f"http://{host}/v1", "api_key_env": "KEY"},
                ["https", "allow_insecure: true"],
            )
            for host in (
                "10.0.0.5:8000",
                "127.0.0.1.evil.com",
                "localhost.evil.com",
                "[fe80::1]",
                "0.0.0.0",
                "2130706433",
            )
        ),
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


def prompt_formats(folder: Path) -> tuple[PromptFormat, PromptFormat]:
    config = load_transfer(folder).config
    return config.source_format, config.target_format


def test_each_model_is_asked_in_its_own_format(transfer_folder, edit_config):
    both = PromptFormat("Query: {prompt}\nIntent:")
    assert prompt_formats(transfer_folder) == (both, both)
    edit_config("target.prompt", "chat")
    assert prompt_formats(transfer_folder) == (both, PromptFormat())
    edit_config("prompt_template", None)
    edit_config("source.prompt", {"format": "chat", "system": "Be brief.", "arguments": {"enable_thinking": False}})
    chat = PromptFormat(system="Be brief.", arguments={"enable_thinking": False})
    assert prompt_formats(transfer_folder) == (chat, PromptFormat())
    edit_config("target.prompt", None)
    source, target = prompt_formats(transfer_folder)
    assert source == target == chat, "by default the same messages"
    assert (source.key, target.key) == ("source.prompt", "target.prompt")
    edit_config("target.prompt", "{system}\n{prompt}\n")
    assert str(prompt_formats(transfer_folder)[1]) == "Be brief.\n{prompt}\n"
    edit_config("source.prompt", both.template)
    edit_config("target.prompt", None)
    assert prompt_formats(transfer_folder) == (both, both)


def with_systems(folder: Path, *systems: str | None) -> None:
    seeds = [{"prompt": "Where is my card?"}, {"prompt": "Why was I charged twice?"}]
    rows = [*seeds, {"prompt": "Is my transfer late?", "response": "intent_1"}]
    rows = [row if own is None else {**row, "system": own} for row, own in zip(rows, systems, strict=True)]
    write_jsonl(folder / "seeds.jsonl", rows[:2])
    write_jsonl(folder / "heldout.jsonl", rows[2:])


def test_the_system_message_of_the_examples_is_the_transfers(transfer_folder, edit_config):
    edit_config("prompt_template", "{system}\n{prompt}:")
    with_systems(transfer_folder, "Sort.", "Sort.", "Sort.")
    assert [str(format) for format in prompt_formats(transfer_folder)] == ["Sort.\n{prompt}:"] * 2
    before = code_version(load_transfer(transfer_folder), "scored_pairs")
    with_systems(transfer_folder, "Sort!", "Sort!", "Sort!")
    assert code_version(load_transfer(transfer_folder), "scored_pairs") != before
    edit_config("prompt_template", None)
    edit_config("source.prompt", "chat")
    edit_config("target.prompt", "{prompt}:")
    assert prompt_formats(transfer_folder) == (PromptFormat(system="Sort!"), PromptFormat("{prompt}:"))


@pytest.mark.parametrize(
    ("systems", "prompt", "words"),
    [
        (
            ["Sort.", "Sort.", "Weigh."],
            "chat",
            ["heldout.jsonl:1", "'Weigh.'", "'Sort.'", "seeds.jsonl:1", "every line"],
        ),
        (["Sort.", None, "Sort."], "chat", ["seeds.jsonl:2", "None here", "'Sort.'"]),
        ([None, None, "Sort."], "chat", ["heldout.jsonl:1", "'Sort.' here"]),
        (
            ["Sort."] * 3,
            {"format": "chat", "system": "Weigh."},
            ["seeds.jsonl:1", "source.prompt.system", "Remove one"],
        ),
        (["Sort."] * 3, "{prompt}", ["seeds.jsonl:1", "put {system} into the template", "source.prompt"]),
        ([7, 7, 7], "chat", ["seeds.jsonl:1", "must be a string", "7"]),
        (["\ud83d"] * 3, "chat", ["seeds.jsonl:1", "'system'"]),
    ],
)
def test_a_system_message_that_can_t_be_shown_is_named(transfer_folder, edit_config, systems, prompt, words):
    edit_config("prompt_template", None)
    edit_config("source.prompt", prompt)
    with_systems(transfer_folder, *systems)
    with pytest.raises(TuneshiftError) as error:
        load_transfer(transfer_folder)
    for word in words:
        assert word in str(error.value)


def test_seeds_of_several_lines_choose_the_format_and_the_limit(transfer_folder, edit_config):
    assert (load_transfer(transfer_folder).generator_format, load_transfer(transfer_folder).max_prompt_characters) == (
        "list",
        300,
    )
    write_jsonl(transfer_folder / "seeds.jsonl", [{"prompt": "Hi"}, {"prompt": "\n  Fix:\n    x\n\n"}])
    transfer = load_transfer(transfer_folder)
    assert transfer.seeds == ["Hi", "  Fix:\n    x"]
    assert (transfer.generator_format, transfer.max_prompt_characters) == ("blocks", None)
    edit_config("generator.max_prompt_characters", 300)
    assert load_transfer(transfer_folder).max_prompt_characters == 300
    edit_config("generator.format", "json")
    assert load_transfer(transfer_folder).generator_format == "json"
    edit_config("generator.format", "list")
    with pytest.raises(TuneshiftError, match=r"seeds.jsonl:2: .*several lines .*generator.format 'list'.* blocks or"):
        load_transfer(transfer_folder)


def test_long_seeds_lift_the_limit_in_characters(transfer_folder, edit_config):
    write_jsonl(transfer_folder / "seeds.jsonl", [{"prompt": "Why? " * 61}])
    assert load_transfer(transfer_folder).max_prompt_characters is None
    edit_config("generator.max_prompt_characters", 200)
    assert load_transfer(transfer_folder).max_prompt_characters == 200


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


def test_an_api_key_among_vllms_arguments_is_refused_and_not_shown(transfer_folder, edit_config):
    edit_config("engine", {"type": "vllm", "vllm": {"extra_args": ["--api-key", "sk-secret"]}})
    with pytest.raises(TuneshiftError, match=r"engine.vllm.extra_args: --api-key: set by the run") as error:
        load_transfer(transfer_folder)
    assert "sk-secret" not in str(error.value)


@pytest.mark.parametrize(
    "server",
    [{"base_url": f"http://{host}/v1"} for host in ("localhost:1", "127.0.0.1", "127.8.0.1:80", "[::1]:8000")]
    + [{"base_url": "https://a/v1"}, {"base_url": "http://a/v1", "allow_insecure": True}],
)
def test_a_key_may_go_to_this_machine_or_encrypted_or_where_that_is_allowed(transfer_folder, edit_config, server):
    edit_config("generator.server", {**server, "api_key_env": "KEY"})
    assert load_transfer(transfer_folder).config.generator.server.api_key_env == "KEY"


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
    assert load_transfer(transfer_folder).config.engine.cross_scores is False


def test_rules_that_rank_take_a_threshold_where_each_arm_has_rounds_of_its_own(transfer_folder, edit_config):
    arms = ["both", {"rule": "top_excess", "threshold": 0.25}, "seed_similarity"]
    edit_config("compare", {"arms": arms})
    with pytest.raises(TuneshiftError, match=r"'top_excess' takes compare.pairs and no threshold"):
        load_transfer(transfer_folder)
    edit_config("compare", {"arms": arms, "loop": True, "seeds": 2})
    loops = load_transfer(transfer_folder).loops
    filters = {name: loop.config.filter for name, loop in loops.items()}
    assert {name: own.threshold for (name, run), own in filters.items() if run == 1} == {
        "both": 1.5, "top_excess 0.25": 0.25, "seed_similarity": 0.5, "random": 1, "unfiltered": 1,
    }  # fmt: skip
    assert {run: loops["random", run].config.seed for run in (0, 1)} == {0: 0, 1: 1}
    assert len({loop.name for loop in loops.values()}) == len(loops) == 10
    assert all(re.fullmatch(r"banking__\w+", loop.name) for loop in loops.values())
    for threshold, problem in (
        (1.5, "1.5 is impossible for rule 'top_excess'"),
        (2, "top_excess: 2 leaves some of the 3"),
    ):
        edit_config("compare", {"arms": [{"rule": "top_excess", "threshold": threshold}], "loop": True})
        edit_config("rounds", 3)
        with pytest.raises(TuneshiftError, match=problem):
            load_transfer(transfer_folder)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_not_every_library_takes_is_refused(transfer_folder, edit_config, seed: int) -> None:
    edit_config("seed", seed)
    with pytest.raises(TuneshiftError, match=rf"transfer.yaml.*seed.*{seed}"):
        load_transfer(transfer_folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("filter.target", "avoid_easy"),
        ("filter.target_share", 0.25),
        ("filter.discriminator", {"threshold": 0.5}),
        ("filter.discriminator", {}),
        ("distill.token_mask", 0.7),
        ("distill.token_mask", None),
        ("distill.prompt_weight", 0.1),
        ("filter.rule", "ifd"),
        ("compare", {"arms": [{"rule": "ifd", "threshold": 0.7}]}),
        ("response.samples", 0),
        ("response", {"samples": 8, "temperature": 1.0, "top_p": 0.9, "agreement": 0.5}),
        ("response.agreement", 0.5),
    ],
)
def test_what_was_taken_out_is_named_with_the_reason(transfer_folder, edit_config, key, value):
    edit_config(key, value)
    with pytest.raises(TuneshiftError) as error:
        load_transfer(transfer_folder)
    (line,) = str(error.value).splitlines()
    key = "response.samples" if key == "response.agreement" else key
    for word in [str(transfer_folder / "transfer.yaml"), key, "was taken out", "docs/experiments.md", "remove it"]:
        assert word in line
    assert not key.startswith("response") or "lower filter.threshold" in line


@pytest.mark.parametrize(
    ("settings", "threshold"),
    [
        ({}, 1.5),
        ({"rule": "difference", "threshold": 0.5}, 0.5),
        ({"rule": "random", "keep": 0.5}, 0.5),
        ({"rule": "top_excess", "threshold": 12}, 12),
        ({"rule": "top_excess", "threshold": 0.25, "keep": None}, 0.25),
        ({"rule": "unfiltered"}, 1),
    ],
)
def test_threshold_is_the_one_name_of_a_cut(transfer_folder, edit_config, settings, threshold):
    edit_config("filter", settings)
    assert load_transfer(transfer_folder).config.filter.threshold == threshold


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


def test_a_round_without_a_pair_would_end_the_loop(transfer_folder, edit_config):
    edit_config("filter", {"rule": "top_excess", "keep": 2})
    assert load_transfer(transfer_folder).config.filter.threshold == 2
    edit_config("rounds", 3)
    with pytest.raises(TuneshiftError, match=r"transfer\.yaml: filter\.threshold 2 leaves some of the 3 rounds"):
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
        (b"? [a]\n: b", "not valid YAML.*unhashable"),
        (b"description: 2024-13-45", "not valid YAML.*month"),
        (b"[" * 2000, "not valid YAML.*recursion"),
        (rb'description: "cut \ud83d"', r"not valid YAML: '\\ud83d' is half of a character.*line 1, column 14"),
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
        ("seeds.jsonl", b'{"prompt": "a"}\n\n{"text": "b"}\n', r":3: 'prompt' must be a .* \(found {'text': 'b'}\)"),
        ("seeds.jsonl", b'{"prompt": " "}\n', r":1: 'prompt' must be a non-empty string \(found ' '\)"),
        ("seeds.jsonl", b'{"prompt": "a"}\n{"prompt": \n', r":2: not valid JSON.*Write .*prompt"),
        ("seeds.jsonl", b'"a"\n', r":1: expected an object like .* found '\"a\"'"),
        ("seeds.jsonl", b'{"prompt": "caf\xe9"}\n', r"UTF-8"),
        ("seeds.jsonl", b'{"prompt": NaN}\n', r":1: 'prompt' must be a non-empty string \(found nan\)"),
        ("seeds.jsonl", b"[" * 100_000 + b"\n", r":1: not valid JSON.*Write .*prompt"),
        ("seeds.jsonl", b"1" * 5000 + b"\n", r":1: not valid JSON"),
        ("seeds.jsonl", rb'{"prompt": "cut \ud83d"}', r":1: 'prompt': '\\ud83d' is half of a character.*remove it"),
        ("heldout.jsonl", rb'{"prompt": "a", "response": "\udc00"}', r":1: 'response': '\\udc00' is half"),
        ("heldout.jsonl", b"\n", r"is empty\..*delete an optional file"),
        ("heldout.jsonl", b'{"prompt": "a"}\n', r":1: 'response' must be a non-empty string \(found {'prompt': 'a'}\)"),
        ("heldout.jsonl", b'{"prompt": "a", "response": 3}\n', r":1: 'response' must be .*\(found 3\)"),
    ],
)
def test_a_bad_example_file_names_its_line_and_repair(transfer_folder, name, content, complaint):
    (transfer_folder / name).write_bytes(content)
    with pytest.raises(TuneshiftError, match=rf"(?s){name}.*{complaint}") as error:
        load_transfer(transfer_folder)
    assert len(str(error.value)) < 1000


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


@pytest.mark.parametrize(
    "named",
    [
        "someone/Tiny-Base",
        "someone/tiny-base@v1",
        "/data/models/tiny-base/",
        "D:\\models\\tiny-base",
        "D:\\models\\tiny-base\\",
        "/home/me/.cache/huggingface/hub/models--someone--tiny-base/snapshots/0123abcd",
        "C:\\Users\\me\\hub\\models--someone--tiny-base\\snapshots\\0123abcd\\",
        "package://tiny-base",
    ],
)
def test_a_base_is_the_same_by_its_last_name(named):
    assert is_same_base(named, "models/tiny-base")
    assert not is_same_base(named, "models/snapshots")
    assert not is_same_base(named, "models/other")


@pytest.mark.parametrize("name", ["seeds.jsonl", "heldout.jsonl", "labelled.jsonl"])
def test_an_example_with_a_token_that_the_model_has_no_embedding_of_is_named(transfer_folder, edit_config, name):
    write_jsonl(transfer_folder / "labelled.jsonl", [{"prompt": "Who?", "response": "me"}])
    edit_config("compare", {"labelled": "labelled.jsonl"})
    model = transfer_folder / "models" / "tiny-base"
    (model / "config.json").write_text('{"model_type": "llama", "vocab_size": 9}')
    (model / "tokenizer.json").write_text('{"added_tokens": [{"id": 9, "content": "[PAD]"}]}')
    assert load_transfer(transfer_folder).seeds, "no example holds it"
    write_jsonl(transfer_folder / name, [{"prompt": "What does [PAD] mean?", "response": "nothing"}])
    with pytest.raises(TuneshiftError, match=rf"{name}: 'What does \[PAD\] mean\?' holds the token '\[PAD\]'.*source"):
        load_transfer(transfer_folder)


def test_a_pickle_adapter_is_refused(transfer_folder):
    (transfer_folder / "adapter" / "adapter_model.safetensors").rename(transfer_folder / "adapter" / "weights.bin")
    with pytest.raises(TuneshiftError, match=r"transfer\.yaml: source\.adapter: .*weights\.bin"):
        load_transfer(transfer_folder)


def test_loading_a_transfer_imports_no_torch(transfer_folder):
    code = "from tuneshift_dag.config.files import load_transfer; load_transfer(Path(sys.argv[1]))"
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


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("rounds", True, "rounds true is no number"),
        ("distill.keep", True, "keep true is no number"),
        ("distill.learning_rate", False, "learning_rate false is no number"),
        ("distill.learning_rate", math.inf, "learning_rate"),
        ("models.workers", True, "workers true is no number"),
        ("generator.calls_per_round", 10**30, "calls_per_round"),
        ("evaluation.bootstrap_samples", 10**13, "bootstrap_samples"),
    ],
)
def test_what_is_no_number_or_too_large_a_one_is_refused(transfer_folder, edit_config, key, value, words) -> None:
    edit_config(key, value)
    with pytest.raises(TuneshiftError, match=words):
        load_transfer(transfer_folder)


def test_keys_may_be_merged_and_given_anew_but_not_twice(transfer_folder) -> None:
    file = transfer_folder / "transfer.yaml"
    text = file.read_text()
    file.write_text(f"{text}models: &m {{<<: &a {{workers: 1}}, workers: 2}}\n")
    assert load_transfer(transfer_folder).config.models.workers == 2
    body = "{<<: &b {x: 1}, x: 2}"
    server = "server: {base_url: 'http://127.0.0.1:1'}"
    engine = f"engine: {{type: openai, {server}, base: {{model: b, extra_body: &c {body}}},"
    file.write_text(f"{text}{engine} fine_tuned: {{model: f, extra_body: {{<<: *c}}}}}}\n")
    assert load_transfer(transfer_folder).config.engine.fine_tuned.extra_body == {"x": 2}
    file.write_text(f"{text}models: {{workers: 1, workers: 2}}\n")
    with pytest.raises(TuneshiftError, match="'workers' is there twice"):
        load_transfer(transfer_folder)


def test_a_link_to_a_transfer_beside_it_is_that_one(transfer_folder) -> None:
    (transfer_folder.parent / "linked").symlink_to(transfer_folder.name)
    transfers, broken = load_all(transfer_folder.parent)
    assert ([transfer.name for transfer in transfers], broken) == (["banking"], {})
    assert load_transfer(transfer_folder.parent / "linked").name == "banking"
