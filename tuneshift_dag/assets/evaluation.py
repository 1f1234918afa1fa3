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
from tuneshift_dag.home import output_dir
from tuneshift_dag.method import scoring
from tuneshift_dag.method.engine import Decoding, Engine, Side
from tuneshift_dag.method.evaluation import bootstrap_accuracy, is_exact_match
from tuneshift_dag.method.prompting import prompt_id
from tuneshift_dag.method.retention import Retention, general_texts, retention
from tuneshift_dag.reports import plots
from tuneshift_dag.resources.dagster_resources import EngineResource, StoreResource
from tuneshift_dag.resources.store import Store
from tuneshift_dag.resources.tables import ACCURACY, EVALUATIONS, RETENTION
from tuneshift_dag.transfer import Transfer


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
        f"-{heldout_hash[:8]}-{text_hash[:8]}-{transfer.adapter_version()}",
        metadata=definition_metadata(transfer, EVALUATIONS),
    )
    def evaluation(
        context: dg.AssetExecutionContext, store: StoreResource, engines: EngineResource
    ) -> dg.MaterializeResult:
        """Exact match on `heldout.jsonl` for four models: source base and fine-tuned, target before and after.

        Greedy responses, with 95 % bootstrap intervals. The held-out file is used here and nowhere else.

        For the target also the perplexity of a small general text, before and after: what it forgot.
        """
        database = store.store()
        with step(context, database, transfer) as current:
            rows: list[dict[str, Any]] = []
            accuracies: list[dict[str, Any]] = []
            retained: list[dict[str, Any]] = []
            for name, engine, side in _models(transfer, database, engines):
                responses = answer_heldout(transfer, store, engine, side, current, name)
                correct = []
                for (prompt, expected), response in zip(transfer.heldout, responses, strict=True):
                    correct.append(is_exact_match(response, expected))
                    rows.append(
                        {
                            "model": name,
                            "prompt_id": prompt_id(prompt),
                            "prompt": prompt,
                            "expected": expected,
                            "response": response.strip(),
                            "correct": correct[-1],
                        }
                    )
                settings = transfer.config.evaluation
                accuracy = bootstrap_accuracy(correct, settings.bootstrap_samples, transfer.config.seed)
                context.log.info(f"{name}: {accuracy.value:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}]")
                accuracies.append({"model": name, **vars(accuracy)})
                if name.startswith("target"):
                    found = _retention(store, engine, side, texts, current)
                    context.log.info(f"{name}: perplexity of general text {found.perplexity:.2f}")
                    retained.append({"model": name, **vars(found)})
            answers, summary, kept = EVALUATIONS.frame(rows), ACCURACY.frame(accuracies), RETENTION.frame(retained)
            database.replace_all(transfer.name, [(EVALUATIONS, answers), (ACCURACY, summary), (RETENTION, kept)])
            picture = plots.accuracy_bars(accuracies)
        picture.save(output_dir(transfer.name) / "accuracy.png")
        mistakes = answers.filter((pl.col("model") == "target_distilled") & ~pl.col("correct"))
        return dg.MaterializeResult(
            data_version=dg.DataVersion(content_version(summary, kept)),
            metadata={
                "dagster/row_count": len(answers),
                **{str(row["model"]): row["value"] for row in accuracies},
                "accuracy": example_rows(summary, ["model", "value", "low", "high", "n"]),
                **{f"{row['model']}_perplexity": row["perplexity"] for row in retained},
                "retention": example_rows(kept, ["model", "perplexity", "bits_per_byte", "tokens"]),
                "chart": picture.markdown(),
                "mistakes": example_rows(mistakes, ["prompt", "expected", "response"]),
                "prompt_template": transfer.config.prompt_template,
                **current.metadata(),
            },
        )

    return evaluation


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
    template = transfer.config.prompt_template
    responses = scoring.generate(
        engine,
        store.cache(),
        [engine.encode(template.replace("{prompt}", prompt)) for prompt, _ in transfer.heldout],
        side,
        Decoding(transfer.config.evaluation.max_new_tokens),
        current.cost,
        on_progress=current.progress(f"evaluating {name}"),
    )
    return [response.text for response in responses]
