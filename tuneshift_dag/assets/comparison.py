"""``comparison``: does the filter earn its place? Models trained on equally many pairs of rival filters, which choose
from the same pairs or, with `compare.loop`, each from rounds that it grew itself."""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
from numpy.typing import NDArray

from tuneshift_dag.assets.common import LOG, Context, Step, definition, example_rows, mean_repetition, step
from tuneshift_dag.assets.distilled_model import KEPT_PAIRS, trained_adapter
from tuneshift_dag.assets.evaluation import answer_heldout, task_keys
from tuneshift_dag.assets.retention import Rows, sampled_perplexity
from tuneshift_dag.config import Transfer
from tuneshift_dag.method import PromptFormat, Scorer, Side
from tuneshift_dag.method.filters import KEEP_RULES, RANKING_RULES
from tuneshift_dag.method.prompting import distinct_bigrams, mean_similarity, prompt_id
from tuneshift_dag.method.statistics import compared
from tuneshift_dag.models import encoder
from tuneshift_dag.reports import plots
from tuneshift_dag.resources import EngineResource, StoreResource
from tuneshift_dag.store import Store
from tuneshift_dag.store.queries import verdicts
from tuneshift_dag.store.records import content_version
from tuneshift_dag.store.tables import COMPARISON, COMPARISON_ANSWERS, COMPARISON_TASKS

DIVERSITY = ("distinct_responses", "distinct_bigrams", "repetition", "similarity")
INTERVAL_COLUMNS = ["arm", "value", "low", "high", "vs_random", "vs_random_low", "vs_random_high"]
Datasets = dict[str, list[pl.DataFrame]]
"""By arm, the pairs of each training, or what each could draw from."""
Correct = NDArray[np.float64]


def build_comparison(transfer: Transfer) -> dg.AssetsDefinition:
    @dg.asset(**definition(transfer, "comparison", COMPARISON, "pytorch", models=True))
    def comparison(context: Context, store: StoreResource, engines: EngineResource) -> dg.MaterializeResult:
        """Models trained on as many pairs of each filter, several times each, and measured on the held-out file.

        Every arm draws from the same scored pairs, or with `compare.loop` from rounds of its own; `random` draws from
        all that pass the quality guards and `unfiltered` from everything. Beside its accuracy stand how varied an arm's
        pairs were, what its models forgot of general text and, with `evaluation.tasks`, their scores on standard tasks.
        It trains arms × seeds models, so it exists only with `compare:` in `transfer.yaml`, and `tuneshift run` leaves
        it to `tuneshift compare`. A killed comparison goes on with the first arm and seed that isn't trained.
        """
        settings = transfer.config.compare
        assert settings is not None
        with step(context, store.store(), transfer, "comparison") as current:
            find = _grown if settings.loop else _candidates
            candidates = _with_oracle(transfer, find(current.store, transfer))
            size = _common_size(transfer, settings.pairs, candidates)
            epochs = settings.epochs or transfer.config.distill.epochs
            # Before anything is trained: a misspelt task, or one whose data can't be had.
            harness = engines.harness(transfer) if transfer.config.evaluation.tasks else None
            measured = _Measured(current)
            datasets: Datasets = {arm: [] for arm in candidates}
            # Seed by seed, so that an early look at the log has every arm once.
            trainings = list(itertools.product(range(settings.seeds), candidates))
            for done, (number, arm) in enumerate(trainings, start=1):
                seed = transfer.config.seed + number
                LOG.info(f"{arm}, seed {seed}: {done} of {len(trainings)}")
                pairs = _draw(candidates[arm][number], size, seed)
                datasets[arm].append(pairs)
                variant = transfer.with_training(seed, epochs)
                row = trained_adapter(current, engines, variant, pairs)
                engine = engines.target(variant, current.store.absolute(row["path"]))
                measured.add(arm, engine, "fine_tuned", harness, seed, f"model {row['model_id']}")
                # One loaded model at a time, however many arms there are.
                engines.release()
            measured.add("target_base", engines.target(transfer), "base", harness)
            source_format = transfer.config.source_format
            measured.add("source_fine_tuned", engines.source(transfer), "fine_tuned", None, format=source_format)

            unlike = encoder.missing_packages()
            vectors = None if unlike else _embed(current, datasets)
            diversity = {arm: _diversity(current, runs, vectors) for arm, runs in datasets.items()}
            correct = _correct(transfer, measured.answers)
            measures = compared(correct, datasets)
            rows = [
                _row(name, correct[name], candidates, datasets)
                | measures[name]
                | diversity.get(name, {})
                | {"general_text": _mean(measured.general.get(name, []))}
                for name in correct
            ]
            summary, tasks = COMPARISON.frame(rows), COMPARISON_TASKS.frame(measured.tasks)
            answers = COMPARISON_ANSWERS.frame(measured.answers)
            tables = [(COMPARISON, summary), (COMPARISON_ANSWERS, answers), (COMPARISON_TASKS, tasks)]
            current.write(tables, content_version(summary, tasks))
            chart = current.picture("comparison", plots.comparison(summary.to_dicts()))
        if unlike:
            LOG.warning(unlike)
        arms = summary.filter(pl.col("pairs") > 0)
        figures = {
            "pairs": size,
            "seeds": settings.seeds,
            "epochs": epochs,
            "comparison": example_rows(summary, INTERVAL_COLUMNS, len(rows)),
            "diversity": example_rows(arms, ["arm", *DIVERSITY], len(arms)),
            "similarity_skipped": unlike,
            "tasks": example_rows(tasks, tasks.columns, len(tasks)) if len(tasks) else None,
            "chart": chart,
        }
        return current.result(len(summary), figures)

    return comparison


