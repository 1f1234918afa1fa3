"""Shared fixtures. Nothing here loads a model or reaches for the network."""

import os

# Read when huggingface_hub is imported, so it has to be set before anything imports it.
os.environ["HF_HUB_OFFLINE"] = "1"

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from tuneshift_dag.resources.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store" / "test.duckdb")


@pytest.fixture
def transfer_folder(tmp_path: Path) -> Path:
    """A minimal valid transfer folder. Its models have the right files and meaningless weights."""
    folder = tmp_path / "transfers" / "banking"
    _write_weights(folder / "models" / "tiny-base" / "model.safetensors", "config.json", {"model_type": "llama"})
    _write_weights(
        folder / "adapter" / "adapter_model.safetensors",
        "adapter_config.json",
        {"peft_type": "LORA", "base_model_name_or_path": "someone/tiny-base"},
    )
    (folder / "transfer.yaml").write_text(
        yaml.safe_dump(
            {
                "source": {"base": "models/tiny-base", "adapter": "adapter"},
                "target": {"base": "models/tiny-base"},
                "generator": {"model": "models/tiny-base", "calls_per_round": 3, "seeds_per_call": 2},
                "prompt_template": "Query: {prompt}\nIntent:",
                "rounds": 2,
            }
        )
    )
    write_jsonl(folder / "seeds.jsonl", [{"prompt": "Where is my card?"}, {"prompt": "Why was I charged twice?"}])
    write_jsonl(folder / "heldout.jsonl", [{"prompt": "Is my transfer late?", "response": "intent_1"}])
    return folder


@pytest.fixture
def edit_config(transfer_folder: Path) -> Callable[[str, Any], None]:
    """Set one dotted key of the transfer folder's ``transfer.yaml``."""

    def edit(key: str, value: Any) -> None:
        file = transfer_folder / "transfer.yaml"
        config = yaml.safe_load(file.read_text())
        section = config
        *path, last = key.split(".")
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
        file.write_text(yaml.safe_dump(config))

    return edit


def write_jsonl(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_weights(file: Path, config_name: str, config: dict[str, str]) -> None:
    file.parent.mkdir(parents=True)
    save_file({"weight": np.zeros(1, np.float32)}, file)
    (file.parent / config_name).write_text(json.dumps(config))
