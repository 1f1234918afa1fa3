"""The in-process engine: one resident base model, its adapter switched on or off per batch.

Its preflight answers whether the adapter is really applied: several libraries drop one without a word when its keys
don't match the model, and then both perplexities are equal."""

import gc
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import Linear
from peft.tuners.lora.bnb import Linear4bit
from transformers import GenerationConfig

from tuneshift_dag import TuneshiftError
from tuneshift_dag.engines import decoding as own_loop
from tuneshift_dag.engines import generic
from tuneshift_dag.engines.kv_cache import KVDtype
from tuneshift_dag.engines.rows import Rows
from tuneshift_dag.engines.server_process import stop_all
from tuneshift_dag.method import (
    SIDES,
    WHOLE_ROUND,
    AdapterCheck,
    Decoding,
    Engine,
    Pair,
    PromptFormat,
    Response,
    Side,
    Target,
)
from tuneshift_dag.models import memory
from tuneshift_dag.models.capabilities import check_finite, end_ids, has_own_loop, start_ids
from tuneshift_dag.models.loading import (
    DeviceMap,
    Quantization,
    dtype_name,
    load_for_inference,
    load_tokenizer,
    pack,
)
from tuneshift_dag.models.prompts import opening_ids, prompt_ids
from tuneshift_dag.models.references import ModelFiles, quantized_dir

T = TypeVar("T")
_LOG = logging.getLogger("tuneshift_dag")
# Raised by hand when a change to the decode loop changes its outputs.
_ENGINE_VERSION = "local-1"
# Preflight: tokens of the answers that are compared with a plain forward pass, and how far they may be from it, in nats
# per token: in bfloat16 rounding alone makes 0.035, and a cache that isn't what the model keeps makes more than 1.
_CHECKED_TOKENS = 4
_SAME_ANSWER = 0.3


