"""`tuneshift run` on tiny real models, in a process that can be killed.

Every kind of step is in it; the general text is short, and pictures are a dot. `start` forks from a process that has
imported everything, which takes longer than such a run.
"""

import json
import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import yaml

from tests.conftest import draw_quickly, write_jsonl
from tests.fakes import FakeModels
from tuneshift_dag import cli, definitions, runner
from tuneshift_dag.method.evaluation import general_texts

SETTINGS = {
    "source": {"base": "models/base", "adapter": "adapter"},
    "target": {"base": "models/target"},
    "generator": {
        "model": "models/base", "mode": "continuation", "calls_per_round": 5, "prompts_per_call": 2,
        "seeds_per_call": 2, "max_new_tokens": 160,
    },
    "prompt_template": "Q: {prompt}\nA:",
    "models": {"quantization": "none", "compute_dtype": "float32", "batch_size": 4},
    "response": {"max_new_tokens": 12},
    "filter": {"rule": "unfiltered", "allow_truncated": True},
    "rounds": 2,
    "distill": {"rank": 4, "alpha": 8, "epochs": 3, "batch_size": 2, "retain": {"texts": 6}},
    "evaluation": {"max_new_tokens": 8, "bootstrap_samples": 100},
    "diversity_map": False,
}  # fmt: skip


def make_tiny_transfer(folder: Path) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tests.families.table import tiny_checkpoint

    for name in ("base", "target"):
        config_file = tiny_checkpoint("llama", folder / "models" / name) / "config.json"
        config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "max_position_embeddings": 2048}))
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(folder / "models" / "base")
    get_peft_model(base, config).save_pretrained(folder / "adapter")
    (folder / "transfer.yaml").write_text(yaml.safe_dump(SETTINGS))
    write_jsonl(
        folder / "seeds.jsonl", [{"prompt": text} for text in ("Where is it?", "Who was that?", "Why so late?")]
    )
    write_jsonl(folder / "heldout.jsonl", [{"prompt": f"Is it {n}?", "response": "yes"} for n in range(3)])
    return folder


def start(home: Path, folder: Path, fake: bool = False) -> BaseProcess:
    """A run in a process of its own; ``fake`` for models that take no time."""
    context = multiprocessing.get_context("forkserver")
    models = [] if fake else ["tuneshift_dag.engines.local", "tuneshift_dag.training.loop"]
    context.set_forkserver_preload(["tests.reliability.whole_run", *models])
    process = context.Process(target=_run, args=(home, folder, fake))
    process.start()
    return process


def _run(home: Path, folder: Path, fake: bool) -> None:
    home.mkdir(exist_ok=True)
    names = {"TUNESHIFT_HOME": home, "DAGSTER_HOME": home / "dagster", "TUNESHIFT_CACHE": home.parent / "cache"}
    os.environ.update({name: str(path) for name, path in names.items()})
    for stream in (1, 2):
        os.dup2(os.open(home.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    little = {kind: [text[:100] for text in texts[:1]] for kind, texts in general_texts().items()}
    with pytest.MonkeyPatch.context() as patch:
        draw_quickly(patch)
        if fake:
            build, models = definitions.build_definitions, FakeModels()
            patch.setattr(
                runner, "build_definitions", lambda found, file, engines=None: build(found, file, models.resource())
            )
        patch.setattr("tuneshift_dag.assets.retention.general_texts", lambda: little)
        patch.setattr("tuneshift_dag.assets.retention.sampled_texts", lambda: little["prose"])
        patch.setattr(sys, "argv", ["tuneshift", "run", str(folder)])
        cli.main()
