"""Step 2 of the method: both source models answer every prompt, and each scores the other's answer."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Protocol, TypeVar

from tuneshift_dag import TuneshiftError
from tuneshift_dag.method import SIDES, Decoding, Pair, Response, Scorer, Side, TextModel

T = TypeVar("T")
OnProgress = Callable[[int, int], None]


class Cache(Protocol):
    """Where results of model calls are kept by content."""

    def response_key(self, fingerprint: str, prompt_ids: Sequence[int], decoding: Decoding) -> str: ...
    def score_key(self, fingerprint: str, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str: ...
    def responses(self, keys: Sequence[str]) -> dict[str, Response]: ...
    def scores(self, keys: Sequence[str]) -> dict[str, float]: ...
    def put(self, responses: dict[str, Response], scores: dict[str, float]) -> None: ...


@dataclass
class Cost:
    """``model_calls``: prompts that a model worked on, in ``model_seconds`` of wall time (loading included), and
    the ``tokens`` it generated; ``cache_hits``: prompts that needed none; ``keys``: every cache entry used."""

    model_calls: int = 0
    cache_hits: int = 0
    tokens: int = field(default=0, compare=False)
    keys: set[str] = field(default_factory=set, compare=False)
    model_seconds: float = field(default=0.0, compare=False)

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; the time it takes to compute them is added to ``model_seconds``."""
        while True:
            with self.model_time():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    @contextmanager
    def model_time(self) -> Iterator[None]:
        """The time that the block takes is added to ``model_seconds``."""
        started = time.monotonic()
        yield
        self.model_seconds += time.monotonic() - started