@dataclass(eq=False)
class LocalEngine(Engine, Target):
    """A base model and its fine-tuned side with transformers, PEFT and bitsandbytes, loaded at first use: a step that
    finds everything in the cache loads nothing. Fine-tuned is the base with an adapter, or a model of its own."""

    base: ModelFiles
    adapter: ModelFiles | None = None
    quantization: Quantization = "nf4"
    compute_dtype: str = "auto"
    batch_size: int = 32
    device_map: DeviceMap = "auto"
    kv_cache_dtype: KVDtype = "auto"
    workers: int | None = None
    """Processes on a CPU that do batches side by side; None for one per thread that PyTorch has."""
    fine_tuned: ModelFiles | None = None
    """The whole fine-tuned model, in the place of ``adapter``."""
    scale: float = field(default=1.0, init=False)
    """Factor of the adapter's update: see `scaled`."""
    _loaded: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """By fingerprint."""
    _loop: Any = field(default=None, init=False, repr=False)
    """The module `decoding`, or `generic` for a family that it doesn't serve."""
    _lender: "LocalEngine | None" = field(default=None, init=False, repr=False)
    """Whose model this one uses, with another scale."""
    _fits: bool | None = field(default=None, init=False, repr=False)
    cross_scores = True

    def __post_init__(self) -> None:
        self.compute_dtype = dtype_name(self.compute_dtype)
        # They are forked, which other systems' libraries don't take well.
        own = torch.get_num_threads() if sys.platform == "linux" else 1
        self.workers = 1 if torch.cuda.is_available() else self.workers or own
        if self.fine_tuned is not None:
            self.chunk_size = WHOLE_ROUND

    @property
    def tokenizer(self) -> Any:
        """That of the fine-tuned side, which may have learned tokens of its own; else the base's."""
        tuned = self.fine_tuned or self.adapter
        return load_tokenizer(tuned, self.base) if tuned else load_tokenizer(self.base)

    @property
    def model(self) -> Any:
        """The base, with the adapter if there is one."""
        return self._model("base")

    @property
    def one_at_a_time(self) -> bool:
        """Whether base and fine-tuned are two models of which the memory holds one."""
        if self.fine_tuned is None:
            return False
        if self._fits is None:
            # Both are of one size.
            self._fits = self.model.get_memory_footprint() < memory.free_bytes() * memory.BATCH_SHARE
        return not self._fits

    def _model(self, side: Side) -> Any:
        if self._lender is not None:
            model = self._lender._model(side)
            self._loop = self._lender._loop
            return model
        files = self._files(side)
        if files.fingerprint not in self._loaded:
            if self._loaded and self.one_at_a_time:
                self._loaded.clear()
                gc.collect()
            self._loaded[files.fingerprint] = self._load(files)
        return self._loaded[files.fingerprint]

    def _files(self, side: Side) -> ModelFiles:
        return self.fine_tuned if self.fine_tuned is not None and side == "fine_tuned" else self.base

    def _load(self, files: ModelFiles) -> Any:
        stop_all()  # a server of this process, which would share the memory
        memory.keep_few_kernels()
        dtype = getattr(torch, self.compute_dtype)
        how = (self.quantization, dtype, self.device_map)
        model = load_for_inference(files, self.adapter, *how, len(self.tokenizer))
        ends = {"eos_token_id": sorted(self.ends), "pad_token_id": self.tokenizer.pad_token_id}
        model.generation_config = GenerationConfig(**ends)  # what the harness, which asks the model itself, stops at
        pack(model)
        with own_loop.contiguous_head(model):
            check_finite(model, files.reference)
            self._loop = own_loop if has_own_loop(model) else generic
        if self._loop is generic:
            _LOG.info(f"{files.reference} ({model.config.model_type}) runs in transformers' own generate: slower.")
        memory.trim()
        memory.drop_file_pages(quantized_dir())
        return model

    @cached_property
    def ends(self) -> frozenset[int]:
        return end_ids(self.tokenizer, *{self._files(side).path for side in SIDES})

    def fingerprint(self, side: Side) -> str:
        parts = [_ENGINE_VERSION, self._files(side).fingerprint, self.quantization, self.compute_dtype]
        if self.kv_cache_dtype != "auto":
            parts.append(f"kv-{self.kv_cache_dtype}")
        if self.ends != {self.tokenizer.eos_token_id}:
            parts.append(f"ends-{sorted(self.ends)}")
        if side == "fine_tuned" and self.fine_tuned is None:
            if self.adapter is None:
                raise ValueError("this engine has no adapter")
            parts.append(self.adapter.fingerprint)
            if self.scale != 1:
                parts.append(f"scale-{self.scale:g}")
        return "|".join(parts)

    def encode(self, text: str, templated: bool = False) -> list[int]:
        if templated:
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)
        return self.prompt_ids(text, PromptFormat("{prompt}"))

    def chat_ids(self, message: str) -> list[int]:
        if not self.tokenizer.chat_template:
            raise TuneshiftError(
                f"{self.base.reference} has no chat template: it is a base model. Set generator.mode to continuation."
            )
        try:
            return self.prompt_ids(message, PromptFormat())
        except TuneshiftError as error:
            raise TuneshiftError(
                f"{self.base.reference}: its chat template refuses a user's message ({error.__cause__ or error}). Set"
                " generator.mode to continuation, or name another generator.model."
            ) from error

    def prompt_ids(self, prompt: str, format: PromptFormat) -> list[int]:
        return prompt_ids(self.tokenizer, format, prompt)

    def opening(self, format: PromptFormat | None) -> list[int]:
        return start_ids(self.tokenizer) if format is None else opening_ids(self.tokenizer, format)

    @property
    def halved(self) -> "LocalEngine | None":
        return self.scaled(0.5) if self.adapter else None

    def scaled(self, scale: float) -> "LocalEngine":
        other = copy(self)
        other.scale, other._lender = scale, self._lender or self
        return other

    def check_answers(self, prompts: Sequence[list[int]]) -> list[str]:
        problems = []
        for side in SIDES if self.adapter or self.fine_tuned else SIDES[:1]:
            answers = dict(i for batch in self.generate(prompts, side, Decoding(_CHECKED_TOKENS)) for i in batch)
            with self.side(side) as model:
                whole = generic.Prefix(list(prompts))
                expected = generic.score(model, whole, [answers[i].token_ids for i in range(len(prompts))])
            apart = max(abs(answers[i].sum_logprob - e) / len(answers[i].token_ids) for i, e in enumerate(expected))
            if not apart < _SAME_ANSWER:
                problems.append(
                    f"{self._files(side).reference} ({side}): the log-probabilities of its answers are {apart:.2f} nats"
                    " per token from those of a plain forward pass, so this model can't be used"
                )
        return problems

    def check_adapter(self, prompts: Sequence[list[int]]) -> AdapterCheck:
        logits = {}
        for side in SIDES:
            with self.side(side) as model:
                logits[side] = self._loop.next_logits(model, self._loop.prefill(model, prompts))
        update_norm = _update_norm(self._model("fine_tuned")) if self.adapter else None
        shared = min(found.shape[1] for found in logits.values())  # a fine-tune may have more or fewer rows
        difference = float((logits["base"][:, :shared] - logits["fine_tuned"][:, :shared]).abs().max())
        problems = self._unlike_tokens() or self.check_answers(prompts[:2])
        if difference == 0:
            why = " (the adapter's weights are zero)" if update_norm == 0 else ""
            problems.append(f"the base and the fine-tuned model give equal logits on every seed{why}")
        surest = (float(logits[side].log_softmax(1).max(1).values.mean()) for side in SIDES)
        warnings = AdapterCheck.confidence_warnings("the first token", *surest)
        return AdapterCheck(problems, warnings, difference, update_norm)

    def _unlike_tokens(self) -> list[str]:
        """A problem when base and fine-tuned model know tokens by other ids: each reads what the other has written."""
        if self.fine_tuned is None:
            return []
        own, tuned = load_tokenizer(self.base).get_vocab(), self.tokenizer.get_vocab()
        unlike = sorted(token for token, number in own.items() if tuned.get(token, number) != number)
        if not unlike:
            return []
        return [
            f"{len(unlike)} tokens, such as {unlike[0]!r}, have other ids in source.base than in source.fine_tuned, so"
            " the two can't score each other's responses: name the base that the model was tuned from"
        ]

    def generate(
        self, prompts: Sequence[list[int]], side: Side, decoding: Decoding, seeds: Sequence[int] | None = None
    ) -> Iterator[list[tuple[int, Response]]]:
        def work(batch: list[int]) -> list[Response]:
            with self.side(side) as model:
                prefix = self._prefill(model, [prompts[i] for i in batch], decoding.max_new_tokens)
                own_seeds = [seeds[i] for i in batch] if seeds else None
                rows = Rows(self.tokenizer, self.ends, len(batch), decoding)
                return list(self._loop.decode(model, rows, prefix, decoding, own_seeds, keep_prefix=False))

        yield from self._batches(prompts, decoding.max_new_tokens, (side,), work)

    def pairs(
        self, prompts: Sequence[list[int]], known: Sequence[dict[Side, Response]], decoding: Decoding
    ) -> Iterator[list[tuple[int, Pair]]]:
        """Each side prefills a prompt once; its keys and values serve both decoding and cross scoring. Of models that
        take turns in memory all responses must be ``known``."""

        def work(batch: list[int]) -> list[Pair]:
            first, second = SIDES
            responses: dict[Side, list[Response]] = {}
            cross: dict[Side, list[float]] = {}
            rows = [prompts[i] for i in batch]
            with self.side(first) as model:
                prefix = self._prefill(model, rows, decoding.max_new_tokens)
                responses[first] = self._respond(model, prefix, [known[i].get(first) for i in batch], decoding, True)
            # The second side scores before it decodes, so that its prompts needn't be held while its cache grows.
            with self.side(second) as model:
                other = self._prefill(model, rows, decoding.max_new_tokens)
                cross[second] = self._loop.score(model, other, [r.token_ids for r in responses[first]])
                responses[second] = self._respond(model, other, [known[i].get(second) for i in batch], decoding, False)
            with self.side(first) as model:
                cross[first] = self._loop.score(model, prefix, [r.token_ids for r in responses[second]])
            return list(map(Pair, responses["base"], responses["fine_tuned"], cross["base"], cross["fine_tuned"]))

        if not self.one_at_a_time:
            yield from self._batches(prompts, decoding.max_new_tokens, SIDES, work)
            return
        yield from self.pairs_in_turns(prompts, known)

    def score(
        self, prompts: Sequence[list[int]], responses: Sequence[list[int]], side: Side
    ) -> Iterator[list[tuple[int, float]]]:
        start, longest = start_ids(self.tokenizer), max(map(len, responses), default=0)

        def work(batch: list[int]) -> list[float]:
            with self.side(side) as model:
                prefix = self._prefill(model, [prompts[i] or start for i in batch], longest)
                return list(self._loop.score(model, prefix, [responses[i] for i in batch]))

        whole = [p + r for p, r in zip(prompts, responses, strict=True)]
        yield from self._batches(whole, longest, (side,), work)

    def _prefill(self, model: Any, prompts: list[list[int]], new_tokens: int) -> Any:
        return self._loop.prefill(model, prompts, new_tokens, self.kv_cache_dtype)

    def _respond(
        self, model: Any, prefix: Any, known: list[Response | None], decoding: Decoding, keep_prefix: bool
    ) -> list[Response]:
        missing = [row for row, response in enumerate(known) if response is None]
        if missing:
            own = prefix if len(missing) == len(known) else prefix.select(missing)
            rows = Rows(self.tokenizer, self.ends, len(missing), decoding)
            new = self._loop.decode(model, rows, own, decoding, keep_prefix=keep_prefix and own is prefix)
            for row, response in zip(missing, new, strict=True):
                known[row] = response
        return [response for response in known if response is not None]

    @contextmanager
    def side(self, side: Side) -> Iterator[Any]:
        model = self._model(side)
        with own_loop.contiguous_head(model):
            if side == "base" and self.adapter is not None:
                with model.disable_adapter():
                    yield model
            elif side == "fine_tuned" and self.scale != 1:
                with rescale_adapter_scale(model, self.scale):
                    yield model
            else:
                yield model

    def _batches(
        self, prompts: Sequence[list[int]], new_tokens: int, sides: Sequence[Side], work: Callable[[list[int]], list[T]]
    ) -> Iterator[list[tuple[int, T]]]:
        model, *_ = [self._model(side) for side in sides]  # before a worker is forked, which then has them too

        def row(length: int) -> int:
            # Two prefills, the tokens that follow one, and a copy of a prefill where some responses are known.
            return own_loop.bytes_per_row(model, 3 * length + new_tokens, logits=1, kv_dtype=self.kv_cache_dtype)

        for batch, results in memory.in_batches(
            [len(p) for p in prompts], self.batch_size, row, work, self.workers or 1
        ):
            yield list(zip(batch, results, strict=True))


def _update_norm(model: Any) -> float:
    """Frobenius norm of the low-rank updates, summed over layers (a product B·A of zero adds nothing)."""
    total = 0.0
    for module in model.modules():
        for name in module.lora_A if isinstance(module, Linear | Linear4bit) else ():
            total += float(module.get_delta_weight(name).detach().float().norm())
    return total
