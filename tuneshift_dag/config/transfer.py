"""The pydantic model of a transfer folder: ``transfer.yaml``, ``seeds.jsonl``, ``heldout.jsonl``.

Every key says what it means, its unit and where its default comes from. Nothing here loads a model;
`load_transfer` is the one place where bad input is turned into an error with its repair.
"""

import hashlib
import importlib.util
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tuneshift_dag.errors import TuneshiftError
from tuneshift_dag.method.evaluation import Metric
from tuneshift_dag.method.filters import KEEP_RULES, Guards, Rule, TargetPreference, verdict_sql
from tuneshift_dag.method.numeric import expected_number
from tuneshift_dag.method.prompting import prompt_id
from tuneshift_dag.models.references import (
    adapter_fingerprint,
    check_adapter_folder,
    check_reference,
    is_hub_id,
)

Rows = list[tuple[str, dict[str, Any]]]
"""Examples as read from a file, each with its place there, for messages."""
SEED_SHAPE = '{"prompt": "..."}'
HELD_OUT_SHAPE = '{"prompt": "...", "response": "..."}'

Mode = Literal["chat", "continuation", "by_response"]
Probability = Annotated[float, Field(gt=0, le=1)]

# Schemas and catalogs that there are in every database of ours (its file is tuneshift.duckdb).
_DUCKDBS_OWN = {"cache", "main", "temp", "system", "tuneshift", "information_schema", "pg_catalog"}
# Where a server is and how it is asked doesn't change what it answers, nor does where a model lies or who trains it.
_HOW_TO_ASK = {"base_url", "api_key_env", "concurrency", "timeout_seconds", "max_retries"}
# Nor do samples change the greedy responses; where they count, see `Transfer.version` and `Transfer.samples_version`.
_SAMPLES = {"samples", "temperature", "top_p", "agreement"}
_WITHOUT_EFFECT: Any = {
    "engine": {"server": _HOW_TO_ASK, "ray": True},
    "generator": {"server": _HOW_TO_ASK},
    "models": {"device_map"},
    "response": _SAMPLES,
    "distill": {"processes"},
}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Section):
    """Model A: the base model and the adapter that holds the skill."""

    base: str = Field(description="Model reference of the source base model.")
    adapter: str = Field(description="PEFT LoRA adapter: a folder (relative to this one) or a hub id.")


class Target(_Section):
    """Model B: the new base model that shall learn the skill."""

    base: str = Field(description="Model reference of the target base model.")


class Models(_Section):
    """How models are loaded for generation, scoring and evaluation."""

    quantization: Literal["nf4", "fp4", "none"] = Field(
        "nf4", description="4-bit data type of every scoring model; `none` keeps the compute dtype."
    )
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description=(
            "Dtype of activations and of weights that aren't 4-bit. `auto` is bfloat16, and float16 on a GPU that"
            " has no bfloat16 of its own (before NVIDIA's Ampere)."
        ),
    )
    device_map: Literal["auto", "single"] = Field(
        "auto",
        description=(
            "With several GPUs: `auto` spreads each model's layers over all of them (accelerate), `single` puts each"
            " model on the first one."
        ),
    )
    kv_cache_dtype: Literal["auto", "int8"] = Field(
        "auto",
        exclude_if=lambda value: value == "auto",
        description=(
            "What the keys and values of a batch are kept in: the compute dtype (`auto`), or 8 bits, which is half the"
            " memory a row (docs/concepts.md)."
        ),
    )
    batch_size: int = Field(32, ge=1, le=1024, description="Most prompts decoded at once; fewer when memory is short.")


class Server(_Section):
    """An OpenAI-compatible server."""

    base_url: str = Field(description="Address of its API, with the `/v1`: `http://127.0.0.1:8000/v1`.")
    api_key_env: str = Field(
        "",
        description=(
            "Name of the environment variable that holds the API key; empty when the server wants none."
            " The key itself is written nowhere."
        ),
    )
    revision: str = Field(
        "",
        description=(
            "Any text; change it when the server runs other weights (or another quantization) under the same"
            " names. What was computed before stays in the cache under the old revision."
        ),
    )
    extra_body: dict[str, Any] = Field(
        {}, description="Fields added to the body of every request, such as `chat_template_kwargs` of vLLM."
    )
    concurrency: int = Field(32, ge=1, le=4096, description="Most requests in flight at once.")
    timeout_seconds: float = Field(600, gt=0, description="Longest wait for one response, the server's queue included.")
    max_retries: int = Field(
        5,
        ge=0,
        description="Retries of a request, with growing pauses, after a time-out or a status 408, 409, 429 or 5xx.",
    )

    @field_validator("base_url")
    @classmethod
    def _is_address(cls, value: str) -> str:
        url = urlsplit(value)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError("must be an address such as http://127.0.0.1:8000/v1")
        if url.username or url.password:
            raise ValueError("must hold no user name or password; name an environment variable in api_key_env")
        return value

    @field_validator("api_key_env")
    @classmethod
    def _is_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*|", value):
            raise ValueError("must be the name of an environment variable in capitals, never the key itself")
        return value


class ServedModel(_Section):
    """A model by the name that a server knows it by."""

    model: str = Field(description="Name of the model on the server.")
    extra_body: dict[str, Any] = Field(
        {}, description="Fields added to the body of its requests, such as `lora` of llama.cpp's server."
    )


