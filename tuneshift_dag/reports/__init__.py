"""The figures of one transfer: what ``tuneshift report`` prints, and what cards say of it in words."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tuneshift_dag import visible
from tuneshift_dag.config import Transfer
from tuneshift_dag.config.schema import Evaluation
from tuneshift_dag.method.statistics import DIFFERENCE, DISCORDANCE, bootstrap_share, compared, prompts_needed
from tuneshift_dag.store import Store
from tuneshift_dag.store.queries import of_its_rounds
from tuneshift_dag.store.records import Records

# Model calls of these assets make the dataset; those of `evaluation` measure the result.
_DATASET_ASSETS = ("seed_set", "synthetic_prompts", "scored_pairs")


def report(store: Store, transfer: Transfer) -> dict[str, Any]:
    """Counts, accuracies, retention and the last run's cost (also of one that did nothing): a JSON-ready object."""
    name = transfer.name

    def rows(query: str) -> list[dict[str, Any]]:
        return store.read(query, schema=name).to_dicts()

    steps, wall = _last_run(store, name)
    named = ("synthetic_prompts", "scored_pairs", "filtered_dataset")
    tables = {table: of_its_rounds(transfer, table) for table in named}
    seconds: dict[str, float] = {}
    for step in steps:
        seconds[step["asset"]] = seconds.get(step["asset"], 0.0) + step["seconds"]
    trained = rows(_TRAINED)
    records = Records(store, transfer)
    # What was measured of a model before this one says nothing of it, nor does a file that is gone.
    past = records.is_of_another_model("evaluation") or not transfer.evaluates
    measured = "WHERE FALSE" if past else ""
    accuracy, retained = rows(f"SELECT * FROM accuracy {measured}"), rows(f"SELECT * FROM retention {measured}")
    compared_now = transfer.config.compare is not None and not records.causes("comparison")
    settings = transfer.config.evaluation
    judged = verdicts(rows("SELECT * FROM evaluations"), retained, settings, transfer.config.seed) if retained else []
    return {
        "transfer": name,
        **rows(_COUNTS.format(**tables))[0],
        # Those that the prompts grew from.
        "seeds": [row["prompt"] for row in rows("SELECT prompt FROM seed_set")],
        "filter": transfer.config.filter.model_dump(),
        "by_round": rows(_BY_ROUND.format(**tables)),
        "model_calls": sum(s["model_calls"] for s in steps if s["asset"] in _DATASET_ASSETS),
        "evaluation_calls": sum(s["model_calls"] for s in steps if s["asset"] == "evaluation"),
        "cache_hits": sum(s["cache_hits"] for s in steps),
        "seconds": {asset: round(value, 2) for asset, value in seconds.items()},
        "seconds_total": wall,
        "model_seconds": round(sum(s["model_seconds"] for s in steps), 2),
        # That of the figures, which may be older than the settings.
        "metric": "numeric" if any(row["flexible"] is not None for row in accuracy) else "exact_match",
        # Without the columns that the metric doesn't have.
        "accuracy": {
            row.pop("model"): {column: value for column, value in row.items() if value is not None} for row in accuracy
        },
        "retention": {row.pop("model"): row for row in retained},
        "retention_by_kind": rows(f"SELECT * FROM retention_by_kind {measured} ORDER BY kind, model"),
        "frontier": rows(f"SELECT * FROM frontier {measured} ORDER BY scale"),
        "verdicts": [vars(verdict) for verdict in judged],
        "tasks": [] if measured else rows(CURRENT_SCORES),
        "comparison": comparison(store, transfer) if compared_now else [],
        # Relative to the store's folder; absolute in rows of older versions.
        "out_of_date": records.changed(),
        "model": {**trained[0], "path": str(store.path.parent / trained[0]["path"])} if trained else None,
    }


@dataclass(frozen=True)
class Verdict:
    """The outcome of one asset check of ``evaluation``."""

    name: str
    passed: bool
    words: str


def verdicts(
    answers: Iterable[Mapping[str, Any]], retained: Iterable[Mapping[str, Any]], settings: Evaluation, seed: int
) -> list[Verdict]:
    """From rows of the tables ``evaluations`` and ``retention``; without held-out answers none on the skill."""
    correct: dict[str, list[bool]] = {}
    for row in sorted(answers, key=lambda row: str(row["prompt_id"])):
        correct.setdefault(row["model"], []).append(bool(row["correct"]))
    perplexity = {row["model"]: float(row["perplexity"]) for row in retained}
    ratio = perplexity["target_distilled"] / perplexity["target_base"]
    skill = [_skill(correct, settings, seed)] if correct else [Verdict("keeps_skill", True, "No held-out file.")]
    most = settings.keeps_general_text
    words = (
        f"General text: {ratio:.2f} times the perplexity of the target before it was tuned;"
        f" evaluation.keeps_general_text allows {most:g}."
    )
    return [*skill, Verdict("keeps_general_text", ratio <= most, words)]


