"""Writes ``docs/evidence_banking.md`` from a store of its own, which it fills first where it must: the closed loop on a
transfer whose base knows nothing of the skill and, with ``--labels``, targets that learn the source's token
distributions.

    python -m benchmarks.evidence_banking [--home .tuneshift/evidence_banking] [--labels]

A killed run goes on where it was, and a second one takes seconds and writes the same page.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks import closed_loop, off_skill, skill_pools, soft_labels
from benchmarks.evidence import ROOT, differences, drift_tables, rounds_of, table, targets
from tuneshift_dag import reports
from tuneshift_dag.config import Transfer
from tuneshift_dag.home import database_file
from tuneshift_dag.method.statistics import over_runs, share_over_runs
from tuneshift_dag.models import encoder
from tuneshift_dag.store import Store

PAGE = ROOT / "docs" / "evidence_banking.md"
PACKAGED = ROOT / "transfers" / "banking_intents"
CALLS, EPOCHS, EVERY = 100, 3, 2
LOOP_PAIRS, LABELLED_PAIRS = 64, 160
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

- Training on the source's token distributions: `python -m benchmarks.evidence_banking --labels`.
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
    parser.add_argument("--labels", action="store_true", help="Train on the source's token distributions, too.")
    arguments = parser.parse_args()
    home = arguments.home.resolve()
    os.environ["TUNESHIFT_HOME"] = str(home)
    store = Store(database_file())
    loop = closed_loop.make_transfer(home / "transfers", PACKAGED, CALLS, {}, EPOCHS, LOOP_PAIRS, EVERY)
    closed_loop.compare(loop)
    sections = [HEAD, looped(store, loop, NearestQuery())]
    sections.append(labels(loop, soft_labels.compare(loop, kept(store, loop), home)) if arguments.labels else NOT_RUN)
    PAGE.write_text("\n".join(sections), "utf-8")
    print(PAGE)


def looped(store: Store, loop: Transfer, judge: NearestQuery) -> str:
    """The section on the loops and their targets."""
    found = closed_loop.drift(store, loop, judge)
    general = off_skill.general(skill_pools.GENERAL)
    misread = sum(intent is not None for intent in judge(general))
    return f"""## The loop

{rounds_of(loop)} Other rules
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


def kept(store: Store, loop: Transfer) -> pl.DataFrame:
    """`LABELLED_PAIRS` of what `both` kept in all its loops: those of the lowest prompt ids, which are hashes."""
    own = [of for (arm, _), of in loop.loops.items() if arm == "both"]
    columns = "prompt_id, prompt, response"
    pairs = pl.concat([store.read(f"SELECT {columns} FROM filtered_dataset", schema=of.name) for of in own])
    return pairs.unique("prompt_id").sort("prompt_id").head(LABELLED_PAIRS)


def labels(loop: Transfer, found: dict[str, dict[str, Any]]) -> str:
    """The section on the source's distributions as labels."""
    marks = {name: np.array(own["marks"], np.float64) for name, own in found.items()}
    apart = over_runs(marks["distribution"] - marks["text"]).interval()
    told = {"distribution": reports.interval(apart.value, apart.low, apart.high, "+")}
    rows = []
    for name, own in marks.items():
        share = share_over_runs(own)
        row = {"labels": name, "runs": len(own), "accuracy": reports.interval(share.value, share.low, share.high)}
        rows.append(row | {"minus text": told.get(name, "-"), "mass elsewhere": f"{found[name]['elsewhere']:.3f}"})
    verdict = (
        "The interval favours the distributions."
        if apart.low > 0
        else "The interval doesn't favour the distributions, so the product trains on text alone."
    )
    config = loop.config.distill
    return f"""## The source's token distributions as labels

{LABELLED_PAIRS} pairs that `both` kept, {len(marks["text"])} training seeds, the same training twice
(`benchmarks/soft_labels.py`; {config.epochs} epochs, learning rate {config.learning_rate:g}): on the response's text,
and on the probabilities that the source gives to its {soft_labels.TOP} likeliest tokens at each place. Both
tokenizations are cut into the shortest pieces with the same bytes; {found["text"]["alike"]:.0%} of the target's tokens
are such a piece by themselves. "Mass elsewhere" is what the labels leave to other tokens than the text's, mean over
tokens. Accuracy is on the {len(loop.heldout)} held-out queries; intervals are for new training seeds and new queries.

{table(rows)}
{verdict}
"""


if __name__ == "__main__":
    main()
