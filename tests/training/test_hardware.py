"""What a machine can't train is said before a model is loaded."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Project
from tuneshift_dag.config.transfer import load_transfer
from tuneshift_dag.errors import TuneshiftError
from tuneshift_dag.reports.doctor import examine
from tuneshift_dag.training import hardware
from tuneshift_dag.training.hardware import training_problem

Edit = Callable[[str, Any], None]
PAGED = r"transfer\.yaml: distill\.optimizer: 'paged_adamw_8bit' needs CUDA.* Set it to adamw"


@pytest.fixture(params=[0, 2])
def gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(hardware, "gpu_count", lambda: request.param)
    return int(request.param)


def test_the_defaults_train_anywhere(transfer_folder: Path, gpus: int) -> None:
    assert training_problem(load_transfer(transfer_folder)) is None


def test_the_paged_optimizer_needs_a_gpu(transfer_folder: Path, edit_config: Edit, gpus: int) -> None:
    edit_config("distill.optimizer", "paged_adamw_8bit")
    problem = training_problem(load_transfer(transfer_folder))
    assert (problem is None) == (gpus > 0)


def test_no_more_processes_than_gpus(transfer_folder: Path, edit_config: Edit, gpus: int) -> None:
    edit_config("distill.processes", 2)
    assert training_problem(load_transfer(transfer_folder)) is None
    edit_config("distill.processes", 3)
    problem = training_problem(load_transfer(transfer_folder))
    assert (problem is None) == (gpus == 0)
    assert not gpus or "distill.processes: 3 processes need a GPU each, and PyTorch sees 2. Set it to 2" in str(problem)


def test_a_run_stops_before_its_first_step(
    project: Project, edit_config: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "gpu_count", lambda: 0)
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


def test_the_doctor_notes_it(transfer_folder: Path, edit_config: Edit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "gpu_count", lambda: 0)
    edit_config("distill.optimizer", "paged_adamw_8bit")
    [note] = [f for f in examine(transfer_folder.name, with_models=False) if f.what == "banking training"]
    assert note.ok is None and "adamw" in note.detail
