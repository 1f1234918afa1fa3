"""Sections of ``transfer.yaml`` that say which models run where, and how they are asked.

Every key says what it means, its unit and where its default comes from. The other sections are in ``schema.py``.
"""

import ipaddress
import re
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tuneshift_dag.method import PromptFormat
from tuneshift_dag.method.asking import Format

Mode = Literal["chat", "continuation", "by_response"]
Quantization = Literal["nf4", "fp4", "none"]
Probability = Annotated[float, Field(gt=0, le=1)]
# What tokenizers take beside the template's own arguments, and what is decided here.
_NOT_THE_TEMPLATES = {
    "conversation", "messages", "tokenize", "add_generation_prompt", "continue_final_message", "padding", "truncation",
    "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
    "sanitize_control_tokens",
}  # fmt: skip


class Section(BaseModel):
    """A mapping of ``transfer.yaml``: unknown keys are refused, and nothing is changed after it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _yes_is_no_number(cls, data: Any) -> Any:
        for name, value in data.items() if isinstance(data, dict) else ():
            annotation = cls.model_fields[name].annotation if name in cls.model_fields else None
            kinds = {annotation, *get_args(annotation)}
            if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
                raise ValueError(f"{name} {str(value).lower()} is no number; write one")
        return data


class Models(Section):
    """How models are loaded for generation, scoring and evaluation."""

    quantization: Quantization = "nf4"
    """4-bit data type of every scoring model; `none` keeps the compute dtype."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Dtype of activations and of weights that aren't 4-bit. `auto` is bfloat16; without instructions for it float16 on
    a GPU (before NVIDIA's Ampere), and float32 on a CPU (before Intel's Cooper Lake and AMD's Zen 4)."""
    device_map: Literal["auto", "single"] = "auto"
    """With several GPUs: `auto` spreads each model's layers over all of them (accelerate), `single` puts each model on
    the first one."""
    kv_cache_dtype: Literal["auto", "int8"] = Field("auto", exclude_if=lambda value: value == "auto")
    """What the keys and values of a batch are kept in: the compute dtype (`auto`), or 8 bits, which is half the memory
    a row (docs/concepts.md)."""
    batch_size: int = Field(32, ge=1, le=1024, description="Most prompts decoded at once; fewer when memory is short.")
    workers: int | None = Field(None, ge=1, le=64, exclude_if=lambda value: value is None)
    """Processes on a CPU that answer and score batches side by side, with one thread each and the model's weights in
    common; by default on Linux as many as PyTorch has threads (the cores, or `OMP_NUM_THREADS`), since threads on a
    small model wait for each other. A number given here also shares the batches of a training, where each process loads
    the model. On a GPU it has no effect."""


class Server(Section):
    """An OpenAI-compatible server."""

    base_url: str = Field(description="Address of its API, with the `/v1`: `http://127.0.0.1:8000/v1`.")
    allow_insecure: bool = False
    """Whether the API key may be sent unencrypted: to an `http://` address that isn't this machine's own."""
    api_key_env: str = ""
    """Name of the environment variable that holds the API key; empty when the server wants none. The key itself is
    written nowhere."""
    revision: str = ""
    """Any text; change it when the server runs other weights (or another quantization) under the same names. What was
    computed before stays in the cache under the old revision."""
    extra_body: dict[str, Any] = {}
    """Fields added to the body of every request, such as `chat_template_kwargs` of vLLM."""
    concurrency: int = Field(32, ge=1, le=4096, description="Most requests in flight at once.")
    timeout_seconds: float = Field(600, gt=0, description="Longest wait for one response, the server's queue included.")
    max_retries: int = Field(5, ge=0)
    """Retries of a request, with growing pauses, after a time-out or a status 408, 409, 429 or 5xx."""

    @property
    def is_here(self) -> bool:
        """Whether it is on this machine."""
        return _is_loopback(urlsplit(self.base_url).hostname or "")

    def __str__(self) -> str:
        return f"openai, {self.concurrency} requests at once, {self.base_url}"

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
    def _is_safe_name(cls, value: str, info: ValidationInfo) -> str:
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*|", value):
            raise ValueError("must be the name of an environment variable in capitals, never the key itself")
        url = urlsplit(info.data.get("base_url", ""))
        if (
            value
            and url.scheme == "http"
            and not info.data.get("allow_insecure")
            and not _is_loopback(url.hostname or "")
        ):
            raise ValueError(
                f"base_url {url.geturl()!r} would carry the key over the network unencrypted: use https, or set"
                " allow_insecure: true where nobody else can listen"
            )
        return value


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class ServedModel(Section):
    """A model by the name that a server knows it by."""

    model: str = Field(description="Name of the model on the server.")
    extra_body: dict[str, Any] = {}
    """Fields added to the body of its requests, such as `lora` of llama.cpp's server."""


class Vllm(Section):
    """`vllm serve`, which a step starts on this machine when it first needs it and ends when it is done."""

    command: tuple[str, ...] = ()
    """The command to run, a word each; by default `[vllm, serve]`. Where vLLM has an environment of its own:
    `[/opt/vllm/bin/vllm, serve]`, or `[/opt/vllm/bin/python, -m, vllm.entrypoints.openai.api_server]`."""
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    """Share of the GPU's memory that vLLM takes; by default its own default, about nine tenths."""
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs over which each model is spread.")
    max_model_len: int | None = Field(None, ge=1)
    """Longest prompt and response together, in tokens; by default the model's context, for which the memory may be
    short."""
    extra_args: tuple[str, ...] = ()
    """More arguments of `vllm serve`, a word each, such as `[--quantization, bitsandbytes]`. A change makes results
    anew: nobody can tell which arguments change what a model answers."""
    start_timeout_s: float = Field(900, gt=0, description="Longest wait for a server that starts, in seconds.")
    concurrency: int = Field(128, ge=1, le=4096, description="Most requests in flight at once.")

    def __str__(self) -> str:
        spread = f", each model on {self.tensor_parallel_size} GPUs" if self.tensor_parallel_size > 1 else ""
        return f"vllm, {self.concurrency} requests at once{spread}"

    @field_validator("extra_args")
    @classmethod
    def _are_not_ours(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        given = {word.partition("=")[0].replace("_", "-") for word in value}
        if taken := sorted(given & _OWN_ARGUMENTS):
            raise ValueError(
                f"{', '.join(taken)}: set by the run itself, on 127.0.0.1 with a key of its own; remove it"
            )
        return value


_OWN_ARGUMENTS = {
    f"--{name}" for name in ("model", "served-model-name", "lora-modules", "host", "port", "uds", "api-key")
}


class RayCluster(Section):
    """The actors of a Ray cluster."""

    address: str = ""
    """`host:port` of the cluster's head, or `auto` on one of its nodes; empty starts a cluster of this machine that
    ends with the process."""
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


class EngineConfig(Section):
    """What runs the source models; the target is always trained and run in this process."""

    type: Literal["local", "vllm", "openai", "ray"] = "local"
    """`local` loads the source models in this process; `vllm` starts `vllm serve` for them on this machine
    (docs/howto_gpu.md). `openai` asks a server such as vLLM's or llama.cpp's (docs/servers.md): `source.base` then only
    names the tokenizer, and `source.adapter` (or `source.fine_tuned`) what the server was given. `ray` loads the source
    models, and a generator without a server, in the actors of a Ray cluster (docs/ray.md); the results are those of
    `local`."""
    vllm: Vllm = Field(Vllm(), description="`vllm`: how it is started.")
    ray: RayCluster = Field(RayCluster(), description="`ray`: the cluster.")
    server: Server | None = Field(None, description="`openai`: the server of the source models.")
    base: ServedModel | None = Field(None, description="`openai`: the source base model.")
    fine_tuned: ServedModel | None = Field(None, description="`openai`: the same with the adapter.")
    cross_scores: bool = True
    """`vllm`, `openai`: whether each source model also scores the other's response. The server must give
    log-probabilities of prompt tokens, which llama.cpp's doesn't; the rules `cross_ratio`,
    `surprise_ratio` and `top_excess` need it."""

    @model_validator(mode="after")
    def _complete(self) -> "EngineConfig":
        for name in ("server", "base", "fine_tuned"):
            given = getattr(self, name) is not None
            if given != (self.type == "openai"):
                raise ValueError(f"{name} must be given with type 'openai' and only then (type is {self.type!r})")
        for name in ("vllm", "ray"):
            if self.type != name and name in self.model_fields_set:
                raise ValueError(f"{name} has no meaning with type {self.type!r}; remove it, or set type: {name}")
        if self.type in ("local", "ray") and not self.cross_scores:
            raise ValueError(
                f"cross_scores can only be switched off with type 'openai' or 'vllm': they cost {self.type!r} little"
            )
        if self.base is not None and self.base == self.fine_tuned:
            raise ValueError(
                f"base and fine_tuned are both {self.base.model!r}: name the adapter in fine_tuned.model"
                " (vLLM's --lora-modules), or switch it on in fine_tuned.extra_body (llama.cpp's lora)"
            )
        return self

    @property
    def served_by(self) -> Server | Vllm | None:
        """The server of the source models, if they are on one."""
        return self.vllm if self.type == "vllm" else self.server


def _server_of_type(value: Any) -> Any:
    """A generator's server as what its ``type`` says."""
    if not isinstance(value, dict):
        return value
    kinds: dict[str, type[Section]] = {"openai": Server, "vllm": Vllm}
    kind = str(value.get("type", "openai"))
    if kind not in kinds:
        raise ValueError(f"type {kind!r} is none of {', '.join(kinds)}")
    return kinds[kind].model_validate({name: each for name, each in value.items() if name != "type"})


class Generator(Section):
    """The instruction model that writes more prompts like the seeds."""

    model: str
    """Model reference; a base model works in `continuation` mode. With a `generator.server` of others, the model's name
    there."""
    server: Annotated[Server | Vllm | None, BeforeValidator(_server_of_type)] = None
    """The server that runs the generator; without it, the generator is loaded in this process. With `type: vllm` a
    step starts `vllm serve` for it, and the other keys are those of `engine.vllm`."""
    quantization: Quantization | None = Field(None, exclude_if=lambda value: value is None)
    """4-bit data type of a generator in this process; by default `models.quantization`. It only writes prompts: no
    perplexity depends on it."""
    mode: Mode = "chat"
    """`chat` uses the model's chat template; `continuation` lets a base model continue a list; `by_response` shows a
    base model seeds with their fine-tuned responses and asks for one prompt of the last seed's response (in the first
    round: of any), for tasks with a fixed set of answers."""
    instruction: str = "Generate {count} more samples like these {seed_count}:"
    """`chat`: the request above the numbered seeds (the paper's wording, §3). `continuation`: the heading above the
    list. `{count}` and `{seed_count}` are filled in."""
    example_template: str = "Topic: {response}\nQuestion: {prompt}"
    """`by_response`: how one seed is shown; `{response}` must stand before `{prompt}`."""
    format: Format | None = Field(None, exclude_if=lambda value: value is None)
    """How prompts are listed: `list`, a numbered list of single lines; for prompts of several lines `blocks`, with
    lines of dashes between them, or `json`, a JSON list of strings. By default `blocks` when a seed has several lines,
    else `list`."""
    calls_per_round: int = Field(16, ge=1, le=1_000_000, description="Generator calls in one round.")
    prompts_per_call: int = Field(20, ge=1, le=200, description="Prompts asked for in one call (paper: 20).")
    seeds_per_call: int = Field(5, ge=1, description="Example prompts shown in one call (paper: 5).")
    original_seeds_per_call: int = Field(0, ge=0)
    """How many of a call's seeds are drawn from seeds.jsonl in every round. 0 is the paper: kept prompts replace them.
    A weak generator imitates its own oddities, and drifts; a few human prompts hold it."""
    balance: Literal["response", "none"] = "response"
    """How seeds are drawn from the kept pairs: `response` weights a pair by 1 / (pairs with its response), so rare
    skills are explored; `none` draws uniformly (the paper)."""
    temperature: float = Field(1.0, gt=0, le=5, description="Sampling temperature.")
    top_k: int = Field(100, ge=0)
    """Sample among this many most likely tokens; 0 for no such limit, with a server that knows no `top_k` (OpenAI's
    own)."""
    top_p: Probability = Field(0.95, description="Sample within this probability mass of the `top_k` tokens.")
    max_new_tokens: int = Field(320, ge=8, description="Longest generator output, in tokens.")
    max_prompt_characters: int = Field(300, ge=10)
    """Longer prompts are dropped. Without this key and `max_prompt_tokens`, and with a seed of several lines or of more
    characters than the default, those are that the models' contexts have no room for."""
    max_prompt_tokens: int | None = Field(None, ge=4, exclude_if=lambda value: value is None)
    """The same limit in tokens of the source model."""
    near_duplicate: Probability = 0.7
    """A prompt whose ROUGE-L with one in the pool exceeds this is dropped (Stanford Alpaca)."""

    @model_validator(mode="after")
    def _possible(self) -> "Generator":
        response, prompt = self.example_template.find("{response}"), self.example_template.find("{prompt}")
        if not 0 <= response < prompt:
            raise ValueError(f"example_template {self.example_template!r} must hold {{response}} and then {{prompt}}")
        if self.mode == "by_response" and self.format == "json":
            raise ValueError("format 'json' is no format of mode 'by_response', which asks for one prompt; use blocks")
        if self.max_prompt_tokens is not None and "max_prompt_characters" in self.model_fields_set:
            raise ValueError(
                f"max_prompt_tokens {self.max_prompt_tokens} and max_prompt_characters {self.max_prompt_characters} are"
                " one limit in two units; remove one of the two"
            )
        if self.server is not None and self.quantization is not None:
            raise ValueError(
                f"quantization {self.quantization!r} is for a generator in this process, and generator.server has"
                " loaded its model already; remove one of the two"
            )
        if self.original_seeds_per_call >= self.seeds_per_call:
            raise ValueError(
                f"original_seeds_per_call {self.original_seeds_per_call} leaves no room for kept prompts among"
                f" seeds_per_call {self.seeds_per_call}; lower it"
            )
        return self


def check_template(template: str) -> None:
    """Raise `ValueError` for a raw template that doesn't show the prompt once, and as it is."""
    if template.count("{prompt}") != 1:
        raise ValueError("must hold {prompt} exactly once")
    if "{{prompt}}" in template:
        raise ValueError("holds {{prompt}}, which would show the prompt in braces; write {prompt}")


class Prompt(Section):
    """How a model is asked. A text alone is a raw template, or the word `chat`."""

    format: Literal["raw", "chat"]
    """`raw`: `template` is all that the model sees before its response. `chat`: the prompt is a user's message in the
    chat template that the model's tokenizer has."""
    template: str | None = Field(None, description="`raw`: must hold `{prompt}` once, and may hold `{system}`.")
    system: str | None = None
    """The system message; in a raw template it stands at `{system}`. With `chat` an empty one keeps a template from
    writing its own."""
    arguments: dict[str, JsonValue] = Field({})
    """`chat`: what the template is given beside the messages, such as `{enable_thinking: false}`."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return {"format": "chat"} if value == "chat" else {"format": "raw", "template": value}

    @model_validator(mode="after")
    def _goes_together(self) -> "Prompt":
        if self.format == "chat":
            if self.template is not None:
                raise ValueError(f"template {self.template!r} is for format: raw, and chat has the model's; remove it")
            if taken := sorted(_NOT_THE_TEMPLATES & set(self.arguments)):
                raise ValueError(f"arguments {', '.join(taken)} can't be given to a chat template; remove them")
            return self
        if self.template is None or self.template.count("{prompt}") != 1:
            raise ValueError("must be a raw template that holds {prompt} exactly once, or the word chat")
        check_template(self.template)
        if self.arguments:
            raise ValueError("arguments are for format: chat; remove them")
        if self.system is not None and "{system}" not in self.template:
            raise ValueError("system is shown nowhere: put {system} into the template, or remove system")
        return self

    def as_format(self, key: str, system: str | None = None) -> PromptFormat:
        """What models are asked by. ``system`` is what a raw template shows at ``{system}`` without its own."""
        if self.system is not None or "{system}" not in (self.template or ""):
            system = self.system
        return PromptFormat(self.template, system, self.arguments, key)
