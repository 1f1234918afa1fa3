"""Meeting requests and their slot codes, written by rule: training data and the held-out file.

    python transfers/meeting_slots/slot_requests.py > transfers/meeting_slots/heldout.jsonl

A slot code is ``<kind><weekday><half>``, for example ``CL4P``: a call on a Thursday, at noon or later. The weekday is 0
when none is named, and the half of the day (A, P) is X when no time is.
"""

import json
import random
import re

KINDS = {
    "CL": ["call", "phone call", "video call", "conference call", "Zoom call"],
    "MT": ["meeting", "team meeting", "budget meeting", "project meeting", "board meeting", "one-on-one meeting",
           "interview", "job interview", "training session", "workshop", "planning session", "seminar"],
    "ML": ["lunch", "dinner", "breakfast", "brunch", "coffee", "team lunch", "business dinner"],
    "AP": ["dentist appointment", "doctor's appointment", "haircut", "eye exam", "check-up", "vet appointment",
           "massage", "appointment"],
    "OT": ["delivery", "flight", "birthday party", "concert", "movie", "football game", "trip", "wedding"],
}  # fmt: skip
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
NO_WEEKDAY, NO_TIME = "0", "X"
LENGTHS = ["15 minutes", "30 minutes", "half an hour", "45 minutes", "an hour", "one hour", "90 minutes", "two hours",
    "2 hours", "an hour and a half"]  # fmt: skip
LENGTH_ADJECTIVES = ["15-minute", "30-minute", "half-hour", "one-hour", "1-hour", "two-hour"]
GROUPS = ["the design team", "the sales team", "my manager", "the client", "our supplier", "the whole team", "HR",
    "the new hires", "the board", "my family", "the investors", "a candidate", "the accountant"]  # fmt: skip
PEOPLE = ["Anna", "Marcus", "Wei", "Sofia", "Ahmed", "Julia", "Tom", "Mr. Brown", "Dr. Lee", "Sarah", "John", "Lucas",
    "Ms. Patel", "Maria", "David", "Emily", "Kofi", "Nora", "Peter and Jane"]  # fmt: skip
OPENINGS = ["Schedule {a}", "Book {a}", "Set up {a}", "Arrange {a}", "Add {a}", "Plan {a}", "Put {a} in my calendar",
    "Please schedule {a}", "Please book {a}", "Can you schedule {a}", "Can you book {a}", "Could you set up {a}",
    "I need to schedule {a}", "I have {a}", "I need {a}", "I'd like to book {a}", "I want to arrange {a}",
    "We have {a}", "Let's have {a}", "Remind me of {a}", "There is {a}", "Make time for {a}", "{A}",
    "Move my calendar around: {a}", "Confirm {a}", "I would like to plan {a}", "Could we have {a}"]  # fmt: skip
TOPICS = ["about the budget", "to discuss the new product", "about the contract", "to review the report",
    "in the main office", "in room 12", "to talk about the project", "at the café"]  # fmt: skip

# The held-out requests are worded with these, which no training request uses.
HELD_OUT_OPENINGS = ["Would you mind setting up {a}", "Find me a slot for {a}", "Hi, please put {a} on the calendar",
    "We should hold {a}", "Don't let me forget {a}", "I was hoping to fit in {a}", "Block time for {a}",
    "Pencil in {a}"]  # fmt: skip
HELD_OUT_PEOPLE = ["Priya", "Daniel", "Olga", "Ines and Paul", "Mrs. Kowalski", "the legal team", "the auditors",
    "our landlord"]  # fmt: skip


def write_request(rng: random.Random, held_out: bool = False) -> tuple[str, str]:
    """One request and its code."""
    kind = rng.choice(list(KINDS))
    clause, adjective = _length(rng)
    day, when_day = _day(rng)
    half, when_time = _time(rng)
    noun = f"{adjective} {rng.choice(KINDS[kind])}".strip()
    if rng.random() < 0.6:
        noun += f" with {rng.choice(HELD_OUT_PEOPLE if held_out else PEOPLE + GROUPS)}"
    if kind in ("CL", "MT") and rng.random() < 0.3:
        noun += f" {rng.choice(TOPICS)}"
    parts = rng.choice([[when_day, when_time, clause], [when_time, when_day, clause], [clause, when_day, when_time]])
    opening = rng.choice(HELD_OUT_OPENINGS if held_out else OPENINGS)
    text = _insert(opening, noun, rng)
    if rng.random() < 0.15 and when_day and text.startswith(("I ", "We ", "There ")):
        parts.remove(when_day)
        text = (
            f"{when_day[0].upper()}{when_day[1:]}, {text[0].lower() if text.startswith('There') else text[0]}{text[1:]}"
        )
    text = " ".join(part for part in [text, *parts] if part)
    text = text.removesuffix(".") + ("?" if text.startswith(("Can", "Could", "Would")) else rng.choice([".", ".", ""]))
    if rng.random() < 0.1:
        text = text.lower()
    return text, f"{kind}{day}{half}"


