"""``tuneshift plan``: does a run fit in this machine's memory, and how long does it take at the speeds recorded here?

Memory is arithmetic over the settings and the models' ``config.json``, without reading weights; time is rows times the
seconds that a row took in this store. docs/scaling.md has the formulas. Units: bytes, seconds, tokens; a row is a
generator call, a pair, a training example or a held-out answer.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from tuneshift_dag import TuneshiftError
from tuneshift_dag.config import Transfer
from tuneshift_dag.config.schema import Distill
from tuneshift_dag.home import database_file
from tuneshift_dag.method.evaluation import SCALES, texts_to_score
from tuneshift_dag.method.rehearsal import TOKENS
from tuneshift_dag.models.memory import BATCH_SHARE, gpu_count, total_bytes
from tuneshift_dag.models.references import Reference
from tuneshift_dag.store import Store

STEPS = ("synthetic_prompts", "scored_pairs", "rehearsal_set", "distilled_model", "evaluation")
# English text and these models' tokenizers: 3.9 over the packaged transfer's prompts.
_CHARACTERS_PER_TOKEN = 4
# QLoRA (arXiv 2305.14314) §3: 4 bits, and with double quantization 0.127 bits of constants, per parameter.
_FOUR_BIT_BYTES = 4.127 / 8
# What training keeps for the backward pass, in bytes per token, layer and (hidden + intermediate) width: 13.1 to 16.2
# counted with `torch.autograd.graph.saved_tensors_hooks` on Gemma 3 270M and SmolLM2-135M, bfloat16, LoRA rank 16.
_SAVED_BYTES = 16
# With gradient checkpointing that of one layer only, and the input of the others: one bfloat16 of the hidden width.
_INPUT_BYTES = 2
# Logits in bfloat16, their float32 copy and its gradient.
_LOGIT_BYTES = 10
# A LoRA weight, its gradient and AdamW's two moments, in float32 or in 8 bits.
_LORA_BYTES = {"adamw": 16, "paged_adamw_8bit": 10}
# The libraries of a process: what the packaged transfer's `seed_set` peaked at, less its model.
_PROCESS_BYTES = 800_000_000
# Share of the memory that an estimate may fill. A GPU loses the rest to the allocator's gaps (an assumption); on a CPU
# freed memory stays with the process: the packaged transfer's recorded peaks are 1.3 to 2.1 times the estimates.
_GPU_USABLE, _CPU_USABLE = 0.9, 0.5


def runs_on(transfer: Transfer, step: str) -> tuple[str | None, str | None]:
    """Models and engine of a step, as far as its speed depends on them; None of one whose speed isn't recorded."""
    config, engine = transfer.config, transfer.config.engine
    source, target = engine.base.model if engine.base else config.source.base, config.target.base
    here = f"ray, {engine.ray}" if engine.type == "ray" else "local"
    asked = str(engine.served_by or here)
    return {
        "synthetic_prompts": (config.generator.model, str(config.generator.server or here)),
        "scored_pairs": (source, asked),
        "rehearsal_set": (target, "local"),
        "distilled_model": (target, "local"),
        "evaluation": (f"{source}, {target}", asked),
    }.get(step, (None, None))


