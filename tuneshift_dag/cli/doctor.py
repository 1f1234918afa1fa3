"""``tuneshift doctor``: is everything there that a run needs? Each finding says what to fix.

Nothing is downloaded: models of the hub that aren't on this machine are named, and what needs them isn't checked.
"""

import importlib.metadata
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path

from tuneshift_dag import TuneshiftError
from tuneshift_dag.config import Transfer
from tuneshift_dag.config.files import check_models, find_transfers, load_transfer
from tuneshift_dag.config.schema_models import Server
from tuneshift_dag.home import database_file, transfers_dir
from tuneshift_dag.method import Scorer
from tuneshift_dag.method.format_detection import best_fit, fits
from tuneshift_dag.models.references import Reference, quantized_copy
from tuneshift_dag.reports.plan import run_warnings
from tuneshift_dag.store import Store
from tuneshift_dag.training import training_problem

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "dagster", "duckdb", "polars")
# A 4-bit 7B model, its converted copy and a database fit in this.
_FREE_GIB = 2
# That are answered in every prompt format.
_SEEDS = 8


@dataclass(frozen=True)
class Finding:
    what: str
    ok: bool | None
    """None: nothing to fix in the transfer, but to know before a run on this machine."""
    detail: str


def examine(name: str | None, with_models: bool) -> Iterator[Finding]:
    """Findings about the environment and about one transfer, or every transfer."""
    yield from _environment()
    folders = find_transfers(transfers_dir())
    if name:
        folders = [Path(name) if (Path(name) / "transfer.yaml").is_file() else transfers_dir() / name]
    if not folders:
        yield Finding("transfers", False, f"none in {transfers_dir()}. Make a folder with transfer.yaml there.")
    for folder in folders:
        try:
            transfer = load_transfer(folder)
            check_models(transfer)
        except TuneshiftError as error:
            yield Finding(folder.name, False, str(error))
            continue
        heldout = f"{len(transfer.heldout)} held-out pairs" if transfer.heldout else "no held-out file: no evaluation"
        rounds = f"up to {transfer.config.rounds} rounds"
        yield Finding(folder.name, True, f"{len(transfer.seeds)} seeds, {heldout}, {rounds}")
        if warnings := run_warnings(transfer):
            yield Finding(f"{folder.name} memory", False, " ".join(warnings))
        if problem := training_problem(transfer):
            yield Finding(f"{folder.name} training", None, problem)
        if tasks := transfer.config.evaluation.tasks:
            from tuneshift_dag.engines.harness import check_names

            yield _tried(f"{transfer.name} tasks", partial(check_names, transfer), ", ".join(tasks))
        names = {key: str(attrgetter(key)(transfer.config)) for key in transfer.fingerprints}
        missing = {key: name for key, name in names.items() if not Reference(name, folder, key).is_here}
        yield from _models(transfer, names, missing)
        if with_models:
            yield from _loaded(transfer, missing)


