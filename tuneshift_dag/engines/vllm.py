"""`vllm serve`, started by the step that needs it, for the source models or for the generator.

It listens on 127.0.0.1 alone, on a free port, with a random key that goes through its environment: everyone on the
machine can read a command's arguments. It is asked as any other server is. There is one at a time, and none while this
process has a model loaded, since both want the GPU's memory."""

import http.client
import json
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import openai

from tuneshift_dag import TuneshiftError
from tuneshift_dag.config.schema_models import EngineConfig, ServedModel, Server, Vllm
from tuneshift_dag.engines.openai_client import LOG, OpenAIServer, ServedGenerator, Work
from tuneshift_dag.engines.openai_source import ServedSource
from tuneshift_dag.engines.server_process import ServerProcess, stop_all
from tuneshift_dag.models.adapter_checks import adapter_config
from tuneshift_dag.models.capabilities import end_ids
from tuneshift_dag.models.loading import load_tokenizer
from tuneshift_dag.models.references import ModelFiles

T = TypeVar("T")
_HOST = "127.0.0.1"
# Values of --max-lora-rank.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Settings of an adapter that vLLM refuses, or leaves out without a word and then answers otherwise.
_NOT_SERVED = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices",
    "target_parameters")  # fmt: skip
# Seconds between two looks whether it is ready, and those that it takes to end after it has failed.
_EVERY, _DYING = 0.2, 5.0


class VllmServer(OpenAIServer):
    """A server of our own. It starts with the first request and stays until `stop_all`; after that, or when it has
    ended by itself, the next requests start it again."""

    def __init__(
        self,
        settings: Vllm,
        key: str,
        models: Mapping[str, ModelFiles],
        compute_dtype: str,
        ends: frozenset[int],
        log_file: Path,
        make_room: Callable[[], None],
    ) -> None:
        """
        Args:
            key: where the settings stand in ``transfer.yaml``, for messages.
            models: a model, and maybe an adapter for it, by the names that they get.
            compute_dtype: that of ``models`` in ``transfer.yaml``; `auto` is left to vLLM, which may see a GPU that
                this process doesn't.
            ends: ids of the tokens that end a response.
            log_file: what vLLM says is added to it.
            make_room: called before it starts, to free the memory that this process's models take.
        """
        self.vllm = settings
        self.log_file = log_file
        self.make_room = make_room
        self.dtype = compute_dtype
        (self._name, self._model), *adapters = models.items()
        self._lora = [word for name, files in adapters for word in _lora_arguments(name, files, self._name)]
        self._process: ServerProcess | None = None
        # What can change an answer, beside the adapter: the caches go by it.
        revision = json.dumps(["vllm", self._model.fingerprint, self.dtype, settings.extra_args])
        asked = {"extra_body": {"stop_token_ids": sorted(ends)}, "concurrency": settings.concurrency, "max_retries": 2}
        # It has no port before it starts.
        super().__init__(Server(base_url=f"http://{_HOST}/v1", revision=revision, **asked), key)
        self._api_key = secrets.token_urlsafe(32)

    def __str__(self) -> str:
        return f"{self.key} (vLLM with {self._model.reference}; its log: {self.log_file})"

    def stream(self, what: str, count: int, work: Work[T]) -> Iterator[list[tuple[int, T]]]:
        if self._process is None or self._process.ended() is not None:
            self._process = self._start()
        yield from super().stream(what, count, work)

    def explain(self, error: openai.APIError, asked: str) -> TuneshiftError:
        broken = isinstance(error, openai.APIConnectionError | openai.InternalServerError)
        if broken and not isinstance(error, openai.APITimeoutError) and self._process is not None:
            status = self._process.ended(_DYING)
            if status is not None:
                return self._failure(self._process, f"ended with status {status}, and what had finished is kept")
        return super().explain(error, asked)

    def _start(self) -> ServerProcess:
        """The process, once it is ready; `TuneshiftError` when it ends before, or takes too long."""
        command = find_command(self.vllm, self.key)
        self.make_room()
        stop_all()
        with socket.socket() as probe:
            probe.bind((_HOST, 0))
            port = int(probe.getsockname()[1])
        self.settings = self.settings.model_copy(update={"base_url": f"http://{_HOST}:{port}/v1"})
        usual = {"VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": _HOST}
        environment = {**usual, **os.environ, "VLLM_API_KEY": self._api_key}
        LOG.info(f"{self}: starting")
        started = time.monotonic()
        process = ServerProcess([*command, *self._arguments(command, port)], environment, self.log_file)
        while not _is_healthy(port):
            status = process.ended(_EVERY)
            if status is not None:
                raise self._failure(process, f"ended with status {status} before it was ready")
            if time.monotonic() - started > self.vllm.start_timeout_s:
                process.stop()
                limit = f"{self.vllm.start_timeout_s:g} s ({self.key}.start_timeout_s)"
                raise self._failure(process, f"wasn't ready within {limit}, and was stopped")
        LOG.info(f"{self}: ready after {time.monotonic() - started:.0f} s")
        return process

    def _arguments(self, command: list[str], port: int) -> list[str]:
        vllm, model = self.vllm, str(self._model.path)
        words = [model] if command[-1] == "serve" else ["--model", model]
        words += ["--dtype", self.dtype, *self._lora]
        if vllm.gpu_memory_utilization is not None:
            words += ["--gpu-memory-utilization", str(vllm.gpu_memory_utilization)]
        if vllm.tensor_parallel_size > 1:
            words += ["--tensor-parallel-size", str(vllm.tensor_parallel_size)]
        if vllm.max_model_len is not None:
            words += ["--max-model-len", str(vllm.max_model_len)]
        # The last of two counts.
        words += [*vllm.extra_args, "--served-model-name", self._name, "--disable-uvicorn-access-log"]
        return [*words, "--host", _HOST, "--port", str(port)]

    def _failure(self, process: ServerProcess, what: str) -> TuneshiftError:
        killed = ". Status 137 is that of a killed process, mostly for lack of memory" if "status 137" in what else ""
        return TuneshiftError(f"{self}: it {what}{killed}. It said last:\n{self.redact(process.last_lines())}")


