import random
from itertools import combinations, pairwise

import numpy as np
import pytest

from tuneshift_dag.method.prompting import (
    PromptPool,
    distinct_bigrams,
    generator_request,
    labelled_request,
    mean_similarity,
    normalize,
    novel_bigrams,
    parse_labelled,
    parse_list,
    prompt_id,
)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("  Where is\tmy CARD?\n", "where is my card"),
        ("snake_case, twice", "snake_case twice"),
        ("3+4?", "3+4"),
        ("Can’t I?", "cant i"),
        ("ﬁne ①", "fine 1"),
        ("?!…", ""),
    ],
)
def test_normalize_drops_case_and_punctuation_only(prompt, expected):
    assert normalize(prompt) == expected


def test_prompt_id_is_that_of_the_normalized_prompt():
    assert prompt_id("Where is my card?") == prompt_id("where is my CARD")
    assert prompt_id("Where is my card?") != prompt_id("Where is my cat?")
    assert len(prompt_id("x")) == 16 and int(prompt_id("x"), 16) >= 0


def test_parse_list_reads_numbers_and_bullets_and_drops_the_rest():
    text = 'Here are some:\n1. First?\n 2) "Second one"\n3: third\n\n- fourth\n* “fifth”\n• sixth\nDone.'
    assert parse_list(text, "chat", finished=True) == ["First?", "Second one", "third", "fourth", "fifth", "sixth"]


def test_parse_list_keeps_a_quotation_inside_an_item():
    text = '1. Why does it say "pending"\n2. "Declined" is what I see'
    assert parse_list(text, "chat", finished=True) == ['Why does it say "pending"', '"Declined" is what I see']


def test_parse_list_of_a_continuation_starts_inside_the_first_item():
    assert parse_list(" First?\n7. Second", "continuation", finished=True) == ["First?", "Second"]
    assert parse_list(" First?\n7. Second", "chat", finished=True) == ["Second"]


@pytest.mark.parametrize("mode", ["chat", "continuation"])
def test_parse_list_drops_the_last_item_when_it_may_be_cut_off(mode):
    text = "1. First\n2. Second\n3. Thi"
    assert parse_list(text, mode, finished=False) == parse_list(text, mode, finished=True)[:-1]
    assert parse_list("1. Fir", mode, finished=False) == []


def test_pool_rejects_each_item_with_its_reason():
    pool = PromptPool(near_duplicate=0.7, max_characters=40)
    pool.add(["Where is my card?"], "seed")
    pool.add(["How do I close my account?"], "held_out")
    items = [
        "...",
        "x" * 41,
        "WHERE is my card",
        "How do I close my account",
        "Can I pay abroad with this card?",
        "can i pay abroad with this card",
        "Can I pay abroad with that card?",
        "y" * 40,
    ]
    accepted, rejected = pool.sort(items)
    assert [(a.position, a.prompt, a.prompt_id) for a in accepted] == [
        (i, items[i], prompt_id(items[i])) for i in (4, 7)
    ]
    assert [(r.position, r.reason) for r in rejected] == [
        (0, "empty"),
        (1, "overlong"),
        (2, "seed"),
        (3, "held_out"),
        (5, "duplicate"),
        (6, "near_duplicate"),
    ]
    assert all(r.prompt == items[r.position] for r in rejected)


def test_the_limit_of_near_duplicates_is_exclusive():
    first, second = "a b c d", "a b x d"  # ROUGE-L 2 * 3 / 8
    for limit, count in ((0.74, 1), (0.75, 2)):
        accepted, _ = PromptPool(limit, 100).sort([first, second])
        assert len(accepted) == count


@pytest.mark.parametrize("limit", [0.3, 0.5, 0.7, 0.8])
def test_near_duplicates_are_those_of_a_brute_force_rouge_l(limit):
    rng = random.Random(0)
    # Few words and many repetitions.
    prompts = {" ".join(rng.choices("abcde", k=rng.randint(1, 9))) for _ in range(120)}
    items = rng.sample(sorted(prompts), len(prompts))
    expected: list[str] = []
    for item in items:
        if all(_rouge_l(item.split(), other.split()) <= limit for other in expected):
            expected.append(item)
    accepted, rejected = PromptPool(limit, 100).sort(items)
    assert [a.prompt for a in accepted] == expected
    assert {r.reason for r in rejected} == {"near_duplicate"}


