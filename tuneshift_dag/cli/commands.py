"""The command line: ``tuneshift new | plan | run | report | sweep | compare | lineage | export | doctor``.

Results go to standard output, progress and messages to standard error.
"""

import json
import logging
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from tuneshift_dag.config.transfer import Mode
from tuneshift_dag.errors import TuneshiftError
from tuneshift_dag.home import database_file, transfers_dir, use_dagster_home
from tuneshift_dag.method.filters import KEEP_RULES, RULES

if TYPE_CHECKING:
    from tuneshift_dag.reports.lineage import Prompt

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Move a fine-tuned skill from one base model to another with five example prompts.",
)
_out = Console()
_err = Console(stderr=True)

TransferName = Annotated[str, typer.Argument(help="Name of a folder under transfers/, or a path to one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Name of the folder to make under transfers/.")],
    adapter: Annotated[str, typer.Option(help="Your PEFT LoRA adapter: a folder, or a hub id.")] = "",
    base: Annotated[
        str, typer.Option(help="Base model of the adapter. Without it, the one that adapter_config.json names.")
    ] = "",
    target: Annotated[str, typer.Option(help="Base model that shall learn the skill.")] = "",
    template: Annotated[
        str, typer.Option(help="Text around a prompt in the adapter's training, with {prompt}; \\n is a new line.")
    ] = "",
    seeds: Annotated[
        str, typer.Option(help="Example prompts: .jsonl, .csv with a column `prompt`, or .txt with one a line.")
    ] = "",
    heldout: Annotated[
        str, typer.Option(help="Labelled examples to measure with: .jsonl, or .csv with `prompt` and `response`.")
    ] = "",
    generator: Annotated[str, typer.Option(help="Model that writes prompts. Without it, the target.")] = "",
    mode: Annotated[
        Mode, typer.Option(help="The generator's mode, see `generator.mode`: a base model needs another than chat.")
    ] = "chat",
    instruction: Annotated[str, typer.Option(help="What the generator is told, see `generator.instruction`.")] = "",
    description: Annotated[str, typer.Option(help="One line for people.")] = "",
    copy_adapter: Annotated[bool, typer.Option(help="Copy a local adapter, or name it where it is.")] = True,
) -> None:
    """Make a transfer folder; in a terminal, ask for what no option says.

    Models and files are given as seen from the working folder. Nothing is overwritten, and a folder appears
    only when everything in it is sound.
    """
    from tuneshift_dag.cli import scaffold

    answers = scaffold.Answers(
        adapter, base, target, template, seeds, heldout, generator, mode, instruction, description, copy_adapter
    )
    scaffold.check_name(transfers_dir(), name)
    if scaffold.missing(answers) and sys.stdin.isatty():
        answers = scaffold.ask_for_the_rest(answers)
    made = scaffold.create(transfers_dir(), name, answers)
    _out.print(str(made.folder), soft_wrap=True, highlight=False)
    heldout_note = f"{len(made.heldout)} held-out pairs" if made.heldout else "no held-out file, so no evaluation"
    _err.print(f"{len(made.seeds)} seeds, {heldout_note}. Next:", highlight=False)
    for command, why in (
        (f"tuneshift doctor {name}", "is the adapter applied?"),
        (f"tuneshift run {name}", "prompts, pairs, the new adapter"),
        ("make ui", "the same in Dagster's UI"),
    ):
        _err.print(f"  {command:40} {why}", highlight=False)


