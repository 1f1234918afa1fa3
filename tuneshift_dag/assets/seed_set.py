"""``seed_set`` and ``round_seeds``: what a round begins with.

``seed_set`` holds the user's example prompts, and the preflight that the adapter is really applied. ``round_seeds`` is
the feedback edge of the loop, drawn as an external asset: Dagster's graph is acyclic, but kept pairs of one round seed
the next. So whoever knows the seeds of a round reports them as an *observation* of that asset's partition, whose data
version is their hash; `synthetic_prompts` depends on it, and becomes stale exactly when they change. (A materialization
event would not do: Dagster doesn't detect staleness behind an external asset then.)
"""

from typing import Any

import dagster as dg
import polars as pl

from tuneshift_dag.assets.common import LOG, Context, Step, definition, example_rows, key, shared, step, warning_check
from tuneshift_dag.config import Transfer, round_key, round_number
from tuneshift_dag.engines.contexts import check_examples
from tuneshift_dag.method import Decoding, scoring
from tuneshift_dag.method.prompting import prompt_id
from tuneshift_dag.method.seed_sampling import Candidate, draw_seeds
from tuneshift_dag.resources import EngineResource, StoreResource
from tuneshift_dag.store import insert, now, records
from tuneshift_dag.store.records import content_version
from tuneshift_dag.store.tables import MODELS, ROUND_SEEDS, SEED_SET

CHECKS = {"adapter_applied": "The adapter changes the base model's answers on the seeds."}


def build_seed_set(transfer: Transfer) -> dg.AssetsDefinition:
    @dg.asset(**definition(transfer, "seed_set", SEED_SET, "pytorch", models=True, checks=CHECKS))
    def seed_set(context: Context, store: StoreResource, engines: EngineResource) -> dg.MaterializeResult:
        """The example prompts from `seeds.jsonl`: all that is known of the skill.

        Before anything is computed, the source adapter is checked on them: a silently unapplied adapter
        would make both models equal and every later result meaningless. Reports the seeds of round_01.
        """
        check_examples(transfer)
        if transfer.config.evaluation.tasks:
            # Now, not after hours of work: a misspelt task, or one whose data can't be had.
            engines.harness(transfer)
        store.store().claim(transfer.name, transfer.folder)
        with step(context, store.store(), transfer, "seed_set") as current:
            with current.cost.model_time():
                source = engines.source(transfer)
                prompts = [source.prompt_ids(seed, transfer.config.source_format) for seed in transfer.seeds]
                if transfer.config.target_format.template is None:
                    # Now, not after hours of work: a target without the chat template that it shall be asked by.
                    engines.target(transfer).prompt_ids(transfer.seeds[0], transfer.config.target_format)
                applied = source.check_adapter(prompts)
            if applied.problems:
                raise dg.Failure(_refusal(transfer, applied.problems), allow_retries=False)
            for warning in applied.warnings:
                LOG.warning(warning)
            responses = scoring.generate(
                source,
                current.cache,
                prompts,
                "fine_tuned",
                Decoding(transfer.config.response.max_new_tokens, stops=transfer.stops),
                current.cost,
            )
            answered = [(seed, response.text) for seed, response in zip(transfer.seeds, responses, strict=True)]
            with current.cost.model_time():
                engines.check_chain(transfer, answered[:2])
            seeds = [Candidate(prompt_id(seed), seed, response) for seed, response in answered]
            rows = SEED_SET.frame([vars(seed) for seed in seeds])
            observed: list[dg.AssetObservation] = []
            current.write(
                [(SEED_SET, rows), (MODELS, _models(transfer))],
                content_version(rows),
                lambda connection: observed.append(write_seeds(connection, current, 1, seeds, seeds)),
            )
            context.log_event(observed[-1])
        figures = {
            "examples": example_rows(rows, ["prompt", "response"]),
            "largest_logit_difference": applied.largest_logit_difference,
            "adapter_delta_norm": applied.delta_norm,
        }
        return current.result(len(rows), figures, warning_check("adapter_applied", "; ".join(applied.warnings)))

    return seed_set


def _models(transfer: Transfer) -> pl.DataFrame:
    resolved_at = now()
    rows: list[dict[str, object]] = []
    for role, found in transfer.fingerprints.items():
        section, name = role.split(".")
        reference = getattr(getattr(transfer.config, section), name)
        marks = {"fingerprint": found.value, "commit": found.commit, "resolved_at": resolved_at}
        rows.append({"role": role, "reference": reference, **marks})
    return MODELS.frame(rows)


def _refusal(transfer: Transfer, problems: list[str]) -> str:
    said = "; ".join(problems) + "."
    if transfer.config.engine.type in ("vllm", "openai"):
        return f"{transfer.folder / 'transfer.yaml'}: {said}"
    key, reference = transfer.config.source.tuned
    check = "Check that source.base is the very model that it was trained on."
    return f"{transfer.folder / 'transfer.yaml'}: {key}: {reference}: {said} {check}"


def build_round_seeds(transfer: Transfer) -> dg.AssetSpec:
    return dg.AssetSpec(
        **shared(transfer, "round_seeds", ROUND_SEEDS),
        description=(
            "The seeds of each round's generator calls. `seed_set` reports those of round_01 and"
            " `filtered_dataset` of a round those of the next: this is how the loop fits a graph without"
            " cycles. Nothing to materialize here; look at the observations."
        ),
    )


def write_seeds(
    connection: Any, current: Step, number: int, pool: list[Candidate], originals: list[Candidate]
) -> dg.AssetObservation:
    """Draw the seeds of round ``number`` from ``pool`` and the user's prompts, store them, and return what is to be
    reported to Dagster; within the transaction that writes what they were drawn from.

    An empty pool says that the round has nothing to do: the dataset has reached its target size.
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
    drawn = [(c, s, seed) for c, call in enumerate(calls if pool else []) for s, seed in enumerate(call)]
    rows = ROUND_SEEDS.frame([{"round": round_, "call": c, "slot": s, **vars(seed)} for c, s, seed in drawn])
    version = content_version(rows)
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


def seed_candidates(current: Step) -> list[Candidate]:
    """The user's prompts, in the order of ``seeds.jsonl``, with the fine-tuned responses."""
    rows = current.read("SELECT prompt_id, prompt, response FROM seed_set").rows()
    known = {seed.prompt: seed for seed in (Candidate(*row) for row in rows)}
    return [known[prompt] for prompt in current.transfer.seeds if prompt in known]


def read_seeds(current: Step) -> list[list[Candidate]]:
    """The seeds of each generator call of a round; no calls when the target size was reached before. `dg.Failure` when
    nobody has reported them yet, naming the round to materialize first."""
    round_ = current.round
    assert round_ is not None
    if not current.records.version("round_seeds", round_):
        # The first gap, not the round just before: that one may lack seeds for the same reason.
        number = round_number(round_)
        while number > 1 and not current.records.version("round_seeds", round_key(number - 1)):
            number -= 1
        asset, before = records.seeds_reporter(number)
        unfinished = before or asset
        raise dg.Failure(
            f"{round_} has no seeds yet, because {unfinished} isn't finished. Materialize {unfinished} first"
            f" (if it failed, its run says what to fix), then {round_} again. Nothing that was computed is lost.",
            allow_retries=False,
        )
    rows = current.read(
        "SELECT call, prompt_id, prompt, response FROM round_seeds WHERE round = ? ORDER BY call, slot", [round_]
    )
    calls: dict[int, list[Candidate]] = {}
    for call, *seed in rows.iter_rows():
        calls.setdefault(call, []).append(Candidate(*seed))
    return list(calls.values())
