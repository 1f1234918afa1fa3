"""What the server engine costs on top of the server's own time: llama.cpp's server, 32 requests in flight."""

import http.client
import json
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import GREEDY, interleaved, prompts, source_files, spread
from tests.servers import test_real_servers as servers
from tests.servers.lora_to_gguf import convert
from tuneshift_dag.config.schema_models import ServedModel, Server
from tuneshift_dag.engines.openai_source import OpenAIServer, ServedSource

CONCURRENCY = 32
REQUESTS = 128


def client_overhead() -> dict[str, Any]:
    """Our wall time over that of a client that sends the same bytes from 32 threads and reads no response."""
    base, adapter = source_files()
    with tempfile.TemporaryDirectory() as folder:
        lora = Path(folder) / "adapter.gguf"
        convert(adapter.path, base.path, lora)
        port = servers.free_port()
        with servers.running(servers.llama_cpp_command(lora, port, slots=CONCURRENCY), port, seconds=60) as url:
            # Without the server's cache of prompts, so that a repetition does the same work.
            models = [
                ServedModel(
                    model="smollm2", extra_body={"cache_prompt": False, "lora": [{"id": 0, "scale": 1.0 - scale}]}
                )
                for scale in (1.0, 0.0)
            ]
            settings = Server(base_url=url, concurrency=CONCURRENCY)
            engine = ServedSource(OpenAIServer(settings, "bench"), *models, base, adapter, cross_scores=False)
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
