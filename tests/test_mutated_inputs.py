"""Whatever is in a user's files, a transfer is loaded or one error names what to repair: never a traceback.

tests/reliability has 2,000 cases of it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.mutations import detail, loaded_or_refused
from tuneshift_dag import TuneshiftError
from tuneshift_dag.config.files import load_transfer


@pytest.fixture
def folder(transfer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a cache of its own: the hash of every mutated file is noted there."""
    monkeypatch.setenv("TUNESHIFT_CACHE", str(tmp_path / "cache"))
    detail(transfer_folder)
    return transfer_folder


def test_mutated_files_are_loaded_or_refused(folder: Path) -> None:
    assert [problem for case in range(200) if (problem := loaded_or_refused(folder, case))] == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{\x94}"),
        ("tokenizer.json", b'{"added_tokens": [{"id": 9}]}'),
        ("tokenizer.json", b'{"added_tokens": [{"id": "9", "content": "a"}]}'),
        ("added_tokens.json", b"[1]"),
        ("added_tokens.json", b'{"a": null}'),
    ],
)
def test_a_damaged_tokenizer_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / "models" / "tiny-base" / name).write_bytes(content)
    with pytest.raises(TuneshiftError, match=rf"transfer\.yaml: [\w.]+: .*{name}"):
        load_transfer(folder)


@pytest.mark.parametrize("key", ["source.adapter", "target.base", "evaluation.task_folder", "compare.labelled"])
def test_a_path_that_no_file_can_have_is_refused(
    folder: Path, edit_config: Callable[[str, Any], None], key: str
) -> None:
    edit_config(key, "x" * 5000)
    with pytest.raises(TuneshiftError, match=r"transfer\.yaml: .*File name too long"):
        load_transfer(folder)


def test_a_number_of_too_many_digits_is_no_json(folder: Path) -> None:
    (folder / "seeds.jsonl").write_text(json.dumps({"prompt": "a"})[:-1] + f', "n": {"9" * 5000}}}')
    with pytest.raises(TuneshiftError, match=r"seeds\.jsonl:1: not valid JSON"):
        load_transfer(folder)
