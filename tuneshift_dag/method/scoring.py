"""Step 2 of the method: both source models answer every prompt, and each scores the other's answer."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from tuneshift_dag.method.engine import Decoding, Engine, Pair, Response, Side

SIDES: tuple[Side, Side] = ("base", "fine_tuned")
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
    engine: Engine,
    cache: Cache,
    prompts: Sequence[list[int]],
    side: Side,
    decoding: Decoding,
    cost: Cost,
    seeds: Sequence[int] | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> list[Response]:
    """A response to every prompt (token ids), from the cache where it is known.

    New responses are put into the cache batch by batch, so a killed run loses at most one batch.
    """
    if decoding.temperature and seeds is None:
        raise ValueError("sampling needs one seed per prompt: without it a response can't be cached honestly")
    fingerprint = engine.fingerprint(side)
    settings = [replace(decoding, seed=seeds[i]) if seeds else decoding for i in range(len(prompts))]
    keys = [cache.response_key(fingerprint, p, d) for p, d in zip(prompts, settings, strict=True)]
    found = cache.responses(keys)
    missing = list({key: i for i, key in enumerate(keys) if key not in found}.values())
    cost.keys.update(keys)
    cost.cache_hits += len(prompts) - len(missing)
    done = 0
    if missing:
        own_seeds = [seeds[i] for i in missing] if seeds else None
        batches = engine.generate([prompts[i] for i in missing], side, decoding, own_seeds)
        for batch in cost.timed(batches):
            new = {keys[missing[i]]: response for i, response in batch}
            cache.put(new, {})
            found |= new
            cost.model_calls += len(new)
            cost.tokens += sum(len(response.token_ids) for response in new.values())
            done += len(new)
            on_progress(done, len(missing))
    return [found[key] for key in keys]


def score_alone(
    engine: Engine,
    cache: Cache,
    responses: Sequence[list[int]],
    side: Side,
    cost: Cost,
    on_progress: OnProgress = lambda done, total: None,
) -> list[float]:
    """log p(y) in nats of every response (token ids) without its prompt; equal responses are scored once.

    The denominator of IFD = PPL(y | x) / PPL(y), Cherry LLM (arXiv 2308.12032), eq. 4.
    """
    return score_given(engine, cache, [[] for _ in responses], responses, side, cost, on_progress)


def score_given(
    engine: Engine,
    cache: Cache,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    side: Side,
    cost: Cost,
    on_progress: OnProgress = lambda done, total: None,
) -> list[float]:
    """log p(y | x) in nats of every given response (token ids) after its prompt; equal ones are scored once."""
    fingerprint = engine.fingerprint(side)
    keys = [cache.score_key(fingerprint, p, r) for p, r in zip(prompts, responses, strict=True)]
    found = cache.scores(keys)
    missing = list({key: i for i, key in enumerate(keys) if key not in found}.values())
    cost.keys.update(keys)
    cost.cache_hits += len(keys) - len(missing)
    done = 0
    if missing:
        asked = engine.score([prompts[i] for i in missing], [responses[i] for i in missing], side)
        for batch in cost.timed(asked):
            new = {keys[missing[i]]: value for i, value in batch}
            cache.put({}, new)
            found |= new
            cost.model_calls += len(new)
            done += len(new)
            on_progress(done, len(missing))
    return [found[key] for key in keys]


def chunk_progress(on_progress: OnProgress, total: int) -> Callable[[int], OnProgress]:
    """Progress over ``total`` prompts that are worked on in chunks: called with a chunk's size, it gives the chunk's.

    What the cache has of later chunks isn't known yet, so all of it counts as still to do.
    """
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
    engine: Engine,
    cache: Cache,
    prompts: Sequence[list[int]],
    decoding: Decoding,
    cost: Cost,
    on_progress: OnProgress = lambda done, total: None,
) -> list[Pair]:
    """Both sides' responses to every prompt (token ids) and the two cross scores.

    What is in the cache is used; the rest is computed and cached batch by batch. A model call is one
    response or one cross score, so a new prompt costs four, or two with an engine without cross scores.
    """
    fingerprints = {side: engine.fingerprint(side) for side in SIDES}
    keys = {s: [cache.response_key(fingerprints[s], p, decoding) for p in prompts] for s in SIDES}
    found = cache.responses([*keys["base"], *keys["fine_tuned"]])

    def cross_keys(i: int, base: Response, fine_tuned: Response) -> tuple[str, str]:
        return (
            cache.score_key(fingerprints["base"], prompts[i], fine_tuned.token_ids),
            cache.score_key(fingerprints["fine_tuned"], prompts[i], base.token_ids),
        )

    known: list[dict[Side, Response]] = [
        {s: found[keys[s][i]] for s in SIDES if keys[s][i] in found} for i in range(len(prompts))
    ]
    answered = [i for i, k in enumerate(known) if len(k) == 2]
    results: dict[int, Pair] = {}
    wanted: dict[int, tuple[str, str]] = {}
    if engine.cross_scores:
        wanted = {i: cross_keys(i, known[i]["base"], known[i]["fine_tuned"]) for i in answered}
    else:
        results = {i: Pair(known[i]["base"], known[i]["fine_tuned"], None, None) for i in answered}
    scores = cache.scores([key for pair in wanted.values() for key in pair])
    for i, (base_key, fine_tuned_key) in wanted.items():
        if base_key in scores and fine_tuned_key in scores:
            results[i] = Pair(known[i]["base"], known[i]["fine_tuned"], scores[base_key], scores[fine_tuned_key])
    # Equal prompts are computed once.
    first: dict[str, int] = {}
    for i, key in enumerate(keys["base"]):
        first.setdefault(key, i)
    missing = [i for i in first.values() if i not in results]
    cost.cache_hits += len(prompts) - len(missing)
    done = 0
    if missing:
        batches = engine.pairs([prompts[i] for i in missing], [known[i] for i in missing], decoding)
        for batch in cost.timed(batches):
            responses: dict[str, Response] = {}
            new_scores: dict[str, float] = {}
            for j, pair in batch:
                i = missing[j]
                results[i] = pair
                responses |= {keys["base"][i]: pair.base, keys["fine_tuned"][i]: pair.fine_tuned}
                cross = (pair.base_on_fine_tuned, pair.fine_tuned_on_base)
                for key, score in zip(cross_keys(i, pair.base, pair.fine_tuned), cross, strict=True):
                    if score is not None:
                        new_scores[key] = score
                cost.model_calls += (4 if engine.cross_scores else 2) - len(known[i])
                generated = {
                    s: r for s, r in (("base", pair.base), ("fine_tuned", pair.fine_tuned)) if s not in known[i]
                }
                cost.tokens += sum(len(response.token_ids) for response in generated.values())
            cache.put(responses, new_scores)
            done += len(batch)
            on_progress(done, len(missing))
    cost.keys.update(keys["base"], keys["fine_tuned"])
    for i, pair in results.items():
        cost.keys.update(cross_keys(i, pair.base, pair.fine_tuned))
    return [results[first[key]] for key in keys["base"]]
