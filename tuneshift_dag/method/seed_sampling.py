"""Drawing a round's seeds from the kept pairs so that small changes of the pool change few seeds.

Each (round, call, slot) ranks every candidate by a hash and takes the lowest (rendezvous sampling), so
a draw depends on which pairs exist, never on their order or on the draws before it. A weight shifts
the ranking like an exponential clock: candidate i is chosen with probability w_i / Σw.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A prompt that can seed a call; ``response`` is what balancing counts."""

    prompt_id: str
    prompt: str
    response: str


def draw_seeds(
    pool: Sequence[Candidate],
    round_number: int,
    calls: int,
    seeds_per_call: int,
    balance: bool,
    salt: int,
    originals: Sequence[Candidate] = (),
    originals_per_call: int = 0,
) -> list[list[Candidate]]:
    """Seeds of every call of a round: ``calls`` lists of up to ``seeds_per_call`` distinct prompts.

    Args:
        pool: pairs kept so far; in the first round the user's prompts.
        balance: weight a candidate by 1 / (candidates with its response), so that every response is
            drawn about equally often.
        salt: the transfer's seed.
        originals: the user's prompts, of which ``originals_per_call`` open every call's list. All of them open it
            in an order that holds for the whole round: an engine computes what prompts share only once.
    """
    counts = Counter(c.response for c in pool)
    weights = [1 / counts[c.response] if balance else 1.0 for c in pool]
    drawn = []
    for call in range(calls):
        place = f"{salt}|{round_number}|{call}"
        opening = place if originals_per_call < len(originals) else f"{salt}|{round_number}"
        first = _draw(originals, [1.0] * len(originals), originals_per_call, f"{opening}|original")
        drawn.append(first + _draw(pool, weights, seeds_per_call - len(first), place))
    return drawn


def _draw(pool: Sequence[Candidate], weights: Sequence[float], count: int, place: str) -> list[Candidate]:
    """``count`` distinct candidates; each slot takes the lowest hash that no slot before it took."""
    chosen: list[Candidate] = []
    for slot in range(min(count, len(pool))):
        ranked = (
            (_clock(weight, f"{place}|{slot}|{c.prompt_id}"), c.prompt_id, c)
            for weight, c in zip(weights, pool, strict=True)
            if c not in chosen
        )
        chosen.append(min(ranked)[2])
    return chosen


def _clock(weight: float, text: str) -> float:
    uniform = (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") + 1) / (2**64 + 1)
    return -math.log(uniform) / weight
