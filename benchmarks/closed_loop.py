"""Does the filter steer the loop, and make a better target? Rounds that each arm grows by itself, with the truth of
each prompt by rule, and targets trained on what each has kept.

The transfer is a packaged one with `compare.loop`, and no seed of the user's in a later round, so that what is kept is
all that keeps the generator on the skill. Nothing is rehearsed in the trainings: that takes most of their time.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import yaml

from benchmarks.off_skill import read_request
from benchmarks.skill_pools import PACKAGED, read, without_guards, write
from tuneshift_dag.config import Transfer
from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.method.statistics import Interval, holm, over_runs
from tuneshift_dag.reports.truth import sweep_truth
from tuneshift_dag.runner import Runner
from tuneshift_dag.store import Store
from tuneshift_dag.store.queries import of_its_rounds

SEEDS, ROUNDS, CALLS = 5, 3, 60
RIVALS: dict[str, float] = {"surprise_ratio": 40.0, "seed_similarity": 0.5}
FIRST_SEED = 100
"""The measures were chosen after a look at loops with seeds 0 to 2, which are therefore not counted."""
Judge = Callable[[Sequence[str]], Sequence[str | None]]
"""The right answer of each prompt; None for one off the skill."""


def make_transfer(
    transfers: Path,
    packaged: Path = PACKAGED,
    calls: int = CALLS,
    rivals: Mapping[str, float] = RIVALS,
    epochs: int = 4,
    pairs: int | None = None,
    every: int = 1,
) -> Transfer:
    """A packaged transfer whose arms grow their own rounds, each of ``calls`` generator calls: `both`, and rules with
    their thresholds. Targets are trained on ``pairs``, or on as many as the arm with the fewest has, and measured on
    one held-out prompt in ``every``."""
    folder = transfers / f"loop_{packaged.name}"
    folder.mkdir(parents=True, exist_ok=True)
    settings = yaml.safe_load((packaged / "transfer.yaml").read_text("utf-8"))
    settings["description"] = f"{packaged.name}, each filter with rounds of its own."
    settings["source"]["adapter"] = str(packaged / "adapter")
    settings["generator"] |= {"calls_per_round": calls, "original_seeds_per_call": 0}
    arms = ["both", *({"rule": rule, "threshold": threshold} for rule, threshold in rivals.items())]
    settings["compare"] = {"arms": arms, "loop": True, "seeds": SEEDS, "pairs": pairs}
    settings["distill"] |= {"retain": 0, "epochs": epochs}
    settings["distill"].pop("keep", None)
    settings |= {"rounds": ROUNDS, "seed": FIRST_SEED, "diversity_map": False}
    (folder / "transfer.yaml").write_text(yaml.safe_dump(settings), "utf-8")
    shutil.copy(packaged / "seeds.jsonl", folder)
    write(folder / "heldout.jsonl", read(packaged / "heldout.jsonl")[::every])
    return load_transfer(folder)


def compare(transfer: Transfer) -> None:
    """Run the rounds and the trainings of every arm that aren't there yet."""
    with dg.DagsterInstance.ephemeral() as instance:
        _runner(transfer, instance).compare()


def grow(transfer: Transfer, arm: str) -> None:
    """Run the rounds of one arm that aren't there yet."""
    with dg.DagsterInstance.ephemeral() as instance:
        for (name, _), loop in transfer.loops.items():
            if name == arm:
                print(f"rounds of {loop.loop}", flush=True)
                _runner(loop, instance).grow()


def _runner(transfer: Transfer, instance: dg.DagsterInstance) -> Runner:
    return Runner(transfer, instance, on_line=lambda line: print(line, flush=True))


def read_requests(prompts: Sequence[str]) -> list[str | None]:
    """The `Judge` of requests for a calendar."""
    return [read_request(prompt) for prompt in prompts]


def drift(store: Store, transfer: Transfer, judge: Judge = read_requests) -> pl.DataFrame:
    """By arm, seed and round: prompts, the share of them in the skill, and the share of the pairs kept whose answer is
    that of a prompt in the skill, and right."""
    rows = []
    for (arm, seed), loop in transfer.loops.items():
        own_rounds = of_its_rounds(loop, "synthetic_prompts")
        prompts = store.read(f"SELECT round, prompt FROM {own_rounds}", schema=loop.name)
        kept = dict(store.read("SELECT prompt, response FROM filtered_dataset", schema=loop.name).iter_rows())
        for round_, own in prompts.sort("round").group_by("round", maintain_order=True):
            codes = dict(zip(own["prompt"], judge(own["prompt"].to_list()), strict=True))
            right = [codes[prompt] == kept[prompt].strip() for prompt in codes if prompt in kept]
            rows.append(
                {"arm": arm, "seed": seed, "round": round_[0], "prompts": len(codes), "kept": len(right)}
                | {"in_skill": float(np.mean([code is not None for code in codes.values()]))}
                | {"right": float(np.mean(right)) if right else None}
            )
    return pl.DataFrame(rows)


def write_truth(file: Path, prompts: Sequence[str]) -> None:
    """The file of `sweep_truth` that says of requests for a calendar what is right."""
    truth = zip(prompts, read_requests(prompts), strict=True)
    write(file, [{"prompt": prompt, "response": code} for prompt, code in truth])


def prompts(store: Store, transfer: Transfer, arm: str) -> list[tuple[Transfer, list[str]]]:
    """By loop seed: the loop of this arm, and the prompts of its rounds."""
    query = "SELECT DISTINCT prompt FROM synthetic_prompts ORDER BY 1"
    loops = [loop for (name, _), loop in transfer.loops.items() if name == arm]
    return [(loop, store.read(query, schema=loop.name)["prompt"].to_list()) for loop in loops]


def drifted(store: Store, transfer: Transfer) -> list[dict[str, Any]]:
    """What `sweep_truth` finds, without guards, in the rounds of the arm `unfiltered`: a pool for each loop seed."""
    pools = []
    for loop, own in prompts(store, transfer, "unfiltered"):
        file = loop.folder / f"truth_{loop.config.seed}.jsonl"
        write_truth(file, own)
        config = loop.config.model_copy(update={"filter": transfer.config.filter})
        pools += sweep_truth(store, without_guards(replace(loop, config=config)), file)["pools"]
    return pools


def against_unfiltered(found: pl.DataFrame, column: str) -> dict[str, Interval]:
    """Each arm's difference from `unfiltered`, the mean of all rounds that were seeded by what it kept, paired by loop
    seed, with its interval for new loop seeds, corrected over the arms (Holm)."""
    seeded = found.filter(pl.col("round") != found["round"].min())
    by_seed = seeded.group_by("arm", "seed", maintain_order=True).agg(pl.col(column).mean()).sort("seed")
    values = {arm: own[column].to_numpy() for (arm,), own in by_seed.group_by("arm", maintain_order=True)}
    means = {}
    for arm, own in values.items():
        if arm != "unfiltered":
            means[str(arm)] = over_runs((own - values["unfiltered"])[:, None])
    return holm(means)
