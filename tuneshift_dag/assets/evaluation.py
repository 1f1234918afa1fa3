"""``evaluation``: how much of the skill has moved, on the held-out file, and what the target forgot meanwhile."""

import hashlib
from typing import Any

import dagster as dg
import polars as pl

from tuneshift_dag.assets.common import LOG, Context, Step, definition, example_rows, step
from tuneshift_dag.config import Transfer
from tuneshift_dag.method import Decoding, PromptFormat, Scorer, Side, scoring
from tuneshift_dag.method.evaluation import bootstrap_accuracy, general_texts, mark, retention
from tuneshift_dag.method.prompting import prompt_id
from tuneshift_dag.reports import plots
from tuneshift_dag.resources import EngineResource, StoreResource
from tuneshift_dag.store.records import content_version
from tuneshift_dag.store.tables import ACCURACY, EVALUATIONS, RETENTION, TASK_SCORES

Rows = list[dict[str, Any]]
Models = list[tuple[str, Scorer, Side]]
"""Name, engine and side of each model that is measured."""


def build_evaluation(transfer: Transfer) -> dg.AssetsDefinition:
    @dg.asset(**definition(transfer, "evaluation", EVALUATIONS, "pytorch", models=True))
    def evaluation(context: Context, store: StoreResource, engines: EngineResource) -> dg.MaterializeResult:
        """Accuracy on `heldout.jsonl` of four models: source base and fine-tuned, target before and after.

        By `evaluation.metric`, of greedy responses, with 95 % bootstrap intervals. The held-out file is used here and
        nowhere else.

        For the target also the perplexity of a small general text, before and after: what it forgot; and with
        `evaluation.tasks` its scores on standard tasks.
        """
        with step(context, store.store(), transfer, "evaluation") as current:
            harness = engines.harness(transfer) if transfer.config.evaluation.tasks else None
            sources, targets = _models(current, engines)
            answers: Rows = []
            accuracies: Rows = []
            formats = (transfer.config.source_format, transfer.config.target_format)
            for models, format in zip((sources, targets), formats, strict=True):
                for name, engine, side in models:
                    answered = answer_heldout(current, engine, side, name, format)
                    answers += [{"model": name, **row} for row in answered]
                    accuracies += [_accuracy(transfer, name, answered)] if answered else []
            retained = [_retention(current, *model) for model in targets]
            keys = task_keys(current, harness, targets)
            table, accuracy, forgot = EVALUATIONS.frame(answers), ACCURACY.frame(accuracies), RETENTION.frame(retained)

            def make_tasks_current(connection: Any) -> str:
                connection.execute("UPDATE task_scores SET current = key IN (SELECT unnest(?))", [keys])
                return content_version(accuracy, forgot, connection.sql(_TASK_SCORES).pl())

            tables = [(EVALUATIONS, table), (ACCURACY, accuracy), (RETENTION, forgot)]
            current.write(tables, statements=make_tasks_current)
            tasks = current.read(_TASK_SCORES)
            chart = current.picture("accuracy", plots.accuracy_bars(accuracies)) if accuracies else None
        mistakes = table.filter((pl.col("model") == "target_distilled") & ~pl.col("correct"))
        measured = [column for column in accuracy.columns if accuracy[column].null_count() == 0]
        figures = {
            **{row["model"]: row["value"] for row in accuracies},
            **{f"{row['model']}_flexible": row.get("flexible") for row in accuracies},
            "accuracy": example_rows(accuracy, measured),
            **{f"{row['model']}_perplexity": row["perplexity"] for row in retained},
            "retention": example_rows(forgot, ["model", "perplexity", "bits_per_byte", "tokens"]),
            "chart": chart,
            "tasks": example_rows(tasks, tasks.columns, len(tasks)) if len(tasks) else None,
            "mistakes": example_rows(mistakes, ["prompt", "expected", "response"]),
            "source_prompt": str(formats[0]),
            "target_prompt": str(formats[1]),
        }
        return current.result(len(table), figures)

    return evaluation


_TASK_SCORES = """
    SELECT model, task, metric, filter, value, stderr, n FROM task_scores WHERE current
    ORDER BY task, metric, filter, model
"""