def _environment() -> Iterator[Finding]:
    for package in _PACKAGES:
        try:
            yield Finding(package, True, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(package, False, f"not installed. Run `pip install {package}`.")
    home = database_file().parent
    free = shutil.disk_usage(home).free / 2**30
    yield Finding("disk", free > _FREE_GIB, f"{free:.0f} GiB free for {home}")
    yield _tried("database", lambda: Store(database_file()).prepare(None), str(database_file()))


def _tried(what: str, check: Callable[[], object], detail: str) -> Finding:
    """With ``detail``, unless the check raises what is to be repaired."""
    try:
        check()
    except TuneshiftError as error:
        return Finding(what, False, str(error))
    return Finding(what, True, detail)


def _models(transfer: Transfer, names: dict[str, str], missing: dict[str, str]) -> Iterator[Finding]:
    """What the weights are known by (the fingerprint, and of the hub the commit), and those that a run would fetch:
    of the references ``names``, by key of ``transfer.yaml``, those that are ``missing`` on this machine."""
    shown = []
    for key, fingerprint in transfer.fingerprints.items():
        if fingerprint.value:
            commit = f", commit {fingerprint.commit[:12]}" if fingerprint.commit else ""
            shown.append(f"{key} {names[key]} ({fingerprint.value[:12]}{commit})")
    if shown:
        yield Finding(f"{transfer.name} weights", True, "; ".join(shown))
    if missing:
        absent = ", ".join(f"{name} ({key})" for key, name in missing.items())
        yield Finding(
            f"{transfer.name} models",
            None,
            f"not on this machine, and so not checked: {absent}. A run fetches them from the hub; `hf download NAME`"
            " does so now, after `hf auth login` for a gated model.",
        )


def quantized_in_use(transfers: Sequence[Transfer]) -> set[str]:
    """Names of the folders with 4-bit copies of weights that these transfers load."""
    used = set()
    for transfer in transfers:
        models, dtype = transfer.config.models, transfer.config.models.compute_dtype
        loaded = {
            ("source.base", models.quantization),
            ("source.fine_tuned", models.quantization),
            ("generator.model", transfer.config.generator_quantization),
            ("target.base", models.quantization),
            ("target.base", transfer.config.distill.quantization),
        }
        for key, quantization in loaded:
            # `auto` is one of three, as the machine has bfloat16. A generator on a server has no fingerprint.
            for name in ("bfloat16", "float16", "float32") if dtype == "auto" else (dtype,):
                if key in transfer.fingerprints and quantization != "none":
                    used.add(quantized_copy(transfer.named(key).cached_as(), quantization, f"torch.{name}").name)
    return used


def _prompt_format(transfer: Transfer, source: Scorer) -> Finding:
    """Whether the fine-tune was made with the configured prompt format, as far as its answers tell."""
    longest = transfer.config.response.max_new_tokens
    found = fits(source, transfer.seeds[:_SEEDS], transfer.config.source_format, longest)
    configured, best = found[0], best_fit(found)
    what, key = f"{transfer.name} prompt format", configured.format.key
    if best is configured:
        return Finding(what, True, f"the fine-tuned model answers best in that of {key} ({configured})")
    told = f"the fine-tuned model answers best in {str(best.format)!r} ({best}), not in that of {key} ({configured})"
    return Finding(what, None, f"{told}. If it was trained with that, set source.prompt to it.")


def _foreign_markup(transfer: Transfer) -> Iterator[Finding]:
    from tuneshift_dag.models.loading import load_tokenizer
    from tuneshift_dag.models.prompts import foreign_names

    what, format = f"{transfer.name} target prompt", transfer.config.target_format
    base, target = (transfer.named(key, "tokenizer").files() for key in ("source.base", "target.base"))
    try:
        source = load_tokenizer(transfer.tuned("tokenizer").files(), base)
        names = ", ".join(foreign_names(load_tokenizer(target), source, format))
    except TuneshiftError as error:
        yield Finding(what, False, str(error))
        return
    if names:
        told = f"{format.key} holds {names}, special to the source's tokenizer and letters to that of target.base"
        yield Finding(what, None, f"{told}. Set target.prompt to a template in plain words, or to the target's own.")


def _loaded(transfer: Transfer, missing: Mapping[str, str]) -> Iterator[Finding]:
    """What only loaded models can tell, of those that are here."""
    from tuneshift_dag.engines.contexts import check_examples
    from tuneshift_dag.resources import EngineResource

    try:
        check_examples(transfer)
    except TuneshiftError as error:
        yield Finding(f"{transfer.name} examples", False, str(error))
    engines, generator = EngineResource(), transfer.config.generator
    # A base model has no chat template, and a run would notice only after the preflight.
    if "generator.model" not in missing and generator.mode == "chat":
        what = f"{transfer.name} generator"
        if isinstance(generator.server, Server):
            asked = f"{generator.model} on {generator.server.base_url} wasn't asked"
            yield Finding(what, None, f"{asked}: the server applies its own chat template")
        else:
            told = f"{generator.model} has a chat template"
            yield _tried(what, lambda: engines.generator(transfer).chat_ids(""), told)
    if "source.base" not in missing and transfer.config.source.tuned[0] not in missing:
        what, format = f"{transfer.name} preflight", transfer.config.source_format
        try:
            source = engines.source(transfer)
            applied = source.check_adapter([source.prompt_ids(seed, format) for seed in transfer.seeds])
            difference = applied.largest_logit_difference
            told = "adapter applied"
            told += "" if difference is None else f" (largest logit difference on the seeds {difference:.1f})"
            told = "; ".join([*applied.problems, *applied.warnings]) or told
            yield Finding(what, not applied.problems, told)
            if not applied.problems:
                yield _prompt_format(transfer, source)
        except TuneshiftError as error:
            yield Finding(what, False, str(error))
    if "target.base" not in missing and transfer.config.target_format.template is None:
        what, example = f"{transfer.name} target prompt", (transfer.seeds[0], transfer.config.target_format)
        told = f"{transfer.config.target.base} has a chat template"
        yield _tried(what, lambda: engines.target(transfer).prompt_ids(*example), told)
    if not missing.keys() & {"source.base", transfer.config.source.tuned[0], "target.base"}:
        yield from _foreign_markup(transfer)
    if not missing.keys() & {"generator.model", "target.base"}:
        examples = [(seed, seed) for seed in transfer.seeds[:2]]
        told = "generator and target answer as a plain forward pass does, and the target trains"
        yield _tried(f"{transfer.name} chain", lambda: engines.check_chain(transfer, examples), told)
    engines.release()  # the next transfer's models need its memory