def _candidates(store: Store, transfer: Transfer) -> Datasets:
    """What each arm can draw from, the same in every run, with the margin where it is a rank. An arm that has nothing
    is a failure."""
    compare, settings = transfer.config.compare, transfer.config.filter
    assert compare is not None
    found: Datasets = {}
    for arm in transfer.config.arms:
        # Without a rank an arm is drawn from by hash.
        margin = "max(margin)" if arm.rule in RANKING_RULES else "NULL::DOUBLE"
        # A rule that ranks has its best of all pairs, or by default of as many as the filter keeps by it.
        ranks_all = arm.rule in (*KEEP_RULES, "unfiltered") and (compare.pairs is not None or arm.rule != settings.rule)
        own = 1.0 if ranks_all else settings.threshold
        # Over all rounds at once: nothing is seeded by them.
        verdict = verdicts(transfer, arm.rule, arm.threshold or own, by_round=False)
        pairs = store.read(
            "SELECT prompt_id, min(round) AS round, any_value(prompt) AS prompt,"
            f" any_value(fine_tuned_response) AS response, {margin} AS margin"
            f" FROM ({verdict}) WHERE reason IS NULL GROUP BY prompt_id ORDER BY prompt_id",
            schema=transfer.name,
        )
        found[arm.name] = [pairs] * _runs(transfer)
        if pairs.is_empty():
            query = f"SELECT reason, count(*) FROM ({verdict}) GROUP BY reason"
            reasons = dict(store.read(query, schema=transfer.name).iter_rows())
            raise dg.Failure(
                f"The arm {arm.name!r} has no pair to train on ({reasons or 'no scored pairs'})."
                f" Run `tuneshift run {transfer.name}` first, or change its threshold in compare.arms of"
                f" {transfer.folder / 'transfer.yaml'}.",
                allow_retries=False,
            )
    return found


def _grown(store: Store, transfer: Transfer) -> Datasets:
    """What each arm kept in the rounds of each run. Nothing is ranked: its filter chose already."""
    found: Datasets = {arm.name: [] for arm in transfer.config.arms}
    for (arm, _), loop in transfer.loops.items():
        pairs = store.read(KEPT_PAIRS, [loop.round_keys[-1]], loop.name)
        if pairs.is_empty():
            raise dg.Failure(
                f"The rounds of {loop.loop} have kept nothing yet: `tuneshift compare {transfer.name}` grows them.",
                allow_retries=False,
            )
        found[arm].append(pairs.with_columns(margin=pl.lit(None, pl.Float64)))
    return found


def _runs(transfer: Transfer) -> int:
    assert transfer.config.compare is not None
    return transfer.config.compare.seeds


def _with_oracle(transfer: Transfer, found: Datasets) -> Datasets:
    """The arms, and the labelled pairs as one more."""
    if transfer.labelled:
        # What most responses start with before their first word: labelled ones, written by people, lack it.
        starts = found["unfiltered"][0]["response"].str.extract(r"^(\s*)", 1).value_counts(sort=True)
        space = str(starts.row(0)[0] or "")
        rows = [(prompt_id(p), "labelled", p, space + r, None) for p, r in transfer.labelled]
        labelled = pl.DataFrame(rows, schema=found["unfiltered"][0].schema, orient="row")
        found["oracle"] = [labelled] * _runs(transfer)
    return found


def _common_size(transfer: Transfer, wanted: int | None, candidates: Datasets) -> int:
    """Pairs of every arm. One that has fewer than are wanted is a failure, and a ranking of which all are taken."""
    arm, fewest = min(((name, _fewest(pools)) for name, pools in candidates.items()), key=lambda each: each[1])
    if wanted is None or wanted <= fewest:
        size, all_pairs = wanted or fewest, _fewest(candidates["random"])
        ranked = [each.name for each in transfer.config.arms if each.rule in RANKING_RULES]
        if ranked and size == all_pairs and not transfer.loops:
            raise dg.Failure(
                f"The arm {ranked[0]!r} ranks pairs, and all {size} of them would be taken, as of random: set"
                f" compare.pairs in {transfer.folder / 'transfer.yaml'} to fewer.",
                allow_retries=False,
            )
        return size
    raise dg.Failure(
        f"The arm {arm!r} has {fewest} pairs, fewer than compare.pairs {wanted} in"
        f" {transfer.folder / 'transfer.yaml'}: lower compare.pairs to at most {fewest}, or loosen the arm.",
        allow_retries=False,
    )


