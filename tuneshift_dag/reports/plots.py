"""Pictures, readable on a light and on a dark page: mid-tone colours on a transparent ground.

Their rows come from `tuneshift_dag.reports.thresholds` and from the tables that they are named for.
"""

import colorsys
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import polars as pl
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from tuneshift_dag.config.schema import Evaluation
from tuneshift_dag.method.filters import MARGIN, RULES, Rule
from tuneshift_dag.reports import by_way

_TEXT = "#7d8590"
_COLORS = ["#4493f8", "#e0823d", "#3fb950", "#ab7df8", "#db61a2", "#c69026"]
_KEPT, _DROPPED = "#3fb950", "#e0823d"
_SIDES = ("left", "bottom")
# One colour for a reason in every picture; reasons that no rule has yet come last.
_VERDICTS = {
    "kept": _KEPT,
    **dict.fromkeys(("fine_tuned_not_confident", "below_threshold", "below_the_top", "not_drawn"), _DROPPED),
    "base_already_confident": "#ab7df8",
    "truncated_response": "#db61a2",
    "repetitive_response": "#4493f8",
    **dict.fromkeys(("refused_response", "empty_response"), "#c69026"),
    "no_perplexity": _TEXT,
}
# The rules with a threshold: what a share keeps is the share.
_RULE_AXIS = {
    "both": "Threshold on each perplexity",
    "difference": "Threshold on PPL base − fine-tuned",
    "ratio": "Threshold on PPL base / fine-tuned",
    "cross_ratio": "Threshold on PPL base / fine-tuned,\nboth of the fine-tuned response",
    "surprise_ratio": "Threshold on log PPL base / fine-tuned,\nboth of the fine-tuned response",
}
# Where they cut the base's perplexity, by the fine-tuned model's and the threshold.
_CUT: dict[str, Callable[[Any, float], Any]] = {
    "difference": lambda ppl, threshold: ppl + threshold,
    "ratio": lambda ppl, threshold: ppl * threshold,
    "cross_ratio": lambda ppl, threshold: ppl * threshold,
    "surprise_ratio": lambda ppl, threshold: np.exp(np.minimum(np.log(ppl) * threshold, 700)),
}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, transparent=True, bbox_inches="tight")
    return buffer.getvalue()


def training_curve(curve: dict[str, Any]) -> bytes:
    """Loss by step, with the epoch's validation loss where there is one."""
    figure, axes = _axes("Step", "Loss (nats per response token)")
    steps = [row["step"] for row in curve["steps"]]
    axes.plot(steps, [row["loss"] for row in curve["steps"]], color=_COLORS[0], alpha=0.6, label="training")
    per_epoch = len(steps) / max(1, len(curve["epochs"]))
    ends = [row["epoch"] * per_epoch for row in curve["epochs"]]
    axes.plot(ends, [row["validation_loss"] for row in curve["epochs"]], "o-", color=_COLORS[1], label="validation")
    axes.set_yscale("log")
    axes.legend(frameon=False, labelcolor=_TEXT)
    return _png(figure)


def accuracy_bars(rows: Sequence[dict[str, Any]]) -> bytes:
    """The table ``accuracy``, with 95 % intervals; for a numeric metric by both ways to find the number."""
    figure, axes = _axes("Held-out accuracy", "")
    rows = by_way({row["model"]: row for row in rows})
    names = [row["model"].replace("_", " ") for row in rows]
    values = [row["value"] for row in rows]
    errors = [[r["value"] - r["low"] for r in rows], [r["high"] - r["value"] for r in rows]]
    axes.barh(names, values, xerr=errors, color=_COLORS[: len(rows)], ecolor=_TEXT, capsize=4)
    for place, row in enumerate(rows):
        axes.text(row["high"] + 0.02, place, f"{row['value']:.2f}", va="center", color=_TEXT)
    axes.set_xlim(0, 1.1)
    axes.invert_yaxis()
    return _png(figure)


