"""``round_seeds``: the feedback edge of the loop, drawn as an external asset.

Dagster's graph is acyclic, but kept pairs of one round seed the next. So the edge is an event: whoever
knows the seeds of a round reports them as an *observation* of this asset's partition, whose data
version is their hash. `synthetic_prompts` depends on it, and becomes stale exactly when they change.
(A materialization event would not do: Dagster doesn't detect staleness behind an external asset then.)
"""

from typing import Any

import dagster as dg

from tuneshift_dag.assets.common import OWNERS, Step, key, partitions, table_metadata
from tuneshift_dag.config import Transfer, round_key, round_number
from tuneshift_dag.method.prompting import prompt_id
from tuneshift_dag.method.seed_sampling import Candidate, draw_seeds
from tuneshift_dag.store import records
from tuneshift_dag.store.database import Store, insert
from tuneshift_dag.store.tables import ROUND_SEEDS


def build_round_seeds(transfer: Transfer) -> dg.AssetSpec:
    return dg.AssetSpec(
        key(transfer, "round_seeds"),
        partitions_def=partitions(transfer),
        group_name=transfer.name,
        owners=OWNERS,
        kinds={"duckdb"},
        description=(
            "The seeds of each round's generator calls. `seed_set` reports those of round_01 and"
            " `filtered_dataset` of a round those of the next: this is how the loop fits a graph without"
            " cycles. Nothing to materialize here; look at the observations."
        ),
        metadata=table_metadata(transfer, ROUND_SEEDS),
    )


def write_seeds(
    connection: Any, current: Step, number: int, pool: list[Candidate], originals: list[Candidate]
) -> dg.AssetObservation:
    """Draw the seeds of round ``number`` from ``pool``, store them, and return what is to be reported to Dagster.

    An empty pool says that the round has nothing to do: the dataset has reached its target size.

    Args:
        connection: of the transaction that writes what they were drawn from.
        originals: the user's prompts.
    """
    transfer, generator = current.transfer, current.transfer.config.generator
    calls = draw_seeds(
        pool,
        number,
        generator.calls_per_round,
        generator.seeds_per_call,
        generator.balance == "response",
        transfer.config.seed,
        originals=[] if number == 1 else originals,
        originals_per_call=generator.original_seeds_per_call,
    )
    round_ = round_key(number)
    rows = ROUND_SEEDS.frame(
        [
            {"round": round_, "call": c, "slot": s, **vars(seed)}
            for c, call in enumerate(calls if pool else [])
            for s, seed in enumerate(call)
        ]
    )
    version = records.content_version(rows)
    connection.execute("DELETE FROM round_seeds WHERE round = ?", [round_])
    insert(connection, ROUND_SEEDS, rows)
    records.note(connection, "round_seeds", round_, version, current.run.run_id)
    return dg.AssetObservation(
        key(transfer, "round_seeds"),
        partition=round_,
        metadata={
            "status": "seeds drawn" if pool else "target size reached: nothing left to do",
            "pool": len(pool),
            "calls": len(calls) if pool else 0,
            "seed_ids": rows["prompt_id"].unique(maintain_order=True).to_list(),
        },
        tags={"dagster/data_version": version},
    )


def seed_candidates(store: Store, transfer: Transfer) -> list[Candidate]:
    """The user's prompts, in the order of ``seeds.jsonl``, with the fine-tuned responses."""
    rows = store.read("SELECT prompt_id, prompt, response FROM seed_set", schema=transfer.name).rows()
    known = {row[0]: Candidate(*row) for row in rows}
    return [known[prompt_id(prompt)] for prompt in transfer.seeds if prompt_id(prompt) in known]


def reporter(number: int) -> tuple[str, str | None]:
    """The asset, and its round, that reports the seeds of round ``number``."""
    return ("seed_set", None) if number == 1 else ("filtered_dataset", round_key(number - 1))


def read_seeds(current: Step) -> list[list[Candidate]]:
    """The seeds of each generator call of a round; no calls when the target size was reached before.

    Raises:
        dg.Failure: when nobody has reported this round's seeds, naming the round to materialize first.
    """
    round_ = current.round
    assert round_ is not None
    if not current.records.version("round_seeds", round_):
        # The first gap, not the round just before: that one may lack seeds for the same reason.
        number = round_number(round_)
        while number > 1 and not current.records.version("round_seeds", round_key(number - 1)):
            number -= 1
        asset, previous = reporter(number)
        unfinished = previous or asset
        raise dg.Failure(
            f"{round_} has no seeds yet, because {unfinished} isn't finished. Materialize {unfinished} first"
            f" (if it failed, its run says what to fix), then {round_} again. Nothing that was computed is lost.",
            allow_retries=False,
        )
    rows = current.store.read(
        "SELECT * FROM round_seeds WHERE round = ? ORDER BY call, slot", [round_], current.transfer.name
    )
    calls: dict[int, list[Candidate]] = {}
    for row in rows.iter_rows(named=True):
        calls.setdefault(row["call"], []).append(Candidate(row["prompt_id"], row["prompt"], row["response"]))
    return list(calls.values())
