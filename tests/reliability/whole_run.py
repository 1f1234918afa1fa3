"""`tuneshift run` in a process that can be killed, on tiny real models or on fakes, and what came of it.

Every kind of step is in it; the general text is short, and pictures are a dot. `start` forks from a process that has
imported everything, which takes longer than such a run.
"""

import hashlib
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import draw_quickly, edit, write_jsonl
from tests.fakes import FakeModels
from tuneshift_dag import cli, definitions, runner
from tuneshift_dag.method.evaluation import general_texts
from tuneshift_dag.store import Store
from tuneshift_dag.store.cache import ResponseCache

Prepare = Callable[[pytest.MonkeyPatch], None]
"""What is otherwise in the process of a run."""
SETTINGS = {
    "source": {"base": "models/base", "adapter": "adapter"},
    "target": {"base": "models/target"},
    "generator": {
        "model": "models/base", "mode": "continuation", "calls_per_round": 5, "prompts_per_call": 2,
        "seeds_per_call": 2, "max_new_tokens": 160,
    },
    "prompt_template": "Q: {prompt}\nA:",
    "models": {"quantization": "none", "compute_dtype": "float32", "batch_size": 4, "workers": 1},
    "response": {"max_new_tokens": 12},
    "filter": {"rule": "unfiltered", "allow_truncated": True},
    "rounds": 2,
    "distill": {"rank": 4, "alpha": 8, "epochs": 3, "batch_size": 2, "retain": {"texts": 6}},
    "evaluation": {"max_new_tokens": 8, "bootstrap_samples": 100},
    "diversity_map": False,
}  # fmt: skip


# Not those of times, run ids and costs.
TABLES = """seed_set round_seeds proposals synthetic_prompts rejected_prompts scored_pairs filtered_dataset
    rejected_pairs rehearsal_set training_examples evaluations accuracy retention retention_by_kind frontier"""
_MODELS = "model_id, dataset_version, pairs, target, target_weights, settings, path, current"
LONGEST = 900.0
"""Seconds after which a run hangs."""


def make_tiny_transfer(folder: Path, **settings: Any) -> Path:
    """A transfer of tiny random Llamas; ``settings`` as in `edit`."""
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
    edit(folder, settings)
    return folder


class Undisturbed:
    """A run in one go, and what came of it. What is noted once for all runs (a model's preflight) is there before."""

    def __init__(self, root: Path, folder: Path, prepare: "Prepare") -> None:
        self.root, self.folder, self.prepare = root, folder, prepare
        finish(root / "warm", folder, prepare)
        began = time.monotonic()
        finish(root / "home", folder, prepare)
        self.seconds = time.monotonic() - began
        began = time.monotonic()
        finish(root / "home", folder, prepare)
        self.idle = time.monotonic() - began
        """Seconds of a run that has nothing to do."""
        self.outcome = outcome(root / "home", folder.name)
        assert all(self.outcome[table] for table in ("scored_pairs", "filtered_dataset", "evaluations", "adapter"))

    def finished(self, home: Path) -> str:
        """Finish what is in ``home``; what then differs from a run in one go, or empty."""
        finish(home, self.folder, self.prepare)
        return self.different(home)

    def different(self, home: Path) -> str:
        found = outcome(home, self.folder.name)
        different = [table for table, rows in self.outcome.items() if not same(rows, found[table])]
        return f"{', '.join(different)} differ: {home}" if different else ""


def _content(file: Path) -> str:
    """A file's hash; of settings without the order of lists, which PEFT makes of sets."""
    content = file.read_bytes()
    if file.suffix == ".json":
        settings = {key: sorted(v) if isinstance(v, list) else v for key, v in json.loads(content).items()}
        content = json.dumps(settings, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def outcome(home: Path, name: str) -> dict[str, Any]:
    """Rows by table, and the trained adapter's files."""
    store = Store(home / "tuneshift.duckdb")
    queries = {table: f"SELECT * FROM {table} ORDER BY ALL" for table in TABLES.split()}
    queries["models"] = f"SELECT {_MODELS} FROM distilled_models ORDER BY ALL"
    found: dict[str, Any] = {table: store.read(query, schema=name).rows() for table, query in queries.items()}
    adapters = sorted((home / "output" / name / "models").glob("*/*"))
    found["adapter"] = [(file.name, _content(file)) for file in adapters if file.is_file()]
    return found


def same(one: Any, other: Any) -> bool:
    """Up to the rounding of another batch."""
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-5)
    return bool(one == other)


