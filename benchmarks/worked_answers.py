"""Do rules keep right worked answers and drop wrong ones? Sums in words, by rule, so that every number is known.

SmolLM2-135M-Instruct learns from some hundreds of them to write its steps and to end with ``#### `` and the number, as
the answers of GSM8K do; then it answers others, of which it gets many wrong. `skill_pools` scores those, once.
"""

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from benchmarks.skill_pools import score, without_guards, write
from tuneshift_dag.config import Transfer
from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.method import PromptFormat
from tuneshift_dag.models.loading import load_tokenizer
from tuneshift_dag.models.references import resolve_model
from tuneshift_dag.reports.truth import sweep_truth
from tuneshift_dag.store import Store
from tuneshift_dag.training.batches import tokenize_example
from tuneshift_dag.training.loop import LoraTraining

TRANSFERS = Path(__file__).parents[1] / "transfers"
sys.path.insert(0, str(TRANSFERS / "meeting_slots"))

from slot_training import train_adapter  # noqa: E402

NAME = "worked_answers"
TRAINING, POOL = 640, 400
SETTINGS = LoraTraining(rank=16, alpha=32, learning_rate=1e-3, epochs=1, batch_size=16, validation_fraction=0.02)
_PEOPLE = ["Anna", "Ben", "Carla", "David", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kira", "Luis"]
_THINGS = ["apples", "books", "coins", "eggs", "marbles", "pencils", "stamps", "tickets", "shells", "buttons"]
_HOLDERS = ["boxes", "bags", "baskets", "shelves", "jars"]


def _more(rng: random.Random, who: str, other: str, what: str) -> tuple[str, str, int]:
    a, b = rng.randint(5, 60), rng.randint(5, 40)
    return (
        f"{who} has {a} {what} and buys {b} more. How many {what} does {who} have now?",
        f"{a} + {b} = {a + b}",
        a + b,
    )


def _fewer(rng: random.Random, who: str, other: str, what: str) -> tuple[str, str, int]:
    a = rng.randint(20, 90)
    b = rng.randint(3, a - 5)
    text = f"{who} had {a} {what} and gave {b} of them to {other}. How many {what} are left?"
    return text, f"{a} - {b} = {a - b}", a - b


def _times(rng: random.Random, who: str, other: str, what: str) -> tuple[str, str, int]:
    a, b, holders = rng.randint(2, 9), rng.randint(3, 15), rng.choice(_HOLDERS)
    text = f"{who} fills {a} {holders} with {b} {what} each. How many {what} are that?"
    return text, f"{a} * {b} = {a * b}", a * b


def _together(rng: random.Random, who: str, other: str, what: str) -> tuple[str, str, int]:
    a, b = rng.randint(3, 30), rng.randint(2, 20)
    text = f"{who} has {a} {what}, and {other} has {b} more than {who}. How many {what} do they have together?"
    return text, f"{other} has {a} + {b} = {a + b}. Together {a} + {a + b} = {2 * a + b}", 2 * a + b


def _rest(rng: random.Random, who: str, other: str, what: str) -> tuple[str, str, int]:
    a, b, holders = rng.randint(2, 8), rng.randint(4, 12), rng.choice(_HOLDERS)
    c = rng.randint(2, a * b - 2)
    text = f"{who} has {a} {holders} of {b} {what} each and loses {c} {what}. How many {what} are left?"
    return text, f"{a} * {b} = {a * b}. Then {a * b} - {c} = {a * b - c}", a * b - c


_KINDS: list[Callable[[random.Random, str, str, str], tuple[str, str, int]]] = [_more, _fewer, _times, _together, _rest]


def problems(count: int, seed: int) -> dict[str, str]:
    """Different problems, each with its worked answer, all kinds equally often."""
    rng, found = random.Random(seed), dict[str, str]()
    while len(found) < count:
        who, other = rng.sample(_PEOPLE, 2)
        text, steps, number = _KINDS[len(found) % len(_KINDS)](rng, who, other, rng.choice(_THINGS))
        found[text] = f" {steps}.\n#### {number}"
    return found


def make_transfer(transfers: Path) -> Transfer:
    """The transfer whose one round are `POOL` problems that its adapter wasn't trained on; trains that first."""
    folder = transfers / NAME
    folder.mkdir(parents=True, exist_ok=True)
    settings = yaml.safe_load((TRANSFERS / "gsm8k_llama" / "transfer.yaml").read_text("utf-8"))
    packaged = yaml.safe_load((TRANSFERS / "meeting_slots_chat" / "transfer.yaml").read_text("utf-8"))
    settings["description"] = "Sums in words, by rule."
    settings["source"] = {"base": packaged["source"]["base"], "adapter": "adapter"}
    settings |= {name: packaged[name] for name in ("target", "generator", "models", "distill")}
    settings["target"].pop("prompt")
    settings |= {"rounds": 1, "response": {"max_new_tokens": 64}}
    settings |= {"evaluation": {"metric": "numeric"}, "diversity_map": False}
    (folder / "transfer.yaml").write_text(yaml.safe_dump(settings), "utf-8")
    taught = problems(TRAINING, 0)
    pool = {text: answer for text, answer in problems(POOL + 100, 1).items() if text not in taught}
    rows = [{"prompt": text, "response": answer.strip()} for text, answer in list(pool.items())[:POOL]]
    write(folder / "truth.jsonl", rows)
    write(folder / "seeds.jsonl", [{"prompt": text} for text in list(taught)[:5]])
    if not (folder / "adapter" / "adapter_config.json").is_file():
        files = resolve_model(settings["source"]["base"], folder, "source.base")
        tokenizer, format = load_tokenizer(files), PromptFormat(settings["prompt_template"])
        examples = [tokenize_example(tokenizer, format, text, answer) for text, answer in taught.items()]
        train_adapter(files, examples, SETTINGS, folder / "adapter")
    return load_transfer(folder)


def sweep(store: Store, transfer: Transfer) -> dict[str, Any]:
    """What `sweep_truth` finds in the pool, which is scored first unless it is; without guards."""
    score(store, transfer, ["truth"])
    (pool,) = sweep_truth(store, without_guards(transfer), transfer.folder / "truth.jsonl")["pools"]
    return dict(pool)
