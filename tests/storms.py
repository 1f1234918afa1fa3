"""A server in trouble, by a seed: refusals in a row, pauses, half answers, connections that end, wrong answers, other
models. `weathered` asks it until it has all that it wants."""

import json
import threading
import time
from pathlib import Path
from random import Random
from typing import Any

from tests.fake_engine import FakeEngine
from tests.fake_server import FakeServer
from tests.mutations import mutated_value
from tuneshift_dag import TuneshiftError
from tuneshift_dag.config.schema_models import ServedModel, Server
from tuneshift_dag.engines.openai_client import OpenAIServer
from tuneshift_dag.engines.openai_source import ServedSource
from tuneshift_dag.method import Decoding, Pair
from tuneshift_dag.method.scoring import Cost, score_pairs
from tuneshift_dag.models.references import ModelFiles
from tuneshift_dag.store import Store
from tuneshift_dag.store.cache import ResponseCache

TEXTS = [f"Query: {'x' * (i * 7 % 5)} {i}\nIntent:" for i in range(12)]
GREEDY = Decoding(64)
AT_ONCE, RETRIES, SECONDS = 4, 2, 1.5
KINDS = ("429", "500", "503", "slow", "half", "cut", "html", "changed", "wrong")
_ATTEMPTS = 30


class Weather:
    """What a request meets, before it is answered."""

    def __init__(self, seed: int) -> None:
        self.dice = Random(seed)
        self.kinds = self.dice.sample(KINDS, self.dice.randint(1, 3))
        self.often = self.dice.choice([0.02, 0.1, 0.3])
        self.storm: list[str] = []
        self.over = False
        self.answered = 0
        self._lock = threading.Lock()

    def __call__(self, server: FakeServer, body: dict[str, Any]) -> tuple[int, str] | None:
        with self._lock:
            if not self.storm and not self.over and self.dice.random() < self.often:
                kind = self.dice.choice(self.kinds)
                self.storm = [kind] * self.dice.randint(1, 3 if kind == "slow" else 8)
            kind = self.storm.pop() if self.storm and not self.over else ""
            self.answered += kind in ("", "wrong")
        if kind.isdigit():
            return int(kind), '{"error": {"message": "busy"}}'
        if kind == "slow":
            time.sleep(SECONDS + 0.5)
        if kind == "html":
            return 200, "<html>the gateway has a problem</html>"
        if kind == "changed":
            return 404, '{"error": {"message": "there is no such model"}}'
        if kind in ("half", "cut", "wrong"):
            answer = server.answer("/v1/completions", body)
            whole = json.dumps(mutated_value(self.dice, answer) if kind == "wrong" else answer)
            return (0, whole) if kind == "cut" else (200, whole[: len(whole) // 2] if kind == "half" else whole)
        return None


def weathered(case: int, tokenizer: Path, folder: Path) -> str:
    """Ask for pairs until all are there; what was wrong, or the kinds of trouble in brackets.

    A wrong answer that can be read isn't to be noticed, so with such answers only the errors are looked at."""
    weather, cache = Weather(case), ResponseCache(Store(folder / f"{case}.duckdb"))
    believed = "wrong" not in weather.kinds
    with FakeServer(tokenizer, before=weather) as server:
        settings = Server(base_url=server.url, concurrency=AT_ONCE, max_retries=RETRIES, timeout_seconds=SECONDS)
        engine = ServedSource(
            OpenAIServer(settings, "engine.server"),
            ServedModel(model="base"),
            ServedModel(model="skill"),
            ModelFiles("org/tiny", tokenizer, "tokenizer-1"),
            ModelFiles("adapter", tokenizer, "adapter-1"),
            True,
        )
        ids = [engine.encode(text) for text in TEXTS]
        for attempt in range(_ATTEMPTS):
            weather.over = attempt == _ATTEMPTS - 1
            known, asked = _entries(cache), len(server.bodies)
            try:
                pairs = score_pairs(engine, cache, ids, GREEDY, Cost())
                break
            except TuneshiftError as error:
                if problem := _badly_told(str(error), server.url):
                    return problem
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            if _entries(cache) < known:
                return "what was computed is gone"
            if len(server.bodies) - asked > (1 + RETRIES) * 4 * len(TEXTS):
                return f"{len(server.bodies) - asked} requests"
        else:
            return "not even the last attempt, without trouble, succeeded"
        # Four requests make a pair; those of a pair that wasn't complete are asked again.
        if weather.answered > 4 * (len(TEXTS) + attempt * AT_ONCE):
            return f"{weather.answered} requests were answered, in {attempt + 1} attempts"
    if believed and (wrong := _wrong(pairs)):
        return wrong
    return f"({', '.join(weather.kinds)})"


def _entries(cache: ResponseCache) -> int:
    return int(
        cache.store.read(
            "SELECT (SELECT count(*) FROM responses) + (SELECT count(*) FROM scores)", schema="cache"
        ).item()
    )


def _badly_told(said: str, url: str) -> str:
    """What is missing in a message."""
    words = ("engine.server", url, "POST /completions for")
    # Numbers that a wrong answer may hold, and tokens that it may lack, are told for what they are.
    if all(word in said for word in words) or "log-probabilit" in said:
        return ""
    return f"not named in: {said}"


def _wrong(pairs: list[Pair]) -> str:
    fake = FakeEngine()
    for text, pair in zip(TEXTS, pairs, strict=True):
        wanted = fake._pair(fake.encode(text), {}, GREEDY)
        if (pair.base.text, pair.fine_tuned.text) != (wanted.base.text, wanted.fine_tuned.text):
            return f"{text!r}: {pair}"
    return ""
