"""Does the filter steer the loop? Rounds that each arm grows by itself, with the truth of each prompt by rule.

The transfer is `meeting_slots_chat` with `compare.loop`, and no seed of the user's in a later round, so that what is
kept is all that keeps the generator on the skill. Nothing is trained on these rounds here, as `tuneshift compare` does.
"""

import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import yaml

from benchmarks.off_skill import read_request
from benchmarks.skill_pools import PACKAGED
from tuneshift_dag.config import Transfer
from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.method.statistics import Interval, Mean, holm
from tuneshift_dag.runner import Runner
from tuneshift_dag.store import Store

NAME = "loop_meeting_slots"
SEEDS, ROUNDS, CALLS = 3, 4, 60


def make_transfer(transfers: Path) -> Transfer:
    folder = transfers / NAME
    folder.mkdir(parents=True, exist_ok=True)
    settings = yaml.safe_load((PACKAGED / "transfer.yaml").read_text("utf-8"))
    settings["description"] = f"{PACKAGED.name}, each filter with rounds of its own."
    settings["source"]["adapter"] = str(PACKAGED / "adapter")
    settings["generator"] |= {"calls_per_round": CALLS, "original_seeds_per_call": 0}
    settings["models"] = {"batch_size": 64, "workers": 1}
    arms = ["both", {"rule": "seed_similarity", "threshold": 0.5}]
    settings["compare"] = {"arms": arms, "loop": True, "seeds": SEEDS}
    settings |= {"rounds": ROUNDS, "diversity_map": False}
    (folder / "transfer.yaml").write_text(yaml.safe_dump(settings), "utf-8")
    for name in ("seeds.jsonl", "heldout.jsonl"):
        shutil.copy(PACKAGED / name, folder)
    return load_transfer(folder)


def grow(transfer: Transfer) -> None:
    """Run the rounds of every arm that aren't there yet."""
    with dg.DagsterInstance.ephemeral() as instance:
        for loop in transfer.loops.values():
            Runner(loop, instance, on_step=lambda asset, round_, name=loop.loop: print(name, asset, round_)).grow()


def drift(store: Store, transfer: Transfer) -> pl.DataFrame:
    """By arm, seed and round: prompts, the share of them in the skill, and the share of the pairs kept whose answer is
    that of a prompt in the skill, and right."""
    rows = []
    for (arm, seed), loop in transfer.loops.items():
        prompts = store.read("SELECT round, prompt FROM synthetic_prompts", schema=loop.name)
        kept = dict(store.read("SELECT prompt, response FROM filtered_dataset", schema=loop.name).iter_rows())
        for round_, own in prompts.sort("round").group_by("round", maintain_order=True):
            codes = {prompt: read_request(prompt) for prompt in own["prompt"]}
            right = [codes[prompt] == kept[prompt].strip() for prompt in codes if prompt in kept]
            rows.append(
                {"arm": arm, "seed": seed, "round": round_[0], "prompts": len(codes), "kept": len(right)}
                | {"in_skill": float(np.mean([code is not None for code in codes.values()]))}
                | {"right": float(np.mean(right)) if right else None}
            )
    return pl.DataFrame(rows)


def against_unfiltered(found: pl.DataFrame, column: str, round_: str) -> dict[str, Interval]:
    """Each arm's difference from `unfiltered` in a round, paired by loop seed, with its interval for new loop seeds,
    corrected over the arms (Holm)."""
    last = found.filter(pl.col("round") == round_).sort("seed")

    def values(arm: str) -> Any:
        return last.filter(pl.col("arm") == arm)[column].to_numpy()

    means = {}
    for arm in last["arm"].unique(maintain_order=True):
        if arm != "unfiltered":
            differences = values(arm) - values("unfiltered")
            count = len(differences)
            means[arm] = Mean(float(differences.mean()), float(differences.var(ddof=1)) / count, count - 1)
    return holm(means)
