"""``filtered_dataset``: the pairs where the fine-tune knows something that the base doesn't."""

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

from tuneshift_dag.assets.common import (
    OWNERS,
    column_lineage,
    definition_metadata,
    example_rows,
    key,
    partitions,
    step,
)
from tuneshift_dag.assets.round_seeds import report_seeds
from tuneshift_dag.config.transfer import Transfer, round_number
from tuneshift_dag.method.seed_sampling import Candidate
from tuneshift_dag.resources.dagster_resources import StoreResource
from tuneshift_dag.store.database import Store
from tuneshift_dag.store.tables import FILTERED_DATASET, REJECTED_PAIRS


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
            "generator.original_seeds_per_call",
            "generator.balance",
            code=3,
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
    def filtered_dataset(context: dg.AssetExecutionContext, store: StoreResource) -> dg.MaterializeResult:
        """Pairs whose fine-tuned response has low perplexity and whose base response has high perplexity.

        There the fine-tuned model knows something that the base doesn't. No model is needed: changing the
        rule or threshold reruns only this. Reports the next round's seeds, drawn from all pairs kept so far, or
        that the dataset has reached `target_pairs`.
        """
        round_ = context.partition_key
        database = store.store()
        with step(context, database, transfer) as current:
            version = refilter(database, transfer, round_, transfer.config.filter.cut)
            judged = database.read(_COUNTS, {"round": round_}, transfer.name)
            reasons = dict(judged.select("reason", "pairs").iter_rows())
            kept = reasons.pop("kept", 0)
            pool = _kept_until(database, transfer, round_)
            done = len(pool) >= transfer.config.target_pairs
            report_seeds(context, database, transfer, round_number(round_) + 1, [] if done else pool)
            examples = database.read(
                "SELECT * FROM filtered_dataset WHERE round = ? ORDER BY prompt_id LIMIT 5", [round_], transfer.name
            )
        return dg.MaterializeResult(
            data_version=dg.DataVersion(version),
            metadata={
                "dagster/partition_row_count": kept,
                "dagster/column_lineage": column_lineage(transfer, FILTERED_DATASET),
                "kept_share": kept / max(1, kept + sum(reasons.values())),
                "kept_so_far": len(pool),
                "target_reached": done,
                "distinct_responses_so_far": len({c.response for c in pool}),
                "dropped": reasons,
                "examples": example_rows(examples, ["prompt", "response", "ppl_fine_tuned", "ppl_base"]),
                **current.metadata(),
            },
            check_results=[_check_seeds(database, transfer, round_)],
        )

    return filtered_dataset


def build_refilter_job(transfer: Transfer) -> UnresolvedAssetJobDefinition:
    """A job for the UI: there "Materialize unsynced" leaves partitioned assets out (Dagster 1.13)."""
    return dg.define_asset_job(
        f"{transfer.name}_refilter",
        selection=[key(transfer, "filtered_dataset")],
        description="After a change of the filter: judges the scored pairs of every round again. No model is loaded.",
    )


_COUNTS = """
    SELECT 'kept' AS reason, count(*) AS pairs FROM filtered_dataset WHERE round = $round
    UNION ALL SELECT reason, count(*) FROM rejected_pairs WHERE round = $round GROUP BY reason ORDER BY reason
"""


def refilter(database: Store, transfer: Transfer, round_: str, threshold: float) -> str:
    """Judge a round's scored pairs and rewrite its kept and rejected rows; return the data version.

    All of it happens inside DuckDB, in one transaction, and no text passes through Python. The
    version is a hash of the kept prompts and responses, whatever the rule and threshold that kept them.

    Args:
        threshold: or, of `filters.KEEP_RULES`, how much is kept (`Filter.cut`).

    Raises:
        dg.Failure: when no pair is kept up to this round, or pairs were scored without the samples that are wanted
            now. The rows that were there stay: for Dagster this materialization never
            was, so a threshold moved back would count them as fresh.
    """
    verdict = transfer.verdict_sql(cut=threshold)
    columns = ", ".join("fine_tuned_response AS response" if c == "response" else c for c in _KEPT_COLUMNS)
    with database.transaction(transfer.name) as connection:
        connection.execute(
            f"CREATE TEMP TABLE judged AS SELECT * FROM ({verdict}) WHERE round = $round",
            {"round": round_},
        )
        for table in (FILTERED_DATASET, REJECTED_PAIRS):
            connection.execute(f"DELETE FROM {table.name} WHERE round = ?", [round_])
        connection.execute(f"INSERT INTO filtered_dataset BY NAME SELECT {columns} FROM judged WHERE reason IS NULL")
        connection.execute(
            "INSERT INTO rejected_pairs BY NAME SELECT round, prompt_id, reason FROM judged WHERE reason IS NOT NULL"
        )
        row = connection.execute(
            "SELECT sha256(coalesce(string_agg(sha256(prompt_id || fine_tuned_response), '' ORDER BY prompt_id), ''))"
            " FROM judged WHERE reason IS NULL"
        ).fetchone()
        pool = connection.execute("SELECT count(*) FROM filtered_dataset WHERE round <= ?", [round_]).fetchone()
        reasons = connection.execute("SELECT reason, count(*) FROM judged GROUP BY reason ORDER BY reason").fetchall()
        if "no_samples" in dict(reasons):
            raise dg.Failure(
                f"{dict(reasons)['no_samples']} pairs of {round_} were scored before response.samples was set:"
                " materialize scored_pairs of this round first, which adds what is missing and computes nothing else"
                " again.",
                allow_retries=False,
            )
        if pool == (0,):
            cuts = f"filter.{transfer.config.filter.cut_key} (now {transfer.config.filter.cut:g})"
            raise dg.Failure(
                f"No pair was kept up to {round_}, so nothing can seed the next round ({dict(reasons)} here)."
                f" Loosen {cuts} in {transfer.folder / 'transfer.yaml'}, or write"
                " seeds that are closer to the task.",
                allow_retries=False,
            )
        connection.execute("DROP TABLE judged")
    assert row is not None
    return str(row[0])[:16]


_KEPT_COLUMNS = [column.name for column in FILTERED_DATASET.columns]


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
