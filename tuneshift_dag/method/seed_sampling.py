"""Drawing a round's seeds from the kept pairs so that small changes of the pool change few seeds.

Each (round, call, slot) ranks every candidate by a hash and takes the lowest (rendezvous sampling), so a draw depends
on which pairs exist, never on their order or on the draws before it. A balanced draw ranks the responses first."""

import hashlib
from collections.abc import Mapping, Sequence
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

    They come from ``pool``, the pairs kept so far; with ``balance`` a response is drawn first, each with the same
    chance, then a candidate that has it. ``originals_per_call`` of the user's ``originals`` open every list; all of
    them do in an order that holds for the whole round: an engine computes what prompts share only once."""
    groups: dict[str, list[Candidate]] = {}
    for candidate in pool:
        groups.setdefault(candidate.response if balance else "", []).append(candidate)
    drawn = []
    for call in range(calls):
        place = f"{salt}|{round_number}|{call}"
        opening = place if originals_per_call < len(originals) else f"{salt}|{round_number}"
        first = _draw({"": originals}, originals_per_call, f"{opening}|original")
        drawn.append(first + _draw(groups, seeds_per_call - len(first), place))
    return drawn


def _draw(groups: Mapping[str, Sequence[Candidate]], count: int, place: str) -> list[Candidate]:
    """Up to ``count`` distinct candidates: each slot takes a group, and one of its candidates that is still free."""
    chosen: list[Candidate] = []
    for slot in range(count):
        left = [name for name, group in groups.items() if any(c not in chosen for c in group)]
        if not left:
            break
        here = f"{place}|{slot}"
        group = groups[min(left, key=lambda name: _rank(here, name))]
        chosen.append(min((c for c in group if c not in chosen), key=lambda c: _rank(here, c.prompt_id)))
    return chosen


def _rank(place: str, name: str) -> bytes:
    return hashlib.sha256(f"{place}|{name}".encode()).digest()
