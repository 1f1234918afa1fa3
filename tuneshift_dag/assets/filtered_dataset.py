"""``filtered_dataset``: the pairs where the fine-tune knows something that the base doesn't."""

from typing import Any

import dagster as dg

from tuneshift_dag.assets.common import Context, definition, example_rows, key, step, warning_check
from tuneshift_dag.assets.seed_set import seed_candidates, write_seeds
from tuneshift_dag.config import Transfer, round_number
from tuneshift_dag.config.versions import code_version
from tuneshift_dag.method.seed_sampling import Candidate
from tuneshift_dag.resources import StoreResource
from tuneshift_dag.resources.runs import refilter_job
from tuneshift_dag.store import Store
from tuneshift_dag.store.queries import verdicts
from tuneshift_dag.store.tables import FILTERED_DATASET, REJECTED_PAIRS

CHECKS = {"seeds_still_kept": "The seeds that this round's prompts came from pass the current filter."}


def build_filtered_dataset(transfer: Transfer) -> dg.AssetsDefinition:
    @dg.asset(**definition(transfer, "filtered_dataset", FILTERED_DATASET, checks=CHECKS))
    def filtered_dataset(context: Context, store: StoreResource) -> dg.MaterializeResult:
        """Pairs whose fine-tuned response has low perplexity and whose base response has high perplexity.

        There the fine-tuned model knows something that the base doesn't. No model is needed: changing the
        rule or threshold reruns only this. Reports the next round's seeds, drawn from all pairs kept so far, or
        that the dataset has reached `target_pairs`.
        """
        return _judge_round(context, store.store(), transfer, context.partition_key)

    return filtered_dataset


def build_refilter_job(transfer: Transfer) -> dg.JobDefinition:
    """A job for the UI: after a change of the filter it judges every round again, in order, in one run.

    Not a `BackfillPolicy.single_run` on the asset: Dagster (1.13) gives all partitions of such a run one data version,
    so that every round, the model and the prompts would look changed whenever one round did; and a backfill of the
    whole loop would wait with every round's filter until all rounds were scored, which its seeds can't. So the run
    reports each round's materialization itself, with the versions by which the UI tells what is out of date.
    """

    @dg.op(name=f"{transfer.name}_refilter_rounds")
    def refilter_rounds(context: dg.OpExecutionContext, store: StoreResource) -> None:
        source = key(transfer, "scored_pairs")
        for round_ in transfer.round_keys:
            latest = dg.AssetRecordsFilter(source, asset_partitions=[round_])
            scored = context.instance.fetch_materializations(latest, limit=1).records
            if not scored:
                break  # it has nothing to judge yet
            materialization = scored[0].asset_materialization
            tags = (materialization.tags if materialization else None) or {}
            result = _judge_round(context, store.store(), transfer, round_)
            assert result.data_version
            context.log_event(
                dg.AssetMaterialization(
                    key(transfer, "filtered_dataset"),
                    partition=round_,
                    metadata=result.metadata,
                    tags={
                        "dagster/code_version": code_version(transfer, "filtered_dataset"),
                        "dagster/data_version": result.data_version.value,
                        "dagster/data_version_is_user_provided": "true",
                        f"dagster/input_data_version/{source.to_user_string()}": tags.get("dagster/data_version", ""),
                        f"dagster/input_event_pointer/{source.to_user_string()}": str(scored[0].storage_id),
                    },
                )
            )

    @dg.job(
        name=refilter_job(transfer.name),
        description="After a change of the filter: judges the scored pairs of every round again. No model is loaded.",
    )
    def refilter() -> None:
        refilter_rounds()

    return refilter


def _judge_round(
    context: Context | dg.OpExecutionContext, store: Store, transfer: Transfer, round_: str
) -> dg.MaterializeResult:
    pool: list[Candidate] = []
    observed: list[dg.AssetObservation] = []
    with step(context, store, transfer, "filtered_dataset", round_) as current:
        if not current.records.version("scored_pairs", round_):
            raise current.lacks("scored_pairs")
        originals = seed_candidates(current)

        def judge_and_draw(connection: Any) -> str:
            version = judge(connection, transfer, round_)
            kept = "SELECT prompt_id, prompt, response FROM filtered_dataset WHERE round <= ? ORDER BY prompt_id"
            pool.extend(Candidate(*row) for row in connection.execute(kept, [round_]).fetchall())
            drawn_from = [] if len(pool) >= transfer.config.target_pairs else pool
            observed.append(write_seeds(connection, current, round_number(round_) + 1, drawn_from, originals))
            return version

        current.write([], statements=judge_and_draw)
        context.log_event(observed[-1])
    dropped = dict(current.read(_COUNTS, {"round": round_}).iter_rows())
    kept = dropped.pop("kept", 0)
    examples = current.read("SELECT * FROM filtered_dataset WHERE round = ? ORDER BY prompt_id LIMIT 5", [round_])
    figures = {
        "kept_share": kept / max(1, kept + sum(dropped.values())),
        "kept_so_far": len(pool),
        "target_reached": len(pool) >= transfer.config.target_pairs,
        "distinct_responses_so_far": len({c.response for c in pool}),
        "dropped": dropped,
        "examples": example_rows(examples, ["prompt", "response", "ppl_fine_tuned", "ppl_base"]),
    }
    return current.result(kept, figures, _check_seeds(store, transfer, round_))