def generate(
    model: TextModel,
    cache: Cache,
    prompts: Sequence[list[int]],
    side: Side,
    decoding: Decoding,
    cost: Cost,
    seeds: Sequence[int] | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> list[Response]:
    """A response to every prompt (token ids), from the cache where it is known. New ones are put there batch by batch,
    so a killed run loses at most one batch."""
    if decoding.temperature and seeds is None:
        raise ValueError("sampling needs one seed per prompt: without it a response can't be cached honestly")
    fingerprint = model.fingerprint(side)
    settings = [replace(decoding, seed=seeds[i]) if seeds else decoding for i in range(len(prompts))]
    keys = [cache.response_key(fingerprint, p, d) for p, d in zip(prompts, settings, strict=True)]

    def ask(missing: list[int]) -> Iterator[list[tuple[int, Response]]]:
        own_seeds = [seeds[i] for i in missing] if seeds else None
        return model.generate([prompts[i] for i in missing], side, decoding, own_seeds)

    def keep(new: dict[str, Response]) -> None:
        for response in new.values():
            _check_finite(response)
        cache.put(new, {})
        cost.model_calls += len(new)
        cost.tokens += sum(len(response.token_ids) for response in new.values())

    return _completed(keys, cache.responses(keys), ask, keep, cost, on_progress)


def score(
    model: Scorer,
    cache: Cache,
    texts: Sequence[list[int]],
    side: Side,
    cost: Cost,
    on_progress: OnProgress = lambda done, total: None,
    prompts: Sequence[list[int]] | None = None,
) -> list[float]:
    """log p(text) in nats of every given text (token ids), each after its prompt or, without prompts, with nothing
    before it; equal ones are scored once."""
    fingerprint = model.fingerprint(side)
    before: Sequence[list[int]] = prompts or [[] for _ in texts]
    keys = [cache.score_key(fingerprint, *each) for each in zip(before, texts, strict=True)]

    def ask(missing: list[int]) -> Iterator[list[tuple[int, float]]]:
        return model.score([before[i] for i in missing], [texts[i] for i in missing], side)

    def keep(new: dict[str, float]) -> None:
        _check_finite(*new.values())
        cache.put({}, new)
        cost.model_calls += len(new)

    return _completed(keys, cache.scores(keys), ask, keep, cost, on_progress)


def _check_finite(*found: Response | float | None) -> None:
    """Raise `TuneshiftError` for a log-probability that isn't a finite number, before it is stored. A response without
    token ids has none (a generator on a server)."""
    for each in found:
        value = (each.sum_logprob if each.token_ids else 0.0) if isinstance(each, Response) else each
        if value is not None and not math.isfinite(value):
            text = f" of the response {each.text[:80]!r}" if isinstance(each, Response) else ""
            raise TuneshiftError(
                f"a log-probability{text} is {value} and no finite number, so a model's weights or activations"
                " overflow: set models.compute_dtype: float32, or check its weights. What was computed before is kept."
            )


def _completed(
    keys: list[str],
    found: dict[str, T],
    ask: Callable[[list[int]], Iterator[list[tuple[int, T]]]],
    keep: Callable[[dict[str, T]], None],
    cost: Cost,
    on_progress: OnProgress,
) -> list[T]:
    """The result of every key. Those that aren't found are asked for, equal ones once, and kept batch by batch."""
    missing = list({key: i for i, key in enumerate(keys) if key not in found}.values())
    cost.keys.update(keys)
    cost.cache_hits += len(keys) - len(missing)
    done = 0
    for batch in cost.timed(ask(missing)) if missing else ():
        new = {keys[missing[i]]: result for i, result in batch}
        keep(new)
        found |= new
        done += len(new)
        on_progress(done, len(missing))
    return [found[key] for key in keys]


def sampling_seed(name: str) -> int:
    """What a sampled response draws from: the same number for the same name."""
    return int.from_bytes(sha256(name.encode()).digest()[:6], "big")


def chunk_progress(on_progress: OnProgress, total: int) -> Callable[[int], OnProgress]:
    """Progress over ``total`` prompts that are worked on in chunks: called with a chunk's size, it gives the chunk's.
    What the cache has of later chunks isn't known yet, so all of it counts as still to do."""
    done, later = 0, total

    def chunk(size: int) -> OnProgress:
        nonlocal later
        before, later = done, later - size

        def report(chunk_done: int, chunk_total: int) -> None:
            nonlocal done
            done = before + chunk_done
            on_progress(done, before + chunk_total + later)

        return report

    return chunk


def score_pairs(
    model: Scorer,
    cache: Cache,
    prompts: Sequence[list[int]],
    decoding: Decoding,
    cost: Cost,
    on_progress: OnProgress = lambda done, total: None,
) -> list[Pair]:
    """Both sides' responses to every prompt (token ids) and the two cross scores, from the cache where they are known,
    else cached batch by batch. A model call is one response or one cross score: up to four for a new prompt."""
    fingerprints = {side: model.fingerprint(side) for side in SIDES}
    keys = {s: [cache.response_key(fingerprints[s], p, decoding) for p in prompts] for s in SIDES}
    found = cache.responses([*keys["base"], *keys["fine_tuned"]])
    if not {*keys["base"], *keys["fine_tuned"]} <= found.keys() and model.one_at_a_time:
        for side in SIDES:
            answers = generate(model, cache, prompts, side, decoding, cost, on_progress=on_progress)
            found |= dict(zip(keys[side], answers, strict=True))

    def cross_keys(i: int, base: Response, fine_tuned: Response) -> tuple[str, str]:
        return (
            cache.score_key(fingerprints["base"], prompts[i], fine_tuned.token_ids),
            cache.score_key(fingerprints["fine_tuned"], prompts[i], base.token_ids),
        )

    known: list[dict[Side, Response]] = [
        {s: found[keys[s][i]] for s in SIDES if keys[s][i] in found} for i in range(len(prompts))
    ]
    answered = {i: (k["base"], k["fine_tuned"]) for i, k in enumerate(known) if len(k) == 2}
    if model.cross_scores:
        wanted = {i: cross_keys(i, *both) for i, both in answered.items()}
        scores = cache.scores([key for pair in wanted.values() for key in pair])
        scored = {i: (scores.get(a), scores.get(b)) for i, (a, b) in wanted.items()}
        results = {keys["base"][i]: Pair(*answered[i], *cross) for i, cross in scored.items() if None not in cross}
    else:
        results = {keys["base"][i]: Pair(*both, None, None) for i, both in answered.items()}
    row = {key: i for i, key in enumerate(keys["base"])}

    def ask(missing: list[int]) -> Iterator[list[tuple[int, Pair]]]:
        return model.pairs([prompts[i] for i in missing], [known[i] for i in missing], decoding)

    def keep(new: dict[str, Pair]) -> None:
        responses: dict[str, Response] = {}
        new_scores: dict[str, float] = {}
        for key, pair in new.items():
            i = row[key]
            _check_finite(pair.base, pair.fine_tuned, pair.base_on_fine_tuned, pair.fine_tuned_on_base)
            both: dict[Side, Response] = {"base": pair.base, "fine_tuned": pair.fine_tuned}
            responses |= {keys[s][i]: response for s, response in both.items()}
            cross = (pair.base_on_fine_tuned, pair.fine_tuned_on_base)
            named = zip(cross_keys(i, pair.base, pair.fine_tuned), cross, strict=True)
            new_scores |= {name: value for name, value in named if value is not None}
            cost.model_calls += (4 if model.cross_scores else 2) - len(known[i])
            cost.tokens += sum(len(response.token_ids) for s, response in both.items() if s not in known[i])
        cache.put(responses, new_scores)

    pairs = _completed(keys["base"], results, ask, keep, cost, on_progress)
    cost.keys.update(keys["fine_tuned"])
    for i, pair in enumerate(pairs):
        cost.keys.update(cross_keys(i, pair.base, pair.fine_tuned))
    return pairs