@dataclass(frozen=True)
class ModelSize:
    """The widths of a dense decoder with gated feed-forward layers (Llama, Qwen, Gemma, Mistral, SmolLM).

    ``attention`` is the width of all query heads together, ``keys`` that of all key heads, and of all value heads.
    """

    layers: int
    hidden: int
    intermediate: int
    attention: int
    keys: int
    vocabulary: int
    tied: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelSize":
        """From a ``config.json``; KeyError names a missing key, ValueError refuses a mixture of experts."""
        config = config.get("text_config", config)
        experts = next((key for key in ("num_local_experts", "num_experts", "n_routed_experts") if config.get(key)), "")
        if experts:
            raise ValueError(f"{experts} is {config[experts]}: a mixture of experts isn't modelled")
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        width = config.get("head_dim") or hidden // heads
        keys = (config.get("num_key_value_heads") or heads) * width
        shape = (config["num_hidden_layers"], hidden, config["intermediate_size"], heads * width, keys)
        return cls(*shape, config["vocab_size"], bool(config.get("tie_word_embeddings", True)))

    def weight_bytes(self, quantized: bool) -> float:
        """All weights; embeddings and head stay in 16 bits."""
        layers = self.layers * self.hidden * (2 * (self.attention + self.keys) + 3 * self.intermediate)
        ends = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return layers * (_FOUR_BIT_BYTES if quantized else 2) + 2 * ends

    def row_bytes(self, prompt: float, new: float, kv_bytes: int) -> float:
        """A row beside the weights, as the local engine counts it: three prompts' keys and values, of two prefills and
        of the growing cache, and three rows of logits."""
        return (3 * prompt + new) * self.layers * 2 * self.keys * kv_bytes + 3 * 2 * self.vocabulary

    def training_bytes(self, distill: Distill, tokens: float, response: float) -> float:
        """Weights, LoRA on every linear layer with its optimizer, and a pass of pairs of ``tokens`` tokens, of which
        the loss is on ``response``."""
        ends = 2 * (2 * self.hidden + self.attention + self.keys) + 3 * (self.hidden + self.intermediate)
        lora = self.layers * distill.rank * ends * _LORA_BYTES[distill.optimizer]
        layer, inputs = _SAVED_BYTES * (self.hidden + self.intermediate), self.layers * _INPUT_BYTES * self.hidden
        kept = layer + inputs if distill.gradient_checkpointing else self.layers * layer
        batch = distill.batch_size * (tokens * kept + response * self.vocabulary * _LOGIT_BYTES)
        return _PROCESS_BYTES + self.weight_bytes(distill.quantization != "none") + lora + batch


def model_sizes(transfer: Transfer) -> dict[str, ModelSize]:
    """Of the source, generator and target those that a process of ours loads; TuneshiftError when one's isn't known."""
    config = transfer.config
    elsewhere = {
        "source.base": config.engine.served_by or config.engine.ray.address,
        "generator.model": config.generator.server or config.engine.ray.address,
        "target.base": None,
    }
    sizes: dict[str, ModelSize] = {}
    for key in (key for key, server in elsewhere.items() if not server):
        reference, where = attrgetter(key)(config), f"{transfer.folder / 'transfer.yaml'}: {key}"
        file = Reference(reference, transfer.folder, where).config_file()
        try:
            if file is None:
                raise ValueError(f"{reference!r} isn't on this machine yet (`hf download {reference}` gets it)")
            sizes[key.partition(".")[0]] = ModelSize.from_config(json.loads(file.read_text("utf-8")))
        except (KeyError, ValueError) as error:
            problem = f"{file} has no {error}" if isinstance(error, KeyError) else error
            raise TuneshiftError(f"{where}: {problem}, so the memory that a run needs isn't known.") from error
    return sizes


@dataclass(frozen=True)
class Work:
    """Rows of each step in a run from nothing; ``recorded`` when former runs say how many prompts and pairs there are,
    else as many as the settings allow. ``prompt`` and ``response`` are mean tokens of a prompt and its response."""

    recorded: bool
    rounds: int
    rows: dict[str, int]
    prompt: float
    response: float

    def seconds(self, speeds: Mapping[str, "Speed"], steps: Iterable[tuple[str, str | None]]) -> dict[str, float]:
        """By step, of all (step, round) in ``steps`` that have a recorded speed."""
        found: dict[str, float] = {}
        for step, round_ in steps:
            if step in speeds and step in self.rows:
                rows = self.rows[step] / (self.rounds if round_ else 1)
                found[step] = found.get(step, 0.0) + rows * speeds[step].seconds_per_row
        return found


