"""An OpenAI-compatible server: a stream of requests to it, what went wrong, and the generator of prompts behind one.

The API key lives in the client and in no record, message or log line."""

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import openai

from tuneshift_dag import TuneshiftError
from tuneshift_dag.config.schema_models import ServedModel, Server
from tuneshift_dag.method import Decoding, PromptWriter, Response, Side
from tuneshift_dag.method.answers import whole_characters

T = TypeVar("T")
Work = Callable[["Requests", int], Awaitable[T]]
# Raised by hand when a change to the requests changes what a model answers.
_ENGINE_VERSION = "openai-1"
_KEY = "authorization"
# What the client sends when there is no key.
_NO_KEY = "EMPTY"
# Results wait at most this long to be stored: what a killed run loses.
_BATCH_SECONDS = 2.0
LOG = logging.getLogger("tuneshift_dag.server")


class Refused(TuneshiftError):
    """The server was reached and doesn't do what was asked of it."""


@dataclass
class Totals:
    """What a stream of requests cost. ``seconds`` is wall time from the first request to the last response."""

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = (self.prompt_tokens + self.completion_tokens) / max(self.seconds, 1e-9)
        tokens = f"{self.prompt_tokens} prompt and {self.completion_tokens} completion tokens"
        return (
            f"{self.requests} requests ({self.retries} retries), {tokens} in {self.seconds:.1f} s, {rate:.0f} tokens/s"
        )


class OpenAIServer:
    """One server: how it is reached and how much is asked of it at once."""

    def __init__(self, settings: Server, key: str) -> None:
        """``key``: where the settings stand in ``transfer.yaml``, for messages."""
        self.settings = settings
        self.key = key
        # The client would take OPENAI_API_KEY by itself and send it to whatever base_url names.
        self._api_key = _NO_KEY
        if settings.api_key_env:
            self._api_key = os.environ.get(settings.api_key_env, "").strip()
            if not self._api_key:
                raise TuneshiftError(
                    f"{key}.api_key_env: the environment variable {settings.api_key_env} isn't set."
                    " Export it with the server's API key, or leave api_key_env out."
                )

    def stream(self, what: str, count: int, work: Work[T]) -> Iterator[list[tuple[int, T]]]:
        """Results of ``work(requests, i)`` for i below ``count``, in batches as they finish.

        Closing the iterator cancels what is in flight. After an error, what had finished comes first. ``what`` names
        the totals that are logged."""
        totals = Totals()
        batches = self._batches(count, work, totals)

        async def following() -> list[tuple[int, T]] | None:
            return await anext(batches, None)

        try:
            with asyncio.Runner() as runner:  # which cancels what is left
                while batch := runner.run(following()):
                    yield batch
        finally:
            if totals.requests:
                LOG.info(f"{what}: {totals}")

    async def _batches(self, count: int, work: Work[T], totals: Totals) -> AsyncIterator[list[tuple[int, T]]]:
        """As many workers as requests may be in flight take the indices in turn: memory doesn't grow with count."""
        indices = iter(range(count))
        finished: list[tuple[int, T]] = []

        async def worker(requests: Requests) -> None:
            for i in indices:
                finished.append((i, await work(requests, i)))

        started = time.monotonic()
        async with self._client() as client:
            requests = Requests(client, self, totals)
            workers = asyncio.gather(*(worker(requests) for _ in range(min(count, self.settings.concurrency))))
            while not workers.done():
                await asyncio.wait([workers], timeout=_BATCH_SECONDS)
                totals.seconds = time.monotonic() - started
                if batch := finished[:]:
                    finished.clear()  # now: workers may go on first when the caller is back
                    yield batch
            workers.result()

    def _client(self) -> openai.AsyncOpenAI:
        """For one stream of requests. The environment's variables for OpenAI are another server's secrets."""
        lines = os.environ.get("OPENAI_CUSTOM_HEADERS", "").splitlines()
        headers: dict[str, Any] = {line.partition(":")[0].strip(): openai.Omit() for line in lines}
        client = openai.AsyncOpenAI(
            api_key=self._api_key,
            base_url=self.settings.base_url,
            timeout=self.settings.timeout_seconds,
            max_retries=self.settings.max_retries,
            default_headers=headers | {name: f"Bearer {self._api_key}" for name in headers if name.lower() == _KEY},
            # A proxy isn't to be asked for this machine, and would be told the key.
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False) if self.settings.is_here else None,
        )
        client.organization = client.project = None
        return client

    def explain(self, error: openai.APIError, asked: str) -> TuneshiftError:
        """One message for what went wrong with the request that was ``asked``, with the repair, and without the API
        key."""
        settings, after = self.settings, f"after {self.settings.max_retries} retries"
        where = f"{self}: {asked}"
        if isinstance(error, openai.APITimeoutError):
            return TuneshiftError(
                f"{where}: no response within {settings.timeout_seconds:g} s {after}. Raise timeout_seconds, or"
                f" lower concurrency (now {settings.concurrency})."
            )
        if isinstance(error, openai.APIConnectionError):
            cause = self.redact(str(error.__cause__ or error))
            return TuneshiftError(f"{where}: can't be reached {after} ({cause}). Is the server running there?")
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            variable = settings.api_key_env or "none is named"
            return TuneshiftError(
                f"{where}: the server refuses the API key (status {error.status_code})."
                f" Check {self.key}.api_key_env ({variable})."
            )
        if isinstance(error, openai.APIStatusError):
            repair = {
                404: f" Check base_url, which ends with /v1 with most servers, and the model names in {self.key}.",
                429: f" It allows fewer requests: lower concurrency (now {settings.concurrency}).",
            }.get(error.status_code, "")
            tried = f" {after}" if error.status_code == 429 or error.status_code >= 500 else ""
            said = self.redact(error.response.text.strip())[:500]
            kind = Refused if error.status_code in (400, 422, 501) else TuneshiftError
            return kind(f"{where}: status {error.status_code}{tried}: {said}{repair}")
        return TuneshiftError(f"{where}: {type(error).__name__}: {self.redact(str(error))}")

    def __str__(self) -> str:
        return f"{self.key} ({self.settings.base_url})"

    def redact(self, text: str) -> str:
        return text if self._api_key == _NO_KEY else text.replace(self._api_key, "***")


