"""Does a rule find the skill? Pools of known composition for the transfer `meeting_slots_chat`, scored once.

A pool is a transfer of its own whose one round holds prompts written by rule (`off_skill`) in the place of generated
ones, so its pairs are scored, cached and replayed by the same code as any, and `tuneshift sweep` reads them.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import yaml

from benchmarks import off_skill
from tuneshift_dag.config import Transfer, round_key
from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.definitions import build_definitions
from tuneshift_dag.method.filters import RULES
from tuneshift_dag.method.prompting import prompt_id
from tuneshift_dag.reports.truth import sweep_truth
from tuneshift_dag.store import Store, insert
from tuneshift_dag.store.queries import verdicts
from tuneshift_dag.store.records import Records, content_version, note
from tuneshift_dag.store.tables import SYNTHETIC_PROMPTS

PACKAGED = Path(__file__).parents[1] / "transfers" / "meeting_slots_chat"
ROUND = round_key(1)
IN_SKILL, GENERAL, NEAR = 400, 350, 100
SHARES = (0.0, 0.25, 0.5, 0.75)
"""Of prompts off the skill in a pool."""
LENGTHS = (16, 64)
"""`response.max_new_tokens`: that of the packaged transfer, which cuts most answers off the skill, and a longer one."""


def make_transfer(transfers: Path, tokens: int) -> Transfer:
    """The transfer of the pool whose answers have up to ``tokens`` tokens, and beside it a truth file a question:
    `truth` (which pairs are right), `skill` (which prompts are in the skill) and `near` (as `truth`, with the near
    prompts as those off the skill)."""
    folder = transfers / f"skill_pool_{tokens}"
    folder.mkdir(parents=True, exist_ok=True)
    settings = yaml.safe_load((PACKAGED / "transfer.yaml").read_text("utf-8"))
    settings["description"] = f"Prompts in and off the skill of {PACKAGED.name}, by rule."
    settings["source"]["adapter"] = str(PACKAGED / "adapter")
    settings["response"] = {"max_new_tokens": tokens}
    settings |= {"rounds": 1, "diversity_map": False}
    (folder / "transfer.yaml").write_text(yaml.safe_dump(settings), "utf-8")
    shutil.copy(PACKAGED / "seeds.jsonl", folder)
    requests, general = off_skill.in_skill(IN_SKILL), off_skill.general(GENERAL)
    codes = [{"prompt": prompt, "response": code} for prompt, code in requests]
    files = {
        "truth": [*codes, *({"prompt": prompt, "response": None} for prompt in general)],
        "skill": [{"prompt": prompt, "truth": "right"} for prompt, _ in requests]
        + [{"prompt": prompt, "truth": "off"} for prompt in general],
        "near": [*codes, *({"prompt": prompt, "response": None} for prompt in off_skill.near(NEAR))],
    }
    for name, rows in files.items():
        write(folder / f"{name}.jsonl", rows)
    return load_transfer(folder)


def score(store: Store, transfer: Transfer, files: Sequence[str] = ("truth", "near")) -> None:
    """Have both source models answer the prompts of these truth files and score them, unless that is done; a killed run
    loses one batch."""
    texts = [row["prompt"] for name in files for row in read(transfer.folder / f"{name}.jsonl")]
    prompts = {prompt_id(text): text for text in texts}
    by_rule = {"round": ROUND, "proposal_id": "by rule"}
    rows = SYNTHETIC_PROMPTS.frame(
        [
            {**by_rule, "prompt_id": id_, "prompt": text, "position": place}
            for place, (id_, text) in enumerate(prompts.items())
        ]
    )
    version = content_version(rows)
    if Records(store, transfer).version("synthetic_prompts", ROUND) != version:
        with store.transaction(transfer.name) as connection:
            connection.execute("DELETE FROM synthetic_prompts")
            insert(connection, SYNTHETIC_PROMPTS, rows)
            note(connection, "synthetic_prompts", ROUND, version, "by rule")
    if not Records(store, transfer).causes("scored_pairs", ROUND):
        return
    job = build_definitions([transfer], store.path).resolve_implicit_global_asset_job_def()
    with dg.DagsterInstance.ephemeral() as instance:
        job.execute_in_process(
            instance=instance,
            asset_selection=[dg.AssetKey([transfer.name, "scored_pairs"])],
            partition_key=ROUND,
            run_config={"loggers": {"console": {"config": {"log_level": "ERROR"}}}},
        )


def write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def sweep(store: Store, transfer: Transfer, truth: str = "truth", guards: bool = True) -> list[dict[str, Any]]:
    """What `sweep_truth` finds in the whole pool and in those of `SHARES`; of the near prompts in the pool of all of
    them."""
    transfer = transfer if guards else without_guards(transfer)
    shares = (NEAR / (IN_SKILL + NEAR),) if truth == "near" else SHARES
    pools: list[dict[str, Any]] = sweep_truth(store, transfer, transfer.folder / f"{truth}.jsonl", off_skill=shares)[
        "pools"
    ]
    return pools


def without_guards(transfer: Transfer) -> Transfer:
    """No answer is dropped for being cut off, repetitive or a refusal, so that a rule has to do it."""
    off = {"allow_truncated": True, "max_repetition": 1.0, "refusals": ()}
    rule = transfer.config.filter.model_copy(update=off)
    return replace(transfer, config=transfer.config.model_copy(update={"filter": rule}))


def pairs(store: Store, transfer: Transfer, rule: str) -> pl.DataFrame:
    """Every scored pair with its ``kind`` (right, wrong, general or near) and, under a rule, its margin; most first."""
    assert rule in RULES
    expected = {row["prompt"]: row["response"] for row in read(transfer.folder / "truth.jsonl")}

    def kind(row: dict[str, Any]) -> str:
        code = expected.get(row["prompt"], "")
        if not code:
            return "general" if code is None else "near"
        return "right" if row["fine_tuned_response"].strip() == code else "wrong"

    query = f"SELECT *, isfinite(margin) AS judged FROM ({verdicts(transfer, rule)}) ORDER BY margin DESC, prompt_id"
    found = store.read(query, schema=transfer.name)
    return found.with_columns(kind=pl.Series([kind(row) for row in found.iter_rows(named=True)]))


def seconds(store: Store, transfer: Transfer) -> float | None:
    """Wall time of the last scoring in which models ran."""
    query = (
        "SELECT seconds FROM steps WHERE asset = 'scored_pairs' AND model_calls > 0 ORDER BY finished_at DESC LIMIT 1"
    )
    found = store.read(query, schema=transfer.name)["seconds"]
    return float(found[0]) if len(found) else None