_COUNTS = """
    SELECT 'kept' AS reason, count(*) AS pairs FROM filtered_dataset WHERE round = $round
    UNION ALL SELECT reason, count(*) FROM rejected_pairs WHERE round = $round GROUP BY reason ORDER BY reason
"""
_KEPT_COLUMNS = ", ".join(
    "fine_tuned_response AS response" if column.name == "response" else column.name
    for column in FILTERED_DATASET.columns
)


def judge(connection: Any, transfer: Transfer, round_: str) -> str:
    """Rewrite the kept and the rejected rows of a round, inside DuckDB; return the data version, a hash of the kept
    prompts and responses. It fails, and the rows that were there stay, when no pair is kept up to this round."""
    connection.execute(
        f"CREATE OR REPLACE TEMP TABLE judged AS SELECT * FROM ({verdicts(transfer)}) WHERE round = $round",
        {"round": round_},
    )
    for table in (FILTERED_DATASET, REJECTED_PAIRS):
        connection.execute(f"DELETE FROM {table.name} WHERE round = ?", [round_])
    connection.execute(f"INSERT INTO filtered_dataset BY NAME SELECT {_KEPT_COLUMNS} FROM judged WHERE reason IS NULL")
    connection.execute(
        "INSERT INTO rejected_pairs BY NAME SELECT round, prompt_id, reason FROM judged WHERE reason IS NOT NULL"
    )
    version = connection.execute(
        "SELECT sha256(coalesce(string_agg(sha256(prompt_id || fine_tuned_response), '' ORDER BY prompt_id), ''))"
        " FROM judged WHERE reason IS NULL"
    ).fetchone()[0]
    reasons = dict(connection.execute("SELECT reason, count(*) FROM judged GROUP BY reason ORDER BY reason").fetchall())
    connection.execute("DROP TABLE judged")
    if connection.execute("SELECT count(*) FROM filtered_dataset WHERE round <= ?", [round_]).fetchone() == (0,):
        before = "SELECT reason, count(*) FROM rejected_prompts GROUP BY reason ORDER BY 2 DESC"
        dropped = dict(connection.execute(before).fetchall())
        raise dg.Failure(_nothing_kept(transfer, round_, reasons, dropped), allow_retries=False)
    return str(version)[:16]


def _nothing_kept(transfer: Transfer, round_: str, reasons: dict[str, int], dropped: dict[str, int]) -> str:
    """What stopped the loop, and what to change: by the commonest of the ``reasons`` that scored pairs were dropped
    for, or else of those that list items were ``dropped`` for before scoring."""
    config = transfer.config
    key = f"the threshold of {config.filter.rule} in compare.arms" if transfer.loop else "filter.threshold"
    threshold = f"{key} (now {config.filter.threshold:g})"
    repairs = {
        "truncated_response": f"raise response.max_new_tokens (now {config.response.max_new_tokens})",
        "fine_tuned_not_confident": f"raise {threshold}",
        "base_already_confident": f"lower {threshold}",
        "below_threshold": f"lower {threshold}",
        "repetitive_response": f"raise filter.max_repetition (now {config.filter.max_repetition:g})",
        "overlong": _longer_prompts(transfer),
        "duplicate": f"raise generator.temperature (now {config.generator.temperature:g}): it repeats itself",
        "near_duplicate": f"raise generator.near_duplicate (now {config.generator.near_duplicate:g})",
        "seed": f"raise generator.temperature (now {config.generator.temperature:g}): it repeats the seeds",
        "held_out": "write seeds that are further from heldout.jsonl: it writes the held-out prompts",
    }
    other = f"change {threshold}" if reasons else "change generator.mode or generator.instruction"
    counts = reasons or dropped
    commonest = max(counts, key=lambda reason: counts[reason], default="")
    if reasons:
        said = f"No pair was kept up to {round_}, so nothing can seed the next round (dropped: {reasons})."
    elif dropped:
        how = f"all that the generator wrote was dropped before ({dropped})"
        said = f"No prompt was left to score up to {round_}: {how}."
    else:
        said = f"No prompt was written up to {round_}: no list was found in what the generator wrote."
    repair = repairs.get(commonest, other)
    return f"{said} In {transfer.folder / 'transfer.yaml'}, {repair}; or write seeds that are closer to the task."


def _longer_prompts(transfer: Transfer) -> str:
    if transfer.max_prompt_characters is not None:
        return f"raise generator.max_prompt_characters (now {transfer.max_prompt_characters})"
    if tokens := transfer.config.generator.max_prompt_tokens:
        return f"raise generator.max_prompt_tokens (now {tokens})"
    return "lower response.max_new_tokens, or name models with longer contexts: they have no room for the prompts"


def _check_seeds(store: Store, transfer: Transfer, round_: str) -> dg.AssetCheckResult:
    kept = "SELECT prompt_id FROM filtered_dataset UNION ALL SELECT prompt_id FROM seed_set"
    used = "SELECT DISTINCT unnest(seed_ids) AS prompt_id FROM proposals WHERE round = ?"
    gone = store.read(f"{used} EXCEPT ({kept}) ORDER BY prompt_id", [round_], transfer.name)["prompt_id"].to_list()
    problem = f"{len(gone)} seeds of {round_} no longer pass the filter." if gone else ""
    return warning_check("seeds_still_kept", problem, prompt_ids=gone[:50])
