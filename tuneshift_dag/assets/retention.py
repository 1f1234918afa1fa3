"""What `evaluation` measures beside the skill: what the target still knows, and at which scale of its adapter."""

from collections.abc import Sequence
from typing import Any

from tuneshift_dag.assets.common import LOG, Step
from tuneshift_dag.method import Scorer, Side, Target, scoring
from tuneshift_dag.method.evaluation import Retention, general_texts, retention, sampled_texts
from tuneshift_dag.method.rehearsal import conversations

Rows = list[dict[str, Any]]
# Answers of a chat target to questions of its own.
_ANSWERS = 32


def measure_retention(current: Step, engine: Target, name: str, side: Side) -> tuple[dict[str, Any], Rows]:
    """A model's row of ``retention`` and its rows of ``retention_by_kind``."""
    kinds = general_texts()
    texts = [text for kind in kinds.values() for text in kind]
    progress = current.progress(f"general text, {name}")
    tokens = [engine.encode(text, templated=True) for text in texts]
    logprobs = scoring.score(engine, current.cache, tokens, side, current.cost, progress)
    whole = retention(texts, tokens, logprobs)
    LOG.info(f"{name}: perplexity of general text {whole.perplexity:.2f}")
    rows, start = [], 0
    for kind, own in kinds.items():
        part = slice(start, start := start + len(own))
        rows.append({"model": name, "kind": kind, **vars(retention(own, tokens[part], logprobs[part]))})
    if answers := _own_answers(current, engine, side):
        rows.append({"model": name, "kind": "own_answers", **vars(answers)})
    return {"model": name, **vars(whole)}, rows


def _own_answers(current: Step, engine: Target, side: Side) -> Retention | None:
    """How well a target that chats predicts what it answered before to questions of its own; other ones than those that
    it was held to in its training."""
    format, seed = current.transfer.config.target_format, current.transfer.config.seed
    if format.template is not None:
        return None
    found = conversations(engine, current.cache, _ANSWERS, format, -1 - seed, current.cost)
    prompts = [text.token_ids[: text.prompt_tokens] for text in found]
    answers = [text.token_ids[text.prompt_tokens :] for text in found]
    logprobs = scoring.score(engine, current.cache, answers, side, current.cost, prompts=prompts)
    return retention([text.response for text in found], answers, logprobs) if found else None


def sampled_perplexity(current: Step, engine: Scorer, side: Side) -> float:
    texts = sampled_texts()
    tokens = [engine.encode(text, templated=True) for text in texts]
    return retention(texts, tokens, scoring.score(engine, current.cache, tokens, side, current.cost)).perplexity


def chosen_scale(frontier: Sequence[dict[str, Any]], most: float | None) -> float:
    """The scale with the best accuracy whose general text costs at most ``most`` times the base's perplexity: the whole
    adapter without such a bound, or when none keeps it. Rows of ``frontier``; of equal ones the largest scale."""
    kept = [row for row in frontier if most is not None and row["ratio"] <= most]
    if not kept:
        return 1.0
    return float(max(kept, key=lambda row: (row["value"] or 0.0, row["scale"]))["scale"])