def finish(home: Path, folder: Path, prepare: "Prepare") -> None:
    """Run to the end."""
    process = start(home, folder, prepare)
    ended(process)
    assert process.exitcode == 0, f"exit status {process.exitcode}: {log_of(home).read_text()[-3000:]}"


def ended(process: BaseProcess) -> None:
    """Wait for the end of a run; one that hangs is killed."""
    process.join(LONGEST)
    if process.exitcode is None:
        process.kill()
        process.join()


def refused(home: Path, process: BaseProcess, words: tuple[str, ...]) -> str:
    """What is wrong with how a run has ended that began with an empty log; empty when all went well, or it says one
    message with one of the words."""
    ended(process)
    if process.exitcode == 0:
        return ""
    said = log_of(home).read_text()
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if process.exitcode != 1 or "Traceback" in said or len(errors) != 1:
        return f"exit status {process.exitcode}: {said[-2000:]}"
    return "" if any(word in errors[0] for word in words) else f"no cause in: {errors[0]}"


def log_of(home: Path) -> Path:
    return home.with_suffix(".log")


def batches_of(home: Path) -> Path:
    """Where a run of `tiny` notes the cache keys of each batch before it commits it, a line each."""
    return home.with_suffix(".batches")


def start(home: Path, folder: Path, prepare: "Prepare") -> BaseProcess:
    """A run in a process of its own."""
    return start_process(home, _run, folder, prepare)


def start_process(home: Path, work: Callable[..., None], *arguments: Any) -> BaseProcess:
    """``work`` with TUNESHIFT_HOME at ``home``."""
    context = multiprocessing.get_context("forkserver")
    models = ["tuneshift_dag.engines.local", "tuneshift_dag.training.loop"]
    context.set_forkserver_preload(["tests.reliability.whole_run", *models])
    process = context.Process(target=_at_home, args=(home, work, *arguments))
    process.start()
    return process


def _at_home(home: Path, work: Callable[..., None], *arguments: Any) -> None:
    home.mkdir(exist_ok=True)
    names = {"TUNESHIFT_HOME": home, "DAGSTER_HOME": home / "dagster", "TUNESHIFT_CACHE": home.parent / "cache"}
    os.environ.update({name: str(path) for name, path in names.items()})
    for stream in (1, 2):
        os.dup2(os.open(log_of(home), os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    work(*arguments)


def _run(folder: Path, prepare: "Prepare") -> None:
    with pytest.MonkeyPatch.context() as patch:
        draw_quickly(patch)
        prepare(patch)
        patch.setattr(sys, "argv", ["tuneshift", "run", str(folder)])
        cli.main()


def plain(patch: pytest.MonkeyPatch) -> None:
    """As it is."""


def little(patch: pytest.MonkeyPatch) -> None:
    """One short general text of each kind."""
    texts = {kind: [text[:100] for text in texts[:1]] for kind, texts in general_texts().items()}
    patch.setattr("tuneshift_dag.assets.retention.general_texts", lambda: texts)
    patch.setattr("tuneshift_dag.assets.retention.sampled_texts", lambda: texts["prose"])


def tiny(patch: pytest.MonkeyPatch) -> None:
    """With what a short run would have none of: states of a training, and checkpoints of the store."""
    from tuneshift_dag.training import loop

    little(patch)
    patch.setattr(loop, "TrainingCheckpoint", partial(loop.TrainingCheckpoint, every=0.02))
    often = "PRAGMA disable_checkpoint_on_shutdown; SET wal_autocheckpoint = '100 kB'; SET max_vacuum_tasks = 0"
    patch.setattr("tuneshift_dag.store.file._WRITER", often)
    put, notes = ResponseCache.put, batches_of(Path(os.environ["TUNESHIFT_HOME"]))

    def noted(cache: ResponseCache, responses: dict[str, Any], scores: dict[str, float]) -> None:
        with notes.open("a") as file:
            file.write(json.dumps([*responses, *scores]) + "\n")
        put(cache, responses, scores)

    patch.setattr(ResponseCache, "put", noted)


def fake(patch: pytest.MonkeyPatch) -> None:
    """Models that take no time."""
    use_models(patch, FakeModels())


def use_models(patch: pytest.MonkeyPatch, models: FakeModels) -> None:
    little(patch)
    build = definitions.build_definitions
    patch.setattr(runner, "build_definitions", lambda found, file, engines=None: build(found, file, models.resource()))
