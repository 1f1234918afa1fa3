"""``evaluation``: how much of the skill has moved, on the held-out file, and what the target forgot meanwhile."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import dagster as dg
import polars as pl

from tuneshift_dag.assets.common import LOG, Context, Step, definition, example_rows, step, warning_check
from tuneshift_dag.assets.retention import Rows, chosen_scale, measure_retention, sampled_perplexity
from tuneshift_dag.config import Transfer
from tuneshift_dag.method import Decoding, PromptFormat, Scorer, Side, Target, scoring
from tuneshift_dag.method.evaluation import SCALES, mark
from tuneshift_dag.method.prompting import prompt_id
from tuneshift_dag.method.statistics import accuracy_of
from tuneshift_dag.reports import CURRENT_SCORES, plots, verdicts
from tuneshift_dag.resources import EngineResource, StoreResource
from tuneshift_dag.store.records import content_version
from tuneshift_dag.store.tables import ACCURACY, EVALUATIONS, FRONTIER, RETENTION, RETENTION_BY_KIND, TASK_SCORES

Models = list[tuple[str, Scorer, Side]]
"""Name, engine and side of each model that is measured."""
CHECKS = {
    "keeps_skill": "The target has at least `evaluation.keeps_skill` of the source's held-out accuracy.",
    "keeps_general_text": "Its perplexity of general text is at most `evaluation.keeps_general_text` times the base's.",
}


def build_evaluation(transfer: Transfer) -> dg.AssetsDefinition:
    @dg.asset(**definition(transfer, "evaluation", EVALUATIONS, "pytorch", models=True, checks=CHECKS))
    def evaluation(context: Context, store: StoreResource, engines: EngineResource) -> dg.MaterializeResult:
        """Accuracy on `heldout.jsonl` of four models: source base and fine-tuned, target before and after.

        By `evaluation.metric`, of greedy responses, with 95 % intervals (Wilson). The held-out file is used here and
        nowhere else.

        For the target also the perplexity of a general text, before and after: what it forgot; both measures again for
        parts of the adapter's update, of which `distill.keep` chooses one; and with `evaluation.tasks` its scores on
        standard tasks.
        """
        with step(context, store.store(), transfer, "evaluation") as current:
            harness = engines.harness(transfer) if transfer.config.evaluation.tasks else None
            measured = _Measured(current)
            source, target = engines.source(transfer), _distilled(current, engines)
            measured.answer("source_base", source, "base")
            measured.answer("source_fine_tuned", source, "fine_tuned")
            measured.answer("target_base", target, "base")
            measured.retain("target_base", target, "base")
            frontier = [measured.at_scale(target, scale) for scale in SCALES]
            scale = chosen_scale(frontier, transfer.config.distill.keep)
            frontier = [{**row, "chosen": row["scale"] == scale} for row in frontier]
            chosen = target.scaled(scale)
            measured.answer("target_distilled", chosen, "fine_tuned")
            measured.retain("target_distilled", chosen, "fine_tuned")
            keys = task_keys(current, harness, [("target_base", target, "base"), (_DISTILLED, chosen, "fine_tuned")])
            table, accuracy = EVALUATIONS.frame(measured.answers), ACCURACY.frame(measured.accuracies)
            forgot, kinds = RETENTION.frame(measured.retained), RETENTION_BY_KIND.frame(measured.kinds)
            scales = FRONTIER.frame(frontier)

            def make_tasks_current(connection: Any) -> str:
                connection.execute("UPDATE task_scores SET current = key IN (SELECT unnest(?))", [keys])
                return content_version(accuracy, forgot, kinds, scales, connection.sql(CURRENT_SCORES).pl())

            tables = [(EVALUATIONS, table), (ACCURACY, accuracy), (RETENTION, forgot), (RETENTION_BY_KIND, kinds)]
            current.write([*tables, (FRONTIER, scales)], statements=make_tasks_current)
            tasks = current.read(CURRENT_SCORES)
            chart = current.picture("accuracy", plots.accuracy_bars(measured.accuracies)) if len(accuracy) else None
            picture = current.picture("frontier", plots.frontier(frontier, transfer.config.evaluation))
            kept = verdicts(measured.answers, measured.retained, transfer.config.evaluation, transfer.config.seed)
        for verdict in kept:
            LOG.info(verdict.words)
        mistakes = table.filter((pl.col("model") == _DISTILLED) & ~pl.col("correct"))
        columns = [column for column in accuracy.columns if accuracy[column].null_count() == 0]
        figures = {
            **{row["model"]: row["value"] for row in measured.accuracies},
            **{f"{row['model']}_flexible": row.get("flexible") for row in measured.accuracies},
            "accuracy": example_rows(accuracy, columns),
            **{f"{row['model']}_perplexity": row["perplexity"] for row in measured.retained},
            "retention": example_rows(forgot, ["model", "perplexity", "bits_per_byte", "tokens"]),
            "retention_by_kind": example_rows(kinds, ["kind", "model", "perplexity", "tokens"], len(kinds)),
            "frontier": picture,
            "adapter_scale": scale,
            "chart": chart,
            "tasks": example_rows(tasks, tasks.columns, len(tasks)) if len(tasks) else None,
            "mistakes": example_rows(mistakes, ["prompt", "expected", "response"]),
            "source_prompt": str(transfer.config.source_format),
            "target_prompt": str(transfer.config.target_format),
        }
        checks = [warning_check(v.name, "" if v.passed else v.words, verdict=v.words) for v in kept]
        return current.result(len(table), figures, *checks)

    return evaluation


_DISTILLED = "target_distilled"


def _distilled(current: Step, engines: EngineResource) -> Target:
    """The target with its adapter. (Its base is the very one that the adapter is attached to: a second copy would only
    take memory.)"""
    distilled = current.read("SELECT path FROM distilled_models WHERE current")
    if distilled.is_empty():
        raise current.lacks("distilled_model")
    return engines.target(current.transfer, current.store.absolute(distilled["path"][0]))


@dataclass
class _Measured:
    current: Step
    answers: Rows = field(default_factory=list)
    accuracies: Rows = field(default_factory=list)
    retained: Rows = field(default_factory=list)
    kinds: Rows = field(default_factory=list)

    def answer(self, name: str, engine: Scorer, side: Side) -> None:
        config = self.current.transfer.config
        format = config.source_format if name.startswith("source") else config.target_format
        answered = answer_heldout(self.current, engine, side, name, format)
        self.answers += [{"model": name, **row} for row in answered]
        self.accuracies += [_accuracy(self.current.transfer, name, answered)] if answered else []

    def retain(self, name: str, engine: Target, side: Side) -> None:
        row, kinds = measure_retention(self.current, engine, name, side)
        self.retained.append(row)
        self.kinds += kinds

    def at_scale(self, target: Target, scale: float) -> dict[str, Any]:
        """A row of ``frontier``, but for which one is chosen."""
        name, transfer, scaled = f"adapter at {scale:g}", self.current.transfer, target.scaled(scale)
        answered = answer_heldout(self.current, scaled, "fine_tuned", name, transfer.config.target_format)
        accuracy = _accuracy(transfer, name, answered) if answered else {}
        perplexity = sampled_perplexity(self.current, scaled, "fine_tuned")
        ratio = perplexity / sampled_perplexity(self.current, target, "base")
        LOG.info(f"{name}: general text {ratio:.3f} times the base's perplexity")
        interval = {key: accuracy.get(key) for key in ("value", "low", "high")}
        return {"scale": scale, **interval, "perplexity": perplexity, "ratio": ratio}


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
    settings = transfer.config.evaluation
    strict = accuracy_of([row["correct"] for row in answers])
    LOG.info(f"{name}: {strict.value:.3f} [{strict.low:.3f}, {strict.high:.3f}]")
    row = {"model": name, **vars(strict)}
    if settings.metric == "numeric":
        loose = accuracy_of([row["correct_flexible"] for row in answers])
        row |= {"flexible": loose.value, "flexible_low": loose.low, "flexible_high": loose.high}
    return row


def task_keys(current: Step, harness: Any, models: Models) -> list[str]:
    """Keys in ``task_scores`` of what each model (`target_base` or, every trained target, `target_distilled`) scores on
    `evaluation.tasks`; known scores aren't computed again, and each task is written when it is done."""
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