@app.command()
def plan(
    transfer: TransferName,
    gpu: Annotated[
        str,
        typer.Option(help="h200, h100, a100, l40s, a10, l4, cpu. Without it, machines like this at recorded speeds."),
    ] = "",
    gpus: Annotated[list[int], typer.Option(min=1, help="How many GPUs; may be repeated.")] = [1, 8, 64],  # noqa: B006
    price: Annotated[float | None, typer.Option(min=0, help="Price of one GPU for one hour, in any currency.")] = None,
    source_parameters: Annotated[
        str, typer.Option(help="Size of the source base model, such as 8B, when its files aren't on this machine.")
    ] = "",
    target_parameters: Annotated[str, typer.Option(help="The same of the target.")] = "",
    generator_parameters: Annotated[str, typer.Option(help="The same of the generator.")] = "",
    as_json: AsJson = False,
) -> None:
    """Estimate a run's time, memory, cost and bottleneck on a number of GPUs; loads no model and changes nothing.

    Speeds are those of this transfer's last run on this machine or, with --gpu, a roofline: what the GPU's data sheet
    allows, times the fraction of it that was measured on a CPU. See docs/scaling.md.
    """
    from tuneshift_dag.reports import plan as plans
    from tuneshift_dag.store.database import Store

    texts = {"source": source_parameters, "target": target_parameters, "generator": generator_parameters}
    given = {name: plans.parameters(text, f"--{name}-parameters") for name, text in texts.items() if text}
    made = plans.plan(Store(database_file()), _load(transfer), gpu, gpus, price, given)
    if as_json:
        print(json.dumps(made, indent=2))
        return
    _out.print(_plan_heading(made), highlight=False)
    _out.print(_plan_table(made))
    if made["recorded_speeds"]:
        _out.print(_speeds_table(made))
    for one in made["plans"]:
        _out.print(f"Bottleneck of {one['gpus']}: {one['bottleneck']}.", highlight=False)
    for warning in made["warnings"]:
        _out.print(f"[yellow]warning:[/yellow] {warning}", highlight=False)


