"""``tuneshift plan``: what a run will take, from the transfer's settings and what former runs took.

The arithmetic is in `tuneshift_dag/method/scaling.py`; here its inputs are gathered, and no weights are read.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tuneshift_dag.config.transfer import Transfer
from tuneshift_dag.errors import TuneshiftError
from tuneshift_dag.home import database_file
from tuneshift_dag.method.scaling import (
    CPU_USABLE,
    GPUS,
    STEPS,
    Answers,
    Estimate,
    Hardware,
    ModelSize,
    Training,
    Workload,
)
from tuneshift_dag.method.scaling import estimate as estimate_gpus
from tuneshift_dag.models.memory import gpu_count, total_bytes
from tuneshift_dag.models.references import known_config
from tuneshift_dag.store.database import Store

# English text and these models' tokenizers: 3.9 over the packaged transfer's prompts.
_CHARACTERS_PER_TOKEN = 4
# As `tuneshift_dag.engines.decoding`: shorter openings aren't shared.
_SHARE_FROM = 16
HERE = "this machine"
MODELS = ("source", "generator", "target")
_UNITS = {"M": 1e6, "B": 1e9, "T": 1e12}


def parameters(text: str, option: str) -> float:
    """The number that ``8B``, ``270M`` or ``135000000`` stands for.

    Raises:
        TuneshiftError: naming the option and the value.
    """
    unit = _UNITS.get(text[-1:].upper(), 1)
    try:
        value = float(text if unit == 1 else text[:-1]) * unit
    except ValueError:
        value = 0
    if not 1e6 <= value <= 1e13:
        raise TuneshiftError(f"{option}: {text!r} is no number of parameters; write it like 8B or 270M.")
    return value


def gpu_named(name: str) -> Hardware:
    """A GPU of the table; `cpu` with the memory of this machine.

    Raises:
        TuneshiftError: naming the ones that are known.
    """
    if name not in GPUS:
        raise TuneshiftError(f"--gpu: {name!r} is not known; use one of {', '.join(GPUS)}.")
    return replace(GPUS[name], memory=total_bytes()) if name == "cpu" else GPUS[name]


def this_machine(transfer: Transfer) -> Hardware:
    """The memory that a model of this transfer has on this machine; its speed is only known from recorded runs."""
    usable = Hardware.usable if gpu_count() else CPU_USABLE
    one = transfer.config.models.device_map == "single"
    return Hardware(HERE, math.inf, math.inf, total_bytes(1 if one else None), usable=usable)


def model_sizes(transfer: Transfer, given: Mapping[str, float]) -> dict[str, ModelSize]:
    """The source, generator and target, from the options or from each one's ``config.json``.

    Raises:
        TuneshiftError: when neither says a model's size, naming the option that does.
    """
    config = transfer.config
    references = {"source": config.source.base, "generator": config.generator.model, "target": config.target.base}
    sizes: dict[str, ModelSize] = {}
    for name in MODELS:
        key = "generator.model" if name == "generator" else f"{name}.base"
        same = [other for other in (name, *MODELS) if references[other] == references[name] and other in given]
        if same:
            sizes[name] = ModelSize.of(given[same[0]])
            continue
        where = f"{transfer.folder / 'transfer.yaml'}: {key}"
        served = name == "generator" and config.generator.server is not None
        file = None if served else known_config(references[name], transfer.folder, where)
        fix = f"give its size with --{name}-parameters 8B"
        if served:
            raise TuneshiftError(f"{where}: {references[name]!r} is on a server, so its size isn't known: {fix}.")
        if file is None:
            raise TuneshiftError(
                f"{where}: {references[name]!r} isn't on this machine yet, so its size isn't known: {fix},"
                f" or get it with `hf download {references[name]}`."
            )
        try:
            sizes[name] = ModelSize.from_config(json.loads(file.read_text()))
        except KeyError as error:
            raise TuneshiftError(f"{where}: {file} has no {error}, so the model's size isn't known: {fix}.") from error
        except ValueError as error:
            raise TuneshiftError(f"{where}: {file}: {error}; {fix}.") from error
    return sizes


@dataclass(frozen=True)
class Lengths:
    """Means of a transfer's rows; where no run recorded them, the longest that its settings allow.

    Responses are in tokens with their longest, prompts in characters.
    """

    recorded: bool
    prompts_per_call: float
    kept_share: float
    prompt_characters: float
    proposal: tuple[float, float]
    base: tuple[float, float]
    fine_tuned: tuple[float, float]
    evaluation: tuple[float, float]


def lengths(store: Store, transfer: Transfer) -> Lengths:
    """What former runs recorded of this transfer, cut to what its settings allow now."""
    config = transfer.config
    caps = (config.generator.max_new_tokens, config.response.max_new_tokens, config.evaluation.max_new_tokens)
    row = store.read(_LENGTHS, schema=transfer.name).row(0, named=True)
    seeds = sum(map(len, transfer.seeds)) / len(transfer.seeds)

    def tokens(name: str, cap: int) -> tuple[float, float]:
        mean, longest = row[name], row[f"{name}_longest"]
        return (cap, cap) if mean is None else (min(mean, cap), min(longest, cap))

    per_call = config.generator.prompts_per_call
    return Lengths(
        recorded=bool(row["scored"]),
        prompts_per_call=min(per_call, row["prompts"] / row["calls"]) if row["calls"] else per_call,
        kept_share=row["kept"] / row["scored"] if row["scored"] else 1.0,
        prompt_characters=row["prompt_characters"] or seeds,
        proposal=tokens("proposal", caps[0]),
        base=tokens("base", caps[1]),
        fine_tuned=tokens("fine_tuned", caps[1]),
        evaluation=tokens("evaluation", caps[2]),
    )


_LENGTHS = """
    WITH answered AS (
        SELECT asset, len(token_ids) AS tokens FROM cache_references JOIN cache.responses USING (key)
    )
    SELECT (SELECT count(*) FROM proposals) AS calls, (SELECT count(*) FROM synthetic_prompts) AS prompts,
        (SELECT count(*) FROM filtered_dataset) AS kept, count(*) AS scored, avg(len(prompt)) AS prompt_characters,
        avg(base_tokens) AS base, max(base_tokens) AS base_longest,
        avg(fine_tuned_tokens) AS fine_tuned, max(fine_tuned_tokens) AS fine_tuned_longest,
        (SELECT avg(tokens) FROM answered WHERE asset = 'synthetic_prompts') AS proposal,
        (SELECT max(tokens) FROM answered WHERE asset = 'synthetic_prompts') AS proposal_longest,
        (SELECT avg(tokens) FROM answered WHERE asset = 'evaluation') AS evaluation,
        (SELECT max(tokens) FROM answered WHERE asset = 'evaluation') AS evaluation_longest
    FROM scored_pairs
