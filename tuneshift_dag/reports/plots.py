"""Pictures, readable on a light and on a dark page: mid-tone colours on a transparent ground."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg
from matplotlib.figure import Figure

_TEXT = "#7d8590"
_COLORS = ["#4493f8", "#e0823d", "#3fb950", "#ab7df8", "#db61a2", "#c69026"]


class Picture:
    """A PNG."""

    def __init__(self, figure: Figure) -> None:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, transparent=True, bbox_inches="tight")
        self.png = buffer.getvalue()

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.png)

    def markdown(self) -> dg.MetadataValue:
        """Dagster metadata that shows the picture in the UI."""
        return dg.MetadataValue.md(f"![](data:image/png;base64,{base64.b64encode(self.png).decode()})")


def training_curve(curve: dict[str, Any]) -> Picture:
    """Loss by step, with the epoch's validation loss where there is one."""
    figure, axes = _axes("Step", "Loss (nats per response token)")
    steps = [row["step"] for row in curve["steps"]]
    axes.plot(steps, [row["loss"] for row in curve["steps"]], color=_COLORS[0], alpha=0.6, label="training")
    per_epoch = len(steps) / max(1, len(curve["epochs"]))
    ends = [row["epoch"] * per_epoch for row in curve["epochs"]]
    axes.plot(ends, [row["validation_loss"] for row in curve["epochs"]], "o-", color=_COLORS[1], label="validation")
    axes.set_yscale("log")
    _legend(axes)
    return Picture(figure)


def accuracy_bars(rows: Sequence[dict[str, Any]]) -> Picture:
    """Held-out accuracy of each model with its 95 % interval."""
    figure, axes = _axes("Held-out exact match", "")
    names = [row["model"].replace("_", " ") for row in rows]
    values = [row["value"] for row in rows]
    errors = [[r["value"] - r["low"] for r in rows], [r["high"] - r["value"] for r in rows]]
    axes.barh(names, values, xerr=errors, color=_COLORS[: len(rows)], ecolor=_TEXT, capsize=4)
    for place, row in enumerate(rows):
        axes.text(row["high"] + 0.02, place, f"{row['value']:.2f}", va="center", color=_TEXT)
    axes.set_xlim(0, 1.1)
    axes.invert_yaxis()
    return Picture(figure)


def _axes(x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6.4, 3.2))
    axes = figure.add_subplot()
    axes.set_xlabel(x, color=_TEXT)
    axes.set_ylabel(y, color=_TEXT)
    axes.tick_params(colors=_TEXT, which="both")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_TEXT)
    axes.grid(alpha=0.25, color=_TEXT)
    return figure, axes


def _legend(axes: Any) -> None:
    axes.legend(frameon=False, labelcolor=_TEXT)
