"""``diversity_map``: do the rounds explore the task, or circle around the seeds?"""

from typing import Any

import dagster as dg
import numpy as np
import polars as pl
from numpy.typing import NDArray

from tuneshift_dag.assets.common import (
    OWNERS,
    Step,
    check_rounds,
    content_version,
    definition_metadata,
    every_round_read,
    example_rows,
    key,
    step,
)
from tuneshift_dag.config.transfer import Transfer
from tuneshift_dag.home import output_dir
from tuneshift_dag.method.diversity import mean_similarity
from tuneshift_dag.models import encoder
from tuneshift_dag.reports import plots
from tuneshift_dag.resources.dagster_resources import StoreResource
from tuneshift_dag.store.database import Store
from tuneshift_dag.store.tables import DIVERSITY_MAP, ROUND_SIMILARITY

# A few seconds of CPU for the encoder and as many for the projection; more points only cover each other.
_MOST_PROMPTS = 2000


def build_diversity_map(transfer: Transfer) -> dg.AssetsDefinition:
    @dg.asset(
        key=key(transfer, "diversity_map"),
        deps=[key(transfer, "synthetic_prompts"), key(transfer, "filtered_dataset")],
        group_name=transfer.name,
        owners=OWNERS,
        kinds={"duckdb", "pytorch"},
        # Installing the encoder makes an asset that was skipped out of date.
        code_version=f"{transfer.version(code=2)}-{'skipped' if encoder.missing_packages() else 'encoded'}",
        metadata=definition_metadata(transfer, DIVERSITY_MAP),
        check_specs=[every_round_read(transfer, "diversity_map")],
    )
    def diversity_map(context: dg.AssetExecutionContext, store: StoreResource) -> dg.MaterializeResult:
        """Seeds and prompts on a map of meaning (MiniLM sentence embeddings, t-SNE), coloured by round.

        Positions depend on the prompts alone: after a change of the threshold the picture is redrawn from
        the stored ones. The metadata say how alike the prompts of each round are, and so does `round_summary`.
        Without the encoder's packages there is no picture, and nothing fails. Switch it off with
        `diversity_map: false` in `transfer.yaml`.
        """
        database = store.store()
        with step(context, database, transfer) as current:
            rounds = check_rounds(context, transfer, "filtered_dataset")
            skipped = _place(current, database, transfer)
            points = database.read(_POINTS, schema=transfer.name)
            similarity = database.read("SELECT * FROM round_similarity ORDER BY round", schema=transfer.name)
        metadata: dict[str, Any] = {"dagster/row_count": len(points), **current.metadata()}
        if skipped:
            context.log.warning(skipped)
            metadata["skipped"] = skipped
        else:
            picture = plots.diversity_map(points)
            picture.save(output_dir(transfer.name) / "diversity_map.png")
            metadata["diversity_map"] = picture.markdown()
            metadata["similarity"] = example_rows(similarity, similarity.columns, len(similarity))
        return dg.MaterializeResult(
            data_version=dg.DataVersion(content_version(points)), metadata=metadata, check_results=[rounds]
        )

    return diversity_map


def _place(current: Step, database: Store, transfer: Transfer) -> str | None:
    """Bring both tables up to the prompts that there are; return why not, if the encoder is missing."""
    prompts = database.read(_PROMPTS, {"limit": _MOST_PROMPTS}, transfer.name)
    known = database.read("SELECT prompt_id FROM diversity_map", schema=transfer.name)
    compared = database.read("SELECT round FROM round_similarity", schema=transfer.name)
    rounds = prompts["round"].drop_nulls().unique()
    if set(known["prompt_id"]) == set(prompts["prompt_id"]) and set(compared["round"]) == set(rounds):
        current.cost.cache_hits += len(prompts)
        return None
    missing = encoder.missing_packages()
    if missing:
        # Old positions would be shown as if they were of the prompts that there are now.
        database.replace_all(
            transfer.name, [(DIVERSITY_MAP, DIVERSITY_MAP.empty()), (ROUND_SIMILARITY, ROUND_SIMILARITY.empty())]
        )
        return missing
    with current.cost.model_time():
        embeddings = encoder.embed(prompts["prompt"].to_list())
    places = encoder.project(embeddings)
    points = prompts.select("prompt_id").with_columns(x=pl.Series(places[:, 0]), y=pl.Series(places[:, 1]))
    similarity = [_similarity(prompts, embeddings, round_) for round_ in rounds.sort()]
    database.replace_all(
        transfer.name, [(DIVERSITY_MAP, points), (ROUND_SIMILARITY, ROUND_SIMILARITY.frame(similarity))]
    )
    return None


def _similarity(prompts: pl.DataFrame, embeddings: NDArray[np.float32], round_: str) -> dict[str, Any]:
    mine = embeddings[(prompts["round"] == round_).fill_null(False).to_numpy()]
    return {"round": round_, "prompts": len(mine), "similarity": mean_similarity(mine)}


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
