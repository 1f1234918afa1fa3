"""``comparison``: does the filter earn its place? Rival filters, the same pairs to choose from, the same size."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
from numpy.typing import NDArray

from tuneshift_dag.assets.common import LOG, Step, definition, example_rows, key, mean_repetition, step
from tuneshift_dag.assets.distilled_model import trained_adapter
from tuneshift_dag.assets.evaluation import answer_heldout, task_keys
from tuneshift_dag.config import Transfer
from tuneshift_dag.config.schema import Arm, Compare
from tuneshift_dag.home import output_dir
from tuneshift_dag.method import scoring
from tuneshift_dag.method.evaluation import Interval, bootstrap_runs, mark
from tuneshift_dag.method.filters import KEEP_RULES, RANKING_RULES, verdict_sql
from tuneshift_dag.method.prompting import distinct_bigrams, mean_similarity, prompt_id
from tuneshift_dag.models import encoder
from tuneshift_dag.reports import plots
from tuneshift_dag.resources import EngineResource, StoreResource
from tuneshift_dag.store import Store
from tuneshift_dag.store.queries import of_its_rounds
from tuneshift_dag.store.records import content_version
from tuneshift_dag.store.tables import COMPARISON, COMPARISON_ANSWERS, COMPARISON_TASKS

# What each arm is measured against.
REFERENCES = ("random", "unfiltered")
DIVERSITY = ("distinct_responses", "distinct_bigrams", "repetition", "similarity")
Correct = NDArray[np.float64]


def build_comparison(transfer: Transfer) -> dg.AssetsDefinition:
    @dg.asset(
        **definition(transfer, COMPARISON, "comparison", "pytorch", models=True),
        deps=[key(transfer, "scored_pairs")],
    )
    def comparison(
        context: dg.AssetExecutionContext, store: StoreResource, engines: EngineResource
    ) -> dg.MaterializeResult:
        """Models trained on as many pairs of each filter, several times each, and measured on the held-out file.

        Every arm draws from the same scored pairs; `random` draws from all that pass the quality guards and
        `unfiltered` from everything. Beside its accuracy stand how varied an arm's pairs were and, with
        `evaluation.tasks`, its scores on standard tasks. It trains arms × seeds models, so it exists only with
        `compare:` in `transfer.yaml`, and `tuneshift run` leaves it to `tuneshift compare`. A killed comparison goes on
        with the first arm and seed that isn't trained.
        """
        settings = transfer.config.compare
        assert settings is not None
        with step(context, store.store(), transfer, "comparison") as current:
            candidates = _candidates(current.store, transfer)
            size = _common_size(transfer, settings, candidates)
            answers: list[dict[str, Any]] = []
            datasets: dict[str, list[pl.DataFrame]] = {arm: [] for arm in candidates}
            correct: dict[str, list[list[bool]]] = {arm: [] for arm in candidates}
            # Before anything is trained: a misspelt task, or one whose data can't be had.
            harness = engines.harness(transfer) if transfer.config.evaluation.tasks else None
            scored: list[tuple[str, int | None, list[str]]] = []
            epochs = settings.epochs or transfer.config.distill.epochs
            # Seed by seed, so that an early look at the log has every arm once.
            for number in range(settings.seeds):
                seed = transfer.config.seed + number
                variant = transfer.with_training(seed, epochs)
                for place, (arm, pool) in enumerate(candidates.items()):
                    done = number * len(candidates) + place + 1
                    LOG.info(f"{arm}, seed {seed}: {done} of {settings.seeds * len(candidates)}")
                    pairs = _draw(pool, size, seed)
                    datasets[arm].append(pairs)
                    responses, keys = _train_and_measure(current, store.cache(), engines, variant, harness, pairs)
                    correct[arm].append(_mark(transfer, arm, seed, responses, answers))
                    scored.append((arm, seed, keys))
            for name, responses, keys in _reference_models(current, store.cache(), engines, harness):
                correct[name] = [_mark(transfer, name, None, responses, answers)]
                scored.append((name, None, keys))
            tables = {name: np.array(runs, np.float64) for name, runs in correct.items()}
            diversity, unlike = _diversity(current, datasets)
            rows = [_row(transfer, name, tables, candidates, datasets, diversity) for name in tables]
            summary = COMPARISON.frame(rows)
            tasks = _tasks(current.store, transfer, scored)
            version = current.write(
                [
                    (COMPARISON, summary),
                    (COMPARISON_ANSWERS, COMPARISON_ANSWERS.frame(answers)),
                    (COMPARISON_TASKS, tasks),
                ],
                content_version(summary, tasks),
            )
            picture = plots.comparison(rows)
            picture.save(output_dir(transfer.name) / "comparison.png")
        if unlike:
            LOG.warning(unlike)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(version),
            metadata={
                "dagster/row_count": len(summary),
                "pairs": size,
                "seeds": settings.seeds,
                "epochs": epochs,
                "comparison": example_rows(
                    summary, ["arm", "value", "low", "high", "vs_random", "vs_random_low", "vs_random_high"], len(rows)
                ),
                "diversity": example_rows(summary.filter(pl.col("pairs") > 0), ["arm", *DIVERSITY], len(datasets)),
                **({"similarity_skipped": unlike} if unlike else {}),
                **({"tasks": example_rows(tasks, tasks.columns, len(tasks))} if len(tasks) else {}),
                "chart": dg.MetadataValue.md(picture.markdown()),
                **current.metadata(),
            },
        )

    return comparison


def _candidates(database: Store, transfer: Transfer) -> dict[str, pl.DataFrame]:
    """What each arm can draw from: prompt_id, round, prompt, response and, where it is a rank, the margin.

    Raises:
        dg.Failure: when an arm has nothing.
    """
    found: dict[str, pl.DataFrame] = {}
    for arm in transfer.config.arms:
        found[arm.name] = database.read(
            "SELECT prompt_id, min(round) AS round, any_value(prompt) AS prompt,"
            " any_value(fine_tuned_response) AS response, max(margin) AS margin"
            f" FROM ({_verdict(transfer, arm)}) WHERE reason IS NULL GROUP BY prompt_id"
            " ORDER BY prompt_id",
            schema=transfer.name,
        )
        if found[arm.name].is_empty():
            reasons = database.read(
                f"SELECT reason, count(*) FROM ({_verdict(transfer, arm)}) GROUP BY reason", schema=transfer.name
            )
            raise dg.Failure(
                f"The arm {arm.name!r} has no pair to train on ({dict(reasons.iter_rows()) or 'no scored pairs'})."
                f" Run `tuneshift run {transfer.name}` first, or change its threshold in compare.arms of"
                f" {transfer.folder / 'transfer.yaml'}.",
                allow_retries=False,
            )
        if arm.rule not in RANKING_RULES:
            # Drawn from by hash: the margin ranks nothing.
            found[arm.name] = found[arm.name].with_columns(margin=pl.lit(None, pl.Float64))
    if transfer.labelled:
        space = _leading_space(found["unfiltered"])
        found["oracle"] = pl.DataFrame(
            [(prompt_id(p), "labelled", p, space + r, None) for p, r in transfer.labelled],
            schema=found["unfiltered"].schema,
            orient="row",
        )
    return found


def _verdict(transfer: Transfer, arm: Arm) -> str:
    """Verdicts of an arm over all rounds at once: nothing is seeded by them."""
    settings = transfer.config.filter
    threshold = arm.threshold or (1.0 if arm.rule in (*KEEP_RULES, "unfiltered") else settings.threshold)
    pairs = of_its_rounds(transfer, "scored_pairs")
    return verdict_sql(arm.rule, transfer.guards, f"{threshold!r}::DOUBLE", seed=transfer.config.seed, pairs=pairs)


def _leading_space(pairs: pl.DataFrame) -> str:
    """What most responses start with before their first word: labelled ones, written by people, lack it."""
    starts = pairs["response"].str.extract(r"^(\s*)", 1).value_counts(sort=True)
    return str(starts.row(0)[0] or "")


def _common_size(transfer: Transfer, settings: Compare, candidates: dict[str, pl.DataFrame]) -> int:
    """Pairs of every arm.

    Raises:
        dg.Failure: when an arm has fewer than ``compare.pairs``.
    """
    arm = min(candidates, key=lambda name: len(candidates[name]))
    fewest = len(candidates[arm])
    if settings.pairs is None or settings.pairs <= fewest:
        return settings.pairs or fewest
    raise dg.Failure(
        f"The arm {arm!r} has {fewest} pairs, fewer than compare.pairs {settings.pairs} in"
        f" {transfer.folder / 'transfer.yaml'}: lower compare.pairs to at most {fewest}, or loosen the arm.",
        allow_retries=False,
    )


def _draw(pool: pl.DataFrame, size: int, seed: int) -> pl.DataFrame:
    """The pairs of one training, in the order of ``distilled_model``.

    The largest margins where there are any; else the lowest hashes. These are the same for all arms, which
    then share what they can: a difference between two arms is one of the pairs in which they differ.
    """
    rank = [hashlib.sha256(f"{seed}|{prompt}".encode()).hexdigest() for prompt in pool["prompt_id"]]
    ranked = pool.with_columns(rank=pl.Series(rank, dtype=pl.String))
    chosen = ranked.sort("margin", "rank", descending=[True, False], nulls_last=True).head(size)
    return chosen.select("prompt_id", "round", "prompt", "response").sort("round", "prompt_id")


def _train_and_measure(
    current: Step, cache: scoring.Cache, engines: EngineResource, variant: Transfer, harness: Any, pairs: pl.DataFrame
) -> tuple[list[str], list[str]]:
    """A trained model's responses to the held-out file, and the keys of its task scores."""
    row = trained_adapter(current, engines, variant, pairs)
    engine = engines.target(variant, current.store.absolute(row["path"]))
    responses = answer_heldout(current, cache, engine, "fine_tuned", f"model {row['model_id']}")
    keys = task_keys(current, harness, [("target_distilled", engine, "fine_tuned")])
    # One loaded model at a time, however many arms there are.
    engines.release()
    return responses, keys


