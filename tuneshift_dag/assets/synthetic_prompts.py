"""``synthetic_prompts``: the generator writes more prompts like each call's seeds."""

import hashlib
from typing import Any

import dagster as dg
import polars as pl

from tuneshift_dag.assets.common import (
    LOG,
    Step,
    column_lineage,
    definition,
    example_rows,
    key,
    mean_repetition,
    partitions,
    step,
)
from tuneshift_dag.assets.seed_set import read_seeds, reporter
from tuneshift_dag.config import Transfer, round_key, round_number
from tuneshift_dag.config.schema_models import Generator
from tuneshift_dag.method import Decoding, PromptWriter, Response, scoring
from tuneshift_dag.method.prompting import (
    PromptPool,
    distinct_bigrams,
    generator_request,
    labelled_request,
    normalize,
    novel_bigrams,
    parse_labelled,
    parse_list,
)
from tuneshift_dag.method.seed_sampling import Candidate
from tuneshift_dag.resources import EngineResource, StoreResource
from tuneshift_dag.store import Store
from tuneshift_dag.store.records import content_version
from tuneshift_dag.store.tables import PROPOSALS, REJECTED_PROMPTS, SYNTHETIC_PROMPTS

FIRST_ROUND = round_key(1)


def build_synthetic_prompts(transfer: Transfer) -> dg.AssetsDefinition:
    asset_key = key(transfer, "synthetic_prompts")

    @dg.asset(
        **definition(transfer, SYNTHETIC_PROMPTS, "synthetic_prompts", "pytorch", models=True),
        # seed_set is named so that Dagster runs it first: it doesn't order through external assets.
        deps=[key(transfer, "seed_set"), key(transfer, "round_seeds")],
        partitions_def=partitions(transfer),
        check_specs=[
            dg.AssetCheckSpec(
                "no_duplicate_prompts",
                asset=asset_key,
                description="No prompt of this round equals (normalized) a seed or a prompt of an earlier round.",
            ),
            dg.AssetCheckSpec(
                "no_held_out_prompts",
                asset=asset_key,
                description="No held-out query is among the prompts: it would be trained on.",
            ),
        ],
    )
    def synthetic_prompts(
        context: dg.AssetExecutionContext, store: StoreResource, engines: EngineResource
    ) -> dg.MaterializeResult:
        """New prompts: the generator is shown a few kept prompts per call and asked for more like them.

        Items that are empty, too long, known from the seeds or an earlier round, nearly the same as a known prompt
        (ROUGE-L), or in the held-out file are dropped and listed in `rejected_prompts`.
        """
        round_ = context.partition_key
        database = store.store()
        with step(context, database, transfer, "synthetic_prompts", round_) as current:
            calls = read_seeds(current)
            if not calls:
                LOG.info(f"{round_}: the dataset has reached target_pairs; nothing to generate.")
            answers = _ask(engines.generator(transfer), store.cache(), current, calls) if calls else []
            proposals, prompts, rejected = _sort_out(transfer, database, round_, calls, answers)
            version = current.write(
                [(PROPOSALS, proposals), (SYNTHETIC_PROMPTS, prompts), (REJECTED_PROMPTS, rejected)],
                content_version(prompts.select("prompt_id", "prompt")),
            )
        return dg.MaterializeResult(
            data_version=dg.DataVersion(version),
            metadata={
                "dagster/partition_row_count": len(prompts),
                "dagster/column_lineage": column_lineage(transfer, SYNTHETIC_PROMPTS),
                "examples": example_rows(prompts, ["prompt"]),
                **_seeded_by(transfer, database, round_),
                "generator_calls": len(calls),
                **_diversity(transfer, database, round_, prompts),
                "rejected": dict(rejected.group_by("reason").len().sort("reason").iter_rows()),
                **current.metadata(),
            },
            check_results=[
                _check_duplicates(transfer, database, round_),
                _check_held_out(transfer, database, round_),
            ],
        )

    return synthetic_prompts


def _request(engine: PromptWriter, settings: Generator, call: list[Candidate], first_round: bool) -> str:
    """What the generator sees in one call. In the first round nothing is known that could be asked for."""
    if settings.mode == "by_response":
        shown = call if first_round else call[:-1]
        asked = None if first_round else call[-1].response
        examples = [(seed.prompt, seed.response) for seed in shown]
        return labelled_request(settings.instruction, settings.example_template, examples, asked)
    prompts = [seed.prompt for seed in call]
    return generator_request(
        settings.mode, settings.instruction, prompts, settings.prompts_per_call, engine.render_chat
    )


def _ask(engine: PromptWriter, cache: scoring.Cache, current: Step, calls: list[list[Candidate]]) -> list[Response]:
    """The generator's answer to every call, sampled with a seed of its own."""
    transfer, settings = current.transfer, current.transfer.config.generator
    requests = [_request(engine, settings, call, first_round=current.round == FIRST_ROUND) for call in calls]
    last_item = settings.seeds_per_call + settings.prompts_per_call
    stops = {"chat": "", "continuation": f"\n{last_item + 1}.", "by_response": "\n\n"}
    decoding = Decoding(
        settings.max_new_tokens,
        settings.temperature,
        settings.top_k,
        settings.top_p,
        stop=stops[settings.mode],
    )
    # The call's number keeps two calls with the same seeds apart.
    seeds = [_sampling_seed(transfer.config.seed, number, request) for number, request in enumerate(requests)]
    return scoring.generate(
        engine,
        cache,
        [engine.encode(request, templated=settings.mode == "chat") for request in requests],
        "base",
        decoding,
        current.cost,
        seeds,
        current.progress("generator calls"),
    )