def frontier(rows: Sequence[dict[str, Any]], settings: Evaluation) -> bytes:
    """The table ``frontier``: held-out accuracy against what general text costs, for each scale of the adapter."""
    figure, axes = _axes("Perplexity of general text, as a multiple of the base's", "Held-out accuracy")
    rows = [row for row in rows if math.isfinite(row["ratio"])]
    ratios = [row["ratio"] for row in rows]
    values = [row["value"] or 0.0 for row in rows]
    axes.plot(ratios, values, color=_COLORS[0], alpha=0.5)
    for row, ratio, value in zip(rows, ratios, values, strict=True):
        color = _KEPT if row["chosen"] else _COLORS[0]
        if row["value"] is not None:
            axes.vlines(ratio, row["low"], row["high"], color=color, alpha=0.5)
        axes.plot(ratio, value, "D" if row["chosen"] else "o", color=color, markersize=8)
        axes.annotate(f"{row['scale']:g}", (ratio, value), (6, 6), textcoords="offset points", color=_TEXT)
    axes.axvline(settings.keeps_general_text, color=_TEXT, linestyle="--")
    low, high = _span(min([1.0, *ratios]), max([settings.keeps_general_text, *ratios]))
    _log_axis(axes.xaxis, low, high)
    axes.set_ylim(0, 1.05)
    axes.set_title("Scale of the adapter; the diamond is what is exported", color=_TEXT, fontsize=10)
    return _png(figure)


def comparison(rows: Sequence[dict[str, Any]]) -> bytes:
    """The table ``comparison``: each arm's accuracy with its 95 % interval, and a dot for every training; and its
    difference from `random` with its corrected interval."""
    figure = Figure(figsize=(9, 1.2 + 0.42 * len(rows)), layout="constrained")
    axes, beside = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _dress(axes, "Held-out accuracy, 95 %", "")
    _dress(beside, "Minus random, corrected (Holm)", "").tick_params(labelleft=False)
    beside.axvline(0, color=_TEXT, linestyle="--", linewidth=1)
    for place, row in enumerate(rows):
        color = _TEXT if row["pairs"] is None else _COLORS[0]
        axes.hlines(place, row["low"], row["high"], color=color, linewidth=2)
        axes.plot(row["value"], place, "D", color=color, markersize=7)
        if row["runs"] > 1:
            axes.plot(row["by_run"], [place] * row["runs"], "o", color=_COLORS[1], markersize=4, alpha=0.8)
        end = (row["high"], place)
        axes.annotate(f"{row['value']:.3f}", end, (6, 0), textcoords="offset points", va="center", color=_TEXT)
        if row["vs_random"] is not None:
            beside.hlines(place, row["vs_random_low"], row["vs_random_high"], color=color, linewidth=2)
            beside.plot(row["vs_random"], place, "D", color=color, markersize=7)
    axes.set_yticks(range(len(rows)), [row["arm"].replace("_", " ") for row in rows])
    axes.set_xlim(0, 1.1)
    axes.invert_yaxis()
    return _png(figure)


def perplexity_histograms(pairs: pl.DataFrame, rule: str, threshold: float) -> bytes:
    """How sure each model is of its own response (paper, figure 3), with the cut where it is one of them."""
    figure, axes = _axes("Perplexity of the model's own response", "Share of pairs")
    columns = {"fine-tuned model": "ppl_fine_tuned", "base model": "ppl_base"}
    if pairs.is_empty():
        return _nothing(figure, axes)
    values = np.concatenate([pairs[column].to_numpy() for column in columns.values()])
    # The last percent would stretch the axis over bars that nobody can see; it goes into the last bar.
    low, high = _span(values.min(), np.quantile(values, 0.99), *([threshold] if rule == "both" else []))
    bins = np.geomspace(low, high, min(40, 6 + int(2 * len(pairs) ** 0.5)) + 1)
    for (name, column), color in zip(columns.items(), _COLORS, strict=False):
        shown = np.clip(pairs[column].to_numpy(), low, high)
        axes.hist(shown, bins, weights=np.full(len(shown), 1 / len(shown)), color=color, alpha=0.55, label=name)
    _log_axis(axes.xaxis, low, high)
    if rule == "both":
        axes.axvline(threshold, color=_TEXT, linestyle="--", label=f"cut at {threshold:g}")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    _legend_beside(axes)
    return _png(figure)


