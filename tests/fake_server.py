"""An OpenAI-compatible server on 127.0.0.1 without a model: it answers what `tests.fake_engine.FakeEngine` answers.

It speaks the completions of vLLM or of llama.cpp, and fails as it is told to. Whatever it is asked is kept.
"""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.fake_engine import FakeEngine
from tuneshift_dag.method import Decoding, Response, Side

END = "<|end|>"


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes, without merges."""
    vocabulary = {symbol: i for i, symbol in enumerate([END, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # whoever finds no place in it comes back a second later


class FakeServer:
    """``with FakeServer(...) as server:`` serves the models "base" and "skill" at ``server.url``."""

    def __init__(
        self,
        tokenizer: Path,
        style: Literal["vllm", "llama_cpp", "plain"] = "vllm",
        echo: bool = True,
        sides: dict[str, Side] | None = None,
        echo_sides: dict[str, Side] | None = None,
        before: Callable[["FakeServer", dict[str, Any]], tuple[int, str] | None] = lambda server, body: None,
    ) -> None:
        """
        Args:
            style: how tokens are written: "plain" is text without ids, as OpenAI's own API has it.
            echo: whether log-probabilities of prompt tokens are given.
            sides: which model answers under which name.
            echo_sides: the same for log-probabilities of prompt tokens.
            before: called with the body of a request before it is answered, in a thread of its own; it may
                return a status and a text to answer instead. With status 0 the connection ends after half of it.
        """
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.style = style
        self.echo = echo
        self.sides: dict[str, Side] = sides or {"base": "base", "skill": "fine_tuned"}
        self.echo_sides = echo_sides or self.sides
        self.before = before
        self.engine = FakeEngine()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.listed = 0
        self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> "FakeServer":
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                server.listed += 1
                names = [{"id": n, "parent": None if n == "base" else "base"} for n in server.sides]
                self._send(200, json.dumps({"object": "list", "data": names}))

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                if not data:
                    return  # the client has gone
                body = json.loads(data)
                with server._lock:
                    server.headers.append({name.lower(): value for name, value in self.headers.items()})
                    server.bodies.append(body)
                    server.in_flight += 1
                    server.most_in_flight = max(server.most_in_flight, server.in_flight)
                try:
                    status, text = server.before(server, body) or (200, "")
                    if not text and body["model"] not in server.sides:
                        status, text = 404, '{"error": {"message": "there is no such model"}}'
                    self._send(status, text or json.dumps(server.answer(self.path, body)))
                finally:
                    with server._lock:
                        server.in_flight -= 1

            def _send(self, status: int, text: str) -> None:
                data = text.encode()
                try:
                    self.send_response(status or 200)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(data)))
                    # What the client waits before a retry; its own pauses start at half a second.
                    self.send_header("retry-after-ms", "1")
                    self.end_headers()
                    self.wfile.write(data if status else data[: len(data) // 2])
                    self.close_connection |= not status
                except OSError:
                    pass  # the client has gone

        self._http = _Listener(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path.endswith("/chat/completions"):
            response = self._respond(body["messages"][0]["content"], body, "base", body["max_completion_tokens"])
            message = {"role": "assistant", "content": response.text}
            choice = {"message": message, "finish_reason": response.finish_reason}
        elif body.get("echo") and self.echo:
            choice = {"text": "", "finish_reason": "length", "logprobs": self._echo(body)}
        else:
            prompt = body["prompt"]
            text = prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)
            response = self._respond(text, body, self.sides[body["model"]], body["max_tokens"])
            tokens = self.tokenizer(response.text, add_special_tokens=False).input_ids
            if response.finish_reason == "stop":
                tokens = [*tokens, self.tokenizer.eos_token_id]
            each = response.sum_logprob / len(response.token_ids)
            choice = {
                "text": response.text,
                "finish_reason": response.finish_reason,
                "logprobs": self._tokens([(t, each) for t in tokens]) if "logprobs" in body else None,
            }
        return {"object": "text_completion", "choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}

    def _respond(self, prompt: str, body: dict[str, Any], side: Side, limit: int) -> Response:
        decoding = Decoding(limit, body["temperature"])
        return self.engine._answer(self.engine.encode(prompt), side, decoding, body.get("seed", 0))

    def _echo(self, body: dict[str, Any]) -> dict[str, Any]:
        """The prompt's tokens, and one more that was generated. A prompt ends with the response to score."""
        ids = body["prompt"]
        prompt, _, response = self.tokenizer.decode(ids).partition("Intent:")
        prompt += "Intent:"
        start = len(self.tokenizer(prompt, add_special_tokens=False).input_ids)
        side = self.echo_sides[body["model"]]
        own = self._respond(prompt, {"temperature": 0}, side, 64)
        if own.text.startswith(response.removesuffix(END)):
            each = own.sum_logprob / len(own.token_ids)
        else:
            scored = Response(response, ids[start:], "stop", 0.0, None)
            each = self.engine._score(self.engine.encode(prompt), side, scored) / len(scored.token_ids)
        known = [None, *[-1.0] * (start - 1), *[each] * (len(ids) - start), -2.0]
        return self._tokens(list(zip([*ids, 5], known, strict=True)))

    def _tokens(self, tokens: list[tuple[int, float | None]]) -> dict[str, Any]:
        if self.style == "llama_cpp":
            return {"content": [{"id": i, "token": self.tokenizer.decode([i]), "logprob": p} for i, p in tokens]}
        names = [f"token_id:{i}" if self.style == "vllm" else self.tokenizer.decode([i]) for i, _ in tokens]
        return {"tokens": names, "token_logprobs": [p for _, p in tokens]}


def fail_first(*statuses: int) -> Callable[[FakeServer, dict[str, Any]], tuple[int, str] | None]:
    """Answer the first requests with these statuses; 0 is one that hangs for a second."""
    left = list(statuses)

    def before(server: FakeServer, body: dict[str, Any]) -> tuple[int, str] | None:
        status = left.pop(0) if left else 200
        if status == 0:
            time.sleep(1)
        return (status, '{"error": {"message": "busy"}}') if status not in (0, 200) else None

    return before
