"""A file system that is full or can't be written: one message, nothing committed lost, and a run after the repair ends
as one that met nothing. A small tmpfs stands for the disk, so this needs root."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import make_transfer_folder
from tests.reliability.whole_run import (
    Undisturbed,
    fake,
    finish,
    log_of,
    make_tiny_transfer,
    outcome,
    same,
    start,
    tiny,
)
from tests.reliability.whole_run import refused as told
from tuneshift_dag.store import Store

pytestmark = [
    pytest.mark.reliability,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system"),
]
FULL = int(os.environ.get("TUNESHIFT_FULL_DISKS", 12))
FULL_WORDS = ("No space left", "disk is full", "disk I/O error", "Could not write")


@contextmanager
def disk(folder: Path, size: int) -> Iterator[Callable[[str], None]]:
    """A file system of its own at ``folder``, and what mounts it again with another size or otherwise."""

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", folder], check=True)

    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield remount
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def refused(home: Path, folder: Path, words: tuple[str, ...]) -> str:
    """What is wrong with how a run ends; empty when it is one message with one of the words, or all went well."""
    log_of(home).unlink(missing_ok=True)
    return told(home, start(home, folder, fake), words)


def test_a_full_disk_costs_what_was_not_committed(tmp_path: Path, campaign: Callable[..., None]) -> None:
    folder = make_transfer_folder(tmp_path)
    finish(tmp_path / "home", folder, fake)
    whole, needed = outcome(tmp_path / "home", "banking"), size_of(tmp_path / "home")

    def fill(case: int) -> str:
        home = tmp_path / f"full{case}"
        with disk(home, int(needed * (case + 0.5) / FULL)) as remount:
            if problem := refused(home, folder, FULL_WORDS):
                return problem
            kept = scores(home)
            remount("size=1g")
            if scores(home) < kept:
                return "committed rows are gone"
            finish(home, folder, fake)
            found = outcome(home, "banking")
        return ", ".join(table for table, rows in whole.items() if not same(rows, found[table]))

    campaign("full disk", "one message; a run after the repair ends as one in one go", FULL, fill)


def test_a_full_disk_under_models_that_are_real(tmp_path: Path, campaign: Callable[..., None]) -> None:
    """Home, cache and temporary files on one disk: also states of a training, the adapter, and what is noted of
    models."""
    folder = make_tiny_transfer(tmp_path / "tiny", **{"models.quantization": "nf4"})
    (tmp_path / "whole").mkdir()
    undisturbed = Undisturbed(tmp_path / "whole", folder, on_one_disk)
    shutil.rmtree(tmp_path / "whole" / "warm")
    needed = size_of(tmp_path / "whole")

    def fill(case: int) -> str:
        with disk(tmp_path / f"full{case}", int(needed * (case + 0.5) / FULL)) as remount:
            home = tmp_path / f"full{case}" / "home"
            process = start(home, folder, on_one_disk)
            if problem := told(home, process, FULL_WORDS):
                return problem
            kept = scores(home)
            remount("size=1g")
            return "committed rows are gone" if scores(home) < kept else undisturbed.finished(home)

    must = "one message; a run after the repair ends as one in one go"
    campaign("full disk under real models, cache and temporary files", must, FULL, fill)


def on_one_disk(patch: pytest.MonkeyPatch) -> None:
    """A tiny real run with its temporary files beside its home."""
    tiny(patch)
    folder = Path(os.environ["TUNESHIFT_HOME"]).parent / "tmp"
    folder.mkdir(exist_ok=True)
    patch.setattr(tempfile, "tempdir", str(folder))


@pytest.mark.parametrize("place", ["home", "cache"])
def test_a_disk_that_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    folder = make_transfer_folder(tmp_path)
    with disk(tmp_path / place, 10**9) as remount:
        finish(tmp_path / "home", folder, fake)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        (folder / "seeds.jsonl").write_text('{"prompt": "Another?"}\n')
        remount("ro")
        assert refused(tmp_path / "home", folder, ("Read-only", "Permission denied")) == ""
        remount("rw")
        finish(tmp_path / "home", folder, fake)


def scores(home: Path) -> int:
    if not (home / "tuneshift.duckdb").exists():
        return 0
    return int(Store(home / "tuneshift.duckdb").read("SELECT count(*) FROM cache.scores").item())


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