class Requests:
    """Requests of one stream: a bounded number at a time, counted."""

    def __init__(self, client: openai.AsyncOpenAI, server: OpenAIServer, totals: Totals) -> None:
        self.client = client
        self.server = server
        self.totals = totals
        self._slots = asyncio.Semaphore(server.settings.concurrency)

    async def models(self) -> list[dict[str, Any]] | None:
        asked = "GET /models"
        raw = await self._send(asked, self.client.models.with_raw_response.list, optional=True)
        listed = self._json(raw, asked).get("data") if raw else None
        return [model for model in listed if isinstance(model, dict)] if isinstance(listed, list) else None

    async def complete(
        self,
        body: Mapping[str, Any],
        extra_body: Mapping[str, Any],
        read: Callable[[dict[str, Any]], T],
        chat: bool = False,
    ) -> T:
        """What ``read`` makes of the first choice of a completion, or of a chat completion."""
        completions: Any = self.client.chat.completions if chat else self.client.completions
        asked = f"POST {'/chat' if chat else ''}/completions for {body['model']!r}"
        extra = {**self.server.settings.extra_body, **extra_body}
        raw = await self._send(asked, completions.with_raw_response.create, **body, extra_body=extra)
        found = self._json(raw, asked)
        self.totals.requests += 1
        self.totals.retries += raw.retries_taken
        try:
            usage = found.get("usage") or {}
            self.totals.prompt_tokens += int(usage.get("prompt_tokens") or 0)
            self.totals.completion_tokens += int(usage.get("completion_tokens") or 0)
            return read(dict(found["choices"][0]))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            problem = self._unreadable(raw, asked)
        raise problem

    async def _send(
        self, asked: str, request: Callable[..., Awaitable[Any]], optional: bool = False, **arguments: Any
    ) -> Any:
        """The response; None when the server doesn't know a request that is ``optional``."""
        async with self._slots:
            try:
                return await request(**arguments)
            except openai.APIError as error:
                if optional and isinstance(error, openai.NotFoundError):
                    return None
                problem = self.server.explain(error, asked)
        # Outside of the handler: the client's own exception holds the request and its headers.
        raise problem

    def _json(self, raw: Any, asked: str) -> dict[str, Any]:
        # Read as it is: fields beyond OpenAI's matter here, and a model of every token costs time.
        try:
            found = json.loads(raw.content)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise self._unreadable(raw, asked)
        return found

    def _unreadable(self, raw: Any, asked: str) -> TuneshiftError:
        said = self.server.redact(raw.content.decode(errors="replace").strip())[:200]
        return TuneshiftError(
            f"{self.server}: {asked}: the response isn't that of an OpenAI-compatible server: {said!r}. Check base_url."
        )


