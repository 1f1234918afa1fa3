"""The entry of training: what a machine can't train is said before a model is loaded, and small real trainings."""

import math
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.conftest import Project
from tuneshift_dag import TuneshiftError
from tuneshift_dag.cli.doctor import examine
from tuneshift_dag.config import Transfer
from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.config.schema import Retain
from tuneshift_dag.engines.local import LocalEngine
from tuneshift_dag.method import Side
from tuneshift_dag.method.evaluation import Retention, general_texts, retention
from tuneshift_dag.models.loading import load_tokenizer
from tuneshift_dag.models.memory import gpu_count
from tuneshift_dag.models.references import resolve_model
from tuneshift_dag.resources import EngineResource
from tuneshift_dag.training import checkpoint_file, training_problem

Edit = Callable[[str, Any], None]
PAGED = r"transfer\.yaml: distill\.optimizer: 'paged_adamw_8bit' needs CUDA.* Set it to adamw"
without_gpu = pytest.mark.skipif(gpu_count() > 0, reason="this machine can train it")


@pytest.mark.parametrize("gpus", [0, 2])
def test_the_defaults_train_anywhere(transfer_folder: Path, gpus: int) -> None:
    assert training_problem(load_transfer(transfer_folder), gpus) is None


def test_the_paged_optimizer_needs_a_gpu(transfer_folder: Path, edit_config: Edit) -> None:
    edit_config("distill.optimizer", "paged_adamw_8bit")
    transfer = load_transfer(transfer_folder)
    assert re.search(PAGED, str(training_problem(transfer, gpus=0)))
    assert training_problem(transfer, gpus=2) is None


def test_no_more_processes_than_gpus(transfer_folder: Path, edit_config: Edit) -> None:
    edit_config("distill.processes", 2)
    assert training_problem(load_transfer(transfer_folder), gpus=2) is None
    edit_config("distill.processes", 3)
    transfer = load_transfer(transfer_folder)
    assert training_problem(transfer, gpus=0) is None, "they share the CPU"
    assert "distill.processes: 3 processes need a GPU each, and PyTorch sees 2. Set it to 2" in str(
        training_problem(transfer, gpus=2)
    )


@without_gpu
def test_a_run_stops_before_its_first_step(project: Project, edit_config: Edit) -> None:
    edit_config("distill.optimizer", "paged_adamw_8bit")
    with pytest.raises(TuneshiftError, match=PAGED):
        project.run()
    assert project.models.calls() == 0
    project.materialize("seed_set")
    for round_ in project.transfer.round_keys:
        project.materialize("synthetic_prompts", "scored_pairs", "filtered_dataset", round=round_)
    before = project.models.calls()
    result = project.materialize("distilled_model")  # as the UI does
    [failed] = [event.step_failure_data.error for event in result.all_events if event.is_step_failure]
    assert re.search(PAGED, failed.to_string())
    assert project.models.calls() == before and project.models.trained == []


@without_gpu
def test_the_doctor_notes_it(transfer_folder: Path, edit_config: Edit) -> None:
    edit_config("distill.optimizer", "paged_adamw_8bit")
    [note] = [f for f in examine(transfer_folder.name, with_models=False) if f.what == "banking training"]
    assert note.ok is None and "adamw" in note.detail


def test_each_base_has_a_training_state_of_its_own(tmp_path: Path) -> None:
    """The fingerprints of an account's models begin alike, and so do those of a model's commits."""
    fingerprints = ("account/model-1B@0a1b", "account/model-3B@0a1b", "account/model-1B@0a1c", "f" * 64)
    files = [checkpoint_file(tmp_path / "models" / "id", fingerprint) for fingerprint in fingerprints]
    assert len(set(files)) == 4
    assert {file.parent for file in files} == {tmp_path / "models"}
    assert all(re.fullmatch(r"\.id-[0-9a-f]{16}\.checkpoint", file.name) for file in files)


def with_distill(transfer: Transfer, **settings: Any) -> Transfer:
    """In this process alone: others would take seconds to begin."""
    distill = transfer.config.distill.model_copy(update=settings)
    models = transfer.config.models.model_copy(update={"workers": 1})
    config = transfer.config.model_copy(update={"distill": distill, "models": models})
    return Transfer(transfer.folder, config, transfer.seeds, transfer.heldout)


def test_a_training_has_the_memory_for_itself_and_too_long_a_one_is_seen_in_general_text(tmp_path: Path) -> None:
    packaged = load_transfer(Path(__file__).parents[2] / "transfers" / "banking_intents")
    transfer = with_distill(
        packaged, epochs=8, batch_size=4, balance="none", learning_rate=3e-3, retain=Retain(weight=0)
    )
    pairs = [(prompt, f" {response}") for prompt, response in transfer.heldout[:4]]
    models, texts = EngineResource(), [kind[0] for kind in general_texts().values()]
    source = models.source(transfer)
    assert isinstance(source, LocalEngine)
    model = weakref.ref(source.model)
    del source
    losses: list[float] = []

    def on_step(step: int, total: int, loss: float) -> None:
        assert model() is None, "the source models have the memory"
        losses.append(loss)

    curve = models.distill(transfer, pairs, [], tmp_path / "adapter", on_step)
    tokenizer: Any = load_tokenizer(resolve_model(transfer.config.target.base, transfer.folder, "target.base"))
    ids = [tokenizer(response, add_special_tokens=False).input_ids for _, response in pairs]
    assert curve.response_tokens == 8 * sum(len(tokens) + 1 for tokens in ids), "with the end of each"
    assert len(losses) == 8 and all(map(math.isfinite, losses))
    trained = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(weight.abs().max() > 0 for name, weight in trained.items() if "lora_B" in name)
    assert list(tmp_path.glob(".adapter-*")) == [], "neither a state to go on from nor half an adapter is left"

    def measured(engine: LocalEngine, side: Side) -> Retention:
        tokens = [engine.encode(text, templated=True) for text in texts]
        logprobs = dict(scored for batch in engine.score([[] for _ in texts], tokens, side) for scored in batch)
        return retention(texts, tokens, [logprobs[i] for i in range(len(texts))])

    before = measured(models.target(transfer), "base")
    distilled = models.target(transfer, tmp_path / "adapter")
    assert measured(distilled, "base").perplexity == pytest.approx(before.perplexity, rel=1e-3)
    after = measured(distilled, "fine_tuned")
    assert (after.tokens, after.bytes) == (before.tokens, before.bytes)
    assert 1 < before.perplexity < 100
    assert after.perplexity > 1.5 * before.perplexity
