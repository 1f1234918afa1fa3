"""Writes ``docs/evidence_banking.md`` from a store of its own, which it fills first where it must: the closed loop on a
transfer whose base knows nothing of the skill.

    python -m benchmarks.evidence_banking [--home .tuneshift/evidence_banking]

A killed run goes on where it was, and a second one takes seconds and writes the same page.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import closed_loop, off_skill, skill_pools
from benchmarks.evidence_loops import differences, drift_tables, rounds_of, targets
from benchmarks.pages import DOCS, write_page
from tuneshift_dag import reports
from tuneshift_dag.config import Transfer
from tuneshift_dag.home import database_file
from tuneshift_dag.models import encoder
from tuneshift_dag.store import Store

ROOT = DOCS.parent
PAGE = DOCS / "evidence_banking.md"
PACKAGED = ROOT / "transfers" / "banking_intents"
CALLS, EPOCHS, EVERY = 100, 3, 2
PAIRS = 64
KNOWN = 0.05
"""Share of queries that are known to be in the skill and are allowed to be read as off it."""

HEAD = """# Evidence: the loop where the base knows nothing

Written by `python -m benchmarks.evidence_banking` from a store of its own (`--home`, by default
`.tuneshift/evidence_banking`), which it fills first; a killed one goes on. Nothing here is edited by hand.
[evidence.md](evidence.md) has the same of a transfer whose base knows much.

`banking_intents` is the other extreme: the base names no intent, so its answers differ from the fine-tuned ones
whatever the prompt, and the rule `both` keeps nearly every pair whose answer is sure. What a filter can do for the
loop here is to drop prompts that the source is unsure of.
"""

NOT_RUN = """## What was not run

- Rules other than `both`, and more pairs for each target.
"""


class NearestQuery:
    """Reads whether a prompt is a query for the support of a bank, and which intent it has: those of the held-out query
    nearest to it in meaning. It is one if it is as near as all but `KNOWN` of the queries in ``development.jsonl``."""

    def __init__(self) -> None:
        known = skill_pools.read(PACKAGED / "heldout.jsonl")
        self.intents = [row["response"] for row in known]
        self._vectors = encoder.embed([row["prompt"] for row in known])
        rows = skill_pools.read(PACKAGED / "development.jsonl")
        nearest, likeness = self._nearest([row["prompt"] for row in rows])
        self.least = float(np.quantile(likeness, KNOWN))
        named = [self.intents[place] == row["response"] for place, row in zip(nearest, rows, strict=True)]
        self.right = float(np.mean(named))
        self.queries = len(rows)

    def _nearest(self, prompts: Sequence[str]) -> tuple[Any, Any]:
        likeness = encoder.embed(prompts) @ self._vectors.T
        return likeness.argmax(1), likeness.max(1)

    def __call__(self, prompts: Sequence[str]) -> list[str | None]:
        nearest, likeness = self._nearest(prompts)
        return [self.intents[i] if near >= self.least else None for i, near in zip(nearest, likeness, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--home", type=Path, default=ROOT / ".tuneshift" / "evidence_banking", help="Its store's folder."
    )
    arguments = parser.parse_args()
    home = arguments.home.resolve()
    os.environ["TUNESHIFT_HOME"] = str(home)
    store = Store(database_file())
    loop = closed_loop.make_transfer(home / "transfers", PACKAGED, CALLS, {}, EPOCHS, PAIRS, EVERY)
    closed_loop.compare(loop)
    write_page(PAGE, ["The loop"], {"The loop": looped(store, loop, NearestQuery())}, HEAD, NOT_RUN)
    print(PAGE)


def looped(store: Store, loop: Transfer, judge: NearestQuery) -> str:
    """The section on the loops and their targets."""
    found = closed_loop.drift(store, loop, judge)
    general = off_skill.general(skill_pools.GENERAL)
    misread = sum(intent is not None for intent in judge(general))
    return f"""{rounds_of(loop)} Other rules
than `both` were left out, for time.

No rule reads these prompts, so a sentence encoder does (all-MiniLM-L6-v2). A prompt is in the skill when it is as near
to one of the {len(judge.intents)} held-out queries as {1 - KNOWN:.0%} of the {judge.queries} queries of
`development.jsonl` are: cosine {judge.least:.2f}. Of {len(general)} general questions (`benchmarks/off_skill.py`) it
takes {misread} for queries. An answer counts as right when it is the intent of that nearest query, which is itself
right for {judge.right:.0%} of the development queries: a rough measure, equally rough for every arm.

{drift_tables(found, "answer is the intent of the nearest held-out query")}
{differences(found, "kept pairs in it, with its intent", "The measure is that of evidence.md.")}
### The targets

They are measured on one query in {EVERY} of the held-out file.

{targets(loop, reports.comparison(store, loop))}"""


if __name__ == "__main__":
    main()