def _skill(correct: Mapping[str, list[bool]], settings: Evaluation, seed: int) -> Verdict:
    least = settings.keeps_skill
    share = bootstrap_share(correct["target_distilled"], correct["source_fine_tuned"], settings.bootstrap_samples, seed)
    if share is None:
        words = "Skill: the source answers no held-out prompt right, so nothing can be said of the target."
        return Verdict("keeps_skill", False, words)
    words = (
        f"Skill: {share.value:.2f} of the source's held-out accuracy (95 % interval {share.low:.2f} to"
        f" {share.high:.2f}); evaluation.keeps_skill asks for {least:g}."
    )
    return Verdict("keeps_skill", share.value >= least, words)


def describe_filter(transfer: Transfer) -> str:
    """For people: the rule and its threshold."""
    settings = transfer.config.filter
    if settings.rule == "unfiltered":
        return "`unfiltered`"
    return f"`{settings.rule}`, threshold {settings.threshold:g}"


def escape_markdown(text: str) -> str:
    """A prompt or response as Markdown that shows it as it is, on one line: no links, pictures, HTML or lists."""
    line = visible(re.sub(r"\s*[\n\r]\s*", " ⏎ ", text.strip()))
    return re.sub(r"([\\`*_\[\]<>#|~&$@]|!(?=\[)|:(?=//)|(?<=www)\.|^[-+=]|(?<=^\d)[.)]|(?<=^\d\d)[.)])", r"\\\1", line)


def fenced(text: str) -> str:
    """A text as a code block of Markdown, whatever stands in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{visible(text)}\n{fence}"


def comparison(store: Store, transfer: Transfer) -> list[dict[str, Any]]:
    """The table ``comparison``, arms by accuracy and then the untrained models, each with its scores on ``tasks``.

    Intervals are those of the stored answers as `compared` has them now, also where an older version wrote the table.
    """
    query = "SELECT * FROM comparison ORDER BY pairs IS NULL, value DESC, arm"
    rows = {row["arm"]: {**row, "tasks": []} for row in store.read(query, schema=transfer.name).iter_rows(named=True)}
    for score in store.read(_ARM_TASKS, schema=transfer.name).iter_rows(named=True):
        rows[score.pop("arm")]["tasks"].append(score)
    marks: dict[str, list[list[float]]] = {}
    for arm, run in store.read(_MARKS, schema=transfer.name).iter_rows():
        marks.setdefault(arm, []).append(run)
    correct = {arm: np.array(runs) for arm, runs in marks.items()}
    for arm, measures in compared(correct, [arm for arm in correct if rows[arm]["pairs"] is not None]).items():
        rows[arm] |= measures
    return list(rows.values())


def power(store: Store, transfer: Transfer) -> str:
    """One sentence: how many held-out prompts show a small difference, and how many there are."""
    found = store.read(_DISCORDANCE, schema=transfer.name).item()
    # Accuracies can't differ by more than the share that tells the two models apart.
    discordance = max(found or DISCORDANCE, DIFFERENCE)
    known = "as in the last comparison" if found else "which is assumed"
    return (
        f"To see a difference of {DIFFERENCE:g} in the accuracy of two models takes"
        f" {prompts_needed(DIFFERENCE, discordance):,} held-out prompts (paired, two-sided 5 %, 80 % power) when just"
        f" one of the two is right on {discordance:.0%} of them, {known}; heldout.jsonl has {len(transfer.heldout):,}."
        " Several trainings of an arm need fewer if they are alike; if they differ, only more of them help."
    )


_DISCORDANCE = """
    SELECT avg((arm.correct <> random.correct)::INTEGER)
    FROM comparison_answers arm JOIN comparison_answers random USING (seed, prompt_id)
    WHERE random.arm = 'random' AND arm.arm <> 'random'
"""
_MARKS = """
    SELECT arm, list(correct::DOUBLE ORDER BY prompt_id) FROM comparison_answers GROUP BY arm, seed ORDER BY arm, seed
"""
_ARM_TASKS = """
    SELECT arm, task, metric, filter, any_value(n) AS n, avg(value) AS value, list(value ORDER BY seed) AS by_run
    FROM comparison_tasks GROUP BY arm, task, metric, filter ORDER BY task, metric, filter, arm
"""


def arm_tasks(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """For people: scores on standard tasks of a `comparison`, one column for each arm; with several trainings their
    mean, lowest and highest."""

    def told(score: dict[str, Any]) -> str:
        runs = score["by_run"]
        return f"{score['value']:.3f}" + (f" ({min(runs):.3f} to {max(runs):.3f})" if len(runs) > 1 else "")

    return by_column([{**score, "arm": row["arm"]} for row in rows for score in row["tasks"]], "arm", told)


def by_column(
    scores: list[dict[str, Any]],
    column: str,
    told: Callable[[dict[str, Any]], str],
    named: Sequence[str] = ("task", "metric", "filter", "n"),
) -> list[dict[str, str]]:
    """Scores (on standard tasks), in words: a row for each of the values of ``named``, a column for each of
    ``column``."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for score in scores:
        names = {name: str(score[name]) for name in named}
        found.setdefault(tuple(names.values()), names)[score[column]] = told(score)
    return list(found.values())