class RayCluster(_Section):
    """The actors of a Ray cluster."""

    address: str = Field(
        "",
        description=(
            "`host:port` of the cluster's head, or `auto` on one of its nodes; empty starts a cluster of this machine"
            " that ends with the process."
        ),
    )
    actors: int = Field(2, ge=1, le=4096, description="Actors at work at once; each loads the model.")
    cpus_per_actor: int = Field(1, ge=1, description="CPUs, and so threads, of an actor.")
    gpus_per_actor: float = Field(0, ge=0, description="GPUs of an actor; with 0.5, two actors share one.")

    def __str__(self) -> str:
        each = f"{self.gpus_per_actor:g} GPU" if self.gpus_per_actor else f"{self.cpus_per_actor} CPU"
        return f"{self.actors} actors × {each}"

    @field_validator("address")
    @classmethod
    def _is_address(cls, value: str) -> str:
        if not re.fullmatch(r"|auto|[\w.-]+:\d+", value):
            raise ValueError("must be host:port of a Ray head, such as 10.0.0.5:6379, or auto, or empty")
        return value

    @field_validator("gpus_per_actor")
    @classmethod
    def _is_share(cls, value: float) -> float:
        if value > 1 and not value.is_integer():
            raise ValueError("must be a whole number of GPUs, or a share of one")
        return value


class EngineConfig(_Section):
    """What runs the source models; the target is always trained and run in this process."""

    type: Literal["local", "openai", "ray"] = Field(
        "local",
        description=(
            "`local` loads the source models in this process; `openai` asks a server such as vLLM's or llama.cpp's"
            " (docs/servers.md). `source.base` then only names the tokenizer, and `source.adapter` what the server"
            " was given. `ray` loads the source models, and a generator without a server, in the actors of a Ray"
            " cluster (docs/ray.md); the results are those of `local`."
        ),
    )
    ray: RayCluster = Field(RayCluster(), description="`ray`: the cluster.")
    server: Server | None = Field(None, description="`openai`: the server of the source models.")
    base: ServedModel | None = Field(None, description="`openai`: the source base model.")
    fine_tuned: ServedModel | None = Field(None, description="`openai`: the same with the adapter.")
    cross_scores: bool = Field(
        True,
        description=(
            "`openai`: whether each source model also scores the other's response. The server must give"
            " log-probabilities of prompt tokens, which llama.cpp's doesn't; the rules `cross_ratio`,"
            " `ifd` and `top_excess`, and `distill.token_mask`, need it."
        ),
    )

    @model_validator(mode="after")
    def _complete(self) -> "EngineConfig":
        for name in ("server", "base", "fine_tuned"):
            given = getattr(self, name) is not None
            if given != (self.type == "openai"):
                raise ValueError(f"{name} must be given with type 'openai' and only then (type is {self.type!r})")
        if self.type != "ray" and "ray" in self.model_fields_set:
            raise ValueError(f"ray has no meaning with type {self.type!r}; remove it, or set type: ray")
        if self.type != "openai" and not self.cross_scores:
            raise ValueError(
                f"cross_scores can only be switched off with type 'openai': they cost {self.type!r} little"
            )
        if self.base is not None and self.base == self.fine_tuned:
            raise ValueError(
                f"base and fine_tuned are both {self.base.model!r}: name the adapter in fine_tuned.model"
                " (vLLM's --lora-modules), or switch it on in fine_tuned.extra_body (llama.cpp's lora)"
            )
        return self


class Generator(_Section):
    """The instruction model that writes more prompts like the seeds."""

    model: str = Field(
        description=(
            "Model reference; a base model works in `continuation` mode. With `generator.server`, the model's name"
            " there."
        )
    )
    server: Server | None = Field(
        None, description="The server that runs the generator; without it, the generator is loaded in this process."
    )
    quantization: Literal["nf4", "fp4", "none"] | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description=(
            "4-bit data type of a generator in this process; by default `models.quantization`. It only writes prompts:"
            " no perplexity depends on it."
        ),
    )
    mode: Mode = Field(
        "chat",
        description=(
            "`chat` uses the model's chat template; `continuation` lets a base model continue a list;"
            " `by_response` shows a base model seeds with their fine-tuned responses and asks for one prompt of the"
            " last seed's response (in the first round: of any), for tasks with a fixed set of answers."
        ),
    )
    instruction: str = Field(
        "Generate {count} more samples like these {seed_count}:",
        description=(
            "`chat`: the request above the numbered seeds (the paper's wording, §3)."
            " `continuation`: the heading above the list. `{count}` and `{seed_count}` are filled in."
        ),
    )
    example_template: str = Field(
        "Topic: {response}\nQuestion: {prompt}",
        description="`by_response`: how one seed is shown; `{response}` must stand before `{prompt}`.",
    )
    calls_per_round: int = Field(16, ge=1, description="Generator calls in one round.")
    prompts_per_call: int = Field(20, ge=1, le=200, description="Prompts asked for in one call (paper: 20).")
    seeds_per_call: int = Field(5, ge=1, description="Example prompts shown in one call (paper: 5).")
    original_seeds_per_call: int = Field(
        0,
        ge=0,
        description=(
            "How many of a call's seeds are drawn from seeds.jsonl in every round. 0 is the paper: kept prompts"
            " replace them. A weak generator imitates its own oddities, and drifts; a few human prompts hold it."
        ),
    )
    balance: Literal["response", "none"] = Field(
        "response",
        description=(
            "How seeds are drawn from the kept pairs: `response` weights a pair by 1 / (pairs with its"
            " response), so rare skills are explored; `none` draws uniformly (the paper)."
        ),
    )
    temperature: float = Field(1.0, gt=0, le=5, description="Sampling temperature.")
    top_k: int = Field(
        100,
        ge=0,
        description=(
            "Sample among this many most likely tokens; 0 for no such limit, with a server that knows no `top_k`"
            " (OpenAI's own)."
        ),
    )
    top_p: Probability = Field(0.95, description="Sample within this probability mass of the `top_k` tokens.")
    max_new_tokens: int = Field(320, ge=8, description="Longest generator output, in tokens.")
    max_prompt_characters: int = Field(300, ge=10, description="Longer prompts are dropped.")
    near_duplicate: Probability = Field(
        0.7, description="A prompt whose ROUGE-L with one in the pool exceeds this is dropped (Stanford Alpaca)."
    )

    @model_validator(mode="after")
    def _template_has_both(self) -> "Generator":
        response, prompt = self.example_template.find("{response}"), self.example_template.find("{prompt}")
        if not 0 <= response < prompt:
            raise ValueError(f"example_template {self.example_template!r} must hold {{response}} and then {{prompt}}")
        return self

    @model_validator(mode="after")
    def _quantized_here(self) -> "Generator":
        if self.server is not None and self.quantization is not None:
            raise ValueError(
                f"quantization {self.quantization!r} is for a generator in this process, and generator.server has"
                " loaded its model already; remove one of the two"
            )
        return self

    @model_validator(mode="after")
    def _room_for_kept_prompts(self) -> "Generator":
        if self.original_seeds_per_call >= self.seeds_per_call:
            raise ValueError(
                f"original_seeds_per_call {self.original_seeds_per_call} leaves no room for kept prompts among"
                f" seeds_per_call {self.seeds_per_call}; lower it"
            )
        return self


