"""``evaluation``: how much of the skill has moved, on the held-out file, and what the target forgot meanwhile."""

import hashlib
from typing import Any

import dagster as dg
import polars as pl

from tuneshift_dag.assets.common import LOG, Step, definition, example_rows, key, step
from tuneshift_dag.config import Transfer
from tuneshift_dag.home import output_dir
from tuneshift_dag.method import Decoding, Scorer, Side, scoring
from tuneshift_dag.method.evaluation import (
    Retention,
    bootstrap_accuracy,
    general_texts,
    mark,
    next_question,
    retention,
)
from tuneshift_dag.method.prompting import prompt_id
from tuneshift_dag.reports import plots
from tuneshift_dag.resources import EngineResource, StoreResource
from tuneshift_dag.store.records import content_version
from tuneshift_dag.store.tables import ACCURACY, EVALUATIONS, RETENTION, TASK_SCORES

TASK_COLUMNS = ["model", "task", "metric", "filter", "value", "stderr", "n"]
Models = list[tuple[str, Scorer, Side]]
"""Name, engine and side of each model that is measured."""


def build_evaluation(transfer: Transfer) -> dg.AssetsDefinition:
    @dg.asset(
        **definition(transfer, EVALUATIONS, "evaluation", "pytorch", models=True),
        deps=[key(transfer, "distilled_model")],
    )
    def evaluation(
        context: dg.AssetExecutionContext, store: StoreResource, engines: EngineResource
    ) -> dg.MaterializeResult:
        """Accuracy on `heldout.jsonl` of four models: source base and fine-tuned, target before and after.

        By `evaluation.metric`, of greedy responses, with 95 % bootstrap intervals. The held-out file is used here and
        nowhere else.

        For the target also the perplexity of a small general text, before and after: what it forgot; and with
        `evaluation.tasks` its scores on standard tasks.
        """
        texts = general_texts()
        with step(context, store.store(), transfer, "evaluation") as current:
            rows: list[dict[str, Any]] = []
            accuracies: list[dict[str, Any]] = []
            retained: list[dict[str, Any]] = []
            harness = engines.harness(transfer) if transfer.config.evaluation.tasks else None
            models = _models(current, engines)
            for name, engine, side in models:
                responses = answer_heldout(current, store.cache(), engine, side, name)
                marks = []
                for (prompt, expected), response in zip(transfer.heldout, responses, strict=True):
                    marks.append(mark(transfer.config.evaluation.metric, response, expected))
                    rows.append(
                        {
                            "model": name,
                            "prompt_id": prompt_id(prompt),
                            "prompt": prompt,
                            "expected": expected,
                            "response": response.strip(),
                            "correct": marks[-1][0],
                            "correct_flexible": marks[-1][1],
                        }
                    )
                if marks:
                    accuracies.append({"model": name, **_accuracy(transfer, marks)})
                    LOG.info("{model}: {value:.3f} [{low:.3f}, {high:.3f}]".format(**accuracies[-1]))
                if name.startswith("target"):
                    found = _retention(current, store.cache(), engine, side, texts)
                    LOG.info(f"{name}: perplexity of general text {found.perplexity:.2f}")
                    retained.append({"model": name, **vars(found)})
            answers, summary, kept = EVALUATIONS.frame(rows), ACCURACY.frame(accuracies), RETENTION.frame(retained)
            keys = task_keys(current, harness, [model for model in models if model[0].startswith("target_")])
            current.write(
                [(EVALUATIONS, answers), (ACCURACY, summary), (RETENTION, kept)],
                statements=lambda connection: _make_tasks_current(connection, keys, summary, kept),
            )
            task_scores = current.store.read(_TASK_SCORES, schema=transfer.name)
            extra: dict[str, Any] = {}
            if accuracies:
                picture = plots.accuracy_bars(accuracies)
                picture.save(output_dir(transfer.name) / "accuracy.png")
                extra["chart"] = dg.MetadataValue.md(picture.markdown())
        if len(task_scores):
            extra["tasks"] = example_rows(task_scores, TASK_COLUMNS, len(task_scores))
        mistakes = answers.filter((pl.col("model") == "target_distilled") & ~pl.col("correct"))
        return dg.MaterializeResult(
            data_version=dg.DataVersion(_version(summary, kept, task_scores)),
            metadata={
                "dagster/row_count": len(answers),
                **{str(row["model"]): row["value"] for row in accuracies},
                **{f"{row['model']}_flexible": row["flexible"] for row in accuracies if row["flexible"] is not None},
                "accuracy": example_rows(summary, [c for c in summary.columns if summary[c].null_count() == 0]),
                **{f"{row['model']}_perplexity": row["perplexity"] for row in retained},
                "retention": example_rows(kept, ["model", "perplexity", "bits_per_byte", "tokens"]),
                **extra,
                "mistakes": example_rows(mistakes, ["prompt", "expected", "response"]),
                "prompt_template": transfer.config.prompt_template,
                **current.metadata(),
            },
        )

    return evaluation


