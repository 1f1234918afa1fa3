"""A few of the losses of power that `make test-reliability` counts, and that the check can fail."""

import shutil
from pathlib import Path

import pytest

from tests.power_loss import lost, recorded

pytestmark = pytest.mark.skipif(not shutil.which("strace"), reason="strace isn't installed")


def test_committed_batches_outlive_a_loss_of_power(tmp_path: Path) -> None:
    events = recorded(tmp_path / "disk", 30)
    assert [lost(events, case, tmp_path / "disk") for case in range(12)] == [""] * 12
    assert any(lost(events, case, tmp_path / "disk", syncs=False) for case in range(12, 20)), "without any fsync"
