import json

import pytest

from tuneshift_dag.method.asking import generator_request, labelled_request, separator, stop_texts

TEXTS = ["Fix this:\n```python\nreturn x +\n```", "    return 1\n\n\tpass", "one line"]


def test_a_chat_request_is_the_papers_sentence_and_the_numbered_seeds():
    text = generator_request("chat", "Generate {count} more samples like these {seed_count}:", ["a?", "b {count}"], 20)
    assert text == "Generate 20 more samples like these 2:\n1. a?\n2. b {count}"


def test_a_continuation_request_ends_with_the_next_number():
    text = generator_request("continuation", "Messages:", ["a?", "b"], 20)
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


def test_prompts_of_several_lines_are_shown_as_they_are() -> None:
    blocks = generator_request("chat", "{count} like these {seed_count}:", TEXTS, 20, "blocks")
    assert blocks.startswith("20 like these 3:\n\n" + "\n---\n".join(TEXTS) + "\n\nWrite a line that holds only --- ")
    listed = generator_request("chat", "Like these:", TEXTS, 20, "json")
    begin, end = listed.index("["), listed.index("]\n\nAnswer with a JSON list")
    assert json.loads(listed[begin : end + 1]) == TEXTS


def test_a_continuation_ends_where_the_next_prompt_begins() -> None:
    assert generator_request("continuation", "Code:", TEXTS[1:], 9, "blocks") == (
        "Code:\n---\n    return 1\n\n\tpass\n---\none line\n---\n"
    )
    assert generator_request("continuation", "Code:", TEXTS[1:], 9, "json") == (
        'Code:\n[\n "    return 1\\n\\n\\tpass",\n "one line",'
    )


@pytest.mark.parametrize(
    ("texts", "line"),
    [
        (["a"], "---"),
        (["a\n--\nb"], "---"),
        (["--- a/file\n--- b"], "----"),
        (["a\n---\nb", "c\n ----- \nd"], "------"),
        ([], "---"),
    ],
)
def test_the_line_between_blocks_is_in_none_of_them(texts, line) -> None:
    assert separator(texts) == line


def test_labelled_blocks_show_responses_as_they_are() -> None:
    examples = [("Fix:\n  a_b", " a_b\n  c")]
    assert labelled_request("Code:", "Fixed: {response}\nRequest: {prompt}", examples, "d_e", "---") == (
        "Code:\n---\nFixed: a_b\n  c\nRequest: Fix:\n  a_b\n---\nFixed: d_e\nRequest:"
    )


@pytest.mark.parametrize(
    ("mode", "format", "stops"),
    [
        ("chat", "list", ()),
        ("chat", "json", ()),
        ("continuation", "list", ("\n26.",)),
        ("continuation", "json", ("\n]",)),
        ("continuation", "blocks", ()),
        ("by_response", "list", ("\n\n",)),
        ("by_response", "blocks", ("\n----",)),
    ],
)
def test_what_ends_an_answer(mode, format, stops) -> None:
    assert stop_texts(mode, format, 25, "----") == stops
