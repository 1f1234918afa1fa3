"""``evaluation``: how much of the skill has moved, on the held-out file, and what the target forgot meanwhile."""

import hashlib
import json
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from tuneshift_dag.assets.common import (
    MODEL_POOL,
    OWNERS,
    Step,
    content_version,
    definition_metadata,
    example_rows,
    key,
    step,
)
from tuneshift_dag.assets.task_scores import TASK_COLUMNS, score_tasks
from tuneshift_dag.config.transfer import Transfer
from tuneshift_dag.home import output_dir
from tuneshift_dag.method import scoring
from tuneshift_dag.method.engine import Decoding, Engine, Side
from tuneshift_dag.method.evaluation import bootstrap_accuracy, mark
from tuneshift_dag.method.numeric import next_question
from tuneshift_dag.method.prompting import prompt_id
from tuneshift_dag.method.retention import Retention, general_texts, retention
from tuneshift_dag.reports import plots
from tuneshift_dag.resources.dagster_resources import EngineResource, StoreResource
from tuneshift_dag.store.database import Store
from tuneshift_dag.store.tables import ACCURACY, EVALUATIONS, RETENTION


def build_evaluation(transfer: Transfer) -> dg.AssetsDefinition:
    texts = general_texts()
    heldout_hash, text_hash = (hashlib.sha256(json.dumps(t).encode()).hexdigest() for t in (transfer.heldout, texts))

    @dg.asset(
        key=key(transfer, "evaluation"),
        deps=[key(transfer, "distilled_model")],
        group_name=transfer.name,
        owners=OWNERS,
        kinds={"duckdb", "pytorch"},
        pool=MODEL_POOL,
        code_version=f"{transfer.version('evaluation', 'engine', 'models', 'source', 'target', 'prompt_template')}"
        f"-{heldout_hash[:8]}-{text_hash[:8]}-{transfer.adapter_version()}{transfer.tasks_version()}",
        metadata=definition_metadata(transfer, EVALUATIONS),
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
        database = store.store()
        with step(context, database, transfer) as current:
            rows: list[dict[str, Any]] = []
            accuracies: list[dict[str, Any]] = []
            retained: list[dict[str, Any]] = []
            harness = engines.harness(transfer) if transfer.config.evaluation.tasks else None
            models = _models(transfer, database, engines)
            for name, engine, side in models:
                responses = answer_heldout(transfer, store, engine, side, current, name)
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
                    context.log.info("{model}: {value:.3f} [{low:.3f}, {high:.3f}]".format(**accuracies[-1]))
                if name.startswith("target"):
                    found = _retention(store, engine, side, texts, current)
                    context.log.info(f"{name}: perplexity of general text {found.perplexity:.2f}")
                    retained.append({"model": name, **vars(found)})
            answers, summary, kept = EVALUATIONS.frame(rows), ACCURACY.frame(accuracies), RETENTION.frame(retained)
            database.replace_all(transfer.name, [(EVALUATIONS, answers), (ACCURACY, summary), (RETENTION, kept)])
            task_scores = score_tasks(transfer, database, harness, models, current)
        extra: dict[str, Any] = {}
        if accuracies:
            picture = plots.accuracy_bars(accuracies)
            picture.save(output_dir(transfer.name) / "accuracy.png")
            extra["chart"] = picture.markdown()
        if len(task_scores):
            extra["tasks"] = example_rows(task_scores, TASK_COLUMNS, len(task_scores))
        mistakes = answers.filter((pl.col("model") == "target_distilled") & ~pl.col("correct"))
        return dg.MaterializeResult(
            data_version=dg.DataVersion(content_version(summary, kept, task_scores.select(TASK_COLUMNS))),
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


def _models(transfer: Transfer, database: Store, engines: EngineResource) -> list[tuple[str, Engine, Side]]:
    current = database.read("SELECT path FROM distilled_models WHERE current", schema=transfer.name)
    if current.is_empty():
        raise dg.Failure("There is no distilled model: materialize distilled_model first.", allow_retries=False)
    source = engines.source(transfer)
    distilled = engines.target(transfer, Path(current["path"][0]))
    return [
        ("source_base", source, "base"),
        ("source_fine_tuned", source, "fine_tuned"),
        ("target_base", engines.target(transfer), "base"),
        ("target_distilled", distilled, "fine_tuned"),
    ]


def _retention(store: StoreResource, engine: Engine, side: Side, texts: list[str], current: Step) -> Retention:
    """The target's base is scored once, however often it is distilled: scores are cached."""
    tokens = [engine.encode(text, templated=True) for text in texts]
    return retention(texts, tokens, scoring.score_alone(engine, store.cache(), tokens, side, current.cost))


def answer_heldout(
    transfer: Transfer, store: StoreResource, engine: Engine, side: Side, current: Step, name: str
) -> list[str]:
    """The model's greedy response to every held-out prompt."""
    template, settings = transfer.config.prompt_template, transfer.config.evaluation
    stop = next_question(template) if settings.metric == "numeric" else ""
    responses = scoring.generate(
        engine,
        store.cache(),
        [engine.encode(template.replace("{prompt}", prompt)) for prompt, _ in transfer.heldout],
        side,
        Decoding(settings.max_new_tokens, stop=stop),
        current.cost,
        on_progress=current.progress(f"evaluating {name}"),
    )
    return [response.text.split(stop)[0] if stop else response.text for response in responses]
