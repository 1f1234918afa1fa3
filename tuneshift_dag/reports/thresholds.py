"""What each filter rule would keep at each threshold, and what the current one does: choosing a cut by looking.

Every number comes from the scored pairs through the SQL that also makes ``filtered_dataset``, without a model, so a
cell is what the dataset becomes when ``filter`` is set to it. What is kept also decides the seeds of later rounds; here
the prompts that there are get judged. `tuneshift sweep` prints the cells, `threshold_report` stores and draws them.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import polars as pl

from tuneshift_dag import TuneshiftError
from tuneshift_dag.config import Transfer
from tuneshift_dag.config.schema import check_threshold
from tuneshift_dag.method.filters import GUARD_REASONS, KEEP_RULES, MARGIN, RULES, Rule, needs_cross_scores
from tuneshift_dag.store import Store
from tuneshift_dag.store.queries import of_its_rounds, verdicts

PAPER_THRESHOLD = 1.5
_MOST_THRESHOLDS = 1000
# Points in one picture: more only paint over each other and make the PNG large.
_MOST_POINTS = 3000
_BUCKETS = 12
_QUANTILES = [round(0.05 + 0.1 * place, 2) for place in range(10)]
_SHARES = [0.1, 0.25, 0.5, 0.75, 1.0]
_PARTS = [0.25, 0.5, 1.5, 2.0]


def sweep(
    store: Store, transfer: Transfer, rules: Sequence[str] = (), grid: Sequence[float] = ()
) -> list[dict[str, Any]]:
    """Rows of the table ``threshold_report``, with ``by_round`` as an object, for each rule and threshold; without any
    ``rules`` all (of a ``grid``, those that can take all of it), without a grid `default_grid` of each rule.
    `TuneshiftError` where a threshold can't separate anything."""
    rounds = f"SELECT round, count(*) FROM {of_its_rounds(transfer, 'scored_pairs')} GROUP BY round ORDER BY round"
    scored = dict(store.read(rounds, schema=transfer.name).iter_rows())
    grids = thresholds_of(store, transfer, rules, grid)
    return [cell for rule, tried in grids.items() for cell in _cells(store, transfer, rule, tried, scored)]


def thresholds_of(
    store: Store, transfer: Transfer, rules: Sequence[str] = (), grid: Sequence[float] = ()
) -> dict[Rule, list[float]]:
    for rule in rules:
        if rule not in RULES:
            raise TuneshiftError(f"There is no rule {rule!r}: use {', '.join(RULES)}.")
    wanted = [rule for rule in RULES if rule in rules] or _rules_for(grid)
    if "seed_similarity" not in transfer.config.rules:
        if "seed_similarity" in rules:
            raise TuneshiftError(
                "How similar prompts are to the seeds isn't known: name seed_similarity in compare.arms of"
                f" {transfer.folder / 'transfer.yaml'}, then `tuneshift run {transfer.name}`."
            )
        wanted = [rule for rule in wanted if rule != "seed_similarity"]
    if not transfer.config.engine.cross_scores:
        crossed = [rule for rule in wanted if needs_cross_scores(rule)]
        if rules and crossed:
            raise TuneshiftError(
                f"{crossed[0]} needs scores that aren't there: remove engine.cross_scores: false from"
                f" {transfer.folder / 'transfer.yaml'}, then `tuneshift run {transfer.name}`."
            )
        wanted = [rule for rule in wanted if rule not in crossed]
    for rule in wanted:
        _check(rule, grid)
    return {rule: sorted(set(grid)) or default_grid(store, transfer, rule) for rule in wanted}


def _cells(
    store: Store, transfer: Transfer, rule: Rule, thresholds: list[float], scored: dict[str, int]
) -> list[dict[str, Any]]:
    settings = transfer.config.filter
    rows = store.read(
        f"""
        WITH grid AS (SELECT unnest($thresholds::DOUBLE[]) AS threshold),
        kept AS (
            SELECT grid.threshold, judged.round, judged.margin, trim(judged.fine_tuned_response) AS response
            FROM grid, LATERAL ({verdicts(transfer, rule, "grid.threshold")}) AS judged
            WHERE judged.reason IS NULL
        )
        SELECT threshold, round, count(*), count(DISTINCT response), avg(margin)
        FROM kept GROUP BY GROUPING SETS ((threshold), (threshold, round))
        """,
        {"thresholds": thresholds},
        transfer.name,
    )
    found = {(threshold, round_): counts for threshold, round_, *counts in rows.iter_rows()}

    def cell(threshold: float) -> dict[str, Any]:
        kept, distinct, margin = found.get((threshold, None), (0, 0, None))
        return {
            "rule": rule,
            "threshold": threshold,
            "pairs_kept": kept,
            "kept_share": kept / max(1, sum(scored.values())),
            "distinct_responses": distinct,
            "mean_margin": margin,
            "by_round": {round_: found.get((threshold, round_), (0,))[0] for round_ in scored},
            "current": (rule, threshold) == (settings.rule, settings.threshold),
        }

    return [cell(threshold) for threshold in thresholds]


