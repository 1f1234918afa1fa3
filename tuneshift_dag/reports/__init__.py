"""The figures of one transfer: what ``tuneshift report`` prints, and what cards say of it in words."""

import re
from collections.abc import Sequence
from typing import Any

from tuneshift_dag.config import Transfer
from tuneshift_dag.store import Store
from tuneshift_dag.store.queries import of_its_rounds

# Model calls of these assets make the dataset; those of `evaluation` measure the result.
_DATASET_ASSETS = ("seed_set", "synthetic_prompts", "scored_pairs")


def report(store: Store, transfer: Transfer) -> dict[str, Any]:
    """Counts, accuracies, retention and the last run's cost (also of one that did nothing): a JSON-ready object."""
    name = transfer.name

    def one(query: str) -> Any:
        return store.read(query, schema=name).item()

    steps, wall = _last_run(store, name)
    tables = ("synthetic_prompts", "scored_pairs", "filtered_dataset")
    prompts, scored, kept = (of_its_rounds(transfer, table) for table in tables)
    return {
        "transfer": name,
        "rounds": one(f"SELECT count(DISTINCT round) FROM {scored}"),
        "prompts": one(f"SELECT count(*) FROM {prompts}"),
        "pairs_scored": one(f"SELECT count(*) FROM {scored}"),
        "pairs_kept": one(f"SELECT count(*) FROM {kept}"),
        "distinct_responses_kept": one(f"SELECT count(DISTINCT trim(response)) FROM {kept}"),
        "filter": transfer.config.filter.model_dump(),
        "by_round": store.read(_BY_ROUND.format(prompts=prompts), schema=name).to_dicts(),
        "model_calls": sum(s["model_calls"] for s in steps if s["asset"] in _DATASET_ASSETS),
        "evaluation_calls": sum(s["model_calls"] for s in steps if s["asset"] == "evaluation"),
        "cache_hits": sum(s["cache_hits"] for s in steps),
        "seconds": _seconds(steps),
        "seconds_total": wall,
        "model_seconds": round(sum(s["model_seconds"] for s in steps), 2),
        "metric": transfer.config.evaluation.metric,
        "accuracy": _accuracy(store, name),
        "retention": {row.pop("model"): row for row in store.read("SELECT * FROM retention", schema=name).to_dicts()},
        "tasks": tasks(store, transfer),
        "comparison": comparison(store, transfer),
        "model": _model(store, name),
    }


def describe_filter(transfer: Transfer) -> str:
    """For people: the rule, its threshold, and the samples that must agree."""
    settings, response = transfer.config.filter, transfer.config.response
    text = f"`{settings.rule}`"
    if settings.rule == "unfiltered":
        return text
    text += f", threshold {settings.threshold:g}"
    if response.samples:
        text += f"; at least {response.agreement:g} of {response.samples} samples agree"
    return text


def escape_markdown(text: str) -> str:
    """A prompt or response as Markdown that shows it as it is, on one line: no links, pictures, HTML or lists."""
    line = re.sub(r"\s*\n\s*", " ⏎ ", text.strip())
    return re.sub(r"([\\`*_\[\]<>#|~&$]|!(?=\[)|^[-+=]|(?<=^\d)[.)]|(?<=^\d\d)[.)])", r"\\\1", line)


def tasks(store: Store, transfer: Transfer) -> list[dict[str, Any]]:
    """Scores of the target on standard tasks; [] without ``evaluation.tasks``."""
    return store.read(
        "SELECT task, metric, filter, model, value, stderr, n FROM task_scores WHERE current"
        " ORDER BY task, metric, filter, model",
        schema=transfer.name,
    ).to_dicts()


def comparison(store: Store, transfer: Transfer) -> list[dict[str, Any]]:
    """The rows of the table ``comparison``, arms by accuracy and then the untrained models; [] before one was made.

    ``tasks`` of a row are the arm's scores on standard tasks: mean over its trainings, and each training's.
    """
    rows = store.read(
        "SELECT * FROM comparison ORDER BY pairs IS NULL, value DESC, arm", schema=transfer.name
    ).to_dicts()
    scores = store.read(_ARM_TASKS, schema=transfer.name).to_dicts()
    return [
        {**row, "tasks": [{k: v for k, v in one.items() if k != "arm"} for one in scores if one["arm"] == row["arm"]]}
        for row in rows
    ]