def _models(current: Step, engines: EngineResource) -> tuple[Models, Models]:
    """Those of the source and those of the target, which must have been distilled."""
    distilled = current.read("SELECT path FROM distilled_models WHERE current")
    if distilled.is_empty():
        raise dg.Failure("There is no distilled model: materialize distilled_model first.", allow_retries=False)
    source = engines.source(current.transfer)
    # Its base is the very one that the adapter is attached to: a second copy would only take memory.
    target = engines.target(current.transfer, current.store.absolute(distilled["path"][0]))
    return (
        [("source_base", source, "base"), ("source_fine_tuned", source, "fine_tuned")],
        [("target_base", target, "base"), ("target_distilled", target, "fine_tuned")],
    )


def answer_heldout(current: Step, engine: Scorer, side: Side, name: str, format: PromptFormat) -> Rows:
    """The model's greedy response to every held-out prompt, marked: rows of ``evaluations`` without the model."""
    transfer = current.transfer
    settings = transfer.config.evaluation
    responses = scoring.generate(
        engine,
        current.cache,
        [engine.prompt_ids(prompt, format) for prompt, _ in transfer.heldout],
        side,
        Decoding(settings.max_new_tokens, stops=transfer.stops),
        current.cost,
        on_progress=current.progress(f"evaluating {name}"),
    )
    rows: Rows = []
    for (prompt, expected), response in zip(transfer.heldout, responses, strict=True):
        correct, flexible = mark(settings.metric, response.text, expected)
        row = {"prompt_id": prompt_id(prompt), "prompt": prompt, "expected": expected}
        row["response"] = response.text.strip()
        rows.append({**row, "correct": correct, "correct_flexible": flexible})
    return rows


def _accuracy(transfer: Transfer, name: str, answers: Rows) -> dict[str, Any]:
    """A row of the table ``accuracy``."""
    settings = transfer.config.evaluation
    how = (settings.bootstrap_samples, transfer.config.seed)
    strict = bootstrap_accuracy([row["correct"] for row in answers], *how)
    LOG.info(f"{name}: {strict.value:.3f} [{strict.low:.3f}, {strict.high:.3f}]")
    row = {"model": name, **vars(strict)}
    if settings.metric == "numeric":
        loose = bootstrap_accuracy([row["correct_flexible"] for row in answers], *how)
        row |= {"flexible": loose.value, "flexible_low": loose.low, "flexible_high": loose.high}
    return row


def _retention(current: Step, name: str, engine: Scorer, side: Side) -> dict[str, Any]:
    """A row of the table ``retention``. The base is scored once, however often it is distilled: scores are cached."""
    texts = general_texts()
    tokens = [engine.encode(text, templated=True) for text in texts]
    logprobs = scoring.score(engine, current.cache, tokens, side, current.cost)
    found = retention(texts, tokens, logprobs)
    LOG.info(f"{name}: perplexity of general text {found.perplexity:.2f}")
    return {"model": name, **vars(found)}


def task_keys(current: Step, harness: Any, models: Models) -> list[str]:
    """Keys in ``task_scores`` of what each model scores on `evaluation.tasks`; known scores aren't computed again.

    A task is written when it is done, so a killed run loses at most one. Without a `Harness` there are no keys. The
    models are called `target_base` or, every trained target, `target_distilled`.
    """
    keys = []
    for name, engine, side in models:
        for task in harness.names if harness else ():
            asked = f"{engine.fingerprint(side)}|{task}|{harness.version(task)}"
            keys.append(hashlib.sha256(asked.encode()).hexdigest())
            if len(current.read("SELECT n FROM task_scores WHERE key = ?", [keys[-1]])):
                current.cost.cache_hits += 1
                continue
            LOG.info(f"{name}: {task}")
            with current.cost.model_time():
                rows = harness.run(task, engine, side)
            current.cost.model_calls += max((row["n"] or 0 for row in rows), default=0)
            marks = {"key": keys[-1], "model": name, "example_limit": harness.limit, "current": False}
            scores = TASK_SCORES.frame([{**marks, **row} for row in rows])
            current.store.append_all(current.transfer.name, [(TASK_SCORES, scores)])
    return keys