class Response(_Section):
    """How the source models answer."""

    max_new_tokens: int = Field(64, ge=1, description="Longest response, in tokens; longer ones are truncated.")
    samples: int = Field(
        0,
        ge=0,
        le=100,
        description=(
            "Self-consistency (Wang et al., arXiv 2203.11171): also sample this many fine-tuned responses to each"
            " prompt, and drop the pair when too few agree with the greedy one. 0 is off; 5 or more make sense."
        ),
    )
    temperature: float = Field(
        0.7, gt=0, le=5, description="Sampling temperature of `samples` (Wang et al.: 0.5 to 0.7)."
    )
    top_p: Probability = Field(1.0, description="`samples` are drawn within this probability mass.")
    agreement: Probability = Field(
        0.5,
        description=(
            "Least share of `samples` whose answer is that of the greedy response, outer white space aside; with"
            " `evaluation.metric: numeric`, whose number is. From 0.5 on, the kept response is the majority's. A change"
            " runs the filter again, and no model."
        ),
    )

    @model_validator(mode="after")
    def _has_samples(self) -> "Response":
        idle = sorted(self.model_fields_set & (_SAMPLES - {"samples"}))
        if not self.samples and idle:
            raise ValueError(f"{' and '.join(idle)} without samples has no meaning; add samples: 5, or remove it")
        return self


class Discriminator(_Section):
    """Trans-LoRA's condition on prompts (arXiv 2405.17258), beside any rule."""

    threshold: float = Field(
        0.5,
        gt=0,
        lt=1,
        description=(
            "Drop a pair unless the discriminator is surer than this that its prompt is real, P(yes) / (P(yes) + P(no))"
            " (paper: yes or no, so 0.5). A change runs the filter again, and no model."
        ),
    )
    steps: int = Field(
        20,
        ge=1,
        le=1000,
        description=(
            "Optimizer steps of its training, each on eight seeds and eight prompts of the first round. With many it"
            " knows the seeds by heart, and takes nothing else for real."
        ),
    )


class Filter(_Section):
    """Which scored pairs are kept. f is the fine-tuned model, b the base, y_f and y_b their responses."""

    rule: Rule = Field(
        "both",
        description=(
            "`both`: PPL_f(y_f) < threshold < PPL_b(y_b). `difference`: PPL_b(y_b) - PPL_f(y_f) > threshold."
            " `ratio`: PPL_b(y_b) / PPL_f(y_f) > threshold."
            " `cross_ratio`: PPL_b(y_f) / PPL_f(y_f) > threshold."
            " `ifd`: threshold < PPL_b(y_f given the prompt) / PPL_b(y_f alone) < 1 (arXiv 2402.00530); costs one"
            " more score a pair. `top_excess`: the pairs with the largest mean of log p_f - log p_b over the tokens"
            " of y_f (TiTok, arXiv 2510.04682). `balanced_confidence`: the pair with the lowest PPL_f(y_f) of every"
            " distinct response, then the second of each, and so on. `random`: a draw by hash from the pairs that pass"
            " the guards. `unfiltered`: every pair with a response, the guards off too."
        ),
    )
    threshold: float = Field(
        1.5, gt=0, description="The cut of the first five rules (paper: 1.5, for its only rule); `ifd` wants its own."
    )
    keep: float | None = Field(
        None,
        gt=0,
        description=(
            "How much `top_excess`, `balanced_confidence` and `random` keep: up to 1, the share of each round's pairs"
            " that pass the guards (TiTok: 0.5); above 1, the number of pairs in all rounds, of which every round has"
            " an equal quota, since its kept pairs seed the next round before that one exists."
        ),
    )
    allow_truncated: bool = Field(
        False, description="Keep pairs whose fine-tuned response was cut off by `response.max_new_tokens`."
    )
    max_repetition: Probability = Field(
        0.5,
        description=(
            "Drop pairs of whose fine-tuned response more than this share of word 4-grams repeats (from 16 tokens on);"
            " 1 switches this off."
        ),
    )
    refusals: tuple[str, ...] = Field(
        (
            "as an ai language model",
            "i can't assist with",
            "i cannot assist with",
            "i can't help with that",
            "i cannot help with that",
            "i'm unable to assist",
            "i'm not able to help with that",
        ),
        description="Drop pairs whose fine-tuned response holds one of these phrases, in any case; `[]` for none.",
    )
    # Left out of what is hashed while it is off: datasets from before there was such a key stay current.
    target: TargetPreference | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description=(
            "Look at what the target's base makes of the fine-tuned response after its prompt (its perplexity, one more"
            " score a pair): `avoid_easy` drops the pairs that it finds easiest (LLKD, arXiv 2411.08028, selects"
            " by the student's uncertainty), `prefer_easy` the hardest. Off by default."
        ),
    )
    target_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        exclude_if=lambda value: value is None,
        description="The share of each round's pairs without another flaw that `target` drops, before the rule.",
    )
    discriminator: Discriminator | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description=(
            "Keep a pair only when a LoRA on the source base, trained to tell seeds.jsonl from the first round's"
            " prompts, takes its prompt for real (Trans-LoRA, arXiv 2405.17258); `{}` for the defaults. From five seeds"
            " it learns hardly more than how they are written. Off by default."
        ),
    )

    @model_validator(mode="after")
    def _possible(self) -> "Filter":
        if any(not phrase.strip() for phrase in self.refusals):
            raise ValueError("refusals holds an empty phrase, which every response contains; remove it")
        if (self.target is None) != (self.target_share is None):
            missing = "target: avoid_easy" if self.target is None else "target_share, a share such as 0.25"
            raise ValueError(f"target and target_share belong together; add {missing}")
        if self.target and self.rule == "unfiltered":
            raise ValueError(f"target {self.target!r} has no meaning for rule 'unfiltered'; remove it")
        if self.discriminator and self.rule == "unfiltered":
            raise ValueError("discriminator has no meaning for rule 'unfiltered'; remove it")
        if self.rule in KEEP_RULES:
            if self.keep is None:
                raise ValueError(
                    f"rule {self.rule!r} needs filter.keep: a share of the pairs, like 0.5, or a number, like 1000"
                )
            check_cut(self.rule, self.keep)
        elif self.keep is not None:
            raise ValueError(
                f"keep {self.keep:g} has no meaning for rule {self.rule!r}; remove it, or use one of the rules"
                f" {' and '.join(KEEP_RULES)}"
            )
        if self.rule not in KEEP_RULES and self.rule != "unfiltered":
            check_cut(self.rule, self.threshold)
        elif "threshold" in self.model_fields_set:
            raise ValueError(f"threshold {self.threshold:g} has no meaning for rule {self.rule!r}; remove it")
        return self

    @property
    def cut(self) -> float:
        """The threshold, or what is kept (see `tuneshift_dag.method.filters.verdict_sql`); 1 for `unfiltered`."""
        if self.rule == "unfiltered":
            return 1.0
        return self.threshold if self.keep is None else self.keep

    @property
    def cut_key(self) -> str:
        """The key of ``filter`` that says how much is kept."""
        return "rule" if self.rule == "unfiltered" else "keep" if self.rule in KEEP_RULES else "threshold"


