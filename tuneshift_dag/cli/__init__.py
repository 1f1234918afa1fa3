"""The command line: one function a command, which reads its arguments, calls a report or the runner, and prints.

`main` is the entry point. What takes long to import is imported by the command that needs it.
"""

import io
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from tuneshift_dag import TuneshiftError
from tuneshift_dag.cli import rendering
from tuneshift_dag.home import database_file, output_dir, transfers_dir, use_dagster_home
from tuneshift_dag.method.filters import KEEP_RULES, RULES

if TYPE_CHECKING:
    from tuneshift_dag.config import Transfer


class _Interruptible(TyperGroup):
    """Says what an interruption means; Typer's own groups end without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            rendering.err.print("interrupted; what was computed is kept: run the same command again")
            raise typer.Exit(130) from error


app = typer.Typer(
    cls=_Interruptible,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Move a fine-tuned skill from one base model to another with five example prompts.",
)
cache_app = typer.Typer(help="The cache of model calls, shared by all transfers.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")

TransferName = Annotated[str, typer.Argument(help="Name of a folder under transfers/, or a path to one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
AsJsonList = Annotated[bool, typer.Option("--json", help="Print one JSON list and nothing else.")]
_RULE_HELP = f"{', '.join(RULES)}; may be repeated. Without it, all; with a grid, those that can take it."
_TRUTH_HELP = (
    ".jsonl or .csv of prompts with `truth`, which is right, wrong or off (the skill), or with `response`, the right"
    " one, null off the skill."
)
_OFF_SKILL_HELP = "With --truth, also a part of the pairs with this share off the skill, such as 0.25; may be repeated."
_GRID_HELP = f"1.1,1.2,1.5 or start:stop:step, of {', '.join(KEEP_RULES)} what to keep; without it, chosen."


@app.command("new")
def make_transfer(
    name: Annotated[str, typer.Argument(help="Name of the folder to make under transfers/.")],
    adapter: Annotated[str, typer.Option(help="Your PEFT adapter: a folder, or a hub id.")] = "",
    fine_tuned: Annotated[str, typer.Option(help="In its place a whole fine-tuned model.")] = "",
    base: Annotated[str, typer.Option(help="Its base model; else the one that adapter_config.json names.")] = "",
    target: Annotated[str, typer.Option(help="Base model that shall learn the skill.")] = "",
    template: Annotated[
        str, typer.Option(help="Text of its training, with {prompt}; \\n: a new line. Or `chat`.")
    ] = "",
    seeds: Annotated[str, typer.Option(help="Prompts: .jsonl, .csv (column `prompt`) or .txt (one a line).")] = "",
    heldout: Annotated[str, typer.Option(help="To measure with: .jsonl, or .csv (`prompt` and `response`).")] = "",
    generator: Annotated[str, typer.Option(help="Model that writes prompts. Without it, the target.")] = "",
    mode: Annotated[
        Literal["chat", "continuation", "by_response"],
        typer.Option(help="The generator's mode, see `generator.mode`: a base model needs another than chat."),
    ] = "chat",
    instruction: Annotated[str, typer.Option(help="What the generator is told, see `generator.instruction`.")] = "",
    description: Annotated[str, typer.Option(help="One line for people.")] = "",
    copy_adapter: Annotated[bool, typer.Option(help="Copy a local adapter, or name it where it is.")] = True,
) -> None:
    """Make a transfer folder; in a terminal, ask for what no option says.

    Models and files are given as seen from the working folder. Nothing is overwritten, and a folder appears
    only when everything in it is sound.
    """
    from tuneshift_dag.cli import new as scaffold

    files, texts = (seeds, heldout), (instruction, description)
    answers = scaffold.Answers(
        adapter, base, target, template, *files, generator, mode, *texts, copy_adapter, fine_tuned
    )
    scaffold.check_name(transfers_dir(), name)
    if scaffold.missing(answers) and sys.stdin.isatty():
        answers = scaffold.ask_for_the_rest(answers)
    made = scaffold.create(transfers_dir(), name, answers)
    rendering.line(str(made.folder), rendering.out)
    heldout_note = f"{len(made.heldout)} held-out pairs" if made.heldout else "no held-out file, so no evaluation"
    rendering.err.print(f"{len(made.seeds)} seeds, {heldout_note}. Next:", highlight=False)
    rendering.commands(
        (f"tuneshift doctor {name}", "is the adapter applied?"),
        (f"tuneshift run {name}", "prompts, pairs, the new adapter"),
        ("make ui", "the same in Dagster's UI"),
    )


@app.command()
def plan(transfer: TransferName, as_json: AsJson = False) -> None:
    """Does a run fit in this machine's memory, and how long does it take? Loads no model and changes nothing.

    Seconds are those of a run from nothing at the speeds that former runs of this transfer recorded here. See
    docs/scaling.md.
    """
    from tuneshift_dag.reports.plan import plan as make

    made = make(_store(), _load(transfer))
    rendering.as_json(made) if as_json else rendering.plan(made)


@app.command()
def run(
    transfer: TransferName,
    rounds: Annotated[int | None, typer.Option(min=1, help="Stop after this round for now, and train.")] = None,
    regrow: Annotated[bool, typer.Option(help="Also grow rounds anew of which only the seeds changed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Materialize what is missing or out of date, round by round, then train and evaluate.

    Runs are recorded in Dagster's instance, so the UI shows them. After a change of the threshold, rounds
    keep their prompts even if their seeds changed; they are named, and --regrow grows them anew.
    """
    from tuneshift_dag.config.files import refresh
    from tuneshift_dag.reports import plan as plans
    from tuneshift_dag.reports import report as make_report
    from tuneshift_dag.store.records import Records, to_do

    # A hub model is looked up once, so that a run has one teacher from its first step to its last.
    loaded = refresh(_load(transfer), lambda problem: rendering.message("warning", "yellow", problem))
    store = _store()
    store.prepare(loaded.name)
    if rounds is not None:  # what is grown stays
        grown = len(loaded.round_keys) - len(Records(store, loaded).missing_rounds("synthetic_prompts"))
        loaded = loaded.with_rounds(max(rounds, grown))
    runner = _runner(loaded)
    for warning in plans.run_warnings(loaded):
        rendering.message("warning", "yellow", warning)
    pending = to_do(store, loaded, regrow)
    if pending:
        speeds = plans.chosen_speeds(plans.recorded_speeds(store, loaded), loaded)
        seconds = plans.work(store, loaded).seconds(speeds, pending)
        rendering.outlook(loaded.name, pending, seconds, plans.STEPS)
    result = runner.run(regrow)
    if not result.materialized:
        rendering.err.print("Everything is up to date.")
    if result.kept_rounds:
        rendering.err.print(
            f"Kept the prompts of {', '.join(result.kept_rounds)}, whose seeds have changed since;"
            " run again with --regrow to grow them anew."
        )
    figures = make_report(store, loaded)
    rendering.as_json(figures) if as_json else rendering.report(figures)
    if not as_json:
        rendering.after_run(loaded.name, output_dir(loaded.name))


