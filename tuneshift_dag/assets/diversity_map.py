"""``diversity_map``: do the rounds explore the task, or circle around the seeds?"""

from typing import Any

import dagster as dg
import polars as pl

from tuneshift_dag.assets.common import EVERY_ROUND, LOG, Context, Step, check_rounds, definition, example_rows, step
from tuneshift_dag.config import Transfer
from tuneshift_dag.method.prompting import mean_similarity
from tuneshift_dag.models import encoder
from tuneshift_dag.reports import plots
from tuneshift_dag.resources import StoreResource
from tuneshift_dag.store.records import content_version
from tuneshift_dag.store.tables import DIVERSITY_MAP, ROUND_SIMILARITY

# A few seconds of CPU for the encoder and as many for the projection; more points only cover each other.
_MOST_PROMPTS = 2000


def build_diversity_map(transfer: Transfer) -> dg.AssetsDefinition:
    @dg.asset(**definition(transfer, "diversity_map", DIVERSITY_MAP, "pytorch", checks=EVERY_ROUND))
    def diversity_map(context: Context, store: StoreResource) -> dg.MaterializeResult:
        """Seeds and prompts on a map of meaning (MiniLM sentence embeddings, t-SNE), coloured by round.

        Positions depend on the prompts alone: after a change of the threshold the picture is redrawn from
        the stored ones. The metadata say how alike the prompts of each round are, and so does `round_summary`.
        Without the encoder's packages there is no picture, and nothing fails. Switch it off with
        `diversity_map: false` in `transfer.yaml`.
        """
        shown: dict[str, Any] = {}
        with step(context, store.store(), transfer, "diversity_map") as current:
            rounds = check_rounds(current, "filtered_dataset")
            places, similarity, skipped = _place(current)
            current.write(
                [(DIVERSITY_MAP, places), (ROUND_SIMILARITY, similarity)],
                statements=lambda connection: content_version(connection.sql(_POINTS).pl()),
            )
            if skipped:
                LOG.warning(skipped)
                shown["skipped"] = skipped
            else:
                shown["diversity_map"] = current.picture("diversity_map", plots.diversity_map(current.read(_POINTS)))
                shown["similarity"] = example_rows(similarity, similarity.columns, len(similarity))
        return current.result(len(places), shown, rounds)

    return diversity_map


def _place(current: Step) -> tuple[pl.DataFrame, pl.DataFrame, str | None]:
    """Rows of both tables, the known ones where they still hold; and why there are none without the encoder."""
    prompts = current.read(_PROMPTS, {"limit": _MOST_PROMPTS})
    known = current.read("SELECT * FROM diversity_map ORDER BY prompt_id")
    compared = current.read("SELECT * FROM round_similarity ORDER BY round")
    rounds = prompts["round"].drop_nulls().unique()
    if set(known["prompt_id"]) == set(prompts["prompt_id"]) and set(compared["round"]) == set(rounds):
        current.cost.cache_hits += len(prompts)
        return known, compared, None
    missing = encoder.missing_packages()
    if missing:
        # Old positions would be shown as if they were of the prompts that there are now.
        return DIVERSITY_MAP.empty(), ROUND_SIMILARITY.empty(), missing
    with current.cost.model_time():
        embeddings = encoder.embed(prompts["prompt"].to_list())
    places = encoder.project(embeddings)
    points = prompts.select("prompt_id").with_columns(x=pl.Series(places[:, 0]), y=pl.Series(places[:, 1]))
    similarity = []
    for round_ in rounds.sort():
        mine = embeddings[(prompts["round"] == round_).fill_null(False).to_numpy()]
        similarity.append({"round": round_, "prompts": len(mine), "similarity": mean_similarity(mine)})
    return points, ROUND_SIMILARITY.frame(similarity), None


# A prompt_id is a hash, so the first prompts by prompt_id are a fair sample, and a stable one.
_PROMPTS = """
    SELECT prompt_id, prompt, NULL AS round FROM seed_set
    UNION ALL (
        SELECT prompt_id, any_value(prompt), min(round) FROM synthetic_prompts
        WHERE prompt_id NOT IN (SELECT prompt_id FROM seed_set)
        GROUP BY prompt_id ORDER BY prompt_id LIMIT $limit
    )
    ORDER BY prompt_id
"""
_POINTS = """
    SELECT m.prompt_id, m.x, m.y, p.round, f.prompt_id IS NOT NULL AS kept
    FROM diversity_map m
    LEFT JOIN (SELECT prompt_id, min(round) AS round FROM synthetic_prompts GROUP BY prompt_id) p USING (prompt_id)
    LEFT JOIN (SELECT DISTINCT prompt_id FROM filtered_dataset) f USING (prompt_id)
    ORDER BY m.prompt_id
"""
