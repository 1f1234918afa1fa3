"""As tests/test_mutated_inputs.py, and more of it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mutations import detail, loaded_or_refused

pytestmark = pytest.mark.reliability
CASES = int(os.environ.get("TUNESHIFT_MUTATIONS", 2000))


def test_mutated_files_are_loaded_or_refused(
    transfer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, campaign: Callable[..., None]
) -> None:
    monkeypatch.setenv("TUNESHIFT_CACHE", str(tmp_path / "cache"))
    detail(transfer_folder)
    must = "loaded, or one error that names what to repair"
    campaign("mutated input files", must, CASES, lambda case: loaded_or_refused(transfer_folder, case))
