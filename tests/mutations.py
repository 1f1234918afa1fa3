"""Files as they come out of a bad edit, a half download or a hostile hand: seeded, so that a number names a case."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml

from tests.conftest import edit
from tuneshift_dag import TuneshiftError
from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.config.versions import INPUTS, code_version

ODD_BYTES = b'\x00|\xff\xfe|\xef\xbb\xbf|\r|\n|\t|"|{|]|\\ud800|&a *a|!!x |: |<<: '.split(b"|")
ODD_VALUES: list[Any] = [
    None, True, 0, -1, 10**30, 1e308, float("nan"), float("inf"), "", " ", "\x00", "a/b", "../..", "~nobody/x", "/",
    "x" * 5000, "\ud800", "{prompt}", "{prompt}{prompt}", "chat", "none", "package://", "package://os/x.gguf",
    "org/name@", [], {}, [[]], [None], {"": None}, [{"a": []}], ["a", 1], "http://[", "http://a:99999",
]  # fmt: skip
# Every section of transfer.yaml, so that every validator meets a wrong value.
SECTIONS: dict[str, Any] = {
    "generator": {"model": "m", "server": {"base_url": "http://127.0.0.1:8000/v1", "api_key_env": "KEY"}},
    "engine": {"type": "ray", "ray": {"actors": 2, "gpus_per_actor": 0.5, "address": "auto"}},
    "models": {"quantization": "nf4", "batch_size": 4, "workers": 2},
    "response": {"max_new_tokens": 8, "stop": ["\n"]},
    "filter": {"rule": "ratio", "threshold": 1.5, "refusals": ["no"]},
    "distill": {"keep": 1.05, "retain": {"weight": 1, "texts": 6}, "balance": "response"},
    "evaluation": {"metric": "exact_match", "keeps_skill": 0.5},
    "compare": {"arms": ["ratio", {"rule": "difference", "threshold": 2}], "seeds": 2},
    "rounds": 2, "target_pairs": 10, "diversity_map": False, "seed": 1,
    "target": {"base": "models/sharded", "prompt": {"format": "chat", "system": "s", "arguments": {"a": 1}}},
}  # fmt: skip
# Files that have more in them than those of `make_transfer_folder`.
DETAILED: dict[str, Any] = {
    "models/tiny-base/config.json": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 9, "text_config": {"vocab_size": 9},
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    },
    "models/tiny-base/tokenizer.json": {"added_tokens": [{"id": 9, "content": "[PAD]"}], "model": {"vocab": {"a": 1}}},
    "models/tiny-base/added_tokens.json": {"[NEW]": 10},
    "models/sharded/config.json": {"model_type": "llama"},
    "models/sharded/tokenizer.json": {},
    "models/sharded/model.safetensors.index.json": {"metadata": {}, "weight_map": {"a": "model-1.safetensors"}},
    "adapter/adapter_config.json": {
        "peft_type": "LORA", "base_model_name_or_path": "someone/tiny-base", "task_type": "CAUSAL_LM", "bias": "none",
        "init_lora_weights": True, "layer_replication": None, "auto_mapping": {"base_model_class": "LlamaForCausalLM"},
    },
}  # fmt: skip


def detail(folder: Path) -> None:
    """Give a minimal transfer folder files with more to be wrong in them."""
    for name, value in DETAILED.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    shutil.copy(folder / "models/tiny-base/model.safetensors", folder / "models/sharded/model-1.safetensors")
    edit(folder, {"target.base": "models/sharded"})


def mutated_bytes(random: Random, data: bytes) -> bytes:
    for _ in range(random.choice([1, 1, 2, 5])):
        start = random.randrange(len(data) + 1)
        end = min(len(data), start + random.choice([0, 1, 1, 8, 100]))
        new = random.choice(
            [b"", data[start:end] * 2, random.randbytes(random.choice([1, 4])), random.choice(ODD_BYTES)]
        )
        data = data[:start] + new + data[end:]
    return data[: random.randrange(len(data) + 1)] if random.random() < 0.1 else data


def mutated_value(random: Random, value: Any) -> Any:
    """The value with one node of it taken out, renamed, doubled or replaced."""
    value = copy.deepcopy(value)
    nodes: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            nodes.append((node, key))
            collect(node[key])

    collect(value)
    if not nodes or random.random() < 0.03:
        return random.choice(ODD_VALUES)
    node, key = random.choice(nodes)
    change = random.random()
    if change < 0.15:
        del node[key]
    elif change < 0.3 and isinstance(node, dict):
        node[random.choice(["", "x", "model", 1, None, f"{key} "])] = node.pop(key)
    elif change < 0.4:
        node[key] = [node[key], node[key]]
    else:
        node[key] = copy.deepcopy(random.choice(ODD_VALUES))
    return value


def _yaml(random: Random, data: bytes) -> bytes:
    return yaml.safe_dump(mutated_value(random, yaml.safe_load(data)), allow_unicode=random.random() < 0.5).encode(
        errors="surrogatepass"
    )


def _json(random: Random, data: bytes) -> bytes:
    return json.dumps(mutated_value(random, json.loads(data))).encode()


def _jsonl(random: Random, data: bytes) -> bytes:
    rows = mutated_value(random, [json.loads(line) for line in data.splitlines()])
    return b"\n".join(json.dumps(row).encode() for row in (rows if isinstance(rows, list) else [rows]))


def _safetensors(random: Random, data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = _json(random, data[8 : 8 + length])
    said = random.choice([len(header)] * 4 + [0, 1, 2**31, 2**64 - 1])
    return said.to_bytes(8, "little") + header + data[8 + length :]


STRUCTURED: dict[str, Callable[[Random, bytes], bytes]] = {
    "transfer.yaml": _yaml,
    "seeds.jsonl": _jsonl,
    "heldout.jsonl": _jsonl,
    "adapter/adapter_model.safetensors": _safetensors,
    "models/tiny-base/model.safetensors": _safetensors,
    "models/sharded/model-1.safetensors": _safetensors,
    **dict.fromkeys(DETAILED, _json),
}


def loaded_or_refused(folder: Path, case: int) -> str:
    """Load the folder with the mutation ``case``, and put it right again. What else than a transfer or a
    `TuneshiftError` that names a file or key comes of it; empty for none."""
    random = Random(case)
    name = random.choice([*STRUCTURED, *["transfer.yaml"] * 6])
    file = folder / name
    sound = file.read_bytes()
    mutate = random.choice([STRUCTURED[name], mutated_bytes])
    data = sound
    if name == "transfer.yaml" and random.random() < 0.7:
        config = yaml.safe_load(sound)
        for section in random.sample(sorted(SECTIONS), random.randint(1, 3)):
            config[section] = SECTIONS[section]
        data = yaml.safe_dump(config).encode()
    try:
        file.write_bytes(mutate(random, data))
        transfer = load_transfer(folder)
        for asset in INPUTS:
            code_version(transfer, asset)
    except TuneshiftError as error:
        if str(folder) not in str(error) and "transfer.yaml" not in str(error):
            return f"case {case}, {name}: the error names no file: {error}"
    except Exception as error:
        return f"case {case}, {name}: {type(error).__name__}: {error} of {file.read_bytes()[:2000]!r}"
    finally:
        file.write_bytes(sound)
    return ""