_ARM_TASKS = """
    SELECT arm, task, metric, filter, any_value(n) AS n, avg(value) AS value, list(value ORDER BY seed) AS by_run
    FROM comparison_tasks GROUP BY arm, task, metric, filter ORDER BY task, metric, filter, arm
"""


def arm_tasks(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """For people: scores on standard tasks of a `comparison`, one column for each arm; [] without any.

    The mean over trainings, and the lowest and highest where there are several.
    """
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        for one in row["tasks"]:
            names = {column: str(one[column]) for column in ("task", "metric", "filter", "n")}
            spread = f" ({min(one['by_run']):.3f} to {max(one['by_run']):.3f})" if len(one["by_run"]) > 1 else ""
            found.setdefault(tuple(names.values()), names)[row["arm"]] = f"{one['value']:.3f}{spread}"
    return list(found.values())


def diversity(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """For people: how varied the training pairs of each arm of a `comparison` were, without what wasn't measured."""
    digits = {"distinct_responses": 0, "distinct_bigrams": 3, "repetition": 3, "similarity": 3}
    trained = [row for row in rows if row["pairs"] is not None]
    measured = [name for name in digits if all(row[name] is not None for row in trained)]
    return [{"arm": row["arm"], **{name: f"{row[name]:.{digits[name]}f}" for name in measured}} for row in trained]


def conclusion(rows: list[dict[str, Any]]) -> str:
    """One sentence: which filters differ from random by an interval that excludes zero."""
    arms = [row for row in rows if row["vs_random"] is not None and row["arm"] not in ("unfiltered", "oracle")]
    better = [row["arm"] for row in arms if row["vs_random_low"] > 0]
    worse = [row["arm"] for row in arms if row["vs_random_high"] < 0]
    said = [f"{', '.join(names)} {what} random" for names, what in ((better, "beats"), (worse, "loses to")) if names]
    if not said:
        return "No filter differs from random by a 95 % interval that excludes zero."
    return f"By a 95 % interval that excludes zero, {' and '.join(said)}."


_BY_ROUND = """
    SELECT p.round, count(DISTINCT p.prompt_id) AS prompts, count(DISTINCT f.prompt_id) AS pairs_kept,
        count(DISTINCT trim(f.response)) AS distinct_responses
    FROM {prompts} p LEFT JOIN filtered_dataset f USING (round, prompt_id)
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
    if not latest:
        return [], None
    batch_id, seconds = latest[0]
    steps = store.read("SELECT * FROM steps WHERE batch_id = ? ORDER BY finished_at", [batch_id], name).to_dicts()
    return steps, seconds


def _seconds(steps: list[dict[str, Any]]) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for step in steps:
        seconds[step["asset"]] = seconds.get(step["asset"], 0.0) + step["seconds"]
    return {asset: round(value, 2) for asset, value in seconds.items()}


def by_way(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table ``accuracy``, one for each way to find a number where the metric has two."""
    found = []
    for row in rows:
        if row.get("flexible") is None:
            found.append(row)
            continue
        flexible = {"value": row["flexible"], "low": row["flexible_low"], "high": row["flexible_high"]}
        found.append({**row, "model": f"{row['model']}, strict"})
        found.append({**row, **flexible, "model": f"{row['model']}, flexible"})
    return found


def _accuracy(store: Store, name: str) -> dict[str, dict[str, float]]:
    """Rows of the table ``accuracy`` by model, without the columns that the metric doesn't have."""
    rows = store.read("SELECT * FROM accuracy", schema=name).to_dicts()
    return {row.pop("model"): {key: value for key, value in row.items() if value is not None} for row in rows}


def _model(store: Store, name: str) -> dict[str, Any] | None:
    rows = store.read(
        "SELECT model_id, dataset_version, pairs, filter, seconds, path FROM distilled_models WHERE current",
        schema=name,
    ).to_dicts()
    # Relative to the store's folder; absolute in rows of older versions.
    return {**rows[0], "path": str(store.path.parent / rows[0]["path"])} if rows else None
