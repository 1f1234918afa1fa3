"""``tuneshift doctor``: is everything there that a run needs? Each finding says what to fix.

Nothing is downloaded: models of the hub that aren't on this machine are named, and what needs them isn't checked.
"""

import importlib.metadata
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tuneshift_dag.config.transfer import Transfer, find_transfers, load_transfer
from tuneshift_dag.errors import TuneshiftError
from tuneshift_dag.home import database_file, home_dir, transfers_dir
from tuneshift_dag.reports.plan import run_warnings
from tuneshift_dag.training.hardware import training_problem

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "dagster", "duckdb", "polars")
# A 4-bit 7B model, its converted copy and a database fit in this.
_FREE_GIB = 2


@dataclass(frozen=True)
class Finding:
    what: str
    ok: bool | None
    """None: nothing to fix in the transfer, but to know before a run on this machine."""
    detail: str


def examine(name: str | None, with_models: bool) -> Iterator[Finding]:
    """Findings about the environment and about one transfer, or every transfer."""
    yield from _environment()
    folders = [_folder(name)] if name else find_transfers(transfers_dir())
    if not folders:
        yield Finding("transfers", False, f"none in {transfers_dir()}. Make a folder with transfer.yaml there.")
    for folder in folders:
        try:
            transfer = load_transfer(folder)
        except TuneshiftError as error:
            yield Finding(folder.name, False, str(error))
            continue
        heldout = f"{len(transfer.heldout)} held-out pairs" if transfer.heldout else "no held-out file: no evaluation"
        yield Finding(
            folder.name, True, f"{len(transfer.seeds)} seeds, {heldout}, up to {transfer.config.rounds} rounds"
        )
        warnings = run_warnings(transfer)
        if warnings:
            yield Finding(f"{folder.name} memory", False, " ".join(warnings))
        problem = training_problem(transfer)
        if problem is not None:
            yield Finding(f"{folder.name} training", None, problem)
        if transfer.config.evaluation.tasks:
            yield _tasks(transfer)
        missing = _not_here(transfer)
        if missing:
            yield Finding(f"{folder.name} models", None, _to_fetch(missing))
        if with_models and "generator.model" not in missing:
            yield from _generator(transfer)
        if with_models and not missing.keys() & {"source.base", "source.adapter"}:
            yield from _preflight(transfer)
        if with_models:
            _release()  # the next transfer's models need its memory


def _release() -> None:
    from tuneshift_dag.resources.dagster_resources import EngineResource

    EngineResource().release()


def _folder(name: str) -> Path:
    return Path(name) if (Path(name) / "transfer.yaml").is_file() else transfers_dir() / name


def _environment() -> Iterator[Finding]:
    for package in _PACKAGES:
        try:
            yield Finding(package, True, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(package, False, f"not installed. Run `pip install {package}`.")
    home_dir().mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(home_dir()).free / 2**30
    yield Finding("disk", free > _FREE_GIB, f"{free:.0f} GiB free for {home_dir()}")
    from tuneshift_dag.store.database import Store

    try:
        Store(database_file()).prepare(None)
        yield Finding("database", True, str(database_file()))
    except TuneshiftError as error:
        yield Finding("database", False, str(error))


def _tasks(transfer: Transfer) -> Finding:
    from tuneshift_dag.engines.harness import check_names

    what = f"{transfer.name} tasks"
    try:
        check_names(transfer)
    except TuneshiftError as error:
        return Finding(what, False, str(error))
    return Finding(what, True, ", ".join(transfer.config.evaluation.tasks))


def _not_here(transfer: Transfer) -> dict[str, str]:
    """Models of the hub that a run would fetch, by key of ``transfer.yaml``."""
    from tuneshift_dag.models.references import hub_files_here

    config = transfer.config
    models = {
        "source.base": config.source.base,
        "source.adapter": config.source.adapter,
        "target.base": config.target.base,
    }
    if config.generator.server is None:
        models["generator.model"] = config.generator.model
    return {key: name for key, name in models.items() if not hub_files_here(name, transfer.folder)}


def _to_fetch(missing: dict[str, str]) -> str:
    names = ", ".join(f"{name} ({key})" for key, name in missing.items())
    return (
        f"not on this machine, and so not checked: {names}. A run fetches them from the hub; `hf download NAME` does so"
        " now, after `hf auth login` for a gated model."
    )


def _generator(transfer: Transfer) -> Iterator[Finding]:
    """A base model has no chat template, and a run would notice only after the preflight."""
    from tuneshift_dag.resources.dagster_resources import EngineResource

    if transfer.config.generator.mode != "chat":
        return
    try:
        EngineResource().generator(transfer).render_chat("")
        yield Finding(f"{transfer.name} generator", True, f"{transfer.config.generator.model} has a chat template")
    except TuneshiftError as error:
        yield Finding(f"{transfer.name} generator", False, str(error))


def _preflight(transfer: Transfer) -> Iterator[Finding]:
    from tuneshift_dag.resources.dagster_resources import EngineResource

    template = transfer.config.prompt_template
    try:
        engine = EngineResource().source(transfer)
        applied = engine.check_adapter([template.replace("{prompt}", seed) for seed in transfer.seeds])
    except TuneshiftError as error:
        yield Finding(f"{transfer.name} preflight", False, str(error))
        return
    detail = "; ".join([*applied.problems, *applied.warnings]) or "adapter applied"
    if detail == "adapter applied" and applied.largest_logit_difference is not None:
        detail += f" (largest logit difference on the seeds {applied.largest_logit_difference:.1f})"
    yield Finding(f"{transfer.name} preflight", not applied.problems, detail)
