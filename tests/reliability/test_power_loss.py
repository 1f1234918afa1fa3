"""As tests/store/test_power_loss.py, and more of it, with checkpoints."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.power_loss import lost, recorded

pytestmark = [
    pytest.mark.reliability,
    pytest.mark.skipif(not shutil.which("strace"), reason="strace isn't installed"),
]
LOSSES = int(os.environ.get("TUNESHIFT_POWER_LOSSES", 300))


def test_losses_of_power(tmp_path: Path, campaign: Callable[..., None]) -> None:
    events = recorded(tmp_path / "disk", 120)
    assert any(event.kind == "remove" or event.kind == "cut" for event in events), "no checkpoint is among them"

    def lose(case: int) -> str:
        said = lost(events, case, tmp_path / "disk")
        shutil.rmtree(tmp_path / f"after-{case}", ignore_errors=True)
        return said

    campaign("loss of power, writes without fsync dropped", "every batch that was committed is there", LOSSES, lose)