class ServedGenerator(PromptWriter):
    """The generator of prompts on a server; with ``chat`` the server applies its chat template. It deals in text: a
    prompt's "token ids" are its Unicode code points, a response has none, and its log-probability is NaN."""

    def __init__(self, server: OpenAIServer, model: str, chat: bool) -> None:
        self.server = server
        self.model = ServedModel(model=model)
        self.is_chat = chat

    def fingerprint(self, side: Side) -> str:
        return model_fingerprint(self.server.settings, self.model, "chat" if self.is_chat else "text")

    def encode(self, text: str, templated: bool = False) -> list[int]:
        return list(map(ord, text))

    def chat_ids(self, message: str) -> list[int]:
        return self.encode(message)

    def generate(
        self, prompts: Sequence[list[int]], side: Side, decoding: Decoding, seeds: Sequence[int] | None = None
    ) -> Iterator[list[tuple[int, Response]]]:
        def read(choice: dict[str, Any]) -> Response:
            answer = (choice.get("message") or {}).get("content") if self.is_chat else choice.get("text")
            # Whatever else ended it (a content filter), its last item may be cut off.
            finished = choice.get("finish_reason") == "stop"
            return Response(whole_characters(answer or ""), [], "stop" if finished else "length", float("nan"), None)

        async def work(requests: Requests, i: int) -> Response:
            text = "".join(map(chr, prompts[i]))
            body, extra = sampling_fields(decoding, seeds[i] if seeds else decoding.seed)
            body["model"] = self.model.model
            if not self.is_chat:
                return await requests.complete({"prompt": text, **body}, extra, read)
            # The name that OpenAI's newer models insist on.
            body["max_completion_tokens"] = body.pop("max_tokens")
            return await requests.complete({"messages": [{"role": "user", "content": text}], **body}, extra, read, True)

        yield from self.server.stream("generator calls", len(prompts), work)


def model_fingerprint(server: Server, model: ServedModel, *parts: str) -> str:
    """What the transfer says of a model on a server, and other ``parts``."""
    extra = json.dumps({**server.extra_body, **model.extra_body}, sort_keys=True)
    return "|".join([_ENGINE_VERSION, model.model, server.revision, extra, *parts])


def sampling_fields(decoding: Decoding, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Standard fields and extensions of a request. Nothing is left to a server's or a model's own defaults."""
    body: dict[str, Any] = {"max_tokens": decoding.max_new_tokens, "temperature": decoding.temperature}
    if decoding.stops:
        body["stop"] = list(decoding.stops)
    if decoding.temperature == 0:
        return body, {}
    # 31 bits: llama.cpp's seed is no longer.
    body |= {"top_p": decoding.top_p, "seed": seed % 2**31}
    return body, {"top_k": decoding.top_k, "min_p": 0.0} if decoding.top_k else {}


def token_logprobs(choice: dict[str, Any]) -> list[tuple[int, float]] | None:
    """Id and log-probability of each token of a choice, 0 of an echoed prompt's first; None when the server didn't
    give them. vLLM writes a token as "token_id:42" when asked to; llama.cpp gives an object with its id. What can't be
    read is an `AttributeError`, `TypeError` or `ValueError`."""
    logprobs = choice.get("logprobs") or {}
    if logprobs.get("content") is not None:
        found = [(token.get("id"), token.get("logprob")) for token in logprobs["content"]]
        return None if any(i is None or p is None for i, p in found) else [(int(i), float(p)) for i, p in found]
    names, values = logprobs.get("tokens"), logprobs.get("token_logprobs")
    if names is None or values is None or not all(str(name).startswith("token_id:") for name in names):
        return None
    return [
        (int(name.removeprefix("token_id:")), 0.0 if value is None else float(value))
        for name, value in zip(names, values, strict=True)
    ]
