"""Campaigns count their cases here: each case is kept, so that a campaign that was ended goes on, and
docs/reliability.md is written from what there is."""

import json
import os
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
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
says what a case is; its number is its seed. What is counted within the cases stands in brackets.

| campaign | must be | cases | as it must be | date | commit | machine |
| --- | --- | --- | --- | --- | --- | --- |
"""


def count(name: str, must: str, cases: int, run: Callable[[int], str], jobs: int = 1, file: Path = ROOT) -> None:
    """Run the cases of a campaign that weren't run with this code; the words that ``run`` gives for a case say what was
    wrong, or stand in brackets, with commas between, when nothing was: each is counted. Asserts that nothing was.

    ``file`` says what a case is: when it or the package has changed, all cases are run anew."""
    known = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    state = _state(file)
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
    # Campaigns of other machines and commits keep their rows.
    lines = [*TABLE.read_text().removeprefix(HEAD).splitlines(True), *map(_row, known.items())]
    TABLE.write_text(HEAD + "".join({line.split(" | ")[0]: line for line in lines}.values()))


def _wrong(campaign: dict[str, Any]) -> dict[str, str]:
    return {case: said for case, said in campaign["found"].items() if said and not said.startswith("(")}


def _row(item: tuple[str, dict[str, Any]]) -> str:
    name, campaign = item
    found, wrong = campaign["found"], _wrong(campaign)
    counted: Counter[str] = Counter()
    for said in found.values():
        if said.startswith("("):
            for part in said.strip("()").split(", "):
                number, _, what = part.partition(" ")
                counted.update({what: int(number)} if what and number.isdigit() else {part: 1})
    told = f" ({', '.join(f'{number} {what}' for what, number in counted.most_common())})" if counted else ""
    cells = [name, campaign["must"], f"{len(found)}{told}", str(len(found) - len(wrong))]
    return f"| {' | '.join([*cells, campaign['date'], campaign['commit'], campaign['machine']])} |\n"


def _state(file: Path) -> str:
    """The last commit that changed the package or ``file``, with a mark when they differ from it."""

    def git(*words: str) -> str:
        command = ["git", *words, "--", "tuneshift_dag", str(file)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return git("log", "-1", "--format=%h") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


@pytest.fixture
def campaign(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`count` for the campaigns of a test's file."""
    return partial(count, file=request.path)