def arms(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """For people: the rows of a `comparison` without diversity and tasks."""

    def against(row: dict[str, Any], other: str) -> str:
        return "-" if row[other] is None else interval(row[other], row[f"{other}_low"], row[f"{other}_high"], "+")

    def told(row: dict[str, Any]) -> dict[str, str]:
        shared, counts = row["shared_with_random"], {"pairs": row["pairs"] or "-", "of": row["candidates"] or "-"}
        return {
            "arm": row["arm"],
            "runs": str(row["runs"]),
            **{name: str(count) for name, count in counts.items()},
            "as random": "-" if shared is None else f"{shared:.0%}",
            "accuracy": interval(row["value"], row["low"], row["high"]),
            "minus random": against(row, "vs_random"),
            "minus unfiltered": against(row, "vs_unfiltered"),
        }

    return list(map(told, rows))


def scales(frontier: list[dict[str, Any]]) -> list[dict[str, str]]:
    """For people: rows of the table ``frontier``."""
    return [
        {
            "scale": f"{row['scale']:g}",
            "held-out accuracy": "-" if row["value"] is None else interval(row["value"], row["low"], row["high"]),
            "general text": f"{row['ratio']:.3f} times",
            "this adapter": "yes" if row["chosen"] else "",
        }
        for row in frontier
    ]


def interval(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{value:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def diversity(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """For people: how varied the training pairs of each arm of a `comparison` were, and what its models forgot, without
    what wasn't measured."""
    digits = {"distinct_responses": 0, "distinct_bigrams": 3, "repetition": 3, "similarity": 3, "general_text": 3}
    trained = [row for row in rows if row["pairs"] is not None]
    measured = [name for name in digits if all(row[name] is not None for row in trained)]
    return [{"arm": row["arm"], **{name: f"{row[name]:.{digits[name]}f}" for name in measured}} for row in trained]


def conclusion(rows: list[dict[str, Any]]) -> str:
    """One sentence: which filters differ from random by a corrected interval that excludes zero."""
    arms = [row for row in rows if row["vs_random"] is not None and row["arm"] not in ("unfiltered", "oracle")]
    better = [row["arm"] for row in arms if row["vs_random_low"] > 0]
    worse = [row["arm"] for row in arms if row["vs_random_high"] < 0]
    said = [f"{', '.join(names)} {what} random" for names, what in ((better, "beats"), (worse, "loses to")) if names]
    if not said:
        return "No filter differs from random: every interval, corrected over the arms, holds zero."
    return f"By an interval that excludes zero, corrected over the arms, {' and '.join(said)}."


_COUNTS = """
    SELECT (SELECT count(DISTINCT round) FROM {scored_pairs}) AS rounds,
        (SELECT count(*) FROM {synthetic_prompts}) AS prompts, (SELECT count(*) FROM {scored_pairs}) AS pairs_scored,
        count(*) AS pairs_kept, count(DISTINCT trim(response)) AS distinct_responses_kept FROM {filtered_dataset}
"""
_TRAINED = "SELECT model_id, dataset_version, pairs, filter, seconds, path FROM distilled_models WHERE current"
CURRENT_SCORES = """
    SELECT model, task, metric, filter, value, stderr, n FROM task_scores WHERE current
    ORDER BY task, metric, filter, model
"""
_BY_ROUND = """
    SELECT p.round, count(DISTINCT p.prompt_id) AS prompts, count(DISTINCT f.prompt_id) AS pairs_kept,
        count(DISTINCT trim(f.response)) AS distinct_responses
    FROM {synthetic_prompts} p LEFT JOIN filtered_dataset f USING (round, prompt_id)
    GROUP BY p.round ORDER BY p.round
"""


def _last_run(store: Store, name: str) -> tuple[list[dict[str, Any]], float | None]:
    """The last run's rows of ``steps``, and its wall time when `tuneshift run` made it."""
    latest = store.read(
        "SELECT batch_id, seconds FROM"
        " (SELECT batch_id, finished_at, seconds FROM runs UNION ALL SELECT batch_id, finished_at, NULL FROM steps)"
        " ORDER BY finished_at DESC LIMIT 1",
        schema=name,
    ).rows()
    batch_id, seconds = latest[0] if latest else (None, None)
    steps = store.read("SELECT * FROM steps WHERE batch_id = ? ORDER BY finished_at", [batch_id], name).to_dicts()
    return steps, seconds


def by_way(by_model: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table ``accuracy``, by model as in `report`: one for each way to find a number."""
    found = []
    for model, row in by_model.items():
        if row.get("flexible") is None:
            found.append({**row, "model": model})
            continue
        flexible = {"value": row["flexible"], "low": row["flexible_low"], "high": row["flexible_high"]}
        found += [{**row, "model": f"{model}, strict"}, {**row, **flexible, "model": f"{model}, flexible"}]
    return found
