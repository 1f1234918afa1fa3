import io
import math
from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
from matplotlib.image import imread

from tuneshift_dag.config.schema import Evaluation
from tuneshift_dag.method.filters import RULES
from tuneshift_dag.reports import plots


def pairs(count: int, ppl_base: float = 4.0) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "ppl_fine_tuned": [1.1 + i / 100 for i in range(count)],
            "ppl_base": [ppl_base] * count,
            "ppl_base_cross": [ppl_base * 100] * count,
            "kept": [i % 2 == 0 for i in range(count)],
        },
        schema={"ppl_fine_tuned": pl.Float64, "ppl_base": pl.Float64, "ppl_base_cross": pl.Float64, "kept": pl.Boolean},
    )


def points(count: int, rounds: int = 2, seeds: int = 1) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "x": [float(i) for i in range(count)],
            "y": [float(i * i % 7) for i in range(count)],
            "round": [None if i < seeds else f"round_{1 + i % rounds:02}" for i in range(count)],
            "kept": [i % 3 == 0 for i in range(count)],
        },
        schema={"x": pl.Float64, "y": pl.Float64, "round": pl.String, "kept": pl.Boolean},
    )


def cells(*rules: str) -> list[dict]:
    return [
        {"rule": r, "threshold": t, "pairs_kept": 9, "distinct_responses": 3, "current": (r, t) == ("both", 1.5)}
        for r in rules
        for t in (1.5, 2.0)
    ]


def verdicts(rounds: int) -> list[dict]:
    names = ("kept", "truncated_response", "a_reason_of_tomorrow")
    return [{"round": f"round_{r:02}", "reason": reason, "pairs": r} for r in range(1, rounds + 1) for reason in names]


def buckets(count: int, width: int) -> list[dict]:
    return [{"low": i * width, "high": (i + 1) * width - 1, "kept": i, "dropped": 2} for i in range(count)]


def accuracies(flexible: float | None) -> list[dict]:
    loose = dict.fromkeys(("flexible", "flexible_low", "flexible_high"), flexible)
    models = ("source_base", "source_fine_tuned", "target_base", "target_distilled")
    return [{"model": model, "value": 0.5, "low": 0.4, "high": 0.6, "n": 9, **loose} for model in models]


def compared(runs: int) -> list[dict]:
    arms = {"both": 0.1, "random": None, "target_base": None}
    return [
        {"arm": arm, "pairs": None if arm == "target_base" else 9, "value": 0.5, "low": 0.4, "high": 0.6, "runs": runs}
        | {"by_run": [0.5] * runs, "vs_random": by, "vs_random_low": by and by - 0.2, "vs_random_high": by and by + 0.2}
        for arm, by in arms.items()
    ]


def pools(count: int) -> list[dict]:
    """The first one has nothing right, and of a threshold nothing is kept."""
    found = [
        {"rule": rule, "threshold": t, "precision": None if t == 2 else 0.5, "recall": 0.5}
        for rule in RULES
        for t in (1, 2)
    ]
    nothing = [{**cell, "recall": None} for cell in found]
    return [
        {
            "off_skill": i / count,
            "right": min(i, 1),
            "wrong": 1,
            "off": i,
            "rules": [],
            "cells": found if i else nothing,
        }
        for i in range(count)
    ]


PICTURES: dict[str, Callable[[], bytes]] = {
    **{
        f"{kind} {rule} {count}": lambda draw=draw, rule=rule, count=count: draw(pairs(count), rule, 1.5)
        for kind, draw in (("histograms", plots.perplexity_histograms), ("scatter", plots.perplexity_scatter))
        for rule in RULES
        for count in (0, 1, 60)
    },
    "histograms of equal certainty": lambda: plots.perplexity_histograms(pairs(1, 1.1), "ratio", 1.5),
    "scatter of nothing dropped": lambda: plots.perplexity_scatter(pairs(1), "both", 1.5),
    "scatter over many decades": lambda: plots.perplexity_scatter(pairs(60, 1e7), "cross_ratio", 1e4),
    "thresholds of nothing": lambda: plots.kept_by_threshold([]),
    "thresholds of one rule": lambda: plots.kept_by_threshold(cells("ratio")),
    "thresholds of three rules": lambda: plots.kept_by_threshold(cells("both", "ratio", "difference")),
    "thresholds of all rules": lambda: plots.kept_by_threshold(cells(*RULES)),
    **{f"{n} rounds": lambda n=n: plots.acceptance_by_round(verdicts(n)) for n in (0, 1, 3, 12, 40)},
    **{f"comparison of {n} runs": lambda n=n: plots.comparison(compared(n)) for n in (1, 3)},
    **{f"precision and recall of {n} pools": lambda n=n: plots.precision_recall(pools(n)) for n in (1, 2, 5)},
    "accuracies": lambda: plots.accuracy_bars(accuracies(None)),
    "accuracies of both ways to find a number": lambda: plots.accuracy_bars(accuracies(0.7)),
    **{f"{n} lengths": lambda n=n: plots.response_lengths(buckets(n, 1 + n)) for n in (0, 1, 12)},
    **{f"map of {n}": lambda n=n: plots.diversity_map(points(n)) for n in (0, 1, 2, 600)},
    "map without seeds": lambda: plots.diversity_map(points(20, seeds=0)),
    "map of many rounds": lambda: plots.diversity_map(points(60, rounds=25)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_a_png_with_something_on_a_transparent_ground(name: str) -> None:
    picture = PICTURES[name]()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(io.BytesIO(picture))
    assert pixels.shape[2] == 4
    assert 300 < pixels.shape[1] < 1200
    opacity = pixels[..., 3]
    assert opacity[0, 0] == 0
    assert 20 < np.count_nonzero(opacity > 0.5) < opacity.size / 2
    assert len(picture) < 200_000


def test_only_rules_with_a_threshold_have_a_panel() -> None:
    assert plots.kept_by_threshold(cells(*RULES)) == plots.kept_by_threshold(cells(*RULES[:5]))
    assert plots.kept_by_threshold(cells("random")) == plots.kept_by_threshold([])


def test_a_scale_that_ruins_general_text_is_left_out_of_the_frontier() -> None:
    row = {"scale": 0.4, "value": 0.5, "low": 0.4, "high": 0.6, "ratio": 1.01, "chosen": True}
    rows = [row, {**row, "scale": 1.0, "ratio": math.inf, "chosen": False}]
    assert plots.frontier(rows, Evaluation()) == plots.frontier([row], Evaluation())
    assert plots.frontier(rows[1:], Evaluation()).startswith(b"\x89PNG")