def _fewest(pools: list[pl.DataFrame]) -> int:
    return min(len(pool) for pool in pools)


def _draw(pool: pl.DataFrame, size: int, seed: int) -> pl.DataFrame:
    """The pairs of one training, in the order of ``distilled_model``: the largest margins, or the lowest hashes."""
    # Hashes are the same for all arms, so that two arms differ only by the pairs that they don't share.
    rank = [hashlib.sha256(f"{seed}|{prompt}".encode()).hexdigest() for prompt in pool["prompt_id"]]
    ranked = pool.with_columns(rank=pl.Series(rank, dtype=pl.String))
    chosen = ranked.sort("margin", "rank", descending=[True, False], nulls_last=True).head(size)
    return chosen.select("prompt_id", "round", "prompt", "response").sort("round", "prompt_id")


@dataclass
class _Measured:
    """What the models of a comparison answered and scored: rows of ``comparison_answers`` and ``comparison_tasks``, and
    by target, run by run, the perplexity of general text as a multiple of the base's."""

    current: Step
    answers: Rows = field(default_factory=list)
    tasks: Rows = field(default_factory=list)
    general: dict[str, list[float | None]] = field(default_factory=dict)

    def add(
        self,
        arm: str,
        engine: Scorer,
        side: Side,
        harness: Any,
        seed: int | None = None,
        label: str = "",
        format: PromptFormat | None = None,
    ) -> None:
        """A model's answers to the held-out file and, with a harness, its scores on standard tasks. Without a format it
        is a target."""
        if format is None:
            of_base = sampled_perplexity(self.current, engine, "base")
            self.general.setdefault(arm, []).append(sampled_perplexity(self.current, engine, side) / of_base)
        own, format = {"arm": arm, "seed": seed}, format or self.current.transfer.config.target_format
        self.answers += [{**own, **row} for row in answer_heldout(self.current, engine, side, label or arm, format)]
        model = "target_base" if side == "base" else "target_distilled"
        keys = task_keys(self.current, harness, [(model, engine, side)])
        columns = "task, metric, filter, value, stderr, n"
        query = f"SELECT {columns} FROM task_scores WHERE key IN (SELECT unnest(?)) ORDER BY task, metric, filter"
        self.tasks += [{**own, **row} for row in self.current.read(query, [keys]).to_dicts()]


def _correct(transfer: Transfer, answers: Rows) -> dict[str, Correct]:
    """By model (runs, held-out prompts): 1 where a run's answer is right."""
    marks: dict[str, list[bool]] = {}
    for row in answers:
        marks.setdefault(row["arm"], []).append(row["correct"])
    return {arm: np.array(runs, np.float64).reshape(-1, len(transfer.heldout)) for arm, runs in marks.items()}


def _embed(current: Step, datasets: Datasets) -> dict[str, NDArray[np.float32]]:
    """The vector of every prompt. Each is embedded once: arms and runs share most of theirs."""
    drawn = itertools.chain.from_iterable(datasets.values())
    prompts = list(dict.fromkeys(prompt for pairs in drawn for prompt in pairs["prompt"]))
    with current.cost.model_time():
        return dict(zip(prompts, encoder.embed(prompts), strict=True))


def _diversity(
    current: Step, runs: list[pl.DataFrame], vectors: dict[str, NDArray[np.float32]] | None
) -> dict[str, float | None]:
    """The columns `DIVERSITY` of an arm, means over its trainings; no similarity without vectors."""

    def similarity(prompts: pl.Series) -> float | None:
        return mean_similarity(np.array([vectors[prompt] for prompt in prompts])) if vectors else None

    return {
        "distinct_responses": _mean([pairs["response"].str.strip_chars().n_unique() for pairs in runs]),
        "distinct_bigrams": _mean([distinct_bigrams(pairs["prompt"]) for pairs in runs]),
        "repetition": _mean([mean_repetition(current.store, pairs["prompt"]) for pairs in runs]),
        "similarity": _mean([similarity(pairs["prompt"]) for pairs in runs]),
    }


def _row(name: str, correct: Correct, candidates: Datasets, datasets: Datasets) -> dict[str, Any]:
    """A row of ``comparison``, without the columns `DIVERSITY` and those of `compared`."""
    row = {"arm": name, "runs": len(correct), "by_run": [float(run.mean()) for run in correct]}
    if name not in datasets:
        return row
    drawn, random = ([set(pairs["prompt_id"]) for pairs in datasets[arm]] for arm in (name, "random"))
    shared = [len(a & b) / len(a) for a, b in zip(drawn, random, strict=True)]
    counts = {"candidates": _fewest(candidates[name]), "pairs": len(datasets[name][0])}
    return {**row, **counts, "shared_with_random": sum(shared) / len(shared)}


def _mean(values: Sequence[float | None]) -> float | None:
    """None when a value is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