def _rouge_l(a: list[str], b: list[str]) -> float:
    table = [[0] * (len(b) + 1)]
    for word in a:
        row = [0]
        for (diagonal, above), other in zip(pairwise(table[-1]), b, strict=True):
            row.append(diagonal + 1 if word == other else max(above, row[-1]))
        table.append(row)
    return 2 * table[-1][-1] / (len(a) + len(b))


def test_a_chat_request_wraps_the_paper_sentence_and_the_numbered_seeds():
    text = generator_request(
        "chat", "Generate {count} more samples like these {seed_count}:", ["a?", "b {count}"], 20, "<{}>".format
    )
    assert text == "<Generate 20 more samples like these 2:\n1. a?\n2. b {count}>"


def test_a_continuation_request_ends_with_the_next_number():
    text = generator_request("continuation", "Messages:", ["a?", "b"], 20, "<{}>".format)
    assert text == "Messages:\n1. a?\n2. b\n3."


TEMPLATE = "Topic: {response}\nQuestion: {prompt}"


def test_labelled_request_ends_where_the_asked_prompt_begins():
    examples = [("Where is it?", " card_arrival"), ("How do I pay?", " payment")]
    assert labelled_request("Questions:", TEMPLATE, examples, " change_pin") == (
        "Questions:\n\nTopic: card arrival\nQuestion: Where is it?\n\nTopic: payment\nQuestion: How do I pay?"
        "\n\nTopic: change pin\nQuestion:"
    )


def test_labelled_request_without_a_response_lets_the_generator_name_one():
    assert labelled_request("Questions:", TEMPLATE, [("Hi?", "greeting")], None).endswith("Question: Hi?\n\nTopic:")


@pytest.mark.parametrize(
    ("text", "asked", "finished", "expected"),
    [
        (" Where is my PIN?\n\n", True, True, ["Where is my PIN?"]),
        (' "Where is my PIN?"\nTopic: x', True, False, ["Where is my PIN?"]),
        (" Where is my PI", True, False, []),
        (" Where is my PIN?", True, True, ["Where is my PIN?"]),
        (" lost card\nQuestion: Where is it?\n\n", False, True, ["Where is it?"]),
        (" lost card and nothing else", False, True, []),
    ],
)
def test_parse_labelled_takes_one_finished_line(text, asked, finished, expected):
    assert parse_labelled(text, TEMPLATE, asked, finished) == expected


def test_repeated_bigrams_lower_the_share() -> None:
    assert distinct_bigrams(["where is my card"]) == 1
    assert distinct_bigrams(["where is my card", "Where is my money?"]) == 4 / 6


def test_novelty_counts_what_no_known_prompt_has() -> None:
    assert novel_bigrams(["where is my money"], ["Where is my card?"]) == 1 / 3
    assert novel_bigrams(["where is my card"], ["where is my card"]) == 0


def test_without_two_words_there_is_no_figure() -> None:
    assert distinct_bigrams(["card", ""]) is None
    assert novel_bigrams([], ["where is my card"]) is None


def test_mean_similarity_is_that_of_all_pairs() -> None:
    vectors = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert mean_similarity(vectors) == pytest.approx(np.mean([a @ b for a, b in combinations(vectors, 2)]), abs=1e-6)
    assert mean_similarity(vectors[[0, 0, 0]]) == pytest.approx(1)
    assert mean_similarity(np.eye(3, dtype=np.float32)) == 0


def test_one_prompt_is_like_nothing() -> None:
    assert mean_similarity(np.eye(1, 3, dtype=np.float32)) is None
    assert mean_similarity(np.zeros((0, 3), np.float32)) is None