def check_cut(rule: Rule, cut: float) -> None:
    """Raise ValueError, saying which values are possible, when a rule can't separate anything at this cut."""
    if rule in KEEP_RULES:
        if not (0 < cut <= 1 or (cut > 1 and float(cut).is_integer())):
            raise ValueError(f"keep {cut:g} is impossible: use a share up to 1, like 0.5, or a whole number of pairs")
    elif rule == "difference":
        if not 0 < cut < math.inf:
            raise ValueError(f"threshold {cut} is impossible: use a number above 0")
    elif rule == "ifd":
        if not 0 < cut < 1:
            raise ValueError(
                f"threshold {cut} is impossible for rule 'ifd': PPL with the prompt / PPL without it is kept between"
                " the threshold and 1; use a number between 0 and 1"
            )
    elif rule != "unfiltered" and not 1 < cut < math.inf:
        raise ValueError(
            f"threshold {cut} is impossible for rule {rule!r}: perplexities are at least 1"
            " and so no cut at or below 1 separates anything; use a value above 1 (the paper: 1.5)"
        )


class Distill(_Section):
    """LoRA training of the target. The paper doesn't publish its values."""

    # `exclude_if`: keys that came later aren't hashed at their defaults, so that earlier models stay current.
    quantization: Literal["nf4", "fp4", "none"] = Field(
        "none",
        description="4-bit type of the frozen target while it is trained (QLoRA); `none` for the dtype. Best is what it"
        " will be served in: `evaluation` serves it in `models.quantization`.",
    )
    rank: int = Field(16, ge=1, description="LoRA rank, on every linear layer.")
    alpha: int = Field(32, ge=1, description="LoRA alpha; the update is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="LoRA dropout.")
    learning_rate: float = Field(5e-4, gt=0, description="Peak learning rate of AdamW.")
    epochs: int = Field(5, ge=1, description="Passes over the dataset.")
    batch_size: int = Field(16, ge=1, description="Pairs in one forward pass.")
    gradient_accumulation: int = Field(
        1,
        ge=1,
        exclude_if=lambda value: value == 1,
        description=(
            "Forward passes in one optimizer step, so that it is on `batch_size` times as many pairs; its loss is the"
            " mean over all their tokens."
        ),
    )
    gradient_checkpointing: bool = Field(
        False,
        exclude_if=lambda value: value is False,
        description="Keep only each layer's input for the backward pass, compute the rest again: less memory, slower.",
    )
    optimizer: Literal["adamw", "paged_adamw_8bit"] = Field(
        "adamw",
        exclude_if=lambda value: value == "adamw",
        description=(
            "`paged_adamw_8bit` keeps AdamW's moments in 8 bits, and in memory that the GPU moves to the CPU's when its"
            " own is full (bitsandbytes, QLoRA); needs CUDA."
        ),
    )
    processes: int = Field(
        1,
        ge=1,
        description=(
            "Processes that share every batch, each with the whole target on a GPU of its own; the adapter is that"
            " of one, up to rounding. Without a GPU they share the CPU."
        ),
    )
    balance: Literal["response", "none"] = Field(
        "none",
        description=(
            "For tasks with a fixed set of answers `response` draws each epoch's pairs so that a response comes in"
            " proportion to the square root of its pairs, and over the epochs nearly every pair; one of a response with"
            " less than a quarter of the mean number of pairs is drawn as often as if there were that many. `none`"
            " takes every pair once."
        ),
    )
    prompt_weight: float = Field(
        0.0,
        ge=0,
        le=1,
        exclude_if=lambda value: value == 0,
        description=(
            "Weight of the loss of four tokens of each prompt, drawn anew in every step, beside that of its response:"
            " with 0.1 the target forgets less of what it knew (`retention`). 0 trains on responses alone."
        ),
    )
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="Share of the steps with a rising learning rate.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient clipping norm.")
    validation_fraction: float = Field(0.05, ge=0, lt=1, description="Share of the pairs held back from training.")
    token_mask: Probability | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description=(
            "Train only on this share of each response's tokens: those with the largest log p_f - log p_b, and the end"
            " token (TiTok, arXiv 2510.04682: 0.7). Costs two more scores a pair. `None` trains on all."
        ),
    )