def work(store: Store, transfer: Transfer) -> Work:
    config, generator = transfer.config, transfer.config.generator
    counts = """
        SELECT (SELECT count(*) FROM proposals) AS calls, (SELECT count(*) FROM synthetic_prompts) AS prompts,
            (SELECT count(*) FROM filtered_dataset) AS kept, count(*) AS scored, avg(len(prompt)) AS characters,
            avg(fine_tuned_tokens) AS response FROM scored_pairs
    """
    row = store.read(counts, schema=transfer.name).row(0, named=True)
    per_call = row["prompts"] / row["calls"] if row["calls"] else generator.prompts_per_call
    prompts = max(1, round(generator.calls_per_round * min(per_call, generator.prompts_per_call)))
    share = row["kept"] / row["scored"] if row["scored"] else 1.0
    # A round that passes target_pairs is finished, and the last. What share is kept, only a run can tell.
    enough = math.ceil(config.target_pairs / max(1, prompts * share)) if row["scored"] else sys.maxsize
    rounds = min(len(transfer.round_keys), enough)
    pairs = min(round(rounds * prompts * share), config.target_pairs + prompts)
    examples = max(1, round(pairs * (1 - config.distill.validation_fraction))) * config.distill.epochs
    texts = config.distill.retain.texts if transfer.rehearses else 0
    if config.target_format.template is None:
        texts += texts // 2  # half of them are answers, to questions of its own
    # Source and target before, the target at every scale.
    measured = (3 + len(SCALES)) * len(transfer.heldout) + texts_to_score() if transfer.evaluates else 0
    rows = (rounds * generator.calls_per_round, rounds * prompts, texts, examples, measured)
    characters = row["characters"] or sum(map(len, transfer.seeds)) / len(transfer.seeds)
    response = min(row["response"] or math.inf, config.response.max_new_tokens)
    counted = {step: number for step, number in zip(STEPS, rows, strict=True) if number}
    return Work(bool(row["scored"]), rounds, counted, characters / _CHARACTERS_PER_TOKEN, response)


