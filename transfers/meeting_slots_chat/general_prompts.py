"""Instructions that have nothing to do with a calendar, written by rule from a fixed seed."""

import random

THINGS = [
    "fruits", "colours", "rivers", "animals of the forest", "kitchen tools", "musical instruments", "sports",
    "planets", "vegetables", "birds", "languages", "trees", "insects", "metals", "board games", "spices", "dances",
    "flowers", "seas", "professions", "vehicles", "kinds of cheese", "ocean animals", "desserts"
]  # fmt: skip
COUNTRIES = [
    "France", "Japan", "Brazil", "Egypt", "Canada", "Norway", "Kenya", "India", "Mexico", "Poland", "Peru",
    "Turkey", "Vietnam", "Greece", "Chile", "Ireland", "Morocco", "Finland", "Portugal", "Cuba"
]  # fmt: skip
CONCEPTS = [
    "gravity", "photosynthesis", "inflation", "a neural network", "democracy", "evaporation", "friction",
    "a vaccine", "an earthquake", "the water cycle", "electricity", "erosion", "a black hole", "a database",
    "magnetism", "an atom", "a volcano", "biodiversity", "a rainbow", "recycling", "the greenhouse effect",
    "a melody"
]  # fmt: skip
TOPICS = [
    "a lighthouse", "an old bicycle", "the first snow", "a lost umbrella", "a busy market", "a quiet library",
    "a train at night", "a garden in spring", "a friendly dog", "a broken clock", "the smell of bread",
    "a long bridge", "a small island", "a red kite", "an empty theatre", "a warm coat", "a rainy street",
    "an apple tree"
]  # fmt: skip
WORDS = [
    "happy", "fast", "difficult", "bright", "silent", "brave", "cold", "generous", "ancient", "honest", "narrow",
    "calm", "rough", "gentle", "strange", "proud", "careful", "sudden", "empty", "clever"
]  # fmt: skip
TASKS = [
    "Name three {THINGS}.", "List four {THINGS}.", "Give me two examples of {THINGS}.",
    "What is the capital of {COUNTRIES}?", "What language do people speak in {COUNTRIES}?",
    "On which continent is {COUNTRIES}?", "Tell me a fact about {COUNTRIES}.",
    "Explain {CONCEPTS} in one sentence.", "What is {CONCEPTS}?", "Why does {CONCEPTS} matter?",
    "Write one sentence about {TOPICS}.", "Write a short title for a story about {TOPICS}.",
    "Describe {TOPICS} in a few words.", "What is the opposite of {WORDS}?",
    "Give me a word that means the same as {WORDS}.", "Use the word {WORDS} in a sentence.", "What is {NUMBERS}?",
    "How many letters has the word {WORDS}?", "Which of these is larger, {PAIRS}?"
]  # fmt: skip


def general_prompts(count: int, seed: int = 0) -> list[str]:
    """Distinct instructions, at most as many as the rules can write."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        filled = {
            "THINGS": rng.choice(THINGS),
            "COUNTRIES": rng.choice(COUNTRIES),
            "CONCEPTS": rng.choice(CONCEPTS),
            "TOPICS": rng.choice(TOPICS),
            "WORDS": rng.choice(WORDS),
            "NUMBERS": f"{rng.randint(2, 60)} {rng.choice(['plus', 'minus', 'times'])} {rng.randint(2, 20)}",
            "PAIRS": f"{rng.randint(2, 99)} or {rng.randint(100, 200)}",
        }
        found.setdefault(rng.choice(TASKS).format(**filled))
    return list(found)
