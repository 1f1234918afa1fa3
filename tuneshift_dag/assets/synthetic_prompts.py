"""``synthetic_prompts``: the generator writes more prompts like each call's seeds."""

import hashlib
from typing import Any

import dagster as dg
import polars as pl

from tuneshift_dag.assets.common import LOG, Context, Step, definition, example_rows, key, mean_repetition, step
from tuneshift_dag.assets.seed_set import read_seeds
from tuneshift_dag.config import Transfer, round_key, round_number
from tuneshift_dag.engines.contexts import overlong
from tuneshift_dag.method import Decoding, PromptWriter, Response, answers, asking, prompting, scoring
from tuneshift_dag.method.seed_sampling import Candidate
from tuneshift_dag.resources import EngineResource, StoreResource
from tuneshift_dag.store import Store
from tuneshift_dag.store.records import content_version, seeds_reporter
from tuneshift_dag.store.tables import PROPOSALS, REJECTED_PROMPTS, SYNTHETIC_PROMPTS

CHECKS = {
    "no_duplicate_prompts": "No prompt of this round equals (normalized) a seed or a prompt of an earlier round.",
    "no_held_out_prompts": "No held-out query is among the prompts: it would be trained on.",
}


def build_synthetic_prompts(transfer: Transfer) -> dg.AssetsDefinition:
    # Made from seed_set, too, so that Dagster runs it first: it doesn't order through external assets.
    @dg.asset(**definition(transfer, "synthetic_prompts", SYNTHETIC_PROMPTS, "pytorch", models=True, checks=CHECKS))
    def synthetic_prompts(context: Context, store: StoreResource, engines: EngineResource) -> dg.MaterializeResult:
        """New prompts: the generator is shown a few kept prompts per call and asked for more like them.

        Items that are empty, too long, known from the seeds or an earlier round, nearly the same as a known prompt
        (ROUGE-L, and the same numbers), or in the held-out file are dropped and listed in `rejected_prompts`.
        """
        database, round_ = store.store(), context.partition_key
        with step(context, database, transfer, "synthetic_prompts", round_) as current:
            calls = read_seeds(current)
            if not calls:
                LOG.info(f"{round_}: the dataset has reached target_pairs; nothing to generate.")
            written = _ask(engines.generator(transfer), current, calls) if calls else []
            proposals, prompts, rejected = _sort_out(current, calls, written)
            current.write(
                [(PROPOSALS, proposals), (SYNTHETIC_PROMPTS, prompts), (REJECTED_PROMPTS, rejected)],
                content_version(prompts.select("prompt_id", "prompt")),
            )
        figures = {
            "examples": example_rows(prompts, ["prompt"]),
            **_seeded_by(current),
            "generator_calls": len(calls),
            **_diversity(current, prompts["prompt"]),
            "rejected": dict(rejected.group_by("reason").len().sort("reason").iter_rows()),
        }
        checks = [check(transfer, database, round_) for check in (_check_duplicates, _check_held_out)]
        return current.result(len(prompts), figures, *checks)

    return synthetic_prompts


def _ask(engine: PromptWriter, current: Step, calls: list[list[Candidate]]) -> list[Response]:
    """The generator's answer to every call, sampled with a seed of its own."""
    transfer, settings = current.transfer, current.transfer.config.generator
    line = _separator(calls)
    requests = [_request(current, call, line) for call in calls]
    last_item = settings.seeds_per_call + settings.prompts_per_call
    stops = asking.stop_texts(settings.mode, transfer.generator_format, last_item, line)
    how = (settings.max_new_tokens, settings.temperature, settings.top_k, settings.top_p)
    return scoring.generate(
        engine,
        current.cache,
        list(map(engine.chat_ids if settings.mode == "chat" else engine.encode, requests)),
        "base",
        Decoding(*how, stops=stops),
        current.cost,
        # The call's number keeps two calls with the same seeds apart.
        [scoring.sampling_seed(f"{transfer.config.seed}|{number}|{text}") for number, text in enumerate(requests)],
        current.progress("generator calls"),
    )


def _separator(calls: list[list[Candidate]]) -> str:
    """The line between blocks, one for all calls since it may be what ends an answer."""
    # Seeds that an older version drew have no response.
    shown = (text for call in calls for seed in call for text in (seed.prompt, seed.response or ""))
    return asking.separator(shown)


def _request(current: Step, call: list[Candidate], line: str) -> str:
    """What the generator is asked in one call. In the first round nothing is known that could be asked for."""
    settings, format = current.transfer.config.generator, current.transfer.generator_format
    if settings.mode == "by_response":
        shown, asked = (call, None) if current.round == round_key(1) else (call[:-1], call[-1].response)
        examples = [(seed.prompt, seed.response) for seed in shown]
        between = line if format == "blocks" else ""
        return asking.labelled_request(settings.instruction, settings.example_template, examples, asked, between)
    prompts, count = [seed.prompt for seed in call], settings.prompts_per_call
    return asking.generator_request(settings.mode, settings.instruction, prompts, count, format, line)