def _reference_models(
    current: Step, cache: scoring.Cache, engines: EngineResource, harness: Any
) -> Iterator[tuple[str, list[str], list[str]]]:
    base = engines.target(current.transfer)
    responses = answer_heldout(current, cache, base, "base", "target_base")
    yield "target_base", responses, task_keys(current, harness, [("target_base", base, "base")])
    source = engines.source(current.transfer)
    yield "source_fine_tuned", answer_heldout(current, cache, source, "fine_tuned", "source_fine_tuned"), []


def _tasks(database: Store, transfer: Transfer, scored: list[tuple[str, int | None, list[str]]]) -> pl.DataFrame:
    """Rows of ``comparison_tasks``: what is known under the keys of each model."""
    rows: list[dict[str, Any]] = []
    for arm, seed, keys in scored:
        found = database.read(
            "SELECT task, metric, filter, value, stderr, n FROM task_scores WHERE key IN (SELECT unnest(?))"
            " ORDER BY task, metric, filter",
            [keys],
            transfer.name,
        )
        rows += [{"arm": arm, "seed": seed, **row} for row in found.to_dicts()]
    return COMPARISON_TASKS.frame(rows)


def _mark(
    transfer: Transfer, name: str, seed: int | None, responses: list[str], answers: list[dict[str, Any]]
) -> list[bool]:
    """Which responses are right; each is noted in ``answers``."""
    correct = []
    for (prompt, expected), response in zip(transfer.heldout, responses, strict=True):
        correct.append(mark(transfer.config.evaluation.metric, response, expected)[0])
        answers.append(
            {
                "arm": name,
                "seed": seed,
                "prompt_id": prompt_id(prompt),
                "response": response.strip(),
                "correct": correct[-1],
            }
        )
    return correct