@app.command()
def report(transfer: TransferName, as_json: AsJson = False) -> None:
    """Figures of a transfer: rounds, pairs, costs of the last run, held-out accuracy, what the target forgot."""
    from tuneshift_dag.reports import report as make

    figures = make(_store(), _load(transfer))
    rendering.as_json(figures) if as_json else rendering.report(figures)


@app.command()
def sweep(
    transfer: TransferName,
    rule: Annotated[list[str] | None, typer.Option(help=_RULE_HELP)] = None,
    grid: Annotated[str, typer.Option(help=_GRID_HELP)] = "",
    truth: Annotated[Path | None, typer.Option(help=_TRUTH_HELP)] = None,
    off_skill: Annotated[list[float] | None, typer.Option(help=_OFF_SKILL_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list, with --truth one object.")] = False,
) -> None:
    """Show what each filter rule would keep at each threshold; loads no model and changes nothing.

    With --truth also whether that is what should be kept: precision, recall and AUC, and a picture of them.
    """
    from tuneshift_dag.reports import thresholds

    loaded = _load(transfer)
    tried = thresholds.parse_grid(grid) if grid else []
    if truth:
        from tuneshift_dag.reports import plots
        from tuneshift_dag.reports.truth import sweep_truth

        found = sweep_truth(_store(), loaded, truth, rule or [], tried, off_skill or [])
        picture = output_dir(loaded.name) / "precision_recall.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(plots.precision_recall(found["pools"]))
        rendering.as_json(found) if as_json else rendering.truth(found)
        rendering.line(f"Picture: {picture}")
        return
    if off_skill:
        raise TuneshiftError("--off-skill needs --truth: a file that says which prompts are off the skill.")
    cells = thresholds.sweep(_store(), loaded, rule or [], tried)
    rendering.as_json(cells) if as_json else rendering.sweep(cells)
    if not as_json and not any(cell["pairs_kept"] for cell in cells):
        rendering.err.print(f"Nothing is kept. If there are no scored pairs yet: tuneshift run {loaded.name}")


@app.command()
def compare(transfer: TransferName, as_json: AsJsonList = False) -> None:
    """Train models on what rival filters keep, equally many pairs each, and compare their held-out accuracy.

    Needs `compare:` in transfer.yaml and the scored pairs of `tuneshift run`. Trains arms × seeds models; what
    was trained before is not trained again, also after a killed run.
    """
    from tuneshift_dag import reports as summary

    loaded = _load(transfer)
    if loaded.config.compare:
        rendering.err.print(summary.power(_store(), loaded), soft_wrap=True, highlight=False)
    _runner(loaded).compare()
    rows = summary.comparison(_store(), loaded)
    rendering.as_json(rows) if as_json else rendering.comparison(rows)
    if not as_json:
        rendering.line(f"Picture: {output_dir(loaded.name) / 'comparison.png'}")


@app.command()
def lineage(
    transfer: TransferName,
    prompt_id: Annotated[str, typer.Argument(help="A prompt's id, the beginning of one, or the prompt's whole text.")],
    up: Annotated[bool, typer.Option("--up/--down", help="Back to the seeds, or forward to what followed.")] = True,
    as_json: AsJson = False,
) -> None:
    """Show which generator calls and seeds a prompt came from, or which prompts it led to and their fate."""
    from dataclasses import asdict

    from tuneshift_dag.reports import lineage as trees

    loaded = _load(transfer)
    root = (trees.up if up else trees.down)(_store(), loaded, prompt_id)
    found = {"transfer": loaded.name, "direction": "up" if up else "down", "root": asdict(root)}
    rendering.as_json(found) if as_json else rendering.out.print(rendering.lineage(root))


@app.command()
def export(
    transfer: TransferName,
    to: Annotated[Path, typer.Option("--to", help="Folder to write to; it is created.")],
    merged: Annotated[bool, typer.Option("--merged", help="Also the whole model, with the adapter in it.")] = False,
    push: Annotated[str, typer.Option(help="Repository of the hub that takes the adapter, or the merged model.")] = "",
) -> None:
    """Write the distilled adapter (PEFT) and the dataset (chat JSONL and Parquet), with their cards.

    `--merged` adds a folder that plain transformers loads and that llama.cpp's `convert_hf_to_gguf.py` turns into GGUF.
    """
    from tuneshift_dag.reports.export import export as write
    from tuneshift_dag.reports.export import push as upload

    for path in write(_store(), _load(transfer), Path(os.path.expanduser(to)), merged):
        rendering.line(str(path), rendering.out)
    if push:
        rendering.line(upload(to / ("merged" if merged else "adapter"), push), rendering.out)


@cache_app.command("stats")
def cache_stats(as_json: AsJsonList = False) -> None:
    """What the cache holds, and how much of it no materialization uses any more."""
    from tuneshift_dag.store.cache import stats

    found = stats(_store())
    rendering.as_json(found) if as_json else rendering.rows("Cache (bytes before compression)", found)


@cache_app.command("gc")
def cache_gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be removed.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it without asking.")] = False,
    as_json: AsJsonList = False,
) -> None:
    """Remove what no transfer uses any more, after listing it: unused answers, adapters, 4-bit copies, schemas.

    In a terminal it asks first; elsewhere it removes nothing without --yes. The database file keeps its size; DuckDB
    uses the space again.
    """
    from tuneshift_dag.cli.doctor import quantized_in_use
    from tuneshift_dag.config.files import find_transfers, load_transfer
    from tuneshift_dag.resources.runs import busy_transfers
    from tuneshift_dag.store.cache import collect, collect_plan, held_back

    store, folders, used = _store(), find_transfers(transfers_dir()), None
    try:
        used = quantized_in_use([load_transfer(folder) for folder in folders])
    except TuneshiftError as error:
        rendering.message("note", "yellow", f"4-bit copies of weights are left alone, since one can't be read: {error}")
    here = {folder.name for folder in folders}
    for step in held_back(store, here):
        rendering.message("note", "yellow", f"a step runs or has failed, so what was computed since stays. {step}")
    plan = collect_plan(store, here | busy_transfers(_instance()), used)
    rows = [{"kind": one.kind, "name": one.name, "bytes": one.bytes, "why": one.reason} for one in plan]
    rendering.as_json(rows) if as_json else rendering.rows("What no transfer uses", rows)
    if not plan or dry_run:
        return
    if not yes and not sys.stdin.isatty():
        rendering.err.print("Nothing was removed: --yes removes it.")
    elif yes or typer.confirm("Remove all of it?", err=True):
        collect(store, plan)
        rendering.err.print("Removed.")


@app.command()
def doctor(
    transfer: Annotated[str | None, typer.Argument(help="A transfer to check; without it, all of them.")] = None,
    models: Annotated[bool, typer.Option(help="Also load the source model and check the adapter.")] = True,
) -> None:
    """Check the environment, the transfer files and the preflight; say what to fix. Nothing is downloaded."""
    from tuneshift_dag.cli.doctor import examine

    _quiet()
    problems = 0
    for finding in examine(transfer, models):
        rendering.finding(finding)
        problems += finding.ok is False
    raise typer.Exit(1 if problems else 0)


def main() -> None:
    """Entry point: a `TuneshiftError` becomes one message and exit status 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # of a terminal that can't show every letter
    try:
        for argument in sys.argv:
            if any("\ud800" <= letter <= "\udfff" for letter in argument):
                raise TuneshiftError(f"The argument {argument!a} is no text in UTF-8.")
        app()
    except TuneshiftError as error:
        rendering.message("error", "red", str(error))
        sys.exit(1)


def _store() -> Any:
    from tuneshift_dag.store import Store

    return Store(database_file())


def _load(name: str) -> "Transfer":
    from tuneshift_dag.config.files import find_transfers, load_transfer

    folder = Path(name) if os.path.isfile(Path(name) / "transfer.yaml") else transfers_dir() / name
    if not os.path.isdir(folder):  # which is no error for a name that no file could have
        known = ", ".join(f.name for f in find_transfers(transfers_dir())) or "none"
        raise TuneshiftError(f"There is no transfer {name!r} in {transfers_dir()} (there: {known}).")
    loaded = load_transfer(folder)
    _store().check_claim(loaded.name, loaded.folder)
    return loaded


def _quiet() -> None:
    """Leave standard error to our own lines."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("alembic").setLevel(logging.WARNING)


def _instance() -> Any:
    folder = use_dagster_home()
    _quiet()
    import dagster as dg

    try:
        return dg.DagsterInstance.get()
    except Exception as error:  # whatever the storage that dagster.yaml names raises
        told = " ".join(str(error).split())
        raise TuneshiftError(
            f"{folder / 'dagster.yaml'}: Dagster can't open its instance ({type(error).__name__}: {told}). Repair the"
            " file, or name another folder in DAGSTER_HOME."
        ) from error


def _runner(transfer: "Transfer") -> Any:
    """A runner in Dagster's instance that tells each step, with its round, and how far it is."""
    instance = _instance()
    from tuneshift_dag.runner import Runner

    def announce(asset: str, round_: str | None) -> None:
        place = f" {round_} of {len(transfer.round_keys)}" if round_ else ""
        rendering.err.print(f"[bold]{asset}[/bold]{place}", highlight=False)

    def tell(line: str) -> None:
        rendering.line(f"  {line}")

    return Runner(transfer, instance, on_step=announce, on_line=tell)
