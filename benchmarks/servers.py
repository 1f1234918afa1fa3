"""Servers of others: how fast llama.cpp's and vLLM answer the prompts that the local engine answers, and what the
server engine costs on top of a server's own time."""

import http.client
import json
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import GREEDY, TRANSFER, interleaved, prompts, ratio, source_files, spread
from tests.servers import test_real_servers as servers
from tests.servers.lora_to_gguf import convert
from tuneshift_dag.config.schema_models import EngineConfig, ServedModel, Server, Vllm
from tuneshift_dag.engines.local import LocalEngine
from tuneshift_dag.engines.openai_source import OpenAIServer, ServedSource
from tuneshift_dag.method import SIDES
from tuneshift_dag.resources import EngineResource

CONCURRENCY = 32
REQUESTS = 128
ANSWERED = 64
VLLM_PYTHON = servers.VLLM_PYTHON
"""The Python that has vLLM; empty without one."""


def scoring_vs_llamacpp() -> dict[str, Any]:
    """Both answers to each prompt, without cross scores, on as many threads: llama.cpp's server with the Q4_1 weights
    over the local engine with the same in nf4. (Their values differ by what each rounds to.)"""
    base, adapter = source_files()
    engine = LocalEngine(base, adapter, "nf4", "auto", ANSWERED)
    with _llama_cpp() as (_, _, server):
        return _anchor(server, engine)


def scoring_vs_vllm() -> dict[str, Any]:
    """The same with vLLM, started as a user's step starts it, both in bfloat16. `TUNESHIFT_VLLM_PYTHON` names the
    Python that has it (`make test-servers` makes one)."""
    settings = Vllm(
        command=(VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server"),
        max_model_len=1024,
        extra_args=("--enforce-eager",),
        concurrency=64,
    )
    models = TRANSFER.config.models.model_copy(update={"compute_dtype": "bfloat16"})
    asked = EngineConfig(type="vllm", vllm=settings, cross_scores=False)
    config = TRANSFER.config.model_copy(update={"engine": asked, "models": models})
    base, adapter = source_files()
    engines = EngineResource()
    try:
        source = engines.source(replace(TRANSFER, config=config))
        engine = LocalEngine(base, adapter, "none", "bfloat16", ANSWERED)
        assert engine.model is not None  # loaded first: to load a model ends the server
        return {**_anchor(source, engine), "arguments": settings.extra_args}
    finally:
        engines.release()


def _anchor(theirs: Any, ours: LocalEngine) -> dict[str, Any]:
    """How many times as long ``theirs`` takes, and the pairs that each answers in a second."""

    def answer(engine: Any) -> None:
        ids = [engine.encode(prompt) for prompt in prompts(ANSWERED)]
        for side in SIDES:
            assert sum(map(len, engine.generate(ids, side, GREEDY))) == ANSWERED

    contestants = {"theirs": lambda: answer(theirs), "ours": lambda: answer(ours)}
    for run in contestants.values():
        run()
    times = interleaved(contestants, 3)
    rates = {name: spread([ANSWERED / t for t in values]) for name, values in times.items()}
    return ratio(times["theirs"], times["ours"], pairs_per_second=rates)


@contextmanager
def _llama_cpp() -> Iterator[tuple[int, list[ServedModel], ServedSource]]:
    """Its port, the source's models, and our client of it. Without the server's cache of prompts, so that a repetition
    does the same work."""
    base, adapter = source_files()
    with tempfile.TemporaryDirectory() as folder:
        lora = Path(folder) / "adapter.gguf"
        convert(adapter.path, base.path, lora)
        port = servers.free_port()
        with servers.running(servers.llama_cpp_command(lora, port, slots=CONCURRENCY), port, seconds=60) as url:
            models = [
                ServedModel(
                    model="smollm2", extra_body={"cache_prompt": False, "lora": [{"id": 0, "scale": 1.0 - scale}]}
                )
                for scale in (1.0, 0.0)
            ]
            settings = Server(base_url=url, concurrency=CONCURRENCY)
            yield (
                port,
                models,
                ServedSource(OpenAIServer(settings, "bench"), *models, base, adapter, cross_scores=False),
            )


def client_overhead() -> dict[str, Any]:
    """Our wall time over that of a client that sends the same bytes from 32 threads and reads no response."""
    with _llama_cpp() as (port, models, engine):
        ids = [engine.encode(prompt) for prompt in prompts(REQUESTS)]
        bodies = [
            json.dumps(
                {
                    "model": "smollm2",
                    "prompt": prompt,
                    "logprobs": 1,
                    "max_tokens": GREEDY.max_new_tokens,
                    "temperature": 0,
                    "repetition_penalty": 1.0,
                    "return_tokens_as_token_ids": True,
                    **models[1].extra_body,
                }
            ).encode()
            for prompt in ids
        ]
        times = interleaved(
            {
                "bare": lambda: _post_all(port, bodies),
                "ours": lambda: list(engine.generate(ids, "fine_tuned", GREEDY)),
            }
        )
    ratios = [ours / bare for ours, bare in zip(times["ours"], times["bare"], strict=True)]
    return {**spread(ratios), "unit": "of the server's own time", "seconds": {k: spread(v) for k, v in times.items()}}


def _post_all(port: int, bodies: Sequence[bytes]) -> None:
    left = iter(bodies)
    lock = threading.Lock()

    def work() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        while True:
            with lock:
                body = next(left, None)
            if body is None:
                return connection.close()
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            assert response.status == 200

    threads = [threading.Thread(target=work) for _ in range(CONCURRENCY)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
