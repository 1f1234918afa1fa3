"""``diversity_map``: do the rounds explore the task, or circle around the seeds?"""

from typing import Any

import dagster as dg
import polars as pl

from tuneshift_dag.assets.common import (
    OWNERS,
    Step,
    check_rounds,
    content_version,
    definition_metadata,
    every_round_read,
    key,
    step,
)
from tuneshift_dag.home import output_dir
from tuneshift_dag.reports import plots
from tuneshift_dag.resources import encoder
from tuneshift_dag.resources.dagster_resources import StoreResource
from tuneshift_dag.resources.store import Store
from tuneshift_dag.resources.tables import DIVERSITY_MAP
from tuneshift_dag.transfer import Transfer

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
        code_version=f"{transfer.version()}-{'skipped' if encoder.missing_packages() else 'encoded'}",
        metadata=definition_metadata(transfer, DIVERSITY_MAP),
        check_specs=[every_round_read(transfer, "diversity_map")],
    )
    def diversity_map(context: dg.AssetExecutionContext, store: StoreResource) -> dg.MaterializeResult:
        """Seeds and prompts on a map of meaning (MiniLM sentence embeddings, t-SNE), coloured by round.

        Positions depend on the prompts alone: after a change of the threshold the picture is redrawn from
        the stored ones. Without the encoder's packages there is no picture, and nothing fails. Switch it
        off with `diversity_map: false` in `transfer.yaml`.
        """
        database = store.store()
        with step(context, database, transfer) as current:
            rounds = check_rounds(context, transfer, "filtered_dataset")
            skipped = _place(current, database, transfer)
            points = database.read(_POINTS, schema=transfer.name)
        metadata: dict[str, Any] = {"dagster/row_count": len(points), **current.metadata()}
        if skipped:
            context.log.warning(skipped)
            metadata["skipped"] = skipped
        else:
            picture = plots.diversity_map(points)
            picture.save(output_dir(transfer.name) / "diversity_map.png")
            metadata["diversity_map"] = picture.markdown()
        return dg.MaterializeResult(
            data_version=dg.DataVersion(content_version(points)), metadata=metadata, check_results=[rounds]
        )

    return diversity_map


def _place(current: Step, database: Store, transfer: Transfer) -> str | None:
    """Bring the table up to the prompts that there are; return why not, if the encoder is missing."""
    prompts = database.read(_PROMPTS, {"limit": _MOST_PROMPTS}, transfer.name)
    known = database.read("SELECT prompt_id FROM diversity_map", schema=transfer.name)
    if set(known["prompt_id"]) == set(prompts["prompt_id"]):
        current.cost.cache_hits += len(prompts)
        return None
    missing = encoder.missing_packages()
    if missing:
        # Old positions would be shown as if they were of the prompts that there are now.
        database.replace(transfer.name, DIVERSITY_MAP, DIVERSITY_MAP.empty())
        return missing
    with current.cost.model_time():
        embeddings = encoder.embed(prompts["prompt"].to_list())
    places = encoder.project(embeddings)
    points = prompts.select("prompt_id").with_columns(x=pl.Series(places[:, 0]), y=pl.Series(places[:, 1]))
    database.replace(transfer.name, DIVERSITY_MAP, points)
    return None


# A prompt_id is a hash, so the first prompts by prompt_id are a fair sample, and a stable one.
_PROMPTS = """
    SELECT prompt_id, prompt FROM seed_set
    UNION ALL (
        SELECT prompt_id, any_value(prompt) FROM synthetic_prompts
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