def _sort_out(
    transfer: Transfer, database: Store, round_: str, calls: list[list[Candidate]], answers: list[Response]
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Frames of proposals, new prompts and rejected items."""
    settings = transfer.config.generator
    pool = PromptPool(settings.near_duplicate, settings.max_prompt_characters)
    pool.add(transfer.seeds, "seed")
    pool.add((prompt for prompt, _ in transfer.heldout), "held_out")
    # Of earlier rounds only, so that the prompts don't depend on the order in which rounds were grown anew.
    known = database.read("SELECT prompt FROM synthetic_prompts WHERE round < ?", [round_], transfer.name)
    pool.add(known["prompt"], "duplicate")
    proposals, prompts, rejected = [], [], []
    for number, (call, answer) in enumerate(zip(calls, answers, strict=True)):
        seed_ids = [seed.prompt_id for seed in call]
        proposal_id = hashlib.sha256(f"{round_}|{number}|{seed_ids}|{answer.text}".encode()).hexdigest()[:16]
        proposals.append(
            {"round": round_, "proposal_id": proposal_id, "call": number, "seed_ids": seed_ids, "text": answer.text}
        )
        items = _items(settings, answer, first_round=round_ == FIRST_ROUND)
        accepted, dropped = pool.sort(items[: settings.prompts_per_call])
        prompts += [{"round": round_, "proposal_id": proposal_id, **vars(item)} for item in accepted]
        rejected += [{"round": round_, "proposal_id": proposal_id, **vars(item)} for item in dropped]
    return PROPOSALS.frame(proposals), SYNTHETIC_PROMPTS.frame(prompts), REJECTED_PROMPTS.frame(rejected)


def _seeded_by(transfer: Transfer, database: Store, round_: str) -> dict[str, Any]:
    """Who reported the round's seeds, and from which rounds these prompts are: the pool is all that was kept so far."""
    asset, partition = reporter(round_number(round_))
    origins = database.read(
        "SELECT coalesce(p.round, 'seed_set') AS origin, count(DISTINCT s.prompt_id) AS seeds FROM round_seeds s"
        " LEFT JOIN synthetic_prompts p USING (prompt_id) WHERE s.round = ? GROUP BY origin ORDER BY origin",
        [round_],
        transfer.name,
    )
    return {
        "seeded_by": dg.MetadataValue.asset(key(transfer, asset)),
        **({"seeded_by_partition": partition} if partition else {}),
        "seeds_from": dict(origins.iter_rows()),
    }


def _diversity(transfer: Transfer, database: Store, round_: str, prompts: pl.DataFrame) -> dict[str, Any]:
    """How varied the round's prompts are, and how much of them no round before it had; nothing for an empty round."""
    earlier = database.read("SELECT prompt FROM synthetic_prompts WHERE round < ?", [round_], transfer.name)["prompt"]
    figures = {
        "distinct_bigrams": distinct_bigrams(prompts["prompt"]),
        "novel_bigrams": novel_bigrams(prompts["prompt"], [*transfer.seeds, *earlier]),
        "repetition": mean_repetition(database, prompts["prompt"].to_list()),
    }
    return {name: value for name, value in figures.items() if value is not None}


def _items(settings: Generator, answer: Response, first_round: bool) -> list[str]:
    finished = answer.finish_reason == "stop"
    if settings.mode == "by_response":
        return parse_labelled(answer.text, settings.example_template, not first_round, finished)
    return parse_list(answer.text, settings.mode, finished)


def _sampling_seed(seed: int, call: int, request: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}|{call}|{request}".encode()).digest()[:6], "big")


def _check_duplicates(transfer: Transfer, database: Store, round_: str) -> dg.AssetCheckResult:
    doubles = database.read(
        "SELECT prompt FROM synthetic_prompts WHERE round = ? AND prompt_id IN ("
        " SELECT prompt_id FROM seed_set UNION ALL"
        " SELECT prompt_id FROM synthetic_prompts WHERE round < ?)",
        [round_, round_],
        transfer.name,
    )["prompt"].to_list()
    return dg.AssetCheckResult(
        passed=not doubles, check_name="no_duplicate_prompts", metadata={"duplicates": doubles[:20]}
    )


def _check_held_out(transfer: Transfer, database: Store, round_: str) -> dg.AssetCheckResult:
    held_out = {normalize(prompt) for prompt, _ in transfer.heldout}
    prompts = database.read("SELECT prompt FROM synthetic_prompts WHERE round = ?", [round_], transfer.name)
    leaked = [p for p in prompts["prompt"] if normalize(p) in held_out]
    return dg.AssetCheckResult(passed=not leaked, check_name="no_held_out_prompts", metadata={"leaked": leaked[:20]})
