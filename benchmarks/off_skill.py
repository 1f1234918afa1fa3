"""Prompts in and off the skill of `meeting_slots_chat`, written by rule: what `skill_pools` scores.

None of them was trained on: the requests are worded as those of the held-out file, and the questions off the skill have
other rules than transfers/meeting_slots_chat/general_prompts.py. The near ones speak of meetings, days and times, and
ask for no entry in a calendar.
"""

import random
import string
import sys
from collections.abc import Iterator
from pathlib import Path

from tuneshift_dag.method.prompting import prompt_id

__all__ = ["general", "in_skill", "near", "read_request"]
SKILL = Path(__file__).parents[1] / "transfers" / "meeting_slots"
sys.path.insert(0, str(SKILL))

from slot_requests import DAYS, HELD_OUT_PEOPLE, KINDS, read_request, write_request  # noqa: E402

_FILLERS = {
    "doing": [
        "clean a wooden table", "boil an egg", "sharpen a pencil", "fold a shirt", "water a cactus",
        "wash a woollen hat",
        "repair a flat tyre", "store fresh mushrooms", "draw a straight line", "find north without a compass",
        "whistle loudly", "peel a mango", "light a campfire", "tie a bow tie", "polish leather shoes", "plant garlic",
        "remove a coffee stain", "tune a guitar", "train a puppy to sit", "dry herbs", "make paper", "skip a stone"],
    "dish": [
        "pancakes", "a lentil soup", "an omelette", "apple pie", "fried rice", "a Greek salad", "hummus", "lemonade",
        "tomato sauce", "garlic bread", "a fruit salad", "mashed potatoes", "guacamole", "rice pudding"],
    "animal": [
        "dolphin", "penguin", "bat", "frog", "octopus", "kangaroo", "spider", "whale", "snake", "ostrich", "salmon",
        "hedgehog", "turtle", "bee", "eagle", "otter", "camel", "owl"],
    "thing": [
        "a ripe banana", "the sky at dusk", "moss", "a ruby", "rust", "a lemon", "fresh snow", "a flamingo", "coal",
        "an emerald", "milk", "a raven", "sand", "a carrot"],
    "phrase": [
        "good night", "thank you", "where is the station", "I am hungry", "the door is open", "a glass of water",
        "my name is Eva", "it is raining", "I love music", "the cat sleeps", "too expensive", "see you soon"],
    "language": ["French", "Spanish", "Italian", "German", "Dutch", "Portuguese"],
    "scene": [
        "the sea at night", "a foggy forest", "an abandoned factory", "a desert road", "a frozen pond",
        "a mountain hut",
        "a crowded harbour", "falling leaves", "a candle", "a thunderstorm", "an old violin", "a sleeping village"],
    "work": [
        "Moby-Dick", "Pride and Prejudice", "Faust", "Don Quixote", "Hamlet", "the Iliad", "Frankenstein", "Dracula",
        "Les Misérables", "Crime and Punishment", "Jane Eyre", "Treasure Island"],
    "field": [
        "astronomy", "botany", "chess", "geology", "pottery", "sailing", "cryptography", "beekeeping", "opera",
        "archery", "typography", "carpentry", "meteorology", "philosophy"],
    "start": [
        "The old bridge creaked when", "Nobody expected that", "Behind the bakery there was", "After the flood,",
        "My grandmother always said", "The robot paused and", "Under the floorboards lay", "The last bus had left, so"],
    "bad": [
        "She go to school.", "He don't like fish.", "The childs is happy.", "I has two brothers.", "We was late again.",
        "Them are my shoes.", "Her speak good English.", "It rain a lot here."],
    "code": [
        "reverses a string", "sums a list of numbers", "counts the vowels of a text", "checks for a prime number",
        "reads a file line by line", "finds the largest of three numbers", "removes duplicates from a list"],
    "pair": [
        "butter and margarine", "a lake and a pond", "a virus and a bacterium", "jam and jelly",
        "a comet and an asteroid", "a violin and a viola", "weather and climate", "a simile and a metaphor",
        "speed and velocity", "wool and cotton"],
}  # fmt: skip
_GENERAL = [
    "How do I {doing}?", "What do I need to {doing}?", "Give me one tip to {doing}.", "What do I need for {dish}?",
    "How long does it take to make {dish}?", "Is a {animal} a mammal?", "What does a {animal} eat?",
    "How many legs has a {animal}?", "What colour is {thing}?", "Translate '{phrase}' into {language}.",
    "Write two lines of a poem about {scene}.", "Describe {scene} with three adjectives.", "Who wrote {work}?",
    "What is {work} about?", "What is {field}?", "Name a famous person in {field}.", "Suggest a first book on {field}.",
    "Finish the sentence: {start}", "Correct this sentence: {bad}", "Write a Python function that {code}.",
    "What is the difference between {pair}?",
]  # fmt: skip
_NEAR = [
    "What makes a {event} go well?", "How long does a {event} usually take?", "What should I wear to a {event}?",
    "Write a polite sentence that declines a {event} on {day}.", "Give me two questions to ask at a {event}.",
    "What is the difference between a {event} and a {other}?", "Why do people dislike a {event} on {day} mornings?",
    "Which day comes after {day}?", "How many days are there from {day} to {later}?", "Write a joke about a {event}.",
    "Is {hour} o'clock in the evening late for a {event}?", "Who usually leads a {event}?",
    "Our {event} with {who} on {day} was cancelled. How do I tell the others?", "Where does the word {day} come from?",
    "What time is it in Tokyo when it is {hour} am in London?", "Do banks open on {day}?",
]  # fmt: skip


def in_skill(count: int, seed: int = 2) -> list[tuple[str, str]]:
    """Requests, worded as the held-out ones, with their codes; none of them is in the held-out file."""
    known = {prompt_id(line) for line in _held_out()}
    rng = random.Random(seed)
    found: dict[str, tuple[str, str]] = {}
    while len(found) < count:
        text, code = write_request(rng, held_out=True)
        if prompt_id(text) not in known:
            found.setdefault(prompt_id(text), (text, code))
    return list(found.values())


def general(count: int, seed: int = 0) -> list[str]:
    """Questions that have nothing to do with a calendar."""
    return _write(_GENERAL, _FILLERS, count, seed)


def near(count: int, seed: int = 0) -> list[str]:
    """Questions about meetings, days and times."""
    nouns = [noun for kind in ("CL", "MT", "AP") for noun in KINDS[kind] if noun[0] not in "aeiou"]
    hours = [str(hour) for hour in range(2, 12)]
    fillers = {"event": nouns, "other": nouns, "day": DAYS, "later": DAYS, "hour": hours, "who": HELD_OUT_PEOPLE}
    return _write(_NEAR, fillers, count, seed)


def _held_out() -> Iterator[str]:
    from tuneshift_dag.config.files import load_transfer

    yield from (prompt for prompt, _ in load_transfer(SKILL.with_name("meeting_slots_chat")).heldout)


def _write(tasks: list[str], fillers: dict[str, list[str]], count: int, seed: int) -> list[str]:
    """Different prompts, every task equally often as long as it has new ones."""
    rng = random.Random(seed)
    found: dict[str, str] = {}
    for number in range(100 * count):
        if len(found) == count:
            break
        task = tasks[number % len(tasks)]
        text = task.format(**{name: rng.choice(fillers[name]) for name in _names(task)})
        found.setdefault(prompt_id(text), text)
    return list(found.values())


def _names(task: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(task) if name]
