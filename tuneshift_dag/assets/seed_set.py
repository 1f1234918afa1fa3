"""``seed_set``: the user's example prompts, and the preflight that the adapter is really applied."""

from datetime import UTC, datetime

import dagster as dg
import polars as pl

from tuneshift_dag.assets.common import LOG, definition, example_rows, key, step
from tuneshift_dag.assets.round_seeds import write_seeds
from tuneshift_dag.config import Transfer
from tuneshift_dag.method import scoring
from tuneshift_dag.method.engine import AdapterCheck, Decoding
from tuneshift_dag.method.prompting import prompt_id
from tuneshift_dag.method.seed_sampling import Candidate
from tuneshift_dag.resources import EngineResource, StoreResource
from tuneshift_dag.store.records import content_version
from tuneshift_dag.store.tables import MODELS, SEED_SET


def build_seed_set(transfer: Transfer) -> dg.AssetsDefinition:
    @dg.asset(
        **definition(transfer, SEED_SET, "seed_set", "pytorch", models=True),
        check_specs=[
            dg.AssetCheckSpec(
                "adapter_applied",
                asset=key(transfer, "seed_set"),
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
        store.store().claim(transfer.name, transfer.folder)
        with step(context, store.store(), transfer, "seed_set") as current:
            rendered = [transfer.config.prompt_template.replace("{prompt}", seed) for seed in transfer.seeds]
            with current.cost.model_time():
                source = engines.source(transfer)
                applied = source.check_adapter(rendered)
            if applied.problems:
                raise dg.Failure(_refusal(transfer, applied.problems), allow_retries=False)
            for warning in applied.warnings:
                LOG.warning(warning)
            responses = scoring.generate(
                source,
                store.cache(),
                [source.encode(prompt) for prompt in rendered],
                "fine_tuned",
                Decoding(transfer.config.response.max_new_tokens),
                current.cost,
            )
            seeds = [
                Candidate(prompt_id(seed), seed, response.text)
                for seed, response in zip(transfer.seeds, responses, strict=True)
            ]
            rows = SEED_SET.frame([vars(seed) for seed in seeds])
            observed: list[dg.AssetObservation] = []
            version = current.write(
                [(SEED_SET, rows), (MODELS, _models(transfer))],
                content_version(rows),
                lambda connection: observed.append(write_seeds(connection, current, 1, seeds, seeds)),
            )
            context.log_event(observed[-1])
        return dg.MaterializeResult(
            data_version=dg.DataVersion(version),
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


def _models(transfer: Transfer) -> pl.DataFrame:
    """Which weights the transfer's references meant in this run."""
    config, now = transfer.config, datetime.now(UTC).replace(tzinfo=None)
    references = {
        "source.base": config.source.base,
        "source.adapter": config.source.adapter,
        "generator.model": config.generator.model,
        "target.base": config.target.base,
    }
    return MODELS.frame(
        [
            {"role": role, "reference": references[role], "fingerprint": found.value, "commit": found.commit}
            | {"resolved_at": now}
            for role, found in transfer.fingerprints.items()
        ]
    )


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