def served_source(
    settings: EngineConfig,
    base: ModelFiles,
    tuned: ModelFiles,
    whole: bool,
    compute_dtype: str,
    logs: Path,
    make_room: Callable[[], None],
) -> ServedSource:
    """The source models: with an adapter (``tuned``) on one server, with a ``whole`` fine-tuned model on two that take
    turns. Log files are in the folder ``logs``."""
    ends = end_ids(load_tokenizer(tuned, base), base.path, *([tuned.path] if whole else []))

    def server(**models: ModelFiles) -> VllmServer:
        log_file = logs / f"vllm-{next(iter(models))}.log"
        return VllmServer(settings.vllm, "engine.vllm", models, compute_dtype, ends, log_file, make_room)

    return ServedSource(
        server(base=base) if whole else server(base=base, fine_tuned=tuned),
        ServedModel(model="base"),
        ServedModel(model="fine_tuned"),
        base,
        tuned,
        settings.cross_scores,
        server(fine_tuned=tuned) if whole else None,
    )


def served_generator(
    settings: Vllm, model: ModelFiles, chat: bool, compute_dtype: str, logs: Path, make_room: Callable[[], None]
) -> ServedGenerator:
    """The generator on a server of its own; arguments as in `served_source`."""
    tokenizer, name = load_tokenizer(model), "generator"
    if chat and not tokenizer.chat_template:
        raise TuneshiftError(
            f"{model.reference} has no chat template: it is a base model. Set generator.mode to continuation."
        )
    ends, log_file = end_ids(tokenizer, model.path), logs / f"vllm-{name}.log"
    server = VllmServer(settings, "generator.server", {name: model}, compute_dtype, ends, log_file, make_room)
    return ServedGenerator(server, name, chat)


def find_command(settings: Vllm, key: str) -> list[str]:
    """The words that start vLLM, the first as a path; `TuneshiftError` with what to install when there is none."""
    name, *words = settings.command or ("vllm", "serve")
    beside = str(Path(sys.executable).parent)
    found = shutil.which(str(Path(name).expanduser()), path=os.pathsep.join([os.environ.get("PATH", ""), beside]))
    if found is None:
        raise TuneshiftError(
            f"{key}: there is no command {name!r} here, which starts vLLM. Install it, best into an environment of its"
            " own (`python3 -m venv ~/vllm && ~/vllm/bin/pip install vllm`), and name it:"
            f" {key}.command: [~/vllm/bin/vllm, serve]"
        )
    return [found, *words]


def _lora_arguments(name: str, adapter: ModelFiles, base: str) -> list[str]:
    """What serves an adapter; `TuneshiftError` for one that vLLM doesn't serve, or not as PEFT does."""
    settings = adapter_config(adapter.path, "source.adapter")
    kind, rank = settings.get("peft_type", "LORA"), int(settings.get("r") or 8)
    problems = [f"peft_type is {kind}"] if kind != "LORA" else []
    problems += [f"{key} is set" for key in _NOT_SERVED if settings.get(key)]
    problems += [f"r is {rank}, and its limit is {_RANKS[-1]}"] if rank > _RANKS[-1] else []
    if problems:
        raise TuneshiftError(
            f"source.adapter: {adapter.path / 'adapter_config.json'}: vLLM can't serve this adapter ({problems[0]})."
            " Use engine.type: local, or merge it into its base and name that in source.fine_tuned."
        )
    module = json.dumps({"name": name, "path": str(adapter.path), "base_model_name": base})
    most = next(most for most in _RANKS if rank <= most)
    # With room for one adapter only, vLLM on a CPU gives it to the base too when both are in a batch.
    return ["--enable-lora", "--max-loras", "2", "--max-lora-rank", str(most), "--lora-modules", module]


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(_HOST, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