def perplexity_scatter(pairs: pl.DataFrame, rule: Rule, threshold: float) -> bytes:
    """The fine-tuned model's perplexity against the base's, kept and dropped (paper, figure 4), with the cut."""
    cross = "ppl_base_cross" in MARGIN[rule]
    whose = "fine-tuned" if cross else "own"
    figure, axes = _axes("PPL of the fine-tuned model", f"PPL of the base model,\n{whose} response", (7, 4.2))
    if pairs.is_empty():
        return _nothing(figure, axes)
    x, y = pairs["ppl_fine_tuned"].to_numpy(), pairs["ppl_base_cross" if cross else "ppl_base"].to_numpy()
    kept = pairs["kept"].to_numpy()
    # Two shapes as well as two colours, for eyes that don't tell green from orange.
    size = 22 if len(x) < 500 else 10
    for name, of, color, shape, width in (("dropped", ~kept, _DROPPED, "x", 1), ("kept", kept, _KEPT, "o", 0)):
        label = f"{name} ({of.mean():.0%})"
        axes.scatter(x[of], y[of], size, color, shape, alpha=0.8, linewidths=width, label=label)
    both = [threshold] if rule == "both" else []
    x_low, x_high = _span(*x, *both)
    y_low, y_high = _span(*y, *both)
    if rule == "both":
        axes.axvline(threshold, color=_TEXT, linestyle="--", label=f"cut at {threshold:g}")
        axes.axhline(threshold, color=_TEXT, linestyle="--")
    elif rule in _CUT:
        line = np.geomspace(x_low, x_high, 200)
        cut = _CUT[rule](line, threshold)
        axes.plot(line, cut, color=_TEXT, linestyle="--", label=f"cut at {rule.replace('_', ' ')} {threshold:g}")
    _log_axis(axes.xaxis, x_low, x_high)
    _log_axis(axes.yaxis, y_low, y_high)
    _legend_beside(axes)
    return _png(figure)


