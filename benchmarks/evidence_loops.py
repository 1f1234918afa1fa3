"""What evidence pages say of loops: what each filter drifts to, and the targets of what each has kept."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from benchmarks import closed_loop, off_skill, skill_pools, soft_labels
from benchmarks.pages import table
from tuneshift_dag import reports
from tuneshift_dag.config import Transfer
from tuneshift_dag.method.statistics import over_runs, share_over_runs


def rounds_of(transfer: Transfer) -> str:
    """Sentences that say what the arms of a closed loop do."""
    rounds, calls = transfer.config.rounds, transfer.config.generator.calls_per_round
    loops = len({seed for _, seed in transfer.loops})
    return f"""Each arm of `compare.loop` grows {rounds} rounds of {calls} generator calls from the
same five seeds, {loops} times with other random choices. What it keeps is all that seeds its next round
(`generator.original_seeds_per_call: 0`; the packaged transfer shows all five seeds in every call)."""


def drift_tables(found: pl.DataFrame, right: str) -> str:
    """What `closed_loop.drift` found, by arm and round; ``right`` says what makes a kept pair right."""

    def shares(arm: str, column: str) -> dict[str, str]:
        return {
            round_: ", ".join("-" if value is None else f"{value:.2f}" for value in own.sort("seed")[column])
            for (round_,), own in found.filter(pl.col("arm") == arm).group_by("round", maintain_order=True)
        }

    arms = found["arm"].unique(maintain_order=True)
    by_round = {
        column: [{"arm": f"`{arm}`", **shares(arm, column)} for arm in arms] for column in ("in_skill", "right")
    }
    counts = [
        {"arm": f"`{arm}`", "prompts": prompts, "kept": kept}
        for arm, prompts, kept in found.group_by("arm", maintain_order=True)
        .agg(pl.col("prompts").sum(), pl.col("kept").sum())
        .iter_rows()
    ]
    return f"""Share of each round's prompts that are in the skill, one figure for each loop seed:

{table(by_round["in_skill"])}
Share of each round's kept pairs whose prompt is in the skill and whose {right}:

{table(by_round["right"])}
Over all rounds and seeds:

{table(counts)}"""


def differences(found: pl.DataFrame, right: str, chosen: str) -> str:
    """Each arm of a closed loop minus `unfiltered`; ``chosen`` says how the measure was."""
    prompts = closed_loop.against_unfiltered(found, "in_skill")
    kept = closed_loop.against_unfiltered(found, "right")
    told = [
        {"arm": f"`{arm}`"}
        | {
            name: reports.interval(of[arm].value, of[arm].low, of[arm].high, "+")
            for name, of in (("prompts in the skill", prompts), (right, kept))
        }
        for arm in prompts
    ]
    clear = [arm for arm, of in prompts.items() if not of.low <= 0 <= of.high]
    return f"""Minus `unfiltered`: both shares, the mean of the rounds after the first, which what the arm kept has
seeded; paired by loop seed, 95 % for new loop seeds, corrected over the arms (Holm). {chosen}

{table(told)}
Of the prompts: {_clear(clear)}
"""


def targets(transfer: Transfer, trained: list[dict[str, Any]]) -> str:
    """The models that a comparison trained, and which of them differ from that of no filter."""
    tested = [row for row in trained if row["vs_unfiltered"] is not None]
    apart = [row["arm"] for row in tested if not row["vs_unfiltered_low"] <= 0 <= row["vs_unfiltered_high"]]
    general = {row["arm"]: row["general_text"] for row in trained}
    rows = [
        {name: value for name, value in row.items() if name != "as random"}
        | {"general text": "-" if general[row["arm"]] is None else f"{general[row['arm']]:.3f} times"}
        for row in reports.arms(trained)
    ]
    pairs = max(row["pairs"] or 0 for row in trained)
    return f"""Each arm's pairs of each seed train a target, as many pairs for every arm ({pairs}), and nothing is
rehearsed. Accuracy is on the {len(transfer.heldout)} held-out prompts, with the intervals of `tuneshift compare`;
general text is its perplexity as a multiple of the base's.

{table(rows)}
Of the targets: {_clear(apart)}
"""


def _clear(arms: Sequence[str]) -> str:
    if not arms:
        return "no arm differs from `unfiltered` by an interval that excludes zero."
    return f"clear of zero against `unfiltered`: {', '.join(f'`{arm}`' for arm in arms)}."


def drifted(pools: list[dict[str, Any]]) -> str:
    """The AUC of each rule on what loops without a filter came to."""
    rows = []
    for rules in zip(*(pool["rules"] for pool in pools), strict=True):
        values = [row["auc"] for row in rules]
        of = over_runs(np.array(values)[:, None]).interval()
        by_seed = ", ".join(f"{value:.2f}" for value in values)
        row = {"rule": f"`{rules[0]['rule']}`", "AUC by loop seed": by_seed}
        rows.append(row | {"mean": reports.interval(of.value, of.low, of.high)})
    sizes = [{name: sum(pool[name] for pool in pools) for name in ("right", "wrong", "off")}]
    return f"""The pairs that the arm `unfiltered` of step two came to by itself, guards off. Whether a prompt is in the
skill, and which code is right, is read by rule; see there. Means have 95 % intervals for new loop seeds.

{table(sizes)}
{table(rows)}"""


def steered(transfer: Transfer, found: pl.DataFrame, trained: list[dict[str, Any]]) -> str:
    """The section on what the loop drifts to under each filter, and on the targets of what each has kept."""
    others = {"general": off_skill.general(skill_pools.GENERAL), "near": off_skill.near(skill_pools.NEAR)}
    misread = " and ".join(
        f"{sum(off_skill.read_request(text) is not None for text in texts)} of {len(texts)} {name}"
        for name, texts in others.items()
    )
    chosen = "The measure was chosen after a look at three other\nloop seeds, which aren't counted."
    return f"""{rounds_of(transfer)} Whether a prompt is
in the skill is read by rule (`read_request` in `transfers/meeting_slots/slot_requests.py`: it names an event and a day
or time, and is no question). It reads the code of every one of the {len(transfer.heldout)} held-out requests, and takes
{misread} questions of step one for requests.

{drift_tables(found, "code is right")}
{differences(found, "kept pairs in it and right", chosen)}
### The targets

{targets(transfer, trained)}"""


def labels(transfer: Transfer, pairs: int, found: dict[str, dict[str, Any]]) -> str:
    """The section on the source's distributions as labels; ``found`` is what `soft_labels.compare` returns."""
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
    config = transfer.config.distill
    return f"""{pairs} of the pairs of step three that `both` keeps, {len(marks["text"])} seeds, the same training twice
(`benchmarks/soft_labels.py`; {config.epochs} epochs, learning rate {config.learning_rate:g}): on the response's text,
and on the probabilities that the source gives to its {soft_labels.TOP} likeliest tokens at each place. Both
tokenizations are cut into the shortest pieces with the same bytes; {found["text"]["alike"]:.0%} of the target's tokens
are such a piece by themselves. "Mass elsewhere" is what the labels leave to other tokens than the text's, mean over
tokens. Accuracy is on the {len(transfer.heldout)} held-out prompts; intervals are for new seeds and new prompts.

{table(rows)}
{verdict}
"""