def _diversity(
    current: Step, datasets: dict[str, list[pl.DataFrame]]
) -> tuple[dict[str, dict[str, float | None]], str | None]:
    """The columns `DIVERSITY` of every arm, and why there is no similarity, if the encoder is missing."""
    missing = encoder.missing_packages()
    places: dict[str, int] = {}
    if not missing:
        # Each prompt once: arms and runs share most of theirs.
        for pairs in itertools.chain.from_iterable(datasets.values()):
            for prompt in pairs["prompt"]:
                places.setdefault(prompt, len(places))
        with current.cost.model_time():
            vectors = encoder.embed(list(places))

    def similarity(prompts: pl.Series) -> float | None:
        return None if missing else mean_similarity(vectors[[places[prompt] for prompt in prompts]])

    found = {
        arm: {
            "distinct_responses": _mean([pairs["response"].str.strip_chars().n_unique() for pairs in runs]),
            "distinct_bigrams": _mean([distinct_bigrams(pairs["prompt"]) for pairs in runs]),
            "repetition": _mean([mean_repetition(current.store, pairs["prompt"].to_list()) for pairs in runs]),
            "similarity": _mean([similarity(pairs["prompt"]) for pairs in runs]),
        }
        for arm, runs in datasets.items()
    }
    return found, missing


def _row(
    transfer: Transfer,
    name: str,
    tables: dict[str, Correct],
    candidates: dict[str, pl.DataFrame],
    datasets: dict[str, list[pl.DataFrame]],
    diversity: dict[str, dict[str, float | None]],
) -> dict[str, Any]:
    samples, seed = transfer.config.evaluation.bootstrap_samples, transfer.config.seed

    def interval(values: Correct) -> Interval:
        return bootstrap_runs(values, samples, seed)

    mine = datasets.get(name, [])
    drawn = [set(pairs["prompt_id"]) for pairs in mine]
    random = [set(pairs["prompt_id"]) for pairs in datasets["random"]]
    shared = [len(a & b) / len(a) for a, b in zip(drawn, random, strict=False)]
    row: dict[str, Any] = {
        "arm": name,
        "runs": len(tables[name]),
        "candidates": len(candidates[name]) if name in candidates else None,
        "pairs": len(mine[0]) if mine else None,
        "shared_with_random": sum(shared) / len(shared) if shared else None,
        **diversity.get(name, dict.fromkeys(DIVERSITY)),
        "by_run": [float(run.mean()) for run in tables[name]],
        **vars(interval(tables[name])),
    }
    for reference in REFERENCES:
        compared = mine and name != reference
        found = interval(tables[name] - tables[reference]) if compared else None
        row |= {
            f"vs_{reference}": found.value if found else None,
            f"vs_{reference}_low": found.low if found else None,
            f"vs_{reference}_high": found.high if found else None,
        }
    return row


def _mean(values: Sequence[float | None]) -> float | None:
    """None when a value is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
