"""``tuneshift doctor``: is everything there that a run needs? Each finding says what to fix.

Nothing is downloaded: models of the hub that aren't on this machine are named, and what needs them isn't checked.
"""

import hashlib
import importlib.metadata
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuneshift_dag import TuneshiftError
from tuneshift_dag.config import Transfer
from tuneshift_dag.config.files import find_transfers, load_transfer
from tuneshift_dag.home import database_file, home_dir, transfers_dir
from tuneshift_dag.reports.plan import run_warnings
from tuneshift_dag.store import Store
from tuneshift_dag.training import training_problem

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
        missing = _missing(transfer)
        yield from _models(transfer, missing)
        if with_models and "generator.model" not in missing:
            yield from _generator(transfer)
        if with_models and not missing & {"source.base", "source.adapter"}:
            yield from _preflight(transfer)
        if with_models:
            _release()  # the next transfer's models need its memory


def _release() -> None:
    from tuneshift_dag.resources import EngineResource

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


def _references(transfer: Transfer) -> dict[str, str]:
    """What a run loads here, by key of ``transfer.yaml``."""
    config = transfer.config
    models = {"source.base": config.source.base, "source.adapter": config.source.adapter}
    models["target.base"] = config.target.base
    if config.generator.server is None:
        models["generator.model"] = config.generator.model
    return models


def _missing(transfer: Transfer) -> set[str]:
    """Keys of the models that a run would fetch from the hub."""
    from tuneshift_dag.models.references import hub_files_here

    return {key for key, name in _references(transfer).items() if not hub_files_here(name, transfer.folder)}


def _models(transfer: Transfer, missing: set[str]) -> Iterator[Finding]:
    """What the weights are known by: the fingerprint, and of the hub the commit."""
    models = _references(transfer)
    shown = []
    for key, fingerprint in transfer.fingerprints.items():
        if fingerprint.value and key in models:
            commit = f", commit {fingerprint.commit[:12]}" if fingerprint.commit else ""
            shown.append(f"{key} {models[key]} ({fingerprint.value[:12]}{commit})")
    if shown:
        yield Finding(f"{transfer.name} weights", True, "; ".join(shown))
    if missing:
        names = ", ".join(f"{models[key]} ({key})" for key in models if key in missing)
        detail = (
            f"not on this machine, and so not checked: {names}. A run fetches them from the hub; `hf download NAME`"
        )
        yield Finding(
            f"{transfer.name} models", None, f"{detail} does so now, after `hf auth login` for a gated model."
        )


def quantized_in_use(transfers: Sequence[Transfer]) -> set[str]:
    """Names of the folders with 4-bit copies of weights that these transfers load, as `models.loading` names them."""
    version = importlib.metadata.version("bitsandbytes")
    used = set()
    for transfer in transfers:
        models, dtype = transfer.config.models, transfer.config.models.compute_dtype
        loaded = {
            ("source.base", models.quantization),
            ("generator.model", transfer.config.generator_quantization),
            ("target.base", models.quantization),
            ("target.base", transfer.config.distill.quantization),
        }
        for key, quantization in loaded:
            # `auto` is one or the other, as the machine has bfloat16. A generator on a server has no fingerprint.
            for name in ("bfloat16", "float16") if dtype == "auto" else (dtype,):
                if key in transfer.fingerprints and quantization != "none":
                    parts = [transfer.fingerprints[key].value, quantization, f"torch.{name}", version]
                    used.add(hashlib.sha256("|".join(parts).encode()).hexdigest()[:16])
    return used


def _generator(transfer: Transfer) -> Iterator[Finding]:
    """A base model has no chat template, and a run would notice only after the preflight."""
    from tuneshift_dag.resources import EngineResource

    config = transfer.config.generator
    what = f"{transfer.name} generator"
    if config.mode != "chat":
        return
    if config.server is not None:
        yield Finding(
            what,
            None,
            f"{config.model} on {config.server.base_url} wasn't asked: the server applies its own chat template",
        )
        return
    try:
        EngineResource().generator(transfer).render_chat("")
        yield Finding(what, True, f"{config.model} has a chat template")
    except TuneshiftError as error:
        yield Finding(what, False, str(error))


def _preflight(transfer: Transfer) -> Iterator[Finding]:
    from tuneshift_dag.resources import EngineResource

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
