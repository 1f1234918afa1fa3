"""Which of the same pairs does each rule choose, and what does a target learn from equally many of them?

The pairs are those of the loops that `closed_loop` grows without a filter, of all its seeds together, so that most of
them are off the skill.
"""

import yaml

from benchmarks import closed_loop, skill_pools
from tuneshift_dag.config import Transfer
from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.method.filters import RANKING_RULES
from tuneshift_dag.store import Store

PAIRS = 64
"""Of every arm and training; about what an arm of the closed loop has."""


def make_transfer(store: Store, loop: Transfer) -> Transfer:
    """The transfer whose one round holds the prompts of the loops without a filter; these are grown and scored first
    where they aren't."""
    closed_loop.grow(loop, "unfiltered")
    folder = loop.folder.with_name(f"open_{loop.name}")
    folder.mkdir(parents=True, exist_ok=True)
    settings = yaml.safe_load((loop.folder / "transfer.yaml").read_text("utf-8"))
    settings["description"] = "Prompts that loops without a filter came to, for every filter to choose from."
    # A rule that ranks takes its best pairs, as many as are wanted.
    arms = [arm.rule if arm.rule in RANKING_RULES else arm.model_dump() for arm in loop.config.compare.arms]
    settings["compare"] |= {"arms": arms, "loop": False, "pairs": PAIRS}
    settings["rounds"] = 1
    (folder / "transfer.yaml").write_text(yaml.safe_dump(settings), "utf-8")
    for name in ("seeds.jsonl", "heldout.jsonl"):
        (folder / name).write_bytes((loop.folder / name).read_bytes())
    prompts = sorted({prompt for _, own in closed_loop.prompts(store, loop, "unfiltered") for prompt in own})
    closed_loop.write_truth(folder / "truth.jsonl", prompts)
    transfer = load_transfer(folder)
    skill_pools.score(store, transfer, ["truth"])
    return transfer
