"""``filtered_dataset``: the pairs where the fine-tune knows something that the base doesn't."""

import dagster as dg
import polars as pl

from tuneshift_dag.assets.common import (
    OWNERS,
    content_version,
    definition_metadata,
    example_rows,
    key,
    partitions,
    step,
)
from tuneshift_dag.assets.round_seeds import report_seeds
from tuneshift_dag.method.filters import verdict_sql
from tuneshift_dag.method.seed_sampling import Candidate
from tuneshift_dag.resources.dagster_resources import StoreResource
from tuneshift_dag.resources.store import Store
from tuneshift_dag.resources.tables import FILTERED_DATASET, REJECTED_PAIRS
from tuneshift_dag.transfer import Transfer, round_number


def build_filtered_dataset(transfer: Transfer) -> dg.AssetsDefinition:
    asset_key = key(transfer, "filtered_dataset")

    @dg.asset(
        key=asset_key,
        deps=[key(transfer, "scored_pairs")],
        partitions_def=partitions(transfer),
        group_name=transfer.name,
        owners=OWNERS,
        kinds={"duckdb"},
        code_version=transfer.version(
            "filter",
            "target_pairs",
            "seed",
            "generator.calls_per_round",
            "generator.seeds_per_call",
            "generator.balance",
        ),
        metadata=definition_metadata(transfer, FILTERED_DATASET),
        check_specs=[
            dg.AssetCheckSpec(
                "seeds_still_kept",
                asset=asset_key,
                description="The seeds that this round's prompts came from pass the current filter.",
            )
        ],
    )
    def filtered_dataset(context: dg.AssetExecutionContext, store: StoreResource) -> dg.MaterializeResult[None]:
        """Pairs whose fine-tuned response has low perplexity and whose base response has high perplexity.

        There the fine-tuned model knows something that the base doesn't. No model is needed: changing the
        threshold reruns only this. Reports the next round's seeds, drawn from all pairs kept so far, or
        that the dataset has reached `target_pairs`.
        """
        round_ = context.partition_key
        database = store.store()
        with step(context, database, transfer) as current:
            judged = judge(database, transfer, round_)
            kept = judged.filter(pl.col("reason").is_null()).select(c.name for c in FILTERED_DATASET.columns)
            dropped = judged.filter(pl.col("reason").is_not_null()).select("round", "prompt_id", "reason")
            tables = [(FILTERED_DATASET, kept), (REJECTED_PAIRS, dropped)]
            database.replace_all(transfer.name, tables, round=round_)
            pool = _kept_until(database, transfer, round_)
            done = len(pool) >= transfer.config.target_pairs
            if not pool:
                raise dg.Failure(
                    f"No pair was kept up to {round_} (of {len(judged)} in this round), so nothing can seed the"
                    f" next: {dict(dropped.group_by('reason').len().iter_rows())}. Loosen filter.threshold"
                    f" (now {transfer.config.filter.threshold}) in {transfer.folder / 'transfer.yaml'}, or"
                    " write seeds that are closer to the task.",
                    allow_retries=False,
                )
            report_seeds(context, database, transfer, round_number(round_) + 1, [] if done else pool)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(content_version(kept.select("prompt_id", "prompt", "response"))),
            metadata={
                "dagster/partition_row_count": len(kept),
                "kept_share": len(kept) / len(judged) if len(judged) else 0.0,
                "kept_so_far": len(pool),
                "target_reached": done,
                "distinct_responses": kept["response"].n_unique(),
                "dropped": dict(dropped.group_by("reason").len().sort("reason").iter_rows()),
                "examples": example_rows(kept, ["prompt", "response", "ppl_fine_tuned", "ppl_base"]),
                **current.metadata(),
            },
            check_results=[_check_seeds(database, transfer, round_)],
        )

    return filtered_dataset


def judge(database: Store, transfer: Transfer, round_: str) -> pl.DataFrame:
    """Every scored pair of a round with the filter's margin and its reason (null when kept)."""
    settings = transfer.config.filter
    verdict = verdict_sql(settings.rule, settings.allow_truncated)
    return database.read(
        f"SELECT *, fine_tuned_response AS response FROM ({verdict}) WHERE round = $round ORDER BY prompt_id",
        {"t": settings.threshold, "round": round_},
        transfer.name,
    )


def _kept_until(database: Store, transfer: Transfer, round_: str) -> list[Candidate]:
    rows = database.read(
        "SELECT prompt_id, prompt, response FROM filtered_dataset WHERE round <= ? ORDER BY prompt_id",
        [round_],
        transfer.name,
    )
    return [Candidate(*row) for row in rows.iter_rows()]


def _check_seeds(database: Store, transfer: Transfer, round_: str) -> dg.AssetCheckResult:
    """Seeds of this round's generator calls that the current filter would not keep."""
    gone = database.read(
        "SELECT DISTINCT unnest(seed_ids) AS prompt_id FROM proposals WHERE round = ? EXCEPT"
        " (SELECT prompt_id FROM filtered_dataset UNION ALL SELECT prompt_id FROM seed_set)"
        " ORDER BY prompt_id",
        [round_],
        transfer.name,
    )["prompt_id"].to_list()
    return dg.AssetCheckResult(
        passed=not gone,
        severity=dg.AssetCheckSeverity.WARN,
        check_name="seeds_still_kept",
        description=f"{len(gone)} seeds of {round_} no longer pass the filter." if gone else None,
        metadata={"prompt_ids": gone[:50]},
    )