def memory(transfer: Transfer, needed: Work, total: float, usable: float) -> tuple[dict[str, float], list[str]]:
    """Bytes of each step that loads models here, and a line with its repair for each that doesn't fit in ``usable``, or
    only with smaller batches; TuneshiftError when a model's size isn't known."""
    config, generator, sizes = transfer.config, transfer.config.generator, model_sizes(transfer)
    quantized, kv_bytes = config.models.quantization != "none", 1 if config.models.kv_cache_dtype == "int8" else 2
    weights = {
        name: size.weight_bytes(config.generator_quantization != "none" if name == "generator" else quantized)
        for name, size in sizes.items()
    }
    # A process keeps what it has loaded until it trains, and loads the target once without and once with the adapter.
    answering = weights.get("source", 0.0) + weights.get("generator", 0.0)
    evaluating = weights.get("source", 0.0) + 2 * weights["target"]
    example = 1 + (needed.response if generator.mode == "by_response" else 0)
    call = len(generator.instruction) / _CHARACTERS_PER_TOKEN + generator.seeds_per_call * (needed.prompt + example)
    # The markup of a chat template is some ten tokens, and left out.
    around = "".join(config.source_format.around()) or config.source_format.system or ""
    template = len(around) / _CHARACTERS_PER_TOKEN
    asked = template + needed.prompt
    calls, pairs = (needed.rows[step] // needed.rounds for step in STEPS[:2])
    measured = (evaluating, asked, config.evaluation.max_new_tokens, len(transfer.heldout))
    answered = [
        ("synthetic_prompts", "generator", answering, call, generator.max_new_tokens, calls),
        ("scored_pairs", "source", answering, asked, config.response.max_new_tokens, pairs),
        ("rehearsal_set", "target", weights["target"], 0, TOKENS, needed.rows.get("rehearsal_set", 0)),
        ("evaluation", "source", *measured),
        ("evaluation", "target", *measured),
    ]
    found: dict[str, float] = {}
    repairs: dict[str, str] = {}
    lines: dict[str, str] = {}
    for step, model, resident, prompt, new, rows in answered:
        if model not in sizes or not rows:
            continue
        row, wanted = sizes[model].row_bytes(prompt, new, kv_bytes), min(config.models.batch_size, rows)
        batch = max(1, min(wanted, int(BATCH_SHARE * (total - resident) / row)))
        found[step] = max(found.get(step, 0.0), _PROCESS_BYTES + resident + batch * row)
        repairs[step] = _smaller_models(transfer, step)
        if batch < wanted and step not in ("rehearsal_set", "evaluation"):
            more = "; models.kv_cache_dtype: int8 makes room for more" if kv_bytes == 2 else ""
            lines[step] = f"{step} has memory for batches of {batch}, not {wanted}: it runs, slower{more}."
    longest = template + _longest_prompt(transfer) + config.response.max_new_tokens

    def training(distill: Distill) -> float:
        return sizes["target"].training_bytes(distill, longest, needed.response)

    found["distilled_model"] = training(config.distill)
    repairs["distilled_model"] = _smaller_training(config.distill, lambda distill: training(distill) <= usable)
    for step, bytes_ in found.items():
        if bytes_ > usable and step != "rehearsal_set":  # the training needs more, and says so
            lines[step] = (
                f"{step} needs about {bytes_ / 1e9:.1f} GB, and of this machine's memory a run can plan with"
                f" {usable / 1e9:.1f} GB: {repairs[step]}, or use more memory."
            )
    return found, [lines[step] for step in STEPS if step in lines]


def _longest_prompt(transfer: Transfer) -> float:
    """In tokens. No prompt is longer than what a generator call writes."""
    if transfer.max_prompt_characters is not None:
        return transfer.max_prompt_characters / _CHARACTERS_PER_TOKEN
    return transfer.config.generator.max_prompt_tokens or transfer.config.generator.max_new_tokens


def _smaller_models(transfer: Transfer, step: str) -> str:
    if transfer.config.models.quantization == "none":
        return "set models.quantization: nf4"
    if step == "evaluation":
        return "choose a smaller target"
    if transfer.config.generator_quantization == "none":
        return "set generator.quantization: nf4"
    return "put the models on a server that spreads them over several GPUs (docs/servers.md)"


def _smaller_training(distill: Distill, fits: Callable[[Distill], bool]) -> str:
    """The smallest change of ``distill`` that makes the training fit."""
    nf4, checkpointing = {"quantization": "nf4"}, {"gradient_checkpointing": True}
    for change in ({}, checkpointing, nf4, nf4 | checkpointing):
        for batch in (distill.batch_size, *(size for size in (16, 8, 4, 2, 1) if size < distill.batch_size)):
            update = {**change, "batch_size": batch}
            if fits(distill.model_copy(update=update)):
                changed = [f"distill.{k}: {str(v).lower()}" for k, v in update.items() if v != getattr(distill, k)]
                return f"set {' and '.join(changed)}"
    return "choose a smaller target"


def this_machine(transfer: Transfer) -> tuple[float, float]:
    """Bytes that a model of this transfer has on this machine, and those of them that a run can plan with."""
    total = total_bytes(1 if transfer.config.models.device_map == "single" else None)
    return total, total * (_GPU_USABLE if gpu_count() else _CPU_USABLE)


def run_warnings(transfer: Transfer) -> list[str]:
    """What a run on this machine won't have the memory for; nothing where models' sizes aren't known yet."""
    try:
        return memory(transfer, work(Store(database_file()), transfer), *this_machine(transfer))[1]
    except TuneshiftError:
        return []


@dataclass(frozen=True)
class Speed:
    """How fast a step ran: which ``models``, on which ``engine``; None when an older version recorded it."""

    step: str
    seconds_per_row: float
    recorded_at: str
    models: str | None
    engine: str | None

    def is_of(self, transfer: Transfer) -> bool:
        return (self.models, self.engine) == runs_on(transfer, self.step)


def recorded_speeds(store: Store, transfer: Transfer) -> list[Speed]:
    """Of each step with each engine and models the last run in which all was computed, by step, latest first."""
    calls = 4 if transfer.config.engine.cross_scores else 2
    found = store.read(_SPEEDS, {"calls": calls}, transfer.name).iter_rows(named=True)
    return sorted((Speed(**row) for row in found), key=lambda speed: STEPS.index(speed.step))


_SPEEDS = """
    WITH ran AS (
        SELECT asset AS step, sum(seconds) AS seconds, sum(model_calls) / if(asset = 'scored_pairs', $calls, 1) AS done,
            max(finished_at) AS finished, models, engine
        FROM steps
        WHERE model_calls > 0 AND cache_hits = 0
            AND asset IN ('synthetic_prompts', 'scored_pairs', 'rehearsal_set', 'evaluation')
        GROUP BY asset, models, engine, batch_id
        UNION ALL
        SELECT 'distilled_model', seconds, (settings ->> 'epochs')::INTEGER
            * greatest(1, round_even(pairs * (1 - (settings ->> 'validation_fraction')::DOUBLE), 0)),
            created_at, target, if(target IS NULL, NULL, 'local')
        FROM distilled_models
    )
    SELECT step, seconds / done AS seconds_per_row, strftime(finished, '%Y-%m-%d %H:%M') AS recorded_at, models, engine
    FROM ran QUALIFY row_number() OVER (PARTITION BY step, models, engine ORDER BY finished DESC) = 1
    ORDER BY finished DESC
"""


def chosen_speeds(recorded: Sequence[Speed], transfer: Transfer) -> dict[str, Speed]:
    """Of each step the speed of the transfer's own models and engine; else one of unknown ones, else the last."""
    chosen: dict[str, Speed] = {}
    for speed in sorted(recorded, key=lambda speed: 0 if speed.is_of(transfer) else 1 if speed.engine is None else 2):
        chosen.setdefault(speed.step, speed)
    return chosen


def plan(store: Store, transfer: Transfer) -> dict[str, Any]:
    """Rows, memory and seconds of each step of a run from nothing, as one JSON-ready object. None is the memory where
    models run elsewhere or have no known size, and the seconds without a recorded speed; ``warnings`` say why."""
    needed, recorded = work(store, transfer), recorded_speeds(store, transfer)
    total, usable = this_machine(transfer)
    try:
        bytes_, warnings = memory(transfer, needed, total, usable)
    except TuneshiftError as error:
        bytes_, warnings = {}, [str(error)]
    speeds = chosen_speeds(recorded, transfer)
    seconds = needed.seconds(speeds, [(step, None) for step in STEPS])
    missing = [step for step in needed.rows if step not in seconds]
    records = f"`tuneshift run {transfer.name}` records"
    if missing:
        warnings.append(f"No speed of {', '.join(missing)} is recorded yet: {records} it.")
    warnings += [
        "{} has no recorded speed of {} ({}): this one is of".format(step, *runs_on(transfer, step))
        + f" {speed.models} ({speed.engine}). {records} its own."
        for step, speed in speeds.items()
        if speed.engine is not None and not speed.is_of(transfer)
    ]
    peaks = dict(store.read("SELECT asset, max(peak_bytes) FROM steps GROUP BY asset", schema=transfer.name).rows())
    steps = {
        step: {"rows": rows, "memory_bytes": bytes_.get(step), "recorded_peak_bytes": peaks.get(step)}
        | {"seconds": seconds.get(step), "speed": vars(speeds[step]) if step in speeds else None}
        for step, rows in needed.rows.items()
    }
    return {
        "transfer": transfer.name,
        "memory_bytes": total,
        "usable_bytes": usable,
        "counts": "recorded" if needed.recorded else "the most that transfer.yaml allows",
        "rounds": needed.rounds,
        "steps": steps,
        "total_seconds": None if missing else sum(seconds.values()),
        "recorded_speeds": [vars(speed) for speed in recorded],
        "warnings": warnings,
    }
