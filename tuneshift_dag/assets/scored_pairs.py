"""``scored_pairs``: both source models answer every prompt; four perplexities per pair."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import dagster as dg
import polars as pl

from tuneshift_dag.assets.common import Context, Step, definition, example_rows, step
from tuneshift_dag.config import Transfer
from tuneshift_dag.method import Decoding, Pair, Response, Scorer, perplexity, scoring
from tuneshift_dag.models import encoder
from tuneshift_dag.models.memory import trim
from tuneshift_dag.resources import EngineResource, StoreResource
from tuneshift_dag.store import Spool, in_chunks
from tuneshift_dag.store.records import content_version
from tuneshift_dag.store.tables import SCORED_PAIRS

CHECKS = {"finite_perplexities": "Every response with tokens has finite perplexities of at least 1."}
EXAMPLE_COLUMNS = ["prompt", "fine_tuned_response", "base_response", "ppl_fine_tuned", "ppl_base"]


def build_scored_pairs(transfer: Transfer) -> dg.AssetsDefinition:
    @dg.asset(**definition(transfer, "scored_pairs", SCORED_PAIRS, "pytorch", models=True, checks=CHECKS))
    def scored_pairs(context: Context, store: StoreResource, engines: EngineResource) -> dg.MaterializeResult:
        """The source base model and the source fine-tuned model each answer every prompt of the round.

        Each pair gets four perplexities: each model on its own response and on the other's (unless
        `engine.cross_scores` is off). The local engine keeps one 4-bit base model, with the adapter switched on or
        off; a server has the models under two names.
        """
        with (
            store.store().spool(SCORED_PAIRS) as rows,
            step(context, store.store(), transfer, "scored_pairs", context.partition_key) as current,
        ):
            for chunk in _score_round(current, engines.source(transfer)):
                rows.append(chunk)
                current.spool_keys()
                trim()
            current.write([(SCORED_PAIRS, rows)], content_version(rows))
            truncated = sum(int((chunk["fine_tuned_finish"] == "length").sum()) for chunk in rows)
            figures = {
                "examples": example_rows(next(iter(rows), SCORED_PAIRS.empty()), EXAMPLE_COLUMNS),
                "truncated_fine_tuned_responses": truncated,
            }
            return current.result(len(rows), figures, _check_finite(rows))

    return scored_pairs


def _score_round(current: Step, engine: Scorer) -> Iterator[pl.DataFrame]:
    """Rows of a round in order of their prompt_id, chunk by chunk: memory doesn't grow with the prompts."""
    transfer = current.transfer
    decoding = Decoding(transfer.config.response.max_new_tokens, stops=transfer.stops)
    total = current.read("SELECT count(*) FROM synthetic_prompts WHERE round = ?", [current.round]).item()
    if not total and not current.records.version("synthetic_prompts", current.round):
        raise current.lacks("synthetic_prompts")
    if not total:
        return
    similarity = _seed_similarity(current)
    progress = scoring.chunk_progress(current.progress("pairs scored"), total)

    def score(prompts: pl.DataFrame) -> pl.DataFrame:
        ids = [engine.prompt_ids(prompt, transfer.config.source_format) for prompt in prompts["prompt"]]
        pairs = scoring.score_pairs(engine, current.cache, ids, decoding, current.cost, progress(len(ids)))
        similar = similarity(prompts["prompt"].to_list())
        return SCORED_PAIRS.frame(
            [
                {**prompt, **pair_row(pair), "round": current.round, "seed_similarity": value}
                for prompt, pair, value in zip(prompts.iter_rows(named=True), pairs, similar, strict=True)
            ]
        )

    with engine.session():
        yield from map(score, _prompt_chunks(current, engine.chunk_size))


def _seed_similarity(current: Step) -> Callable[[Sequence[str]], Sequence[float | None]]:
    """Of prompts, the highest cosine similarity of each to a seed; None where no rule asks for it."""
    if "seed_similarity" not in current.transfer.config.rules:
        return lambda prompts: [None] * len(prompts)
    seeds = encoder.embed(current.transfer.seeds)

    def similarity(prompts: Sequence[str]) -> list[float]:
        with current.cost.model_time():
            return [float(value) for value in (encoder.embed(prompts) @ seeds.T).max(axis=1)]

    return similarity


def _prompt_chunks(current: Step, size: int) -> Iterator[pl.DataFrame]:
    query = (
        "SELECT prompt_id, prompt FROM synthetic_prompts WHERE round = ? AND prompt_id > ? ORDER BY prompt_id LIMIT ?"
    )
    last = ""
    while len(prompts := current.read(query, [current.round, last, size])):
        last = prompts["prompt_id"][-1]
        yield prompts


def pair_row(pair: Pair) -> dict[str, Any]:
    """The columns of ``scored_pairs`` that a pair determines."""
    f, b = pair.fine_tuned, pair.base
    return {
        "fine_tuned_response": f.text,
        "base_response": b.text,
        "fine_tuned_tokens": len(f.token_ids),
        "base_tokens": len(b.token_ids),
        "fine_tuned_finish": f.finish_reason,
        "base_finish": b.finish_reason,
        "fine_tuned_own_logprob": f.sum_logprob,
        "base_own_logprob": b.sum_logprob,
        "base_cross_logprob": pair.base_on_fine_tuned,
        "fine_tuned_cross_logprob": pair.fine_tuned_on_base,
        "fine_tuned_eos_logprob": f.eos_logprob,
        "base_eos_logprob": b.eos_logprob,
        "ppl_fine_tuned": perplexity(f.sum_logprob, len(f.token_ids)),
        "ppl_base": perplexity(b.sum_logprob, len(b.token_ids)),
        "ppl_base_cross": _cross_perplexity(pair.base_on_fine_tuned, f),
        "ppl_fine_tuned_cross": _cross_perplexity(pair.fine_tuned_on_base, b),
    }


def _cross_perplexity(sum_logprob: float | None, response: Response) -> float | None:
    return None if sum_logprob is None else perplexity(sum_logprob, len(response.token_ids))


def _check_finite(rows: pl.DataFrame | Spool) -> dg.AssetCheckResult:
    columns = ["ppl_fine_tuned", "ppl_base", "ppl_base_cross", "ppl_fine_tuned_cross"]
    # Rounding may put a certain answer's perplexity a hair below 1.
    finite = pl.all_horizontal((pl.col(c).is_finite() & (pl.col(c) > 1 - 1e-6)) | pl.col(c).is_null() for c in columns)
    bad = list(islice((id_ for chunk in in_chunks(rows) for id_ in chunk.filter(~finite)["prompt_id"]), 20))
    return dg.AssetCheckResult(passed=not bad, check_name="finite_perplexities", metadata={"prompt_ids": bad})
