"""The in-process engine: one resident base model, its adapter switched on or off per batch.

Its preflight answers whether the adapter is really applied: several libraries drop one without a word when its keys
don't match the model, and then both perplexities are equal."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from safetensors import safe_open

from tuneshift_dag import TuneshiftError
from tuneshift_dag.engines import decoding as loop
from tuneshift_dag.engines.kv_cache import KVDtype
from tuneshift_dag.method import SIDES, AdapterCheck, Decoding, Engine, Pair, PromptFormat, Response, Side
from tuneshift_dag.models import memory
from tuneshift_dag.models.capabilities import check_head, head_logits, start_ids
from tuneshift_dag.models.loading import (
    ADAPTER,
    DeviceMap,
    Quantization,
    dtype_name,
    load_for_inference,
    load_tokenizer,
    pack,
)
from tuneshift_dag.models.prompts import prompt_ids
from tuneshift_dag.models.references import ModelFiles, quantized_dir

T = TypeVar("T")
# Raised by hand when a change to the decode loop changes its outputs.
_ENGINE_VERSION = "local-1"


@dataclass(eq=False)
class LocalEngine(Engine):
    """A base model and its adapter with transformers, PEFT and bitsandbytes, loaded at first use: a step that finds
    everything in the cache loads nothing."""

    base: ModelFiles
    adapter: ModelFiles | None = None
    quantization: Quantization = "nf4"
    compute_dtype: str = "auto"
    batch_size: int = 32
    device_map: DeviceMap = "auto"
    kv_cache_dtype: KVDtype = "auto"
    workers: int = 1
    """Processes on a CPU that do batches side by side; without effect on a GPU."""
    _model: Any = field(default=None, init=False, repr=False)
    cross_scores = True

    def __post_init__(self) -> None:
        self.compute_dtype = dtype_name(self.compute_dtype)
        if torch.cuda.is_available():
            self.workers = 1

    @property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.base)

    @property
    def model(self) -> Any:
        if self._model is None:
            memory.keep_few_kernels()
            dtype = getattr(torch, self.compute_dtype)
            self._model = load_for_inference(self.base, self.adapter, self.quantization, dtype, self.device_map)
            pack(self._model)
            with loop.contiguous_head(self._model):
                check_head(self._model)
            memory.trim()
            memory.drop_file_pages(quantized_dir())
        return self._model

    def fingerprint(self, side: Side) -> str:
        parts = [_ENGINE_VERSION, self.base.fingerprint, self.quantization, self.compute_dtype]
        if self.kv_cache_dtype != "auto":
            parts.append(f"kv-{self.kv_cache_dtype}")
        if side == "fine_tuned":
            if self.adapter is None:
                raise ValueError("this engine has no adapter")
            parts.append(self.adapter.fingerprint)
        return "|".join(parts)

    def encode(self, text: str, templated: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=not templated).input_ids)

    def render_chat(self, message: str) -> str:
        if not self.tokenizer.chat_template:
            raise TuneshiftError(
                f"{self.base.reference} has no chat template: it is a base model. Set generator.mode to continuation."
            )
        chat = [{"role": "user", "content": message}]
        return str(self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))

    def prompt_ids(self, prompt: str, format: PromptFormat) -> list[int]:
        return prompt_ids(self.tokenizer, format, prompt)

    def check_adapter(self, prompts: Sequence[list[int]]) -> AdapterCheck:
        assert self.adapter is not None, "only an engine with an adapter can be checked"
        with safe_open(self.adapter.path / "adapter_model.safetensors", "pt") as saved:
            problems = unplaced_tensors(self.model, list(saved.keys()))
        logits = {}
        for side in SIDES:
            with self.side(side) as model:
                logits[side] = head_logits(model, loop.prefill(model, prompts).hidden)
        update_norm = _update_norm(self.model)
        if update_norm == 0:
            problems.append("the adapter's weights are zero: it changes nothing")
        difference = float((logits["base"] - logits["fine_tuned"]).abs().max())
        if difference == 0:
            problems.append("the base and the fine-tuned model give equal logits on every seed")
        surest = (float(logits[side].log_softmax(1).max(1).values.mean()) for side in SIDES)
        warnings = AdapterCheck.confidence_warnings("the first token", *surest)
        return AdapterCheck(problems, warnings, difference, update_norm)

    def generate(
        self, prompts: Sequence[list[int]], side: Side, decoding: Decoding, seeds: Sequence[int] | None = None
    ) -> Iterator[list[tuple[int, Response]]]:
        def work(batch: list[int]) -> list[Response]:
            with self.side(side) as model:
                prefix = loop.prefill(model, [prompts[i] for i in batch], decoding.max_new_tokens, self.kv_cache_dtype)
                own_seeds = [seeds[i] for i in batch] if seeds else None
                return loop.decode(model, self.tokenizer, prefix, decoding, own_seeds, keep_prefix=False)

        yield from self._batches(prompts, decoding, work)

    def pairs(
        self, prompts: Sequence[list[int]], known: Sequence[dict[Side, Response]], decoding: Decoding
    ) -> Iterator[list[tuple[int, Pair]]]:
        """Each side prefills a prompt once; its keys and values serve both decoding and cross scoring."""

        def work(batch: list[int]) -> list[Pair]:
            first, second = SIDES
            responses: dict[Side, list[Response]] = {}
            cross: dict[Side, list[float]] = {}
            rows = [prompts[i] for i in batch]
            with self.side(first) as model:
                prefix = loop.prefill(model, rows, decoding.max_new_tokens, self.kv_cache_dtype)
                responses[first] = self._respond(model, prefix, [known[i].get(first) for i in batch], decoding, True)
            # The second side scores before it decodes, so that its prompts needn't be held while its cache grows.
            with self.side(second) as model:
                other = loop.prefill(model, rows, decoding.max_new_tokens, self.kv_cache_dtype)
                cross[second] = loop.score(model, other, [r.token_ids for r in responses[first]])
                responses[second] = self._respond(model, other, [known[i].get(second) for i in batch], decoding, False)
            with self.side(first) as model:
                cross[first] = loop.score(model, prefix, [r.token_ids for r in responses[second]])
            return list(map(Pair, responses["base"], responses["fine_tuned"], cross["base"], cross["fine_tuned"]))

        yield from self._batches(prompts, decoding, work)

    def score(
        self, prompts: Sequence[list[int]], responses: Sequence[list[int]], side: Side
    ) -> Iterator[list[tuple[int, float]]]:
        start, longest = start_ids(self.tokenizer), max(map(len, responses), default=0)

        def work(batch: list[int]) -> list[float]:
            with self.side(side) as model:
                prefix = loop.prefill(model, [prompts[i] or start for i in batch], longest, self.kv_cache_dtype)
                return loop.score(model, prefix, [responses[i] for i in batch])

        whole = [p + r for p, r in zip(prompts, responses, strict=True)]
        yield from self._batches(whole, Decoding(longest), work)

    def _respond(
        self, model: Any, prefix: loop.Prefix, known: list[Response | None], decoding: Decoding, keep_prefix: bool
    ) -> list[Response]:
        """A response to every row: the known one, or a new one."""
        missing = [row for row, response in enumerate(known) if response is None]
        if missing:
            own = prefix if len(missing) == len(known) else prefix.select(missing)
            new = loop.decode(model, self.tokenizer, own, decoding, keep_prefix=keep_prefix and own is prefix)
            for row, response in zip(missing, new, strict=True):
                known[row] = response
        return [response for response in known if response is not None]

    @contextmanager
    def side(self, side: Side) -> Iterator[Any]:
        """The model with the adapter on (``fine_tuned``) or off (``base``)."""
        with loop.contiguous_head(self.model):
            if side == "base" and self.adapter is not None:
                with self.model.disable_adapter():
                    yield self.model
            else:
                yield self.model

    def _batches(
        self, prompts: Sequence[list[int]], decoding: Decoding, work: Callable[[list[int]], list[T]]
    ) -> Iterator[list[tuple[int, T]]]:
        def row(length: int) -> int:
            # Two prefills, the tokens that follow one, and a copy of a prefill where some responses are known.
            tokens = 3 * length + decoding.max_new_tokens
            return loop.bytes_per_row(self.model, tokens, logits=1, kv_dtype=self.kv_cache_dtype)

        lengths = [len(p) for p in prompts]
        _ = self.model  # before a worker is forked, which then has it too
        for batch, results in memory.in_batches(lengths, self.batch_size, row, work, self.workers):
            yield list(zip(batch, results, strict=True))


def unplaced_tensors(model: Any, saved: Sequence[str]) -> list[str]:
    """Problems with the names of an adapter's saved tensors: each must have a place in the loaded model."""
    places = {name.replace(f".{ADAPTER}.", ".") for name, _ in model.named_parameters() if "lora_" in name}
    unknown, unfilled = sorted(set(saved) - places), sorted(places - set(saved))
    problems = []
    if unknown:
        problems.append(f"{len(unknown)} adapter tensors have no place in the base model, first {unknown[0]!r}")
    if unfilled:
        problems.append(f"{len(unfilled)} LoRA layers got no weights from the adapter, first {unfilled[0]!r}")
    return problems


def _update_norm(model: Any) -> float:
    """Frobenius norm of the low-rank updates, summed over layers (a product B·A of zero adds nothing)."""
    total = 0.0
    for module in model.modules():
        for name in getattr(module, "lora_A", {}):
            a, b = (part[name].weight.detach().float() for part in (module.lora_A, module.lora_B))
            total += float((b @ a).norm()) * abs(module.scaling[name])
    return total
