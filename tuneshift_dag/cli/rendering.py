"""What the command line prints: tables, trees and lines of the objects that reports return. Nothing is computed here.

Results go to `out` (standard output), progress and messages to `err` (standard error).
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from tuneshift_dag import visible

if TYPE_CHECKING:
    from tuneshift_dag.cli.doctor import Finding
    from tuneshift_dag.reports.lineage import Prompt


class _Console(Console):
    """Shows control characters of a text (a model's, a server's) as their numbers instead of obeying them."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


out = _Console()
err = _Console(stderr=True)
# What a run draws into its output folder, in the order to look at it.
_PICTURES = ("perplexity_scatter", "kept_by_threshold", "diversity_map", "training_curve", "accuracy", "frontier")


def as_json(found: Any) -> None:
    print(json.dumps(found, indent=2))


def message(kind: str, color: str, text: str, console: Console = err) -> None:
    """One line. A text may hold square brackets, such as a template's [/INST]."""
    console.print(f"[{color}]{kind}:[/{color}] ", end="")
    line(text, console)


def line(text: str, console: Console = err) -> None:
    """As it is: names of files and models' texts may hold square brackets."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def rows(title: str, found: Sequence[dict[str, Any]]) -> None:
    """A table with the columns of the first row."""
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(found[0] if found else ["nothing yet"]):
        table.add_column(column.replace("_", " "), no_wrap=not place, overflow="fold")
    for row in found:
        table.add_row(*(Text(f"{v:.3f}" if isinstance(v, float) else str(v)) for v in row.values()))
    out.print(table)


def commands(*lines: tuple[str, str]) -> None:
    """What to type next, and why."""
    for command, why in lines:
        err.print(f"  {command:40} {why}", highlight=False)


def outlook(name: str, pending: list[tuple[str, str | None]], seconds: dict[str, float], steps: Sequence[str]) -> None:
    """What a run will do, and how long it takes: speeds of ``steps`` are recorded, and ``seconds`` go by these."""
    rounds = sorted({round_ for _, round_ in pending if round_})
    told = f"{len(pending)} steps to do"
    told += f", {len(rounds)} rounds ({rounds[0]} to {rounds[-1]})" if rounds else ""
    due = {asset for asset, _ in pending}
    unknown = [step for step in steps if step in due and step not in seconds]
    if seconds:
        total = sum(seconds.values())
        most = f"{total:.0f} s" if total < 90 else f"{total / 60:.0f} min" if total < 5400 else f"{total / 3600:.1f} h"
        speed = f"at most {most} at recorded speeds, less what the cache has"
        speed += f"; without {', '.join(unknown)}: no recorded speed yet" if unknown else ""
    else:
        speed = "no recorded speed yet" if unknown else "no model runs"
    err.print(f"[bold]{name}[/bold]: {told}; {speed}.", highlight=False, soft_wrap=True)


def after_run(name: str, output: Path) -> None:
    """What to look at after a run: its pictures, and the commands that go on."""
    pictures = [f"  {file}" for file in (output / f"{name}.png" for name in _PICTURES) if file.is_file()]
    if pictures:
        line("\n".join(["Pictures:", *pictures]))
    err.print("Next:")
    commands(
        (f"tuneshift report {name}", "these figures again"),
        (f"tuneshift sweep {name}", "what other rules and thresholds would keep"),
        (f"tuneshift export {name} --to out/", "the adapter and the dataset, with their cards"),
        ("make ui", "the graph in Dagster's UI"),
    )


def report(figures: dict[str, Any]) -> None:
    from tuneshift_dag.method.evaluation import TITLES
    from tuneshift_dag.reports import by_column, by_way, scales

    out.print(
        f"[bold]{figures['transfer']}[/bold]: {figures['rounds']} rounds, {figures['prompts']} prompts,"
        f" {figures['pairs_scored']} pairs scored, {figures['pairs_kept']} kept with"
        f" {figures['distinct_responses_kept']} distinct responses"
    )
    rows("Rounds", figures["by_round"])
    columns = ("model", "value", "low", "high", "n")
    shown = [{column: row[column] for column in columns} for row in by_way(figures["accuracy"])]
    rows(f"Held-out {TITLES[figures['metric']]}, 95 % interval", shown)
    if figures["retention"]:
        retained = [{"model": name, **row} for name, row in figures["retention"].items()]
        rows("General text, before and after the distillation", retained)
    if figures["frontier"]:
        rows("Skill and general text by scale of the adapter", scales(figures["frontier"]))
    if figures["tasks"]:
        rows("Standard tasks, ± standard error", by_column(figures["tasks"], "model", _with_error))
    rows("Cost of the last run", [{"asset": asset, "seconds": value} for asset, value in figures["seconds"].items()])
    out.print(
        f"Last run: {figures['model_calls']} model calls for the dataset,"
        f" {figures['evaluation_calls']} for the evaluation; {figures['cache_hits']} answers from the cache."
    )
    if figures["out_of_date"]:
        told = f"{', '.join(figures['out_of_date'])}: made before transfer.yaml or its files changed."
        message("out of date", "yellow", f"{told} `tuneshift run {figures['transfer']}` makes it anew.", out)
    for verdict in figures["verdicts"]:
        message(*(("ok", "green") if verdict["passed"] else ("look", "yellow")), verdict["words"], out)


def _with_error(score: dict[str, Any]) -> str:
    return f"{score['value']:.3f}" + ("" if score["stderr"] is None else f" ± {score['stderr']:.3f}")


def plan(made: dict[str, Any]) -> None:
    rows_of = ", ".join(f"{step['rows']:,} {name}" for name, step in made["steps"].items())
    out.print(
        f"[bold]{made['transfer']}[/bold]: {made['rounds']} rounds from nothing; rows of each step ({made['counts']}):"
        f" {rows_of}. This machine has {made['memory_bytes'] / 1e9:.1f} GB, of which a run can plan with"
        f" {made['usable_bytes'] / 1e9:.1f} GB.",
        highlight=False,
    )

    def number(value: float | None, text: str = "{:,.1f}", scale: float = 1) -> str:
        return "-" if value is None else text.format(value / scale)

    shown = []
    for name, step in made["steps"].items():
        memory = {key: number(step[key], "{:.1f} GB", 1e9) for key in ("memory_bytes", "recorded_peak_bytes")}
        row = {"step": name, "memory": memory["memory_bytes"], "recorded peak": memory["recorded_peak_bytes"]}
        row |= {"seconds": number(step["seconds"]), "rows/s": "-", "speed of": "-"}
        if (speed := step["speed"]) is not None:
            models = ", ".join(model.rpartition("/")[2] for model in (speed["models"] or "unknown").split(", "))
            row["rows/s"] = f"{1 / speed['seconds_per_row']:,.1f}"
            row["speed of"] = f"{models} ({speed['engine'] or 'unknown'}), {speed['recorded_at'][:10]}"
        shown.append(row)
    shown.append({**dict.fromkeys(shown[0], ""), "step": "total", "seconds": number(made["total_seconds"])})
    rows("Seconds at the speeds recorded here", shown)
    for warning in made["warnings"]:
        message("warning", "yellow", warning, out)


def sweep(cells: list[dict[str, Any]]) -> None:
    table = Table(title="Pairs kept; * is the current filter", title_justify="left")
    table.add_column("rule", no_wrap=True)
    # In a narrow window rounds are left out rather than every number cut; --json has them.
    rounds = [round_ for round_ in cells[0]["by_round"] if out.width >= 75 + 8 * len(cells[0]["by_round"])]
    for column in ("threshold", "kept", "share", "distinct responses", "mean margin", *rounds):
        table.add_column(column.replace("_", " "), justify="right", no_wrap=column in ("threshold", "kept", "share"))
    for place, cell in enumerate(cells):
        if place and cell["rule"] != cells[place - 1]["rule"]:
            table.add_section()
        margin = cell["mean_margin"]
        table.add_row(
            cell["rule"],
            f"{'* ' if cell['current'] else ''}{cell['threshold']:g}",
            str(cell["pairs_kept"]),
            f"{cell['kept_share']:.1%}",
            str(cell["distinct_responses"]),
            "-" if margin is None else f"{margin:.4g}",
            *(str(cell["by_round"][round_]) for round_ in rounds),
            style="bold" if cell["current"] else None,
        )
    out.print(table)


def truth(found: dict[str, Any]) -> None:
    """What `reports.truth.sweep_truth` found, pools beside one another."""
    pools = found["pools"]
    names = [f"{pool['off_skill']:.0%} off" for pool in pools]
    counts = [
        {"off the skill": name} | {c: pool[c] for c in ("right", "wrong", "off")}
        for name, pool in zip(names, pools, strict=True)
    ]
    rows("Pairs with a truth: all of them, then those drawn", counts)

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    def told(rule: dict[str, Any]) -> str:
        return number(rule["auc"]) + ("" if rule["auc"] is None else f" ({rule['low']:.3f} to {rule['high']:.3f})")

    aucs = [
        {"rule": of[0]["rule"] + ("" if of[0]["threshold"] is None else f", {of[0]['threshold']:g}")}
        | {f"{place}. {name}": told(rule) for place, (name, rule) in enumerate(zip(names, of, strict=True), 1)}
        for of in zip(*(pool["rules"] for pool in pools), strict=True)
    ]
    rows("AUC (95 % interval): right responses of the skill against all others", aucs)
    title = "Precision and recall of right responses of the skill, by share off the skill; * is the current filter"
    table = Table("rule", "threshold", *(f"{name}\nprec. recall" for name in names), title=title, title_justify="left")
    for of in zip(*(pool["cells"] for pool in pools), strict=True):
        values = (f"{number(cell['precision']):5} {number(cell['recall'])}" for cell in of)
        threshold = f"{'* ' if of[0]['current'] else ''}{of[0]['threshold']:g}"
        table.add_row(of[0]["rule"], threshold, *values, style="bold" if of[0]["current"] else None)
    out.print(table)
    left = {"scored pairs have no truth in the file": found["pairs_without_truth"]}
    left |= {"prompts of the file aren't scored pairs": found["prompts_not_scored"]}
    for what, count in left.items():
        if count:
            message("note", "yellow", f"{count} {what}; they count nowhere.")


def comparison(found: list[dict[str, Any]]) -> None:
    from tuneshift_dag import reports as summary

    title = "Held-out accuracy by filter, 95 % intervals; those of differences corrected over the arms (Holm)"
    rows(title, summary.arms(found))
    varied = summary.diversity(found)
    rows("Diversity of the training pairs, and general text (times the base's perplexity)", varied)
    if varied and "similarity" not in varied[0]:
        err.print("Without similarity: the sentence encoder isn't installed (the extra `encoder`).", soft_wrap=True)
    tasks = summary.arm_tasks(found)
    if tasks:
        rows("Standard tasks, mean over trainings (lowest to highest)", tasks)
    out.print(summary.conclusion(found), soft_wrap=True)


def lineage(prompt: "Prompt") -> Tree:
    """A prompt with its calls, and their prompts."""
    tree = Tree(prompt_line(prompt))
    for call in prompt.calls:
        line = Text(f"generator call {call.number} of {call.round}", "bold")
        line.append(f" (new prompts: {call.written}, dropped: {call.dropped})", "not bold")
        tree.add(_and_elsewhere(line, call.repeated)).children += map(lineage, call.prompts)
    return tree


def prompt_line(prompt: "Prompt") -> Text:
    """One line of a lineage tree; prompts and responses are data and never markup."""
    place = "seed set" if prompt.fate == "seed" else f"{prompt.round or 'a former round'}, {prompt.fate}"
    place += f": {prompt.reason}" if prompt.reason else ""
    place += ", trained on" if prompt.trained_on else ""
    line = Text.assemble((prompt.prompt_id, "dim"), " ", prompt.prompt or "(text no longer stored)")
    line.append(f" [{place}]", "cyan")
    if prompt.response is not None:
        line.append(f" → {prompt.response.strip()}", "green")
    return _and_elsewhere(line, prompt.repeated)


def _and_elsewhere(line: Text, repeated: bool) -> Text:
    return line.append(" (continued elsewhere in this tree)", "dim") if repeated else line


def finding(found: "Finding") -> None:
    mark = {True: "[green]ok[/green]  ", None: "[yellow]note[/yellow]", False: "[red]fix[/red] "}[found.ok]
    out.print(f"{mark} ", end="")
    out.print(f"{found.what}: {found.detail}", markup=False, soft_wrap=True)