"""


def workload(transfer: Transfer, sizes: Mapping[str, ModelSize], known: Lengths, here: bool) -> Workload:
    """The work of a whole run from nothing, in the terms of `tuneshift_dag.method.scaling`.

    Args:
        here: whether only this machine's memory counts, and not that of servers.
    """
    config = transfer.config
    quantized = config.models.quantization != "none"
    local = config.engine.server is None
    served_generator = config.generator.server is not None
    loaded = {"generator": not served_generator, "source": local, "target": True}
    if config.models.kv_cache_dtype == "int8":
        sizes = {name: replace(size, kv_bits=8 if loaded[name] else 16) for name, size in sizes.items()}
    generator, source, target = sizes["generator"], sizes["source"], sizes["target"]
    batch = config.models.batch_size if config.engine.server is None else config.engine.server.concurrency
    opening, _, rest = config.prompt_template.partition("{prompt}")
    shared = len(opening) / _CHARACTERS_PER_TOKEN
    prompt = (len(rest) + known.prompt_characters) / _CHARACTERS_PER_TOKEN
    if shared < _SHARE_FROM:
        shared, prompt = 0, prompt + shared

    def answers(side: tuple[float, float], scored: float, rows: int) -> Answers:
        return Answers(source, quantized and local, rows, batch, prompt, *side, shared, scored, eager=local)

    prompts = max(1, round(config.generator.calls_per_round * known.prompts_per_call))
    # A round that passes target_pairs is finished, and the last. What share is kept, only a run can tell.
    enough = math.ceil(config.target_pairs / max(1, prompts * known.kept_share))
    rounds = min(config.rounds, enough) if known.recorded else config.rounds
    pairs = min(round(rounds * prompts * known.kept_share), config.target_pairs + prompts)
    base_scored, fine_tuned_scored = (known.fine_tuned[0], known.base[0]) if config.engine.cross_scores else (0, 0)
    train = config.distill
    longest = (len(opening) + len(rest) + config.generator.max_prompt_characters) / _CHARACTERS_PER_TOKEN
    heldout = len(transfer.heldout)
    of_source = [answers(known.evaluation, 0, heldout)] * 2
    of_target = [
        Answers(target, quantized, heldout, config.models.batch_size, prompt, *known.evaluation, shared, split=False)
    ] * 2
    sides = [answers(known.base, base_scored, prompts), answers(known.fine_tuned, fine_tuned_scored, prompts)]
    if config.response.samples:
        sides.append(answers(known.fine_tuned, 0, prompts * config.response.samples))
    target_scores = config.filter.target is not None
    if target_scores:
        sides.append(
            Answers(target, quantized, prompts, config.models.batch_size, prompt, 0, 0, shared, known.fine_tuned[0])
        )
    source_bytes = 0.0 if here and not local else source.weight_bytes(quantized and local)
    proposals = _proposals(transfer, generator, known)
    generator_bytes = 0.0 if here and served_generator else generator.weight_bytes(proposals.quantized)
    # A process keeps what it has loaded until it trains, and loads the target once without and once with the adapter.
    resident = generator_bytes + source_bytes
    return Workload(
        rounds,
        proposals,
        sides,
        Training(
            target,
            train.quantization != "none",
            max(1, round(pairs * (1 - train.validation_fraction))) * train.epochs,
            train.batch_size,
            train.rank,
            shared + prompt + known.fine_tuned[0],
            known.fine_tuned[0],
            longest + config.response.max_new_tokens,
            train.gradient_checkpointing,
            train.optimizer == "paged_adamw_8bit",
        ),
        [*of_source, *of_target] if heldout else [],
        {
            "synthetic_prompts": resident,
            "scored_pairs": resident + (target.weight_bytes(quantized) if target_scores else 0),
            "evaluation": source_bytes + 2 * target.weight_bytes(quantized),
        },
    )


def _proposals(transfer: Transfer, model: ModelSize, known: Lengths) -> Answers:
    """The generator's calls of one round: an instruction and seeds, of which the user's may open every call."""
    config = transfer.config.generator
    example = len("1. \n")
    if config.mode == "by_response":
        example = len(config.example_template) + round(known.fine_tuned[0] * _CHARACTERS_PER_TOKEN)
    seed = (known.prompt_characters + example) / _CHARACTERS_PER_TOKEN
    same = config.original_seeds_per_call if config.original_seeds_per_call >= len(transfer.seeds) else 0
    served = config.server
    return Answers(
        model,
        transfer.config.generator_quantization != "none" and served is None,
        config.calls_per_round,
        transfer.config.models.batch_size if served is None else served.concurrency,
        (config.seeds_per_call - same) * seed,
        *known.proposal,
        len(config.instruction) / _CHARACTERS_PER_TOKEN + same * seed,
        eager=served is None,
    )


@dataclass(frozen=True)
class Speed:
    """How fast a step ran: rows are generator calls, pairs, training examples or held-out answers.

    Args:
        tokens_per_second: generated ones; None when they weren't counted.
        models: what ran, and on which ``engine``; None when an older version recorded it.
    """

    step: str
    seconds_per_row: float
    rows: int
    recorded_at: str
    tokens_per_second: float | None
    models: str | None
    engine: str | None

    def is_of(self, transfer: Transfer) -> bool:
        return (self.models, self.engine) == (transfer.models_of(self.step), transfer.engine_of(self.step))


def recorded_speeds(store: Store, transfer: Transfer) -> list[Speed]:
    """Of each step with each engine and models the last run in which all was computed, by step, latest first."""
    config = transfer.config
    calls = (4 if config.engine.cross_scores else 2) + transfer.needs_ifd + config.response.samples
    calls += (config.filter.target is not None) + 2 * (config.filter.discriminator is not None)
    speeds = []
    for row in store.read(_SPEEDS, schema=transfer.name).iter_rows(named=True):
        rows = row["model_calls"] / (calls if row["asset"] == "scored_pairs" else 1)
        per_second = None if row["tokens"] is None else row["tokens"] / row["seconds"]
        at = f"{row['finished']:%Y-%m-%d %H:%M}"
        ran = (row["models"], row["engine"])
        speeds.append(Speed(row["asset"], row["seconds"] / rows, round(rows), at, per_second, *ran))
    for row in store.read(_TRAININGS, schema=transfer.name).iter_rows(named=True):
        settings = json.loads(row["settings"])
        examples = round(row["pairs"] * (1 - settings["validation_fraction"])) * settings["epochs"]
        at = f"{row['created_at']:%Y-%m-%d %H:%M}"
        engine = transfer.engine_of("distilled_model") if row["target"] else None
        speeds.append(Speed("distilled_model", row["seconds"] / examples, examples, at, None, row["target"], engine))
    return sorted(speeds, key=lambda speed: STEPS.index(speed.step))


_SPEEDS = """
    SELECT asset, models, engine, sum(seconds) AS seconds, sum(model_calls)::DOUBLE AS model_calls,
        sum(tokens_generated)::DOUBLE AS tokens, max(finished_at) AS finished
    FROM steps
    WHERE model_calls > 0 AND cache_hits = 0 AND asset IN ('synthetic_prompts', 'scored_pairs', 'evaluation')
    GROUP BY asset, models, engine, batch_id
    QUALIFY row_number() OVER (PARTITION BY asset, models, engine ORDER BY finished DESC) = 1
    ORDER BY finished DESC