@app.command()
def run(
    transfer: TransferName,
    regrow: Annotated[
        bool, typer.Option(help="Also grow rounds anew that are out of date only because their seeds changed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Materialize what is missing or out of date, round by round, then train and evaluate.

    Runs are recorded in Dagster's instance, so the UI shows them. After a change of the threshold, rounds
    keep their prompts even if their seeds changed; they are named, and --regrow grows them anew.
    """
    from tuneshift_dag.reports.plan import run_warnings
    from tuneshift_dag.reports.summary import report as make_report
    from tuneshift_dag.store.database import Store

    loaded = _load(transfer)
    instance = _instance()
    from tuneshift_dag.runner import Runner

    _quiet()

    def announce(asset: str, round_: str | None) -> None:
        _err.print(f"[bold]{asset}[/bold] {round_ or ''}")

    store = Store(database_file())
    store.prepare(loaded.name)
    for warning in run_warnings(loaded):
        _err.print(f"[yellow]warning:[/yellow] {warning}", highlight=False)
    result = Runner(loaded, instance, on_step=announce).run(regrow)
    if not result.materialized:
        _err.print("Everything is up to date.")
    if result.kept_rounds:
        _err.print(
            f"Kept the prompts of {', '.join(result.kept_rounds)}, whose seeds changed with the filter;"
            " run again with --regrow to grow them anew."
        )
    figures = make_report(store, loaded)
    _show(figures, as_json)


@app.command()
def report(transfer: TransferName, as_json: AsJson = False) -> None:
    """Figures of a transfer: rounds, pairs, costs of the last run, held-out accuracy, what the target forgot."""
    from tuneshift_dag.reports.summary import report as make_report
    from tuneshift_dag.store.database import Store

    loaded = _load(transfer)
    _show(make_report(Store(database_file()), loaded), as_json)


@app.command()
def sweep(
    transfer: TransferName,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            "--rule",
            help=f"{', '.join(RULES[:-1])} or {RULES[-1]}; may be repeated."
            " Without it, all; with a grid, those that can take it.",
        ),
    ] = None,
    grid: Annotated[
        str,
        typer.Option(
            "--grid",
            help=f"1.1,1.2,1.5 or start:stop:step, of {', '.join(KEEP_RULES[:-1])} and {KEEP_RULES[-1]} what to keep;"
            " without it, chosen.",
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list of cells and nothing else.")] = False,
) -> None:
    """Show what each filter rule would keep at each threshold; loads no model and changes nothing."""
    from tuneshift_dag.reports import sweep as sweeps
    from tuneshift_dag.store.database import Store

    loaded = _load(transfer)
    thresholds = sweeps.parse_grid(grid) if grid else []
    cells = sweeps.sweep(Store(database_file()), loaded, rule or [], thresholds)
    if as_json:
        print(json.dumps(cells, indent=2))
        return
    _out.print(_sweep_table(cells))
    if not rule and "ifd" not in {cell["rule"] for cell in cells}:
        _err.print("Without ifd: its perplexity is only scored when filter.rule in transfer.yaml is ifd.")
    if not any(cell["pairs_kept"] for cell in cells):
        _err.print(f"Nothing is kept. If there are no scored pairs yet: tuneshift run {loaded.name}")


@app.command()
def compare(
    transfer: TransferName,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list of arms and nothing else.")] = False,
) -> None:
    """Train models on what rival filters keep, equally many pairs each, and compare their held-out accuracy.

    Needs `compare:` in transfer.yaml and the scored pairs of `tuneshift run`. Trains arms × seeds models; what
    was trained before is not trained again, also after a killed run.
    """
    from tuneshift_dag.home import output_dir
    from tuneshift_dag.reports import summary
    from tuneshift_dag.store.database import Store

    loaded = _load(transfer)
    instance = _instance()
    from tuneshift_dag.runner import Runner

    _quiet()
    Runner(loaded, instance, on_step=lambda asset, _: _err.print(f"[bold]{asset}[/bold]")).compare()
    rows = summary.comparison(Store(database_file()), loaded)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    _print_comparison(rows)
    _err.print(f"Picture: {output_dir(loaded.name) / 'comparison.png'}", soft_wrap=True)


@app.command()
def lineage(
    transfer: TransferName,
    prompt_id: Annotated[str, typer.Argument(help="A prompt's id, the beginning of one, or the prompt's whole text.")],
    up: Annotated[
        bool, typer.Option("--up/--down", help="Back to the seeds it came from, or forward to all that it led to.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Show which generator calls and seeds a prompt came from, or which prompts it led to and their fate."""
    from tuneshift_dag.reports import lineage as trees
    from tuneshift_dag.store.database import Store

    loaded = _load(transfer)
    root = (trees.up if up else trees.down)(Store(database_file()), loaded, prompt_id)
    if as_json:
        direction = "up" if up else "down"
        print(json.dumps({"transfer": loaded.name, "direction": direction, "root": asdict(root)}, indent=2))
        return
    tree = Tree(_prompt_line(root))
    _add_calls(tree, root)
    _out.print(tree)


@app.command()
def export(
    transfer: TransferName,
    to: Annotated[Path, typer.Option("--to", help="Folder to write to; it is created.")],
) -> None:
    """Write the distilled adapter (PEFT) and the dataset (chat JSONL and Parquet), with their cards."""
    from tuneshift_dag.reports.export import export as write
    from tuneshift_dag.store.database import Store

    for path in write(Store(database_file()), _load(transfer), to):
        _out.print(str(path), soft_wrap=True)


cache_app = typer.Typer(help="The cache of model calls, shared by all transfers.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")


@cache_app.command("stats")
def cache_stats(as_json: AsJson = False) -> None:
    """What the cache holds, and how much of it no materialization uses any more."""
    from tuneshift_dag.store.database import Store
    from tuneshift_dag.store.upkeep import stats

    _show_rows("Cache (bytes before compression)", stats(Store(database_file())), as_json)


@cache_app.command("gc")
def cache_gc(as_json: AsJson = False) -> None:
    """Remove what no materialization uses (yet): don't run it while a step runs, or after one that you want to go on.

    The file keeps its size; DuckDB uses the space again.
    """
    from tuneshift_dag.store.database import Store
    from tuneshift_dag.store.upkeep import collect

    _show_rows("Removed: the unreferenced ones", collect(Store(database_file())), as_json)


@app.command()
def doctor(
    transfer: Annotated[str | None, typer.Argument(help="A transfer to check; without it, all of them.")] = None,
    models: Annotated[bool, typer.Option(help="Also load the source model and check the adapter.")] = True,
) -> None:
    """Check the environment, the transfer files and the preflight; say what to fix. Nothing is downloaded."""
    from tuneshift_dag.reports.doctor import examine

    ok = True
    for finding in examine(transfer, models):
        mark = {True: "[green]ok[/green]  ", None: "[yellow]note[/yellow]", False: "[red]fix[/red] "}[finding.ok]
        _out.print(f"{mark} {finding.what}: ", end="")
        _out.print(finding.detail, markup=False, soft_wrap=True)
        ok = ok and finding.ok is not False
    if not ok:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: a `TuneshiftError` becomes one message and exit status 1."""
    try:
        app()
    except TuneshiftError as error:
        _err.print("[red]error:[/red] ", end="")
        # A message may hold square brackets, such as a template's [/INST].
        _err.print(str(error), soft_wrap=True, markup=False, highlight=False)
        sys.exit(1)


def _load(name: str) -> Any:
    from tuneshift_dag.config.transfer import find_transfers, load_transfer

    folder = Path(name) if (Path(name) / "transfer.yaml").is_file() else transfers_dir() / name
    if not folder.is_dir():
        known = ", ".join(f.name for f in find_transfers(transfers_dir())) or "none"
        raise TuneshiftError(f"There is no transfer {name!r} in {transfers_dir()} (there: {known}).")
    return load_transfer(folder)


def _instance() -> Any:
    use_dagster_home()
    import dagster as dg

    return dg.DagsterInstance.get()


def _quiet() -> None:
    """Leave standard error to our own lines and Dagster's."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.WARNING)


def _show(figures: dict[str, Any], as_json: bool) -> None:
    from tuneshift_dag.method.evaluation import TITLES
    from tuneshift_dag.reports.summary import by_way

    if as_json:
        print(json.dumps(figures, indent=2))
        return
    _out.print(
        f"[bold]{figures['transfer']}[/bold]: {figures['rounds']} rounds, {figures['prompts']} prompts,"
        f" {figures['pairs_scored']} pairs scored, {figures['pairs_kept']} kept with"
        f" {figures['distinct_responses_kept']} distinct responses"
    )
    _out.print(_table("Rounds", figures["by_round"]))
    accuracy = [{"model": name, **row} for name, row in figures["accuracy"].items()]
    accuracy = [{column: row[column] for column in ("model", "value", "low", "high", "n")} for row in by_way(accuracy)]
    _out.print(_table(f"Held-out {TITLES[figures['metric']]}, 95 % interval", accuracy))
    if figures["retention"]:
        retained = [{"model": name, **row} for name, row in figures["retention"].items()]
        _out.print(_table("General text, before and after the distillation", retained))
    if figures["tasks"]:
        _out.print(_table("Standard tasks, ± standard error", _side_by_side(figures["tasks"])))
    cost = [{"asset": asset, "seconds": value} for asset, value in figures["seconds"].items()]
    _out.print(_table("Cost of the last run", cost))
    _out.print(
        f"Last run: {figures['model_calls']} model calls for the dataset,"
        f" {figures['evaluation_calls']} for the evaluation; {figures['cache_hits']} answers from the cache."
    )


def _side_by_side(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Scores of standard tasks with one column for each model."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for score in tasks:
        names = {column: score[column] for column in ("task", "metric", "filter", "n")}
        error = "" if score["stderr"] is None else f" ± {score['stderr']:.3f}"
        rows.setdefault(tuple(map(str, names.values())), names)[score["model"]] = f"{score['value']:.3f}{error}"
    return list(rows.values())


def _add_calls(tree: Tree, prompt: "Prompt") -> None:
    """Hang a prompt's calls, and their prompts, on its branch."""
    for call in prompt.calls:
        line = Text(f"generator call {call.number} of {call.round}", "bold")
        line.append(f" (new prompts: {call.written}, dropped: {call.dropped})", "not bold")
        branch = tree.add(_and_elsewhere(line, call.repeated))
        for child in call.prompts:
            _add_calls(branch.add(_prompt_line(child)), child)


def _prompt_line(prompt: "Prompt") -> Text:
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


def _sweep_table(cells: list[dict[str, Any]]) -> Table:
    table = Table(title="Pairs kept; * is the current filter", title_justify="left")
    table.add_column("rule", no_wrap=True)
    # In a narrow window rounds are left out rather than every number cut; --json has them.
    rounds = [round_ for round_ in cells[0]["by_round"] if _out.width >= 75 + 8 * len(cells[0]["by_round"])]
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
    return table


def _show_rows(title: str, rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        _out.print(_table(title, rows))


def _plan_heading(made: dict[str, Any]) -> str:
    if made["speeds"] == "roofline":
        speeds = f"Roofline of {made['gpu']}: an estimate, whose fractions of the limit were measured on a CPU."
    else:
        at = max(speed["recorded_at"] for speed in made["speeds"].values())
        speeds = f"At speeds recorded here, the last on {at} (UTC)."
    return (
        f"[bold]{made['transfer']}[/bold]: {made['rounds']} rounds, {made['generator_calls']} generator calls,"
        f" {made['pairs_scored']} pairs scored, {made['training_examples']} training examples in all epochs."
        f"\n{speeds} Lengths: {made['lengths']}."
    )


def _plan_table(made: dict[str, Any]) -> Table:
    plans = made["plans"]
    peaks = made["recorded_peak_bytes"]
    unit = "machine" if made["gpu"] in ("cpu", "this machine") else "GPU"
    table = Table(title="Seconds", title_justify="left")
    table.add_column("", no_wrap=True)
    for one in plans:
        table.add_column(f"{one['gpus']} {unit}{'s' if one['gpus'] > 1 else ''}", justify="right")
    for column in ("memory each", *(["recorded peak"] if peaks else [])):
        table.add_column(column, justify="right")
    for step in plans[0]["seconds"]:
        memory = [max(one["memory_bytes"][step] for one in plans), *([peaks[step]] if peaks else [])]
        seconds = (f"{one['seconds'][step]:,.1f}" for one in plans)
        table.add_row(step, *seconds, *(f"{number / 1e9:.1f} GB" for number in memory))
    table.add_section()
    table.add_row("total", *(f"{one['total_seconds']:,.1f}" for one in plans))
    table.add_row(f"with endless {unit}s", *(f"{one['sequential_seconds']:,.1f}" for one in plans))
    table.add_row(f"{unit}-hours", *(f"{one['gpu_hours']:,.2f}" for one in plans))
    if plans[0]["cost"] is not None:
        table.add_row("cost", *(f"{one['cost']:,.2f}" for one in plans))
    return table


def _speeds_table(made: dict[str, Any]) -> Table:
    table = Table(title="Recorded speeds", caption="bold: used above", title_justify="left", caption_justify="left")
    table.add_column("", no_wrap=True)
    for column in ("rows/s", "tokens/s", "models", "engine", "recorded"):
        table.add_column(column, justify="right" if column.endswith("/s") else "left", overflow="fold")
    for speed in made["recorded_speeds"]:
        tokens = speed["tokens_per_second"]
        table.add_row(
            speed["step"],
            f"{1 / speed['seconds_per_row']:,.1f}",
            "-" if tokens is None else f"{tokens:,.0f}",
            ", ".join(model.rpartition("/")[2] for model in speed["models"].split(", ")) if speed["models"] else "-",
            speed["engine"] or "-",
            speed["recorded_at"][:10],
            style="bold" if speed == made["speeds"][speed["step"]] else None,
        )
    return table


def _print_comparison(rows: list[dict[str, Any]]) -> None:
    from tuneshift_dag.reports import summary

    _out.print(_comparison_table(rows))
    varied = summary.diversity(rows)
    _out.print(_table("Diversity of the training pairs", varied))
    if varied and "similarity" not in varied[0]:
        _err.print("Without similarity: the sentence encoder isn't installed (the extra `encoder`).", soft_wrap=True)
    tasks = summary.arm_tasks(rows)
    if tasks:
        _out.print(_table("Standard tasks, mean over trainings (lowest to highest)", tasks))
    _out.print(summary.conclusion(rows), soft_wrap=True)


def _comparison_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Held-out accuracy by filter, 95 % intervals", title_justify="left")
    for column in ("arm", "runs", "pairs", "of", "as random", "accuracy", "minus random", "minus unfiltered"):
        table.add_column(column, justify="left" if column == "arm" else "right")

    def cell(row: dict[str, Any], name: str, sign: str = "") -> str:
        low, high = (f"{name}_low", f"{name}_high") if name != "value" else ("low", "high")
        if row[name] is None:
            return "-"
        return f"{row[name]:{sign}.3f} \\[{row[low]:{sign}.3f}, {row[high]:{sign}.3f}]"

    for place, row in enumerate(rows):
        if row["pairs"] is None and place and rows[place - 1]["pairs"] is not None:
            table.add_section()
        shared = row["shared_with_random"]
        table.add_row(
            row["arm"],
            str(row["runs"]),
            str(row["pairs"] or "-"),
            str(row["candidates"] or "-"),
            "-" if shared is None else f"{shared:.0%}",
            cell(row, "value"),
            cell(row, "vs_random", "+"),
            cell(row, "vs_unfiltered", "+"),
        )
    return table


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in rows[0] if rows else ["nothing yet"]:
        table.add_column(column.replace("_", " "))
    for row in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
    return table
