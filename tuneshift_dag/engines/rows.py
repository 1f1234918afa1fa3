"""What every row of a batch has answered so far, and how its next token is chosen: the same for every decode loop.

A token's log-probability is its raw logit minus the float32 log-sum-exp, before temperature and top-p."""

from collections.abc import Container, Iterator, Sequence
from typing import Any, Literal

import torch

from tuneshift_dag.method import Decoding, Response, before_stop
from tuneshift_dag.models.prompts import response_text

# Logits turned into float32 at once, in elements: half a megabyte stays in a core's cache.
_FLOAT_AT_ONCE = 1 << 17
# Tokens that run at once, padding included: on a CPU more isn't faster and is more padded; a GPU needs many.
_TOKENS_AT_ONCE = {"cpu": 512}
_TOKENS_AT_ONCE_ELSEWHERE = 16384


class Rows:
    """What each row of a batch has answered so far. ``ends`` are the ids of the tokens that end a response."""

    def __init__(self, tokenizer: Any, ends: Container[int], count: int, decoding: Decoding) -> None:
        self.tokenizer = tokenizer
        self.ends = ends
        self.stops = decoding.stops
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.logprobs: list[list[float]] = [[] for _ in range(count)]
        self.done = [False] * count
        # A token is a byte or more, so a stop is within as many of the last tokens as it has bytes.
        self._window = 8 + max((len(stop.encode()) for stop in self.stops), default=0)

    def add(self, rows: Sequence[int], tokens: list[int], logprobs: list[float]) -> list[bool]:
        """Append one token to each row; True where the row goes on. Finished rows ignore theirs."""
        for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
            if self.done[row]:
                continue
            self.tokens[row].append(token)
            self.logprobs[row].append(logprob)
            self.done[row] = token in self.ends or self._stopped(row)
        return [not self.done[row] for row in rows]

    def responses(self) -> list[Response]:
        return list(map(self._response, range(len(self.done))))

    def _stopped(self, row: int) -> bool:
        if not self.stops:
            return False
        written = self.tokenizer.decode(self.tokens[row][-self._window :])
        return any(stop in written for stop in self.stops)

    def _response(self, row: int) -> Response:
        ids, logprobs = self.tokens[row], self.logprobs[row]
        cut = before_stop(ids, logprobs, self.stops, self._text) if self.stops else None
        if cut:
            text, ids, logprobs = cut
            return Response(text, ids, "stop", sum(logprobs), None)
        ended = bool(ids) and ids[-1] in self.ends
        reason: Literal["stop", "length"] = "stop" if self.done[row] else "length"
        # The end may be a token that isn't special for the tokenizer, which would write it.
        text = self._text(ids[:-1] if ended else ids)
        return Response(text, ids, reason, sum(logprobs, 0.0), logprobs[-1] if ended else None)

    def _text(self, ids: list[int]) -> str:
        return response_text(self.tokenizer, ids)


def choose(logits: torch.Tensor, decoding: Decoding, generators: list[torch.Generator]) -> torch.Tensor:
    """One token per row; sampling looks at ``top_k`` candidates, since sorting a vocabulary costs more than a pass."""
    if decoding.temperature == 0:
        return logits.argmax(1)
    k = min(decoding.top_k or 1024, logits.shape[1])
    values, candidates = logits.topk(k)
    probabilities = (values.float() / decoding.temperature).softmax(1)
    before = probabilities.cumsum(1) - probabilities
    probabilities = probabilities.masked_fill(before >= decoding.top_p, 0)
    # Gumbel-max with each row's own noise: the same row draws the same token in any batch.
    noise = torch.stack([torch.rand(k, generator=g) for g in generators]).to(logits.device)
    gumbel = -torch.log(-torch.log(noise.clamp_min(1e-20)))
    return candidates.gather(1, (probabilities.log() + gumbel).argmax(1, keepdim=True))[:, 0]


def logprobs_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Float32 log-probability of one token per row (N, V). A few rows at a time, never a float32 copy."""
    step = max(1, _FLOAT_AT_ONCE // logits.shape[1])
    totals = torch.cat([logits[i : i + step].float().logsumexp(1) for i in range(0, len(logits), step)])
    return logits.gather(1, tokens[:, None].to(logits.device))[:, 0].float() - totals


def chunks(lengths: Sequence[int], device: torch.device) -> Iterator[list[int]]:
    """Consecutive rows whose padded tokens are few enough to run at once; at least one row each."""
    most = _TOKENS_AT_ONCE.get(device.type, _TOKENS_AT_ONCE_ELSEWHERE)
    rows: list[int] = []
    width = 0
    for row, length in enumerate(lengths):
        if rows and max(width, length) * (len(rows) + 1) > most:
            yield rows
            rows, width = [], 0
        rows.append(row)
        width = max(width, length)
    yield rows