def _insert(opening: str, noun: str, rng: random.Random) -> str:
    first = noun.split()[0]
    bare = first in {"lunch", "dinner", "breakfast", "brunch", "coffee", "training"}
    article = "" if bare else rng.choice(["the ", "my ", "a ", "a ", "a "])
    if article == "a " and first[0].lower() in "aei":
        article = "an "
    with_article = article + noun
    return opening.replace("{a}", with_article).replace("{A}", noun[0].upper() + noun[1:])


def _length(rng: random.Random) -> tuple[str, str]:
    """A clause ("for an hour") and an adjective ("one-hour"), at most one of which is given. The code has no length."""
    draw = rng.random()
    if draw < 0.6:
        return "", ""
    return ("", rng.choice(LENGTH_ADJECTIVES)) if draw < 0.7 else (f"for {rng.choice(LENGTHS)}", "")


def _day(rng: random.Random) -> tuple[str, str]:
    draw = rng.random()
    if draw < 0.1:
        return NO_WEEKDAY, rng.choice(["", "today", "tomorrow"])
    number = rng.randrange(7)
    return str(number + 1), f"{rng.choice(['on', 'on', 'on', 'next', 'this'])} {DAYS[number]}"


def _time(rng: random.Random) -> tuple[str, str]:
    draw = rng.random()
    if draw < 0.08:
        return NO_TIME, ""
    if draw < 0.12:
        return "P", "at noon"
    hour, minute = rng.randint(7, 20), rng.choice([0, 0, 0, 30, 30, 15, 45])
    half = "A" if hour < 12 else "P"
    if draw < 0.17:
        return half, f"at {hour:02d}:{minute:02d}"
    clock = f"{(hour - 1) % 12 + 1}" + (f":{minute:02d}" if minute else "")
    name = "am" if half == "A" else "pm"
    return half, f"at {clock}" + rng.choice([f" {name}", f" {name}", name, f" {name[0]}.m.", f" {name.upper()}"])


def read_request(text: str) -> str | None:
    """The code of a request, whoever wrote it: the first event that it names, its weekday and its time. None for a text
    that names no event, or neither day nor time, or that asks a question about them."""
    lower = text.lower()
    found = [(match.start(), -len(noun), kind) for noun, kind in _NOUNS.items() if (match := _word(noun).search(lower))]
    day = next((str(number) for number, name in enumerate(DAYS, 1) if _word(name.lower()).search(lower)), NO_WEEKDAY)
    half = _half(lower)
    dated = day != NO_WEEKDAY or half != NO_TIME or _word("today|tomorrow").search(lower)
    return f"{min(found)[2]}{day}{half}" if found and dated and not _QUESTION.match(lower) else None


def _half(text: str) -> str:
    if "noon" in text:
        return "P"
    clock = _CLOCK.search(text)
    if clock is None:
        return NO_TIME
    return (clock["half"] or "ap"[int(clock["hour"]) >= 12]).upper()


_NOUNS = {noun.lower(): kind for kind, nouns in KINDS.items() for noun in nouns}
_CLOCK = re.compile(r"\b\d{1,2}(?::\d\d)? ?(?P<half>[ap])\.?m\b|\bat (?P<hour>\d\d):\d\d\b")
_QUESTION = re.compile(r"(what|why|how|which|who|whose|where|when|is|are|was|were|do|does|did)\b")


def _word(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{pattern})\b")


def training_requests(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Distinct requests with their codes; none of them is in the held-out file."""
    rng = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        text, code = write_request(rng)
        rows.setdefault(text, code)
    return list(rows.items())


def held_out_requests(count: int = 240, seed: int = 1) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        text, code = write_request(rng, held_out=True)
        rows.setdefault(text, code)
    return list(rows.items())


if __name__ == "__main__":
    for prompt, response in held_out_requests():
        print(json.dumps({"prompt": prompt, "response": response}, ensure_ascii=False))