class Arm(_Section):
    """One filter in a comparison; written as a rule's name alone, or with its own threshold."""

    rule: Rule = Field(description="A filter rule.")
    threshold: float | None = Field(None, description="Its cut; without one, that of `filter`.")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"rule": value} if isinstance(value, str) else value

    @property
    def name(self) -> str:
        return self.rule if self.threshold is None else f"{self.rule} {self.threshold:g}"


class Compare(_Section):
    """``tuneshift compare``: models trained on what rival filters keep of the same scored pairs."""

    arms: tuple[Arm, ...] = Field(
        (),
        description=(
            "The filters beside `random` and `unfiltered`: a rule's name, or `{rule: ratio, threshold: 2}`. A rule"
            " without a threshold takes that of `filter`. Without arms, the rule of `filter`."
        ),
    )
    pairs: int | None = Field(
        None,
        ge=2,
        description="Training pairs of every arm; by default as many as the arm with the fewest has.",
    )
    seeds: int = Field(
        3, ge=2, description="Trainings of every arm, each with a seed and a draw of pairs of its own; use 3 or more."
    )
    epochs: int | None = Field(None, ge=1, description="Passes over the pairs; by default `distill.epochs`.")
    labelled: str | None = Field(
        None,
        description=(
            "A file like heldout.jsonl, with other prompts (a path relative to this folder): the arm `oracle`, what"
            " real data of the same size would give."
        ),
    )


class Evaluation(_Section):
    """Accuracy on the held-out file, and on standard tasks."""

    # Keys that came later aren't part of a version at their defaults: nothing made before them is out of date.
    metric: Metric = Field(
        "exact_match",
        exclude_if=lambda value: value == "exact_match",
        description=(
            "`exact_match`: the response equals the held-out one, outer white space aside. `numeric`: its number does,"
            " found as lm-evaluation-harness does for GSM8K, in two ways that are both reported: strict (after"
            " `#### `) and flexible (the last number)."
        ),
    )
    max_new_tokens: int = Field(32, ge=1, description="Longest answer, in tokens.")
    bootstrap_samples: int = Field(2000, ge=100, description="Resamples behind the 95 % intervals.")
    tasks: tuple[str, ...] = Field(
        (),
        exclude_if=lambda value: not value,
        description=(
            "Tasks of lm-evaluation-harness to measure the target on before and after, such as `[gsm8k, mbpp, bbh]`;"
            " needs the extra `lm-eval`."
        ),
    )
    task_folder: str | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description=(
            "Folder of task files of your own (a path relative to this one), for other tasks or for data on this"
            " machine; its data files are named from that folder."
        ),
    )
    task_limit: int | None = Field(
        None,
        ge=1,
        exclude_if=lambda value: value is None,
        description="At most this many examples of each task; for a try, since the scores are then rough.",
    )


