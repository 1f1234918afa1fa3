"""Whether a filter rule finds the skill: precision, recall and AUC against what is known to be true of scored pairs.

A rule should keep the pairs in the skill whose response is right, and drop those that are wrong or off the skill. Like
`thresholds` it replays stored scores: no model, no training.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from tuneshift_dag import TuneshiftError
from tuneshift_dag.config import Transfer
from tuneshift_dag.config.examples import read_truth
from tuneshift_dag.method.filters import GUARD_REASONS, Rule
from tuneshift_dag.method.statistics import auc, wilson
from tuneshift_dag.reports.thresholds import PAPER_THRESHOLD, thresholds_of
from tuneshift_dag.store import Store
from tuneshift_dag.store.queries import of_its_rounds, verdicts

_LABELS = ("right", "wrong", "off")


def sweep_truth(
    store: Store,
    transfer: Transfer,
    file: Path,
    rules: Sequence[str] = (),
    grid: Sequence[float] = (),
    off_skill: Sequence[float] = (),
) -> dict[str, Any]:
    """A JSON-ready object: what could not be judged, and for each pool its ``rules`` (AUC) and ``cells``.

    Args:
        file: what is true of each prompt, see `read_truth`.
        rules, grid: as in `thresholds.sweep`.
        off_skill: shares of prompts off the skill; a part of the pool is drawn for each, beside the pool as it is.
    """
    metric = transfer.config.evaluation.metric
    truths = read_truth(file, metric)
    query = f"SELECT round, prompt_id, fine_tuned_response FROM {of_its_rounds(transfer, 'scored_pairs')}"
    scored = store.read(query, schema=transfer.name)
    known = [
        {"round": round_, "prompt_id": id_, "truth": truths[id_].of(response, metric)}
        | {"rank": hashlib.sha256(f"pool|{transfer.config.seed}|{id_}".encode()).hexdigest()}
        for round_, id_, response in scored.iter_rows()
        if id_ in truths
    ]
    if not known:
        raise TuneshiftError(
            f"{file}: none of its {len(truths)} prompts is a scored pair of {transfer.name}, which has {len(scored)}."
            f" Label prompts of the table scored_pairs; if there are none yet: tuneshift run {transfer.name}"
        )
    pairs = pl.DataFrame(known).sort("rank", "round")
    grids = thresholds_of(store, transfer, rules, grid)
    return {
        "transfer": transfer.name,
        "pairs_without_truth": len(scored) - len(pairs),
        "prompts_not_scored": len(truths.keys() - set(scored["prompt_id"])),
        "pools": [
            _pool(store, transfer, grids, pairs, "LEFT"),
            *(_pool(store, transfer, grids, _drawn(pairs, share), "INNER") for share in off_skill),
        ],
    }


def _drawn(pairs: pl.DataFrame, share: float) -> pl.DataFrame:
    """The largest part of the pairs with this share off the skill: the same one each time, smaller ones in larger."""
    off = pl.col("truth") == "off"
    inside, outside = pairs.filter(~off), pairs.filter(off)
    size = 0.0
    if 0 <= share < 1:
        size = min(len(inside) / (1 - share), len(outside) / share if share else float("inf"))
    if size < 1 or (share and not (round(size * (1 - share)) and round(size * share))):
        raise TuneshiftError(
            f"--off-skill {share:g} can't be drawn: give a share from 0 to below 1, for which there are pairs. Of the"
            f" scored pairs with a truth {len(inside)} are in the skill and {len(outside)} off it."
        )
    return pl.concat([inside.head(round(size * (1 - share))), outside.head(round(size * share))])


def _pool(
    store: Store, transfer: Transfer, grids: dict[Rule, list[float]], pairs: pl.DataFrame, join: str
) -> dict[str, Any]:
    """``join`` LEFT: the rules judge all scored pairs, as the filter does, also those that no truth is known of; INNER:
    these alone."""
    counts = {label: int((pairs["truth"] == label).sum()) for label in _LABELS}
    settings = transfer.config.filter
    cells: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for rule, thresholds in grids.items():
        query = "SELECT threshold, truth, count(*) FROM judged WHERE reason IS NULL GROUP BY ALL"
        rows = _judged(store, transfer, pairs, join, rule, thresholds, query)
        kept = {(threshold, truth): number for threshold, truth, number in rows.iter_rows()}
        for threshold in thresholds:
            right, wrong, off = (kept.get((threshold, label), 0) for label in _LABELS)
            cells.append(
                {"rule": rule, "threshold": threshold, "kept": right + wrong + off, "right": right, "wrong": wrong}
                | {"off": off, **_share("precision", right, right + wrong + off)}
                | {**_share("recall", right, counts["right"])}
                | {"current": (rule, threshold) == (settings.rule, settings.threshold)}
            )
        # Only the order of the margins counts, which no threshold changes but that of `both`.
        cut = settings.threshold if rule == settings.rule else PAPER_THRESHOLD
        score = f"CASE WHEN reason IN {GUARD_REASONS} THEN '-inf'::DOUBLE ELSE coalesce(margin, 0) END"
        query = f"SELECT truth, {score} FROM judged"
        right_ones, scores = (column.to_numpy() for column in _judged(store, transfer, pairs, join, rule, [cut], query))
        right_ones = right_ones == "right"
        value = auc(scores[right_ones], scores[~right_ones]) if 0 < right_ones.sum() < len(scores) else None
        at = cut if rule == "both" else None
        found.append({"rule": rule, "threshold": at, "auc": None, "low": None, "high": None})
        if value:
            found[-1] |= {"auc": value.value, "low": value.low, "high": value.high}
    return {"off_skill": counts["off"] / len(pairs), **counts, "rules": found, "cells": cells}


def _share(name: str, part: int, whole: int) -> dict[str, float | None]:
    """With Wilson's interval; of nothing none."""
    if not whole:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    found = wilson(part / whole, whole)
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def _judged(
    store: Store, transfer: Transfer, pairs: pl.DataFrame, join: str, rule: Rule, thresholds: list[float], query: str
) -> pl.DataFrame:
    """The rows of a query over ``judged``: the pairs with their truth and, for each threshold, the rule's verdict."""
    return store.read(
        f"""
        WITH known AS (
            SELECT unnest($round::VARCHAR[]) AS round, unnest($prompt_id::VARCHAR[]) AS prompt_id,
                unnest($truth::VARCHAR[]) AS truth
        ),
        pool AS (SELECT * FROM {of_its_rounds(transfer, "scored_pairs")} {join} JOIN known USING (round, prompt_id)),
        grid AS (SELECT unnest($thresholds::DOUBLE[]) AS threshold),
        judged AS (
            SELECT threshold, truth, reason, margin
            FROM grid, LATERAL ({verdicts(transfer, rule, "grid.threshold", pairs="pool")})
            WHERE truth IS NOT NULL
        )
        {query}
        """,
        {column: pairs[column].to_list() for column in ("round", "prompt_id", "truth")} | {"thresholds": thresholds},
        transfer.name,
    )
