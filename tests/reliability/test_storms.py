"""As tests/engines/test_storms.py, and more of it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fake_server import save_tokenizer
from tests.storms import weathered

pytestmark = pytest.mark.reliability
STORMS = int(os.environ.get("TUNESHIFT_STORMS", 100))


def test_servers_in_trouble(tmp_path: Path, campaign: Callable[..., None]) -> None:
    save_tokenizer(tmp_path / "tokenizer")
    must = "bounded retries; answers are kept; errors name server and request"
    campaign("a server in trouble", must, STORMS, lambda case: weathered(case, tmp_path / "tokenizer", tmp_path))