def kept_by_threshold(cells: Sequence[dict[str, Any]]) -> bytes:
    """Pairs that each rule with a threshold keeps (left axis), and their distinct responses (right), a panel a rule."""
    cells = [cell for cell in cells if cell["rule"] in _RULE_AXIS]
    rules = list(dict.fromkeys(cell["rule"] for cell in cells))
    if not rules:
        return _nothing(*_axes("", ""))
    columns = min(2, len(rules))
    figure = Figure(figsize=(5 * columns, 3.2 * -(-len(rules) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(rules) // columns), columns, squeeze=False, gridspec_kw={"wspace": 0.08})
    tops = [1.1 * max(1, *(cell[key] for cell in cells)) for key in ("pairs_kept", "distinct_responses")]
    handles: dict[str, Any] = {}
    for rule, left in zip(rules, panels.flat, strict=False):
        mine = [cell for cell in cells if cell["rule"] == rule]
        thresholds = [cell["threshold"] for cell in mine]
        _dress(left, _RULE_AXIS[rule], "Pairs kept")
        left.set_title(rule.replace("_", " "), color=_TEXT, loc="left", fontsize=11)
        right = _dress(left.twinx(), "", "Distinct responses", sides=("right",))
        (handles["pairs kept"],) = left.plot(thresholds, [c["pairs_kept"] for c in mine], "o-", color=_KEPT, ms=4)
        distinct = [c["distinct_responses"] for c in mine]
        (handles["distinct responses"],) = right.plot(thresholds, distinct, "s:", color=_COLORS[0], ms=3)
        for cell in mine:
            if cell["current"]:
                left.axvline(cell["threshold"], color=_TEXT, linestyle="--", zorder=1)
                (handles["current"],) = left.plot(cell["threshold"], cell["pairs_kept"], "*", color=_DROPPED, ms=14)
        _log_axis(left.xaxis, *_span(*thresholds))
        for axes, color, top in zip((left, right), (_KEPT, _COLORS[0]), tops, strict=True):
            axes.set_ylim(0, top)
            axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.tick_params(axis="y", colors=color)
            axes.yaxis.label.set_color(color)
    for panel in panels.flat[len(rules) :]:
        panel.set_visible(False)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=3, frameon=False, labelcolor=_TEXT)
    return _png(figure)


def precision_recall(pools: Sequence[dict[str, Any]]) -> bytes:
    """What `truth.sweep_truth` found: a panel a pool, a line a rule, a point a threshold; the dashed line is the share
    of right responses in the pool, the precision of a rule that knows nothing."""
    columns = min(3, len(pools))
    figure = Figure(figsize=(3.4 * columns, 3.4 * -(-len(pools) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(pools) // columns), columns, squeeze=False, sharex=True, sharey=True)
    colors: dict[str, str] = dict(zip(RULES, _COLORS, strict=False))
    handles: dict[str, Any] = {}
    for pool, axes in zip(pools, panels.flat, strict=False):
        _dress(axes, "Recall", "Precision").set(xlim=(0, 1.04), ylim=(0, 1.04))
        axes.set_title(f"{pool['off_skill']:.0%} off the skill", color=_TEXT, loc="left", fontsize=11)
        total = sum(pool[label] for label in ("right", "wrong", "off"))
        handles["knows nothing"] = axes.axhline(pool["right"] / total, color=_TEXT, linestyle="--", linewidth=1)
        for rule in dict.fromkeys(cell["rule"] for cell in pool["cells"]):
            mine = [c for c in pool["cells"] if c["rule"] == rule and c["precision"] is not None]
            points = [c["recall"] or 0 for c in mine], [c["precision"] for c in mine]
            (handles[rule.replace("_", " ")],) = axes.plot(
                *points, "o-", color=colors.get(rule, _TEXT), ms=3, linewidth=1
            )
    for panel in panels.flat[len(pools) :]:
        panel.set_visible(False)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=4, frameon=False, labelcolor=_TEXT)
    return _png(figure)


def acceptance_by_round(verdicts: Sequence[dict[str, Any]]) -> bytes:
    """Pairs of each round, kept or dropped by reason."""
    figure, axes = _axes("", "Scored pairs")
    if not verdicts:
        return _nothing(figure, axes)
    rounds = sorted({row["round"] for row in verdicts})
    pairs = {(row["round"], row["reason"]): row["pairs"] for row in verdicts}
    layers: dict[str, tuple[str, Sequence[int]]] = {}
    for reason in [*_VERDICTS, *sorted({row["reason"] for row in verdicts} - set(_VERDICTS))]:
        label = reason.replace("fine_tuned", "fine-tuned").replace("_", " ")
        layers[label] = (_VERDICTS.get(reason, _TEXT), [pairs.get((round_, reason), 0) for round_ in rounds])
    word = "\nkept" if len(rounds) <= 10 else ""
    _stack(axes, 0.7, layers, word)
    axes.set_xticks(range(len(rounds)), [round_.replace("_", " ") for round_ in rounds])
    if len(rounds) > 5:
        axes.set_xticks(range(len(rounds)), [round_.removeprefix("round_") for round_ in rounds])
        axes.set_xlabel("Round", color=_TEXT)
    _legend_beside(axes)
    return _png(figure)


def response_lengths(buckets: Sequence[dict[str, Any]]) -> bytes:
    """Pairs by length of the fine-tuned response, and the share that is kept of each length."""
    figure, axes = _axes("Fine-tuned response (tokens)", "Scored pairs")
    if not buckets:
        return _nothing(figure, axes)
    colors = {"kept": _KEPT, "dropped": _DROPPED}
    _stack(axes, 0.8, {name: (color, [row[name] for row in buckets]) for name, color in colors.items()})
    names = [f"{row['low']}" if row["low"] == row["high"] else f"{row['low']}–{row['high']}" for row in buckets]
    crowded = sum(map(len, names)) > 40
    axes.set_xticks(range(len(buckets)), names, rotation=45 if crowded else 0, ha="right" if crowded else "center")
    _legend_beside(axes, "share kept\nabove the bar")
    return _png(figure)


def diversity_map(points: pl.DataFrame) -> bytes:
    """Prompts as points near others of like meaning, coloured by round (paper, figure 2); seeds (NULL) are stars."""
    figure, axes = _axes("", "", (7.5, 5), sides=())
    axes.set(xticks=[], yticks=[])
    if points.is_empty():
        return _nothing(figure, axes)
    rounds = points["round"].drop_nulls().unique().sort().to_list()
    size = 30 if len(points) < 500 else 14
    for number, round_ in enumerate(rounds):
        color = _round_color(number, len(rounds))
        mine = points.filter(pl.col("round") == round_)
        for kept, face, alpha, order in ((False, "none", 0.8, 2), (True, color, 0.9, 3)):
            part, look = mine.filter(pl.col("kept") == kept), {"facecolors": face, "edgecolors": color}
            axes.scatter(part["x"], part["y"], size, **look, linewidths=0.8, alpha=alpha, zorder=order)
        # With many rounds the legend names some of them: the colours run in order.
        if number % -(-len(rounds) // 10) == 0 or number == len(rounds) - 1:
            axes.scatter([], [], 40, color=color, label=round_.replace("_", " "))
    axes.scatter([], [], 40, facecolors=_TEXT, edgecolors=_TEXT, label="kept")
    axes.scatter([], [], 40, facecolors="none", edgecolors=_TEXT, label="dropped")
    seeds = points.filter(pl.col("round").is_null())
    axes.scatter(seeds["x"], seeds["y"], 260, "#e5484d", "*", edgecolors="white", linewidths=0.8, zorder=4)
    axes.scatter([], [], 90, "#e5484d", "*", label="seed")
    _legend_beside(axes)
    return _png(figure)


def _round_color(number: int, count: int) -> Any:
    if count <= len(_COLORS):
        return _COLORS[number]
    # Hues from blue over green to orange at one lightness: a colormap's ends vanish on white or on black.
    return colorsys.hls_to_rgb(0.62 - 0.55 * number / (count - 1), 0.48, 0.7)


def _stack(axes: Any, width: float, layers: dict[str, tuple[str, Sequence[int]]], word: str = "") -> None:
    """Bars of layers (colour and heights, by label) on one another, with the share of ``kept`` above each bar."""
    heights = np.array([layer for _, layer in layers.values()])
    for (label, (color, layer)), floor in zip(layers.items(), heights.cumsum(axis=0) - heights, strict=True):
        if any(layer):
            axes.bar(range(len(layer)), layer, width, floor, color=color, alpha=0.85, label=label)
    tops, style = heights.sum(axis=0), {"ha": "center", "va": "bottom", "color": _TEXT, "fontsize": 9}
    for place, (kept, top) in enumerate(zip(layers["kept"][1], tops, strict=True)):
        axes.annotate(f"{kept / max(1, top):.0%}{word}", (place, top), (0, 3), textcoords="offset points", **style)
    axes.set_ylim(0, max(tops) * 1.2)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="x", visible=False)


def _span(*values: float) -> tuple[float, float]:
    """The ends of a logarithmic axis, a little beyond the values."""
    low, high = float(min(values)), float(max(values))
    margin = max((high / low) ** 0.04, 1.002)
    return low / margin, high * margin


def _log_axis(axis: Any, low: float, high: float) -> None:
    """A logarithmic axis with plain numbers at readable places: Matplotlib's own write 2 × 10⁰ below 10."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    few, some = high / low > 1000, high / low > 20
    leading = (1,) if few else (1, 2, 5) if some else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7)
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    ticks = [round(lead * 10.0**decade, 12) for decade in decades for lead in leading]
    ticks = [tick for tick in ticks if low <= tick <= high]
    if len(ticks) < 3:
        ticks = [tick for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if value < 1e6 else f"{value:.0e}"))


def _nothing(figure: Figure, axes: Any) -> bytes:
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, "No scored pairs yet", transform=axes.transAxes, ha="center", va="center", color=_TEXT)
    return _png(figure)


def _axes(x: str, y: str, size: tuple[float, float] = (6.4, 3.2), sides: Sequence[str] = _SIDES) -> tuple[Figure, Any]:
    figure = Figure(figsize=size)
    return figure, _dress(figure.add_subplot(), x, y, sides)


def _dress(axes: Any, x: str, y: str, sides: Sequence[str] = _SIDES) -> Any:
    axes.set_xlabel(x, color=_TEXT)
    axes.set_ylabel(y, color=_TEXT)
    axes.tick_params(colors=_TEXT, which="both")
    for side, spine in axes.spines.items():
        spine.set_visible(side in sides)
        spine.set_color(_TEXT)
    axes.set_axisbelow(True)
    if "bottom" in sides:
        axes.grid(alpha=0.25, color=_TEXT)
    return axes


def _legend_beside(axes: Any, title: str | None = None) -> None:
    legend = axes.legend(frameon=False, labelcolor=_TEXT, loc="upper left", bbox_to_anchor=(1.01, 1), title=title)
    legend.get_title().set_color(_TEXT)
