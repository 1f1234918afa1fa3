"""Campaigns count their cases here: each case is kept, so that a campaign that was ended goes on, and
docs/reliability.md is written from what there is."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
KEPT = ROOT / ".tuneshift" / "reliability.json"
TABLE = ROOT / "docs" / "reliability.md"
MINUTES = float(os.environ.get("TUNESHIFT_RELIABILITY_MINUTES", 60))
"""No case of a campaign is begun later than this after its first one."""
JOBS = int(os.environ.get("TUNESHIFT_JOBS", 1))
"""Cases at a time, for campaigns whose cases are processes of their own: as many as there are cores."""
HEAD = """# Reliability, counted

What `make test-reliability` counted, by campaign: cases, and how many of them ended as they must. `tests/reliability`
says what a case is; its number is its seed.

| campaign | must be | cases | as it must be | date | commit | machine |
| --- | --- | --- | --- | --- | --- | --- |
"""


def count(name: str, must: str, cases: int, run: Callable[[int], str], jobs: int = 1) -> None:
    """Run the cases of a campaign that weren't run at this commit; the words that ``run`` gives for a case say what was
    wrong, or stand in brackets when nothing was. Asserts that nothing was."""
    known = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    state = _state()
    campaign = known.get(name, {})
    if campaign.get("commit") != state:
        campaign = {"commit": state, "found": {}}
    machine = f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 1e9:.0f} GB, {platform.system()}"
    campaign |= {"must": must, "machine": machine}
    end = time.monotonic() + 60 * MINUTES
    todo = [case for case in range(cases) if str(case) not in campaign["found"]]
    with ThreadPoolExecutor(jobs) as pool:
        results = pool.map(lambda case: run(case) if time.monotonic() < end else None, todo)
        for case, said in zip(todo, results, strict=True):
            if said is None:
                continue
            campaign["found"][str(case)] = said
            _write(known | {name: campaign | {"date": f"{datetime.now(UTC):%Y-%m-%d}"}})
    assert _wrong(campaign) == {}


def _write(known: dict[str, Any]) -> None:
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(json.dumps(known, indent=1))
    TABLE.write_text(HEAD + "".join(map(_row, known.items())))


def _wrong(campaign: dict[str, Any]) -> dict[str, str]:
    return {case: said for case, said in campaign["found"].items() if said and not said.startswith("(")}


def _row(item: tuple[str, dict[str, Any]]) -> str:
    name, campaign = item
    found, wrong = campaign["found"], _wrong(campaign)
    where: dict[str, int] = {}
    for said in found.values():
        if said.startswith("("):
            where[said.strip("()")] = where.get(said.strip("()"), 0) + 1
    told = f" ({', '.join(f'{n} {place}' for place, n in sorted(where.items(), key=lambda i: -i[1]))})" if where else ""
    cells = [name, campaign["must"], f"{len(found)}{told}", str(len(found) - len(wrong))]
    return f"| {' | '.join([*cells, campaign['date'], campaign['commit'], campaign['machine']])} |\n"


def _state() -> str:
    """The commit, with a mark when the files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "tuneshift_dag", "tests")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


@pytest.fixture(scope="session")
def campaign() -> Callable[..., None]:
    return count
