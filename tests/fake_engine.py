"""A deterministic engine without a model, for tests of everything above the engine. It imports nothing that a process
would wait for.

A token is a character code and the end token is 0. What a prompt is answered follows from a hash of its
text, so the same prompt always gets the same answer, whatever the batch. A greedy answer is an intent. Of a base,
sampling is what the generator does, so the answer is a list of new prompts.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from copy import copy

from tuneshift_dag.method import AdapterCheck, Decoding, Engine, Pair, PromptFormat, Response, Side, Target

EOS = 0
_SYLLABLES = ["ba", "ce", "di", "fo", "gu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "zu"]


class FakeEngine(Engine, Target):
    """Both protocols of `tuneshift_dag.method`.

    ``answered`` and ``scored`` record the work done: (side, prompt) of every response that was generated
    and of every given response that was scored.
    """

    cross_scores = True

    def __init__(
        self,
        name: str = "fake",
        batch_size: int = 4,
        items: int = 5,
        fail_after: int | None = None,
        check: AdapterCheck | None = None,
        base: str = "",
        on_batch: Callable[[int], None] = lambda number: None,
    ) -> None:
        """
        Args:
            items: prompts in one generated list; the second repeats the first.
            fail_after: raise instead of giving batch number ``fail_after`` (from 0).
            check: what `check_adapter` finds; by default nothing wrong.
            base: another engine's name, if both have the same base model.
            on_batch: called with the number of a batch (from 0 in every call) before it is computed.
        """
        self.name = name
        self.base = base or name
        self.batch_size = batch_size
        self.items = items
        self.scale = 1.0
        self.fail_after = fail_after
        self.on_batch = on_batch
        self.check = check or AdapterCheck([], [], largest_logit_difference=1.0, delta_norm=1.0)
        self.answered: list[tuple[Side, str]] = []
        self.scored: list[tuple[Side, str]] = []

    def fingerprint(self, side: Side) -> str:
        return f"{self.base if side == 'base' else f'{self.name}, {self.scale:g}'}|{side}"

    def encode(self, text: str, templated: bool = False) -> list[int]:
        return [ord(character) for character in text]

    def chat_ids(self, message: str) -> list[int]:
        return self.encode(f"<user>{message}</user>")

    def prompt_ids(self, prompt: str, format: PromptFormat) -> list[int]:
        before, after = format.around()
        if format.template is None:
            before, after = f"<system>{format.system}</system><user>" if format.system else "<user>", "</user>"
        return self.encode(f"{before}{prompt}{after}")

    def opening(self, format: PromptFormat | None) -> list[int]:
        return self.encode("<s>" if format is None else "<s><user>")

    def scaled(self, scale: float) -> "FakeEngine":
        other = copy(self)
        other.scale = scale
        return other

    def check_adapter(self, prompts: Sequence[list[int]]) -> AdapterCheck:
        return self.check

    def generate(
        self, prompts: Sequence[list[int]], side: Side, decoding: Decoding, seeds: Sequence[int] | None = None
    ) -> Iterator[list[tuple[int, Response]]]:
        for batch in self._batches(prompts):
            yield [(i, self._answer(prompts[i], side, decoding, seeds[i] if seeds else 0)) for i in batch]

    def pairs(
        self, prompts: Sequence[list[int]], known: Sequence[dict[Side, Response]], decoding: Decoding
    ) -> Iterator[list[tuple[int, Pair]]]:
        for batch in self._batches(prompts):
            yield [(i, self._pair(prompts[i], known[i], decoding)) for i in batch]

    def score(
        self, prompts: Sequence[list[int]], responses: Sequence[list[int]], side: Side
    ) -> Iterator[list[tuple[int, float]]]:
        for batch in self._batches(responses):
            self.scored += [(side, "".join(map(chr, prompts[i]))) for i in batch]
            # Between 4 and 5 nats a token: less likely than after a prompt (see `_score`).
            yield [(i, -(4 + _number("alone", responses[i]) % 100 / 100) * len(responses[i])) for i in batch]

    def _batches(self, prompts: Sequence[list[int]]) -> Iterator[list[int]]:
        # Longest first, as the real engine does, so that results arrive out of order.
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        for number, start in enumerate(range(0, len(order), self.batch_size)):
            if number == self.fail_after:
                raise RuntimeError("the engine was killed")
            self.on_batch(number)
            yield order[start : start + self.batch_size]

    def _pair(self, ids: list[int], known: dict[Side, Response], decoding: Decoding) -> Pair:
        base = known.get("base") or self._answer(ids, "base", decoding)
        fine_tuned = known.get("fine_tuned") or self._answer(ids, "fine_tuned", decoding)
        return Pair(base, fine_tuned, self._score(ids, "base", fine_tuned), self._score(ids, "fine_tuned", base))

    def _answer(self, ids: list[int], side: Side, decoding: Decoding, seed: int = 0) -> Response:
        prompt = "".join(map(chr, ids))
        self.answered.append((side, prompt))
        if decoding.temperature > 0 and side == "base":
            text, logprob = self._list(prompt, seed), -2.0
        else:
            text, logprob = self._intent(prompt, side)
        text = min((text.partition(stop)[0] for stop in decoding.stops), key=len, default=text)
        tokens = [*self.encode(text), EOS][: decoding.max_new_tokens]
        finished = tokens[-1] == EOS
        return Response(
            text[: len(tokens)],
            tokens,
            "stop" if finished else "length",
            logprob * len(tokens),
            logprob if finished else None,
        )

    def _intent(self, prompt: str, side: Side) -> tuple[str, float]:
        """The answer to a prompt and its mean log-probability per token.

        Of ten prompts the fine-tuned model is sure of eight, and the base of one.
        """
        place = _number("place", prompt) % 10
        if side == "fine_tuned":
            return f" intent_{_number('intent', prompt) % 4}", -1.0 if place < 2 else -0.05
        return f" something about case {_number('case', prompt) % 50}", -0.1 if place == 9 else -1.5

    def _list(self, request: str, seed: int) -> str:
        """A numbered list of new prompts; it goes on after the number that a continuation request ends with."""
        items = [
            "Is " + " ".join(_word("prompt", request, seed, number, place) for place in range(7)) + "?"
            for number in range(self.items)
        ]
        items[1:2] = [items[0].upper()]
        last = re.search(r"\n(\d+)\.$", request)
        first = int(last.group(1)) if last else 1
        text = "\n".join(f"{number}. {item}" for number, item in enumerate(items, first))
        return text.removeprefix(f"{first}.") if last else text

    def _score(self, ids: list[int], side: Side, response: Response) -> float:
        prompt = "".join(map(chr, ids))
        self.scored.append((side, prompt))
        logprob = -3.0 if side == "base" else -4.0
        return (logprob - _number("score", prompt) % 100 / 1000) * len(response.token_ids)


def _number(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def _word(*parts: object) -> str:
    number = _number(*parts)
    return "".join(_SYLLABLES[number // 15**place % 15] for place in range(3))
