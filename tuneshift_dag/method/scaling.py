"""What a transfer costs on a number of GPUs: seconds, memory and the bottleneck, by arithmetic alone.

A roofline: reading a prompt and training are bound by floating-point operations, a decode step by the larger of
operations and bytes read. Both limits are divided by the fraction of them that is reached. `docs/scaling.md` derives
the formulas; nothing here reads a file or loads a model.

Units: seconds, bytes, tokens, floating-point operations. Lengths are means over rows unless they say longest.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Phase = Literal["decode", "prefill", "launch"]

STEPS = ("synthetic_prompts", "scored_pairs", "distilled_model", "evaluation")
# QLoRA (arXiv 2305.14314) §3: 4 bits, and with double quantization 0.127 bits of constants, per parameter.
_FOUR_BIT_BYTES = 4.127 / 8
# What training keeps for the backward pass, in bytes per token, layer and (hidden + intermediate) width: 13.1 to 16.2
# counted with `torch.autograd.graph.saved_tensors_hooks` on Gemma 3 270M and SmolLM2-135M, bfloat16, LoRA rank 16.
_SAVED_BYTES = 16
# Logits in bfloat16, their float32 copy and its gradient.
_LOGIT_BYTES = 10
# With gradient checkpointing that of one layer only, and the input of the others: one bfloat16 of the hidden width.
_INPUT_BYTES = 2
# A LoRA weight, its gradient and AdamW's two moments, in float32 or in 8 bits.
_LORA_BYTES = 16
_LORA_BYTES_8BIT = 10
# The libraries of a process: what the packaged transfer's `seed_set` peaked at, less its model.
_PROCESS_BYTES = 800_000_000
# As `tuneshift_dag.models.batching`: the share of the free memory that a batch may plan with.
_BATCH_SHARE = 0.5
# Where freed memory stays with the process, on a CPU, the packaged transfer's recorded peaks are 1.3 to 2.1 times the
# estimates.
CPU_USABLE = 0.5
# A head this wide is assumed of a model whose config.json isn't known (Llama 3's vocabulary).
_VOCABULARY = 128_256


_BOUNDS: dict[Phase, str] = {
    "decode": "decoding",
    "prefill": "reading prompts",
    "launch": "starting kernels",
}


@dataclass(frozen=True)
class Hardware:
    """What one GPU can do: dense bfloat16 operations per second, bytes per second from its memory, bytes of memory.

    ``launch``: seconds that plain PyTorch needs to start the kernels of one layer, whatever their size. The gpt-fast
    report (pytorch.org/blog/accelerating-generative-ai-2) gives 25.5 tokens per second for Llama 7B, 32 layers, batch
    1, on an A100 that only waits for the CPU: 1.2 ms a layer.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    launch: float = 1 / 25.5 / 32
    usable: float = 0.9
    """Share of the memory that an estimate may fill; the rest is lost to the allocator's gaps (an assumption)."""


# NVIDIA's data sheets, dense (half of what is printed "with sparsity"), the SXM version where there are several.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Hardware("h200", 989e12, 4.8e12, 141e9),  # H200 Tensor Core GPU data sheet: 1,979 with sparsity
        Hardware("h100", 989e12, 3.35e12, 80e9),  # H100 Tensor Core GPU data sheet, SXM: 1,979 with sparsity
        Hardware("a100", 312e12, 2.039e12, 80e9),  # A100 80GB data sheet, SXM
        Hardware("l40s", 362e12, 0.864e12, 48e9),  # L40S data sheet
        Hardware("a10", 125e12, 0.6e12, 24e9),  # A10 data sheet
        Hardware("l4", 121e12, 0.3e12, 24e9),  # L4 data sheet: 242 with sparsity
        # No GPU: two cores of an AMD EPYC with AVX512_BF16 (benchmarks/README.md, `fraction_of_limit`).
        Hardware("cpu", 1.016e12, 46.7e9, 16e9, launch=0, usable=CPU_USABLE),
    )
}


@dataclass(frozen=True)
class Fractions:
    """How much of the limit is reached. Measured on a CPU with models of 135M and 270M; for a GPU an assumption.

    `decode` and `prefill`: benchmarks/README.md, `fraction_of_limit` of the AMD EPYC, at 96 rows. `training`: the
    packaged transfer's recorded training there, 307.9 s, whose limit by the formulas here is 87 s.
    """

    decode: float = 0.36
    prefill: float = 0.41
    training: float = 0.28