def _items(current: Step, answer: Response, line: str) -> list[str]:
    settings, format = current.transfer.config.generator, current.transfer.generator_format
    finished = answer.finish_reason == "stop"
    if settings.mode == "by_response":
        asked, between = current.round != round_key(1), line if format == "blocks" else ""
        items = answers.parse_labelled(answer.text, settings.example_template, asked, finished, between)
        return items[: settings.prompts_per_call]
    return answers.read_answer(answer.text, settings.mode, format, finished, settings.prompts_per_call, line)


def _sort_out(
    current: Step, calls: list[list[Candidate]], written: list[Response]
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    transfer, settings, round_ = current.transfer, current.transfer.config.generator, current.round
    pool = prompting.PromptPool(settings.near_duplicate, overlong(transfer))
    pool.add(transfer.seeds, "seed")
    pool.add((prompt for prompt, _ in transfer.heldout), "held_out")
    pool.add(_earlier_prompts(current), "duplicate")
    proposals, prompts, rejected = [], [], []
    line = _separator(calls)
    for number, (call, answer) in enumerate(zip(calls, written, strict=True)):
        seed_ids = [seed.prompt_id for seed in call]
        proposal_id = hashlib.sha256(f"{round_}|{number}|{seed_ids}|{answer.text}".encode()).hexdigest()[:16]
        own: dict[str, object] = {"round": round_, "proposal_id": proposal_id}
        proposals.append({**own, "call": number, "seed_ids": seed_ids, "text": answer.text})
        accepted, dropped = pool.sort(_items(current, answer, line))
        prompts += [{**own, **vars(item)} for item in accepted]
        rejected += [{**own, **vars(item)} for item in dropped]
    return PROPOSALS.frame(proposals), SYNTHETIC_PROMPTS.frame(prompts), REJECTED_PROMPTS.frame(rejected)


def _earlier_prompts(current: Step) -> pl.Series:
    """Of earlier rounds only, so that the prompts don't depend on the order in which rounds were grown anew."""
    return current.read("SELECT prompt FROM synthetic_prompts WHERE round < ?", [current.round])["prompt"]


def _seeded_by(current: Step) -> dict[str, Any]:
    """Who reported the round's seeds, and from which rounds these prompts are: the pool is all that was kept so far."""
    asset, partition = seeds_reporter(round_number(str(current.round)))
    origins = current.read(
        "SELECT coalesce(p.round, 'seed_set') AS origin, count(DISTINCT s.prompt_id) AS seeds FROM round_seeds s"
        " LEFT JOIN synthetic_prompts p USING (prompt_id) WHERE s.round = ? GROUP BY origin ORDER BY origin",
        [current.round],
    )
    return {
        "seeded_by": dg.MetadataValue.asset(key(current.transfer, asset)),
        "seeded_by_partition": partition,
        "seeds_from": dict(origins.iter_rows()),
    }


def _diversity(current: Step, prompts: pl.Series) -> dict[str, float | None]:
    """How varied the round's prompts are, and how much of them no round before it had; None for an empty round."""
    return {
        "distinct_bigrams": prompting.distinct_bigrams(prompts),
        "novel_bigrams": prompting.novel_bigrams(prompts, [*current.transfer.seeds, *_earlier_prompts(current)]),
        "repetition": mean_repetition(current.store, prompts),
    }


def _check_duplicates(transfer: Transfer, database: Store, round_: str) -> dg.AssetCheckResult:
    known = "SELECT prompt_id FROM seed_set UNION ALL SELECT prompt_id FROM synthetic_prompts WHERE round < $round"
    query = f"SELECT prompt FROM synthetic_prompts WHERE round = $round AND prompt_id IN ({known})"
    doubles = database.read(query, {"round": round_}, transfer.name)["prompt"].to_list()
    found = {"duplicates": doubles[:20]}
    return dg.AssetCheckResult(passed=not doubles, check_name="no_duplicate_prompts", metadata=found)


def _check_held_out(transfer: Transfer, database: Store, round_: str) -> dg.AssetCheckResult:
    held_out = {prompting.normalize(prompt) for prompt, _ in transfer.heldout}
    prompts = database.read("SELECT prompt FROM synthetic_prompts WHERE round = ?", [round_], transfer.name)
    leaked = [p for p in prompts["prompt"] if prompting.normalize(p) in held_out]
    return dg.AssetCheckResult(passed=not leaked, check_name="no_held_out_prompts", metadata={"leaked": leaked[:20]})