class TransferConfig(_Section):
    """``transfer.yaml``."""

    description: str = Field("", description="One line for people.")
    source: Source
    target: Target
    generator: Generator
    prompt_template: str = Field(description="All that a model sees before the response; must hold `{prompt}` once.")
    engine: EngineConfig = EngineConfig()
    models: Models = Models()
    response: Response = Response()
    filter: Filter = Filter()
    rounds: int = Field(4, ge=1, le=99, description="Most rounds.")
    target_pairs: int = Field(1000, ge=1, description="Rounds stop when this many pairs are kept.")
    distill: Distill = Distill()
    evaluation: Evaluation = Evaluation()
    compare: Compare | None = Field(
        None, description="Without this section there is no `comparison`; `compare: {}` takes the defaults."
    )
    diversity_map: bool = Field(
        True, description="Draw the prompts on a map of meaning: some seconds on the CPU, with the extra `encoder`."
    )
    seed: int = Field(0, description="Seed of every random choice.")

    @model_validator(mode="after")
    def _keep_can_be_reached(self) -> "TransferConfig":
        keep = self.filter.keep or 0
        if keep > self.target_pairs:
            raise ValueError(
                f"filter.keep {keep:g} can't be reached: rounds stop at target_pairs {self.target_pairs}; raise it"
            )
        if 1 < keep < self.rounds:
            raise ValueError(
                f"filter.keep {keep:g} leaves some of the {self.rounds} rounds without a pair to seed the next; use at"
                " least one for each round"
            )
        return self

    @model_validator(mode="after")
    def _arms_are_possible(self) -> "TransferConfig":
        for arm in self.compare.arms if self.compare else ():
            if arm.rule in ("random", "unfiltered"):
                raise ValueError(f"compare.arms: {arm.name!r} is always part of a comparison; remove it")
            if arm.rule in KEEP_RULES:
                if arm.threshold is not None:
                    raise ValueError(f"compare.arms: {arm.rule!r} takes compare.pairs and no threshold; remove it")
            elif arm.threshold is not None:
                check_cut(arm.rule, arm.threshold)
            elif arm.rule != self.filter.rule:
                raise ValueError(
                    f"compare.arms: {arm.rule!r} needs a threshold, since filter.rule is {self.filter.rule!r}: write"
                    f" {{rule: {arm.rule}, threshold: ...}} (`tuneshift sweep` shows what a threshold keeps)"
                )
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError(f"compare.arms names the same arm twice ({', '.join(names)}); remove one")
        return self

    @property
    def generator_quantization(self) -> str:
        """What a generator in this process is quantized to: its own setting, or that of ``models``."""
        return self.generator.quantization or self.models.quantization

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The filters to compare, `random` and `unfiltered` last; the rule of ``filter`` when none is named."""
        if self.compare is None:
            return ()
        own = self.filter.rule if self.filter.rule not in ("random", "unfiltered") else None
        chosen = self.compare.arms or ((Arm(rule=own),) if own else ())
        return (*chosen, Arm(rule="random"), Arm(rule="unfiltered"))

    @field_validator("prompt_template")
    @classmethod
    def _has_prompt(cls, value: str) -> str:
        if value.count("{prompt}") != 1:
            raise ValueError("must contain {prompt} exactly once")
        return value

    @model_validator(mode="after")
    def _rule_has_its_scores(self) -> "TransferConfig":
        arms = self.compare.arms if self.compare else ()
        for key, rule in [("filter.rule", self.filter.rule), *(("compare.arms:", arm.rule) for arm in arms)]:
            if rule in ("cross_ratio", "ifd", "top_excess") and not self.engine.cross_scores:
                raise ValueError(f"{key} {rule!r} needs scores that engine.cross_scores: false leaves out")
        if self.filter.discriminator and self.engine.type == "openai":
            raise ValueError(
                "filter.discriminator trains an adapter of source.base and asks it, which a server's model can't do"
                " (engine.type is 'openai'); remove it, or set engine.type to local or ray"
            )
        if self.distill.token_mask is not None and not self.engine.cross_scores:
            raise ValueError(
                f"distill.token_mask {self.distill.token_mask:g} needs scores that engine.cross_scores: false leaves"
                " out; remove it"
            )
        return self


class Transfer:
    """A transfer folder, read and checked: its settings, seeds, held-out pairs and, to compare, labelled pairs."""

    def __init__(
        self,
        folder: Path,
        config: TransferConfig,
        seeds: list[str],
        heldout: list[tuple[str, str]],
        labelled: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.folder = folder
        self.name = folder.name
        self.config = config
        self.seeds = seeds
        self.heldout = heldout
        self.labelled = labelled

    @property
    def round_keys(self) -> list[str]:
        """Partition keys: ``round_01``, ``round_02``, ..."""
        return [round_key(number) for number in range(1, self.config.rounds + 1)]

    @property
    def needs_ifd(self) -> bool:
        """Whether pairs need the perplexity that only the rule `ifd` reads."""
        return "ifd" in {self.config.filter.rule, *(arm.rule for arm in self.config.arms)}

    @property
    def guards(self) -> Guards:
        settings = self.config.filter
        agreement = self.config.response.agreement if self.config.response.samples else None
        return Guards(
            settings.allow_truncated,
            settings.max_repetition,
            settings.refusals,
            agreement,
            settings.discriminator.threshold if settings.discriminator else None,
            settings.target,
            settings.target_share or 0.0,
        )

    def models_of(self, asset: str) -> str | None:
        """The models of a step whose speed is recorded for `tuneshift plan`; None for another one."""
        config = self.config
        source = config.engine.base.model if config.engine.base else config.source.base
        return {
            "synthetic_prompts": config.generator.model,
            "scored_pairs": source,
            "distilled_model": config.target.base,
            "evaluation": f"{source}, {config.target.base}",
        }.get(asset)

    def engine_of(self, asset: str) -> str | None:
        """What runs `models_of` the step, as far as speed depends on it."""
        engine = self.config.engine
        server = self.config.generator.server if asset == "synthetic_prompts" else engine.server
        if self.models_of(asset) is None:
            return None
        if asset == "distilled_model":
            return "local"
        if server is not None:
            return f"openai, {server.concurrency} requests at once, {server.base_url}"
        return f"ray, {engine.ray}" if engine.type == "ray" else "local"

    def describe_filter(self) -> str:
        """For people: the rule, its cut, and what is asked beyond it."""
        settings, response = self.config.filter, self.config.response
        text = f"`{settings.rule}`"
        if settings.rule == "unfiltered":
            return text
        text += f", {settings.cut_key} {settings.cut:g}"
        if settings.target is not None:
            text += f"; `{settings.target}` of the target, share {settings.target_share:g}"
        if settings.discriminator:
            text += f"; prompts that a discriminator takes for real ({settings.discriminator.threshold:g})"
        if response.samples:
            text += f"; at least {response.agreement:g} of {response.samples} samples agree"
        return text

    def with_training(self, seed: int, epochs: int) -> "Transfer":
        """The same transfer, trained with another seed and number of epochs."""
        distill = self.config.distill.model_copy(update={"epochs": epochs})
        config = self.config.model_copy(update={"seed": seed, "distill": distill})
        return Transfer(self.folder, config, self.seeds, self.heldout, self.labelled)

    def verdict_sql(self, rule: Rule | None = None, cut: float | str | None = None) -> str:
        """`tuneshift_dag.method.filters.verdict_sql` of this transfer, with its own rule and cut if none are named.

        Args:
            cut: a number, or SQL.
        """
        settings = self.config.filter
        value = settings.cut if cut is None else cut
        sql = value if isinstance(value, str) else f"{value!r}::DOUBLE"
        pairs = self.of_its_rounds("scored_pairs")
        return verdict_sql(rule or settings.rule, self.guards, sql, self.config.rounds, self.config.seed, pairs)

    def of_its_rounds(self, table: str) -> str:
        """SQL of a table's rows of the rounds that there are; those of others stay in it when ``rounds`` is lowered."""
        return f"(SELECT * FROM {table} WHERE round <= '{self.round_keys[-1]}')"

    def version(self, *sections: str, code: int = 1) -> str:
        """A code version: the hash of the named parts of the settings and of ``code``.

        Args:
            sections: dotted keys of ``transfer.yaml``, for example ``"filter"`` or ``"source.base"``.
            code: raised by hand when the meaning of the code that uses them changes.
        """
        dump = self.config.model_dump(mode="json", exclude=_WITHOUT_EFFECT)
        if dump["engine"]["type"] == "ray":
            dump["engine"]["type"] = "local"  # whose results are the same
        # How many prompts are answered at once doesn't change what a prompt is answered. (Not left out of the dump, so
        # that versions from when it counted stay valid.)
        dump["models"]["batch_size"] = Models.model_fields["batch_size"].default
        if dump["models"]["compute_dtype"] == "auto":
            dump["models"]["compute_dtype"] = "bfloat16"  # which it is, but on old GPUs
        if self.config.response.samples:
            dump["filter"]["agreement"] = self.config.response.agreement  # it decides what is kept
        if (self.config.filter.keep or 0) > 1:
            dump["filter"]["rounds"] = self.config.rounds  # which share the number
        parts = {section: _dig(dump, section) for section in sections}
        return hashlib.sha256(json.dumps([code, parts], sort_keys=True).encode()).hexdigest()[:12]

    def samples_version(self) -> str:
        """Changes with all that makes other samples, or compares them otherwise; empty without samples."""
        response = self.config.response
        if not response.samples:
            return ""
        parts = [response.samples, response.temperature, response.top_p, self.config.evaluation.metric]
        return "-" + hashlib.sha256(json.dumps([*parts, self.config.seed]).encode()).hexdigest()[:8]

    def discriminator_version(self) -> str:
        """Changes with the seeds and settings that make another discriminator; empty without one."""
        settings = self.config.filter.discriminator
        if settings is None:
            return ""
        parts = [settings.steps, self.seeds, self.config.seed]
        return "-" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]

    def adapter_version(self) -> str:
        """Changes with the source adapter's files; empty for an adapter on the hub."""
        path = (self.folder / self.config.source.adapter).expanduser()
        return adapter_fingerprint(path)[:8] if path.is_dir() else ""

    def tasks_version(self) -> str:
        """Changes with the files of ``evaluation.task_folder``; empty without one."""
        if not self.config.evaluation.task_folder:
            return ""
        folder = (self.folder / self.config.evaluation.task_folder).expanduser()
        digest = hashlib.sha256()
        for file in sorted(folder.rglob("*")):
            name = file.relative_to(folder).as_posix()
            # Python and editors write files of their own there.
            if file.is_file() and not re.search(r"(^|/)(\.|__pycache__/)", name):
                digest.update(f"{name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
        return "-" + digest.hexdigest()[:8]


def round_key(number: int) -> str:
    return f"round_{number:02d}"


def round_number(key: str) -> int:
    return int(key.removeprefix("round_"))


def name_problem(name: str) -> str:
    """Why a transfer can't have this name, which is that of its schema in the database; empty if it can."""
    if not re.fullmatch(r"[A-Za-z0-9_]+", name):
        return "letters, digits and underscores only"
    return f"the database has something of its own named {name!r}" if name.lower() in _DUCKDBS_OWN else ""


def load_transfer(folder: Path) -> Transfer:
    """Read and check a transfer folder without loading a model.

    Raises:
        TuneshiftError: naming the file, the key, the value and the repair.
    """
    config_file = folder / "transfer.yaml"
    problem = name_problem(folder.resolve().name)
    if problem:
        raise TuneshiftError(f"{folder}: rename the folder: {problem}.")
    config = _read_config(config_file)
    seed_rows = read_jsonl(folder / "seeds.jsonl", SEED_SHAPE)
    heldout_file = folder / "heldout.jsonl"
    seeds, heldout = check_examples(
        seed_rows, read_jsonl(heldout_file, HELD_OUT_SHAPE) if heldout_file.exists() else []
    )
    _check_tasks(config.evaluation, config_file, folder)
    if config.evaluation.metric == "numeric":
        _refuse_answers_without_number(heldout_file, heldout)
    labelled = _read_labelled(config, config_file, folder, heldout)
    served = config.engine.type == "openai"
    check_reference(config.source.base, folder, f"{config_file}: source.base", weights=not served)
    check_reference(config.target.base, folder, f"{config_file}: target.base")
    if config.generator.server is None:
        check_reference(config.generator.model, folder, f"{config_file}: generator.model")
    _check_adapter(config, folder, f"{config_file}: source.adapter")
    return Transfer(folder.resolve(), config, seeds, heldout, labelled)


def check_examples(seed_rows: Rows, heldout_rows: Rows) -> tuple[list[str], list[tuple[str, str]]]:
    """Seeds and held-out (prompt, response) pairs, without surrounding space.

    Raises:
        TuneshiftError: naming the line of a text that is missing, of a prompt that is there twice, or of a
            held-out prompt that is a seed.
    """
    seeds = [_text(row, "prompt", at) for at, row in seed_rows]
    _refuse_doubles([at for at, _ in seed_rows], seeds)
    heldout = [(_text(row, "prompt", at), _text(row, "response", at)) for at, row in heldout_rows]
    places = [at for at, _ in heldout_rows]
    prompts = [prompt for prompt, _ in heldout]
    _refuse_doubles(places, prompts)
    _refuse_seeds_in_heldout(seeds, list(zip(places, prompts, strict=True)))
    return seeds, heldout


def find_transfers(root: Path) -> list[Path]:
    """Folders under ``root`` that hold a ``transfer.yaml``, by name."""
    return sorted(path.parent for path in root.glob("*/transfer.yaml"))


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which the last one would count."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                problem = f"the key {key.value!r} is there twice; keep one of them"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_config(file: Path) -> TransferConfig:
    if not file.is_file():
        raise TuneshiftError(f"{file} doesn't exist. A transfer is a folder with transfer.yaml and seeds.jsonl.")
    try:
        data = yaml.load(read_text(file), _Loader)
    except yaml.YAMLError as error:
        raise TuneshiftError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise TuneshiftError(f"{file} must be a mapping of keys; found {type(data).__name__}.")
    try:
        return TransferConfig.model_validate(data)
    except ValidationError as error:
        raise TuneshiftError("\n".join(_explain(file, problem) for problem in error.errors())) from error


def _explain(file: Path, problem: Any) -> str:
    key = ".".join(map(str, problem["loc"]))
    found = repr(problem["input"])
    if "key" in key.rsplit(".", 1)[-1]:
        # Somebody may have put an API key here.
        found = "a value that isn't shown"
    if problem["type"] == "extra_forbidden":
        return f"{file}: {key}: unknown key (value {found}). Remove it or correct its spelling."
    if problem["type"] == "missing":
        return f"{file}: {key}: missing. Add it."
    message = problem["msg"].removeprefix("Value error, ")
    if not key:
        return f"{file}: {message}."
    return f"{file}: {key}: {message} (found {found})."


def read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")  # which is UTF-8, with or without a byte-order mark
    except UnicodeDecodeError as error:
        raise TuneshiftError(f"{file} is not UTF-8 text ({error}). Save it as UTF-8.") from error


def read_jsonl(file: Path, shape: str) -> Rows:
    """(position, row) of every line; the position is for messages, and so is ``shape``, an example of a line."""
    if not file.is_file():
        raise TuneshiftError(f"{file} doesn't exist. Write one line of {shape} for each example.")
    rows = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise TuneshiftError(f"{file}:{number}: not valid JSON ({error}). Write {shape}.") from error
        if not isinstance(row, dict):
            raise TuneshiftError(f"{file}:{number}: expected an object like {shape}, found {line.strip()!r}.")
        rows.append((f"{file}:{number}", row))
    if not rows:
        raise TuneshiftError(f"{file} is empty. Write at least one line of {shape}, or delete an optional file.")
    return rows


def _text(row: dict[str, Any], key: str, at: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise TuneshiftError(f"{at}: {key!r} must be a non-empty string (found {value!r}).")
    return value.strip()


def _refuse_seeds_in_heldout(seeds: list[str], heldout: list[tuple[str, str]]) -> None:
    known = {prompt_id(seed) for seed in seeds}
    for at, prompt in heldout:
        if prompt_id(prompt) in known:
            raise TuneshiftError(f"{at}: {prompt!r} is also a seed, so it would be trained on. Remove one of them.")


def _check_tasks(settings: Evaluation, config_file: Path, folder: Path) -> None:
    """What can be seen without importing lm-evaluation-harness, which takes seconds."""
    if settings.tasks and importlib.util.find_spec("lm_eval") is None:
        raise TuneshiftError(
            f"{config_file}: evaluation.tasks {list(settings.tasks)} needs lm-evaluation-harness, which isn't"
            " installed: run `pip install 'tuneshift-dag[lm-eval]'`, or remove the key."
        )
    if settings.task_folder and not (folder / settings.task_folder).expanduser().is_dir():
        raise TuneshiftError(
            f"{config_file}: evaluation.task_folder: there is no folder {folder / settings.task_folder}. Correct it, or"
            " remove the key."
        )


def _refuse_answers_without_number(file: Path, heldout: list[tuple[str, str]]) -> None:
    for prompt, response in heldout:
        if expected_number(response) is None:
            raise TuneshiftError(
                f"{file}: the response to {prompt!r} gives no number (found {response!r}), which evaluation.metric"
                " 'numeric' compares. End it with '#### ' and the number, or write the number alone."
            )


def _read_labelled(
    config: TransferConfig, config_file: Path, folder: Path, heldout: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    """The pairs of ``compare.labelled``; none when it isn't set."""
    if config.compare is None:
        return []
    if not heldout:
        raise TuneshiftError(
            f"{config_file}: compare: trained models are compared on {folder / 'heldout.jsonl'}, which doesn't exist."
            " Write it, or remove compare."
        )
    if config.compare.labelled is None:
        return []
    rows = read_jsonl((folder / config.compare.labelled).expanduser(), HELD_OUT_SHAPE)
    pairs = [(_text(row, "prompt", at), _text(row, "response", at)) for at, row in rows]
    _refuse_doubles([at for at, _ in rows], [prompt for prompt, _ in pairs])
    known = {prompt_id(prompt) for prompt, _ in heldout}
    for (at, _), (prompt, _) in zip(rows, pairs, strict=True):
        if prompt_id(prompt) in known:
            raise TuneshiftError(
                f"{at}: {prompt!r} is also in heldout.jsonl, so its answer would be trained on. Remove one of them."
            )
    return pairs


def _refuse_doubles(places: list[str], prompts: list[str]) -> None:
    first: dict[str, str] = {}
    for at, prompt in zip(places, prompts, strict=True):
        if first.setdefault(prompt_id(prompt), at) != at:
            raise TuneshiftError(f"{at}: {prompt!r} is the prompt of {first[prompt_id(prompt)]} again. Remove one.")


def _check_adapter(config: TransferConfig, folder: Path, key: str) -> None:
    path = (folder / config.source.adapter).expanduser()
    if not path.exists() and is_hub_id(config.source.adapter):
        return  # a hub id: fetched, and then checked, when it is first needed
    adapter = check_adapter_folder(path, key)
    named = adapter.get("base_model_name_or_path")
    if named and not is_same_base(str(named), config.source.base):
        raise TuneshiftError(
            f"{key}: {path / 'adapter_config.json'} was trained on the base model {named!r}, but source.base is"
            f" {config.source.base!r}. Set source.base to the adapter's base; if they are the same weights under"
            " two names, set base_model_name_or_path in adapter_config.json to the value of source.base."
        )


def is_same_base(reference: str, other: str) -> bool:
    """Whether two references end in the same name: a model may be named by hub id, folder or package."""
    return _base_name(reference) == _base_name(other)


def _base_name(reference: str) -> str:
    return reference.split("@")[0].rstrip("/").rsplit("/", 1)[-1].lower()


def _dig(data: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        data = data[part]
    return data
