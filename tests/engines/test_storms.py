"""A few of the storms that `make test-reliability` counts."""

from pathlib import Path

import pytest

from tests.fake_server import save_tokenizer
from tests.storms import weathered


@pytest.mark.parametrize("case", range(4))
def test_what_a_server_in_trouble_has_answered_is_kept(case: int, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer")
    said = weathered(case, tmp_path / "tokenizer", tmp_path)
    assert said.startswith("("), said