"""
_TRAININGS = """
    SELECT pairs, seconds, target, settings, created_at FROM distilled_models
    QUALIFY row_number() OVER (PARTITION BY target ORDER BY created_at DESC) = 1
    ORDER BY created_at DESC
"""


def chosen_speeds(recorded: Sequence[Speed], transfer: Transfer) -> dict[str, Speed]:
    """Of each step the speed of the transfer's own models and engine; else one of unknown ones, else the last."""

    def distance(speed: Speed) -> int:
        return 0 if speed.is_of(transfer) else 1 if speed.engine is None else 2

    by_step = {step: [speed for speed in recorded if speed.step == step] for step in STEPS}
    return {step: min(speeds, key=distance) for step, speeds in by_step.items() if speeds}


def plan(
    store: Store,
    transfer: Transfer,
    gpu: str = "",
    gpus: Sequence[int] = (1, 8, 64),
    price: float | None = None,
    given: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Seconds, memory, GPU-hours, cost and bottleneck for each number of GPUs, as one JSON-ready object.

    Args:
        gpu: a name of `tuneshift_dag.method.scaling.GPUS`; without one, machines like this one at recorded speeds.
        price: of one GPU for one hour, in any currency.
        given: parameters of models, by `MODELS`.

    Raises:
        TuneshiftError: when a model's size isn't known, or without ``gpu`` and a recorded run.
    """
    known = lengths(store, transfer)
    work = workload(transfer, model_sizes(transfer, given or {}), known, here=not gpu)
    steps = [step for step in STEPS if step != "evaluation" or work.evaluation]
    recorded: Sequence[Speed] = []
    speeds: dict[str, Speed] = {}
    if gpu:
        hardware = gpu_named(gpu)
    else:
        hardware = this_machine(transfer)
        recorded = recorded_speeds(store, transfer)
        speeds = chosen_speeds(recorded, transfer)
        missing = [step for step in steps if step not in speeds]
        if missing:
            raise TuneshiftError(
                f"{store.path} holds no speed of {', '.join(missing)} of {transfer.name}: `tuneshift run"
                f" {transfer.name}` records it, or name a GPU to estimate it, such as --gpu h100"
                f" (known: {', '.join(GPUS)})."
            )
    per_row = {step: speed.seconds_per_row for step, speed in speeds.items()}
    estimates = [estimate_gpus(work, hardware, count, recorded=per_row) for count in gpus]
    return {
        "transfer": transfer.name,
        "gpu": hardware.name,
        "memory_bytes": hardware.memory,
        "speeds": {step: vars(speed) for step, speed in speeds.items()} or "roofline",
        "recorded_speeds": [vars(speed) for speed in recorded],
        "recorded_peak_bytes": _peaks(store, transfer, steps) if speeds else None,
        "lengths": "recorded" if known.recorded else "the longest that transfer.yaml allows",
        "rounds": work.rounds,
        "generator_calls": work.rounds * work.proposals.rows,
        "pairs_scored": work.rounds * work.pairs[0].rows,
        "training_examples": work.training.examples,
        "plans": [_plan(one, price) for one in estimates],
        "warnings": [
            *_other_speeds(transfer, speeds),
            *memory_warnings(transfer, work, hardware),
            *_idle(work, max(gpus)),
        ],
    }


def _peaks(store: Store, transfer: Transfer, steps: Sequence[str]) -> dict[str, int]:
    """The largest peak of each step that any run recorded."""
    rows = store.read("SELECT asset, max(peak_bytes) FROM steps GROUP BY asset", schema=transfer.name).rows()
    peaks = dict(rows)
    return {step: peaks.get(step, 0) for step in steps}


def _plan(one: Estimate, price: float | None) -> dict[str, Any]:
    return {
        "gpus": one.gpus,
        "seconds": one.seconds,
        "total_seconds": one.total_seconds,
        "sequential_seconds": sum(one.sequential.values()),
        "gpu_hours": one.gpu_hours,
        "cost": None if price is None else price * one.gpu_hours,
        "bottleneck": one.bottleneck,
        "memory_bytes": one.memory,
        "batch": one.batch,
    }


def run_warnings(transfer: Transfer) -> list[str]:
    """What a run on this machine won't have the memory for; nothing where models' sizes aren't known yet."""
    try:
        sizes = model_sizes(transfer, {})
    except TuneshiftError:
        return []
    work = workload(transfer, sizes, lengths(Store(database_file()), transfer), here=True)
    return memory_warnings(transfer, work, this_machine(transfer))


def memory_warnings(transfer: Transfer, work: Workload, gpu: Hardware) -> list[str]:
    """One line, with its repair, for each step that needs more memory than there is or has room for a part of its
    batch only."""
    room = gpu.usable * gpu.memory
    estimated = estimate_gpus(work, gpu, 1)
    config = transfer.config
    elsewhere: set[str] = set()
    if gpu.name == HERE:
        elsewhere |= {"scored_pairs"} if config.engine.server else set()
        elsewhere |= {"scored_pairs", "synthetic_prompts"} if config.engine.ray.address else set()
        elsewhere |= {"synthetic_prompts"} if config.generator.server else set()
    batches = {"synthetic_prompts": work.proposals, "scored_pairs": work.pairs[0]}
    lines = []
    for step, needed in estimated.memory.items():
        if step in elsewhere:
            continue
        if needed > room:
            training = step == "distilled_model"
            repair = _smaller_training(work.training, room) if training else _smaller_models(transfer, step)
            lines.append(
                f"{step} needs about {gigabytes(needed)} and {gpu.name} has {gigabytes(gpu.memory)}, of which it can"
                f" plan with {gigabytes(room)}: {repair}, or use more memory."
            )
        elif step in batches and estimated.batch[step] < min(batches[step].batch, batches[step].rows):
            lines.append(
                f"{step} has memory for batches of {estimated.batch[step]} on {gpu.name}, not {batches[step].batch}: it"
                f" runs, slower{_room_for_more(transfer, step)}."
            )
    return lines


def _smaller_models(transfer: Transfer, step: str) -> str:
    if transfer.config.models.quantization == "none":
        return "set models.quantization: nf4"
    if step == "evaluation":
        return "choose a smaller target"
    if transfer.config.generator_quantization == "none":
        return "set generator.quantization: nf4"
    return "put the models on a server that spreads them over several GPUs (docs/servers.md)"


def _room_for_more(transfer: Transfer, step: str) -> str:
    server = transfer.config.generator.server if step == "synthetic_prompts" else transfer.config.engine.server
    can = server is None and transfer.config.models.kv_cache_dtype == "auto"
    return "; models.kv_cache_dtype: int8 makes room for more" if can else ""


def _smaller_training(training: Training, room: float) -> str:
    """The smallest change of ``distill`` that makes the training fit."""
    same = training.checkpointing
    for quantized, checkpointing in (
        (training.quantized, same),
        (training.quantized, True),
        (True, same),
        (True, True),
    ):
        for batch in (training.batch, *(size for size in (16, 8, 4, 2, 1) if size < training.batch)):
            changed = replace(training, quantized=quantized, checkpointing=checkpointing, batch=batch)
            if changed.memory <= room:
                changes = ["distill.quantization: nf4"] if quantized and not training.quantized else []
                changes += ["distill.gradient_checkpointing: true"] if checkpointing and not same else []
                changes += [f"distill.batch_size: {batch}"] if batch < training.batch else []
                return f"set {' and '.join(changes)}"
    return "choose a smaller target"


def _other_speeds(transfer: Transfer, speeds: Mapping[str, Speed]) -> list[str]:
    return [
        f"{step} has no recorded speed of {transfer.models_of(step)} ({transfer.engine_of(step)}): this one is of"
        f" {speed.models} ({speed.engine}). `tuneshift run {transfer.name}` records its own."
        for step, speed in speeds.items()
        if speed.engine is not None and not speed.is_of(transfer)
    ]


def _idle(work: Workload, gpus: int) -> list[str]:
    calls = work.proposals.rows
    if calls >= gpus:
        return []
    return [
        f"A round has {calls} generator calls, so {gpus - calls} of {gpus} GPUs are idle while it generates: raise"
        " generator.calls_per_round and lower rounds."
    ]


def gigabytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB"