def _accuracy(transfer: Transfer, marks: list[tuple[bool, bool | None]]) -> dict[str, float | None]:
    """A row of the table ``accuracy`` without the model's name."""

    def interval(place: int) -> dict[str, float]:
        correct = [bool(both[place]) for both in marks]
        return vars(bootstrap_accuracy(correct, transfer.config.evaluation.bootstrap_samples, transfer.config.seed))

    row: dict[str, float | None] = {**interval(0), "flexible": None, "flexible_low": None, "flexible_high": None}
    if transfer.config.evaluation.metric == "numeric":
        loose = interval(1)
        row |= {"flexible": loose["value"], "flexible_low": loose["low"], "flexible_high": loose["high"]}
    return row


def _version(summary: pl.DataFrame, kept: pl.DataFrame, task_scores: pl.DataFrame) -> str:
    return content_version(summary, kept, task_scores.select(TASK_COLUMNS))


def _models(current: Step, engines: EngineResource) -> Models:
    query = "SELECT path FROM distilled_models WHERE current"
    distilled = current.store.read(query, schema=current.transfer.name)
    if distilled.is_empty():
        raise dg.Failure("There is no distilled model: materialize distilled_model first.", allow_retries=False)
    transfer = current.transfer
    source, target = engines.source(transfer), engines.target(transfer, current.store.absolute(distilled["path"][0]))
    return [
        ("source_base", source, "base"),
        ("source_fine_tuned", source, "fine_tuned"),
        # The very base that the adapter is attached to: a second copy would only take memory.
        ("target_base", target, "base"),
        ("target_distilled", target, "fine_tuned"),
    ]


def _retention(current: Step, cache: scoring.Cache, engine: Scorer, side: Side, texts: list[str]) -> Retention:
    """The target's base is scored once, however often it is distilled: scores are cached."""
    tokens = [engine.encode(text, templated=True) for text in texts]
    logprobs = scoring.score(engine, cache, tokens, side, current.cost)
    return retention(texts, tokens, logprobs)


def answer_heldout(current: Step, cache: scoring.Cache, engine: Scorer, side: Side, name: str) -> list[str]:
    """The model's greedy response to every held-out prompt."""
    transfer = current.transfer
    template, settings = transfer.config.prompt_template, transfer.config.evaluation
    stop = next_question(template) if settings.metric == "numeric" else ""
    responses = scoring.generate(
        engine,
        cache,
        [engine.encode(template.replace("{prompt}", prompt)) for prompt, _ in transfer.heldout],
        side,
        Decoding(settings.max_new_tokens, stop=stop),
        current.cost,
        on_progress=current.progress(f"evaluating {name}"),
    )
    return [response.text.split(stop)[0] if stop else response.text for response in responses]


def task_keys(current: Step, harness: Any, models: Models) -> list[str]:
    """Keys in ``task_scores`` of what each model scores on `evaluation.tasks`; known scores aren't computed again.

    A task is written when it is done, so a killed run loses at most one.

    Args:
        harness: a `tuneshift_dag.engines.harness.Harness`; without one there are no keys.
        models: `target_base` or, as every trained target is called, `target_distilled`.
    """
    keys = []
    for name, engine, side in models:
        for task in harness.names if harness else ():
            asked = f"{engine.fingerprint(side)}|{task}|{harness.version(task)}"
            keys.append(hashlib.sha256(asked.encode()).hexdigest())
            query = "SELECT n FROM task_scores WHERE key = ?"
            if len(current.store.read(query, [keys[-1]], current.transfer.name)):
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


_TASK_SCORES = "SELECT * FROM task_scores WHERE current ORDER BY task, metric, filter, model"


def _make_tasks_current(connection: Any, keys: list[str], summary: pl.DataFrame, kept: pl.DataFrame) -> str:
    connection.execute("UPDATE task_scores SET current = key IN (SELECT unnest(?))", [keys])
    return _version(summary, kept, connection.sql(_TASK_SCORES).pl())
