"""``seed_set``: the user's example prompts, and the preflight that the adapter is really applied."""

import hashlib
import json

import dagster as dg

from tuneshift_dag.assets.common import (
    MODEL_POOL,
    OWNERS,
    content_version,
    definition_metadata,
    example_rows,
    key,
    step,
)
from tuneshift_dag.assets.round_seeds import report_seeds, seed_candidates
from tuneshift_dag.config.transfer import Transfer
from tuneshift_dag.engines.preflight import AdapterCheck
from tuneshift_dag.method import scoring
from tuneshift_dag.method.engine import Decoding
from tuneshift_dag.method.prompting import prompt_id
from tuneshift_dag.resources.dagster_resources import EngineResource, StoreResource
from tuneshift_dag.store.tables import SEED_SET


def build_seed_set(transfer: Transfer) -> dg.AssetsDefinition:
    asset_key = key(transfer, "seed_set")
    sections = ("source", "generator", "engine", "models", "prompt_template", "response", "seed")
    seeds_hash = hashlib.sha256(json.dumps(transfer.seeds).encode()).hexdigest()

    @dg.asset(
        key=asset_key,
        group_name=transfer.name,
        owners=OWNERS,
        kinds={"duckdb", "pytorch"},
        pool=MODEL_POOL,
        code_version=f"{transfer.version(*sections, code=3)}-{seeds_hash[:8]}-{transfer.adapter_version()}",
        metadata=definition_metadata(transfer, SEED_SET),
        check_specs=[
            dg.AssetCheckSpec(
                "adapter_applied",
                asset=asset_key,
                description="The adapter changes the base model's answers on the seeds.",
            )
        ],
    )
    def seed_set(
        context: dg.AssetExecutionContext, store: StoreResource, engines: EngineResource
    ) -> dg.MaterializeResult:
        """The example prompts from `seeds.jsonl`: all that is known of the skill.

        Before anything is computed, the source adapter is checked on them: a silently unapplied adapter
        would make both models equal and every later result meaningless. Reports the seeds of round_01.
        """
        if transfer.config.evaluation.tasks:
            # Now, not after hours of work: a misspelt task, or one whose data can't be had.
            engines.harness(transfer)
        with step(context, store.store(), transfer) as current:
            rendered = [transfer.config.prompt_template.replace("{prompt}", seed) for seed in transfer.seeds]
            with current.cost.model_time():
                source = engines.source(transfer)
                applied = source.check_adapter(rendered)
            current.cost.model_calls += 2 * len(transfer.seeds)
            if applied.problems:
                raise dg.Failure(_refusal(transfer, applied.problems), allow_retries=False)
            for warning in applied.warnings:
                context.log.warning(warning)
            responses = scoring.generate(
                source,
                store.cache(),
                [source.encode(prompt) for prompt in rendered],
                "fine_tuned",
                Decoding(transfer.config.response.max_new_tokens),
                current.cost,
            )
            rows = SEED_SET.frame(
                [
                    {"prompt_id": prompt_id(seed), "prompt": seed, "response": response.text}
                    for seed, response in zip(transfer.seeds, responses, strict=True)
                ]
            )
            store.store().replace(transfer.name, SEED_SET, rows)
            report_seeds(context, store.store(), transfer, 1, seed_candidates(store.store(), transfer))
        return dg.MaterializeResult(
            data_version=dg.DataVersion(content_version(rows)),
            metadata={
                "dagster/row_count": len(rows),
                "examples": example_rows(rows, ["prompt", "response"]),
                **_figures(applied),
                **current.metadata(),
            },
            check_results=[
                dg.AssetCheckResult(
                    passed=not applied.warnings,
                    severity=dg.AssetCheckSeverity.WARN,
                    check_name="adapter_applied",
                    description="; ".join(applied.warnings) or None,
                )
            ],
        )

    return seed_set


def _refusal(transfer: Transfer, problems: list[str]) -> str:
    if transfer.config.engine.type == "openai":
        return f"{transfer.folder / 'transfer.yaml'}: " + "; ".join(problems) + "."
    return (
        f"{transfer.folder / transfer.config.source.adapter}: " + "; ".join(problems) + "."
        " Check that source.base is the very model that the adapter was trained on."
    )


def _figures(applied: AdapterCheck) -> dict[str, float]:
    figures = {
        "largest_logit_difference": applied.largest_logit_difference,
        "adapter_delta_norm": applied.delta_norm,
    }
    return {name: value for name, value in figures.items() if value is not None}