@dataclass(frozen=True)
class ModelSize:
    """The widths of a dense decoder with gated feed-forward layers (Llama, Qwen, Gemma, Mistral, SmolLM).

    Args:
        attention: width of all query heads together.
        keys: width of all key heads together, and of all value heads.
        tied: whether the head is the embedding table.
        kv_bits: of a number of the keys and values that are kept.
    """

    layers: int
    hidden: int
    intermediate: int
    attention: int
    keys: int
    vocabulary: int
    tied: bool
    kv_bits: int = 16

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelSize":
        """From a ``config.json`` as transformers writes it.

        Raises:
            KeyError: naming a key that isn't there.
            ValueError: for a mixture of experts, whose active and stored parameters differ.
        """
        config = config.get("text_config", config)
        experts = next((key for key in ("num_local_experts", "num_experts", "n_routed_experts") if config.get(key)), "")
        if experts:
            raise ValueError(f"{experts} is {config[experts]}: a mixture of experts isn't modelled")
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        width = config.get("head_dim") or hidden // heads
        return cls(
            layers=config["num_hidden_layers"],
            hidden=hidden,
            intermediate=config["intermediate_size"],
            attention=heads * width,
            keys=(config.get("num_key_value_heads") or heads) * width,
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", True)),
        )

    @classmethod
    def of(cls, parameters: float) -> "ModelSize":
        """A usual shape of that many parameters: 128 times as wide as deep, a quarter of the heads for the keys.

        Llama 3.1 8B is 4,096 wide and has 32 layers; this gives 4,215 and 33.
        """
        hidden = 4096.0
        for _ in range(20):  # a layer of `from_config`'s `body` has 13 `hidden`² parameters
            embeddings = min(2 * _VOCABULARY * hidden, parameters / 4)
            hidden = ((parameters - embeddings) * 128 / 13) ** (1 / 3)
        width = round(hidden)
        vocabulary = round(embeddings / 2 / hidden)
        layers = max(1, round(hidden / 128))
        return cls(layers, width, round(3.5 * width), width, width // 4, vocabulary, tied=False)

    @property
    def body(self) -> int:
        """Parameters of all layers."""
        attention = 2 * self.hidden * (self.attention + self.keys)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.body + self.head * (1 if self.tied else 2)

    def body_bytes(self, quantized: bool) -> float:
        return self.body * (_FOUR_BIT_BYTES if quantized else 2)

    def weight_bytes(self, quantized: bool) -> float:
        """All weights; embeddings and head stay in 16 bits."""
        return self.body_bytes(quantized) + 2 * (self.parameters - self.body)

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token, as attention reads them: 16 bits, whatever they are kept in."""
        return self.layers * 2 * self.keys * 2

    def lora_parameters(self, rank: int) -> int:
        """Of a LoRA on every linear layer of the body."""
        ends = 2 * (2 * self.hidden + self.attention + self.keys) + 3 * (self.hidden + self.intermediate)
        return self.layers * rank * ends


@dataclass(frozen=True)
class Answers:
    """Rows that one model reads and answers, in batches.

    Args:
        rows: in one round.
        batch: most rows at once.
        prompt: tokens that each row reads for itself.
        response: tokens generated; the batch goes on, with few rows, until its longest.
        shared: tokens that open every prompt of a batch, and are read once.
        scored: given tokens that are read and scored after the prompt (the other model's response).
        split: whether rows are divided among the GPUs.
        eager: plain PyTorch, which starts each kernel by itself; servers record them once.
    """

    model: ModelSize
    quantized: bool
    rows: int
    batch: int
    prompt: float
    response: float
    longest: float
    shared: float = 0
    scored: float = 0
    split: bool = True
    eager: bool = True

    @property
    def row_bytes(self) -> float:
        """What a row needs beside the weights, as the local engine counts it: three prompts' keys and values, of two
        prefills and of the growing cache, and three rows of logits."""
        tokens = 3 * (self.shared + self.prompt) + self.longest
        return tokens * self.model.kv_bytes * self.model.kv_bits / 16 + 3 * 2 * self.model.vocabulary

    def fitting(self, room: float) -> "Answers":
        """With a batch that the engine would choose in ``room`` bytes beside the weights; at least one row."""
        return replace(self, batch=max(1, min(self.batch, int(_BATCH_SHARE * room / self.row_bytes))))

    def seconds(self, gpu: Hardware, fractions: Fractions, gpus: int) -> dict[Phase, float]:
        """Of one round, on the GPU with the most rows, by what bounds it."""
        rows = math.ceil(self.rows / gpus) if self.split else self.rows
        full, rest = divmod(rows, self.batch)
        total: dict[Phase, float] = {"decode": 0.0, "prefill": 0.0, "launch": 0.0}
        launch = gpu.launch * self.model.layers if self.eager else 0.0
        for size, times in ((self.batch, full), (rest, 1)):
            passes: list[tuple[Phase, float, float]] = [
                ("prefill", 1, self._prefill(gpu, size) / fractions.prefill),
                ("decode", self.response, self._step(gpu, size) / fractions.decode),
                ("decode", max(0.0, self.longest - self.response), self._step(gpu, 1) / fractions.decode),
            ]
            for phase, count, seconds in passes if size else ():
                total["launch" if launch > seconds else phase] += times * count * max(launch, seconds)
        return total

    def _prefill(self, gpu: Hardware, rows: int) -> float:
        tokens = self.shared + rows * (self.prompt + self.scored)
        operations = 2 * self.model.body * tokens + 2 * self.model.head * rows * (1 + self.scored)
        return max(operations / gpu.flops, self._weights / gpu.bandwidth)

    def _step(self, gpu: Hardware, rows: int) -> float:
        """One token for each row: every weight and every key and value is read once."""
        context = self.shared + self.prompt + self.response / 2
        read = self._weights + rows * context * self.model.kv_bytes
        return max(read / gpu.bandwidth, rows * 2 * (self.model.body + self.model.head) / gpu.flops)

    @property
    def _weights(self) -> float:
        return self.model.body_bytes(self.quantized) + 2 * self.model.head


@dataclass(frozen=True)
class Training:
    """LoRA training on one GPU.

    Args:
        examples: seen in all epochs together.
        tokens: of an example, prompt and response.
        response: those of them that the loss is on.
        longest: tokens of the longest example.
        checkpointing: whether only the layers' inputs are kept, and each layer computed again in the backward pass.
        moments_8bit: whether AdamW's moments are in 8 bits.
    """

    model: ModelSize
    quantized: bool
    examples: int
    batch: int
    rank: int
    tokens: float
    response: float
    longest: float
    checkpointing: bool = False
    moments_8bit: bool = False

    def seconds(self, gpu: Hardware, fractions: Fractions) -> float:
        """Forward and the gradient of the activations, 2 operations each a weight; of LoRA weights 2 more; with
        checkpointing the forward of the layers twice."""
        again = 1 if self.checkpointing else 0
        lora = self.model.lora_parameters(self.rank)
        weights = 4 * self.model.body + 6 * lora + again * 2 * (self.model.body + lora)
        operations = self.examples * (self.tokens * weights + self.response * 4 * self.model.head)
        steps = math.ceil(self.examples / self.batch)
        read = steps * ((2 + again) * self.model.body_bytes(self.quantized) + 4 * self.model.head)
        limit = max(operations / gpu.flops, read / gpu.bandwidth)
        # Forward and backward; that backward starts as many kernels is an assumption.
        return max(limit / fractions.training, steps * (2 + again) * gpu.launch * self.model.layers)

    @property
    def memory(self) -> float:
        """Weights, LoRA with its optimizer, activations and logits of one pass of the longest examples."""
        layer, layers = _SAVED_BYTES * (self.model.hidden + self.model.intermediate), self.model.layers
        kept = layer + layers * _INPUT_BYTES * self.model.hidden if self.checkpointing else layers * layer
        activations = self.longest * kept
        logits = self.response * self.model.vocabulary * _LOGIT_BYTES
        lora = (_LORA_BYTES_8BIT if self.moments_8bit else _LORA_BYTES) * self.model.lora_parameters(self.rank)
        return _PROCESS_BYTES + self.model.weight_bytes(self.quantized) + lora + self.batch * (activations + logits)


@dataclass(frozen=True)
class Workload:
    """The steps of a transfer that run models."""

    rounds: int
    proposals: Answers
    pairs: Sequence[Answers]
    """The base and the fine-tuned source model; then its samples and the target's scores, if there are any."""
    training: Training
    evaluation: Sequence[Answers]
    """The models that answer the held-out file; none without one."""
    resident: Mapping[str, float]
    """Bytes of the weights that a process holds during `synthetic_prompts`, `scored_pairs` and `evaluation`."""


@dataclass(frozen=True)
class Estimate:
    """What a number of GPUs would take.

    Args:
        seconds: of each step, all rounds.
        sequential: seconds of each step that no number of GPUs makes shorter.
        memory: of each step, on one GPU.
        batch: rows at once in each step that answers, as many as fit.
    """

    gpus: int
    seconds: dict[str, float]
    phases: dict[str, dict[Phase, float]]
    sequential: dict[str, float]
    memory: dict[str, float]
    batch: dict[str, int]

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def gpu_hours(self) -> float:
        """Of all GPUs for the whole time: they are rented also while they wait."""
        return self.gpus * self.total_seconds / 3600

    @property
    def bottleneck(self) -> str:
        """The step that takes longest, and what bounds it."""
        step = max(self.seconds, key=lambda name: self.seconds[name])
        if step == "distilled_model":
            return f"{step}, which isn't divided"
        if self.gpus > 1 and self.sequential[step] > self.seconds[step] / 2:
            return f"{step}, " + (
                "whose target isn't divided" if step == "evaluation" else "as rounds wait for each other"
            )
        phases = self.phases.get(step)
        if not phases:
            return step
        phase = max(phases, key=lambda name: phases[name])
        return f"{step}, {_BOUNDS[phase]}"


def estimate(
    work: Workload,
    gpu: Hardware,
    gpus: int,
    fractions: Fractions | None = None,
    recorded: Mapping[str, float] | None = None,
) -> Estimate:
    """What ``work`` takes on ``gpus`` of this kind.

    Args:
        recorded: seconds per row of a step (per example of `distilled_model`) in a former run, used in place of the
            roofline. A smaller batch is assumed to take as long as a full one, so that only whole batches are divided.
    """
    reached, speeds = fractions or Fractions(), recorded or {}
    steps = {"synthetic_prompts": [work.proposals], "scored_pairs": list(work.pairs)}
    if work.evaluation:
        steps["evaluation"] = list(work.evaluation)
    fitting = {
        name: [part.fitting(gpu.memory - work.resident[name]) for part in parts] for name, parts in steps.items()
    }

    def run(count: int) -> tuple[dict[str, float], dict[str, dict[Phase, float]]]:
        seconds: dict[str, float] = {}
        phases: dict[str, dict[Phase, float]] = {}
        for name, parts in fitting.items():
            rounds = 1 if name == "evaluation" else work.rounds
            if name in speeds:
                seconds[name] = rounds * _recorded_rows(name, parts, count) * speeds[name]
                continue
            each = [part.seconds(gpu, reached, count) for part in parts]
            phases[name] = {phase: rounds * sum(one[phase] for one in each) for phase in each[0]}
            seconds[name] = sum(phases[name].values())
        trained = speeds.get("distilled_model")
        seconds["distilled_model"] = (
            work.training.seconds(gpu, reached) if trained is None else work.training.examples * trained
        )
        return {step: seconds[step] for step in STEPS if step in seconds}, phases

    seconds, phases = run(gpus)
    endless, _ = run(max(part.rows for parts in steps.values() for part in parts))
    memory = {
        name: _PROCESS_BYTES + work.resident[name] + max(min(p.batch, p.rows) * p.row_bytes for p in parts)
        for name, parts in fitting.items()
    }
    return Estimate(
        gpus,
        seconds,
        phases,
        endless,
        memory | {"distilled_model": work.training.memory},
        {name: min(part.batch for part in parts) for name, parts in fitting.items()},
    )


def _recorded_rows(name: str, parts: Sequence[Answers], gpus: int) -> int:
    """Rows one after another on the GPU with the most. A scored pair is one row; an evaluated prompt one per model."""
    rows = []
    for part in parts:
        batches = math.ceil(part.rows / part.batch)
        share = math.ceil(batches / gpus) if part.split else batches
        rows.append(min(part.rows, share * part.batch))
    return sum(rows) if name == "evaluation" else rows[0]