def default_grid(store: Store, transfer: Transfer, rule: Rule) -> list[float]:
    """Thresholds where the rule's verdict changes: quantiles of what it compares (ratios may span four orders of
    magnitude), the paper's 1.5 and, of the current rule, its own; of `filters.KEEP_RULES` shares."""
    settings = transfer.config.filter
    mine = [settings.threshold] if rule == settings.rule else []
    if rule == "unfiltered":
        return [1.0]
    if rule in KEEP_RULES:
        number = mine[0] if mine and mine[0] > 1 else None
        return sorted({*mine, *(_SHARES if number is None else (max(2, round(number * part)) for part in _PARTS))})
    floor = 0 if rule == "difference" else 1  # as in the check of transfer.yaml
    compared = ("ppl_fine_tuned", "ppl_base") if rule == "both" else (MARGIN[rule].removesuffix(" - {t}"),)
    values = " UNION ALL ".join(f"SELECT {value} AS value FROM usable" for value in compared)
    # A pair without a perplexity, or truncated, or empty, is out at every threshold.
    found = _judged(
        store,
        transfer,
        f""", usable AS (FROM judged WHERE coalesce(reason, '') NOT IN {GUARD_REASONS})
        SELECT unnest(quantile_cont(value, {_QUANTILES})) FROM ({values}) WHERE value > {floor} AND isfinite(value)""",
        verdicts(transfer, rule, PAPER_THRESHOLD),
    ).to_series()
    return sorted(t for t in {*mine, PAPER_THRESHOLD, *(_readable(value, floor) for value in found)} if t > floor)


def _readable(value: float, floor: int) -> float:
    """Three significant digits; just above the floor, where perplexities crowd, of what is above it."""
    start = floor if value < 10 else 0
    return round(start + float(f"{value - start:.3g}"), 10)


def parse_grid(text: str) -> list[float]:
    """Thresholds from ``1.1,1.2,1.5`` or ``start:stop:step`` (the stop included); `TuneshiftError` for other text."""
    try:
        if ":" not in text:
            return [float(part) for part in text.split(",")]
        start, stop, step = (float(part) for part in text.split(":"))
    except ValueError:
        raise TuneshiftError(
            f"--grid {text!r} can't be read: write thresholds as 1.1,1.2,1.5 or as start:stop:step, like 1.1:2:0.1."
        ) from None
    if not (math.isfinite(start + stop + step) and step > 0 and stop >= start):
        raise TuneshiftError(f"--grid {text!r} has no thresholds: the step must be above 0 and stop not below start.")
    count = math.floor((stop - start) / step + 1e-9) + 1
    if count > _MOST_THRESHOLDS:
        raise TuneshiftError(f"--grid {text!r} has {count} thresholds, over {_MOST_THRESHOLDS}: use a larger step.")
    # Rounded, so that 1.1:2:0.1 hits the 1.3 of transfer.yaml and not 1.3000000000000003.
    return [round(start + place * step, 10) for place in range(count)]


def _check(rule: Rule, grid: Sequence[float]) -> None:
    try:
        for threshold in grid:
            check_threshold(rule, threshold)
    except ValueError as error:
        raise TuneshiftError(f"{error}.") from error


def _rules_for(grid: Sequence[float]) -> list[Rule]:
    """The rules that can take every threshold of a grid (without one, all); `TuneshiftError` when no rule can."""
    able: list[Rule] = []
    for rule in RULES if not grid else [rule for rule in RULES if rule != "unfiltered"]:
        with contextlib.suppress(TuneshiftError):
            _check(rule, grid)
            able.append(rule)
    if not able:
        raise TuneshiftError(
            f"No rule takes all of the thresholds {', '.join(f'{t:g}' for t in grid)}: name one with --rule to see why."
        )
    return able


def perplexities(store: Store, transfer: Transfer) -> pl.DataFrame:
    """(ppl_fine_tuned, ppl_base, ppl_base_cross, kept) of pairs that have finite perplexities: a fair sample, and the
    same one each time, since a prompt_id is a hash."""
    return _judged(
        store,
        transfer,
        f"""
        SELECT ppl_fine_tuned, ppl_base, ppl_base_cross, reason IS NULL AS kept FROM judged
        WHERE isfinite(ppl_fine_tuned) AND isfinite(ppl_base) AND isfinite(ppl_base_cross)
        ORDER BY prompt_id, round LIMIT {_MOST_POINTS}
        """,
    )


def verdicts_by_round(store: Store, transfer: Transfer) -> list[dict[str, Any]]:
    """``{round, reason, pairs}`` of every round and reason; the kept ones have the reason ``kept``."""
    return _judged(
        store,
        transfer,
        "SELECT round, coalesce(reason, 'kept') AS reason, count(*) AS pairs FROM judged"
        " GROUP BY ALL ORDER BY round, reason",
    ).to_dicts()


def response_lengths(store: Store, transfer: Transfer) -> list[dict[str, Any]]:
    """``{low, high, kept, dropped}``: verdicts by the fine-tuned response's length in tokens, ends included."""
    return _judged(
        store,
        transfer,
        f"""
        , ends AS (
            SELECT min(fine_tuned_tokens) AS shortest,
                ((max(fine_tuned_tokens) - min(fine_tuned_tokens)) // {_BUCKETS} + 1)::INTEGER AS width
            FROM judged
        ),
        buckets AS (SELECT *, (fine_tuned_tokens - shortest) // width AS bucket FROM judged, ends)
        SELECT any_value(shortest + bucket * width)::INTEGER AS low,
            any_value(shortest + (bucket + 1) * width - 1)::INTEGER AS high,
            count(*) FILTER (reason IS NULL) AS kept, count(*) FILTER (reason IS NOT NULL) AS dropped
        FROM buckets WHERE bucket IS NOT NULL GROUP BY bucket ORDER BY bucket
        """,
    ).to_dicts()


def _judged(store: Store, transfer: Transfer, query: str, judged: str = "") -> pl.DataFrame:
    """The rows of a query over ``judged``: every scored pair with its verdict, by default the current filter's."""
    return store.read(f"WITH judged AS ({judged or verdicts(transfer)}) {query}", schema=transfer.name)
