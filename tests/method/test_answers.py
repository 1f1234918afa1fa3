import random

import pytest

from tuneshift_dag.method.answers import parse_labelled, parse_list, read_answer, trimmed
from tuneshift_dag.method.asking import generator_request, separator

TEMPLATE = "Topic: {response}\nQuestion: {prompt}"


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


# Lines of prompts as people have them: code, documents, other scripts, marks of JSON and Markdown.
LINES = [
    "def f(x):  # a", "    return x[0] + {'a': \"b\"}[\"c\"]", "\tpass", "", "#include <stdio.h>", "C:\\new\\table",
    "3. Drei", "- ein Punkt", "他说：“你好”", "ありがとう。", "أين بطاقتي؟", "สวัสดีครับ", "{\"prompt\": [1, 2]},",
    "---", "😀 it's", "[\"a\", \"b\"]", "title: x", "x = 'it' if y else \"no\"", "a, b: c",
]  # fmt: skip
CODE = "```python\nx = [1]\n\n---\n2. y\n```"


def some_texts(rng: random.Random) -> list[str]:
    texts = []
    while len(texts) < 4:
        lines = rng.choices(LINES, k=rng.randint(1, 6))
        text = trimmed("\n".join([*lines, CODE] if rng.random() < 0.3 else lines))
        texts += [text] if text else []
    return texts


@pytest.mark.parametrize("format", ["json", "blocks"])
@pytest.mark.parametrize("mode", ["chat", "continuation"])
def test_what_is_shown_reads_back_as_the_same_prompts(mode, format) -> None:
    rng = random.Random(0)
    for _ in range(200):
        texts = some_texts(rng)
        line = separator(texts)
        request = generator_request(mode, "", texts, 4, format, line)
        if mode == "chat":
            answer = request.removeprefix("\n\n").rpartition("\n\n")[0]  # without the sentence that asks for the format
        else:
            answer = request.removeprefix(generator_request(mode, "", texts[:1], 4, format, line))
        assert read_answer(answer, mode, format, True, 4, line) == texts[mode == "continuation" :]


@pytest.mark.parametrize(
    "answer",
    [
        '["a\\nb", "c"]',
        'Sure! Here is the list:\n```json\n[\n  "a\\nb",\n  "c",\n]\n```\nAnything else?',
        '["a\nb", "c"]',
        "['a\\nb', 'c']",
        '[{"prompt": "a\\nb"}, {"prompt": "c"}]',
        '[{"id": 1, "text": "a\\nb"}, {"id": 2, "text": "c"},]',
        '[{"prompt": "a\\nb", "answer": "no"}, {"prompt": "c", "answer": "no"}]',
        '{"prompts": ["a\\nb", "c"]}',
        '{"prompts": ["a\nb", "c"',
        '{"prompt": "a\\nb"}\n{"prompt": "c"}',
        '{"prompt": "a\nb"},\n{"prompt": "c"}',
        '[["a\\nb"], ["c"]]',
        '["a\\nb", "c", "cut o',
        '["a\\nb", "c", {"prompt": "cut',
        # Another form than the one that was asked for.
        "1. a\nb\n2. c\n3. cut o",
        'a\nb\n---\nc\n---\nx: ["cut", "off"]',
        "a\nb\n---\nc\n---\ncut o",
    ],
)
def test_a_json_list_is_read_however_it_is_written(answer) -> None:
    finished = "cut" not in answer
    assert read_answer(answer, "chat", "json", finished, 9) == ["a\nb", "c"]


@pytest.mark.parametrize(
    ("answer", "items"),
    [
        ('["He said "hi", then left.", "b"]', ['He said "hi", then left.', "b"]),
        ("['don't', 'b']", ["don't", "b"]),
        (r'["\d+ and \u00e9 \ud83d\ude00", "\ud83d"]', [r"\d+ and é 😀", "�"]),
        ('["a", 3, null, "b"]', ["a", "b"]),
        ("[" * 5000, []),
        ("I can't do that [sorry].", []),
    ],
)
def test_what_is_not_quite_json(answer, items) -> None:
    assert read_answer(answer, "chat", "json", True, 9) == items


def test_a_json_continuation_begins_inside_the_list() -> None:
    answer = '\n "a\\n  b",\n "c"'
    assert read_answer(answer, "continuation", "json", True, 9) == ["a\n  b", "c"]
    assert read_answer(f'{answer},\n "cut', "continuation", "json", False, 9) == ["a\n  b", "c"]
    assert read_answer(answer, "continuation", "json", True, 1) == ["a\n  b"]


FIX = "Fix:\n```python\ndef f(x):\n\n    return x +\n```"


@pytest.mark.parametrize(
    ("answer", "items"),
    [
        (f"1. {FIX}\n2. {FIX}", [FIX, FIX]),
        (f"Here you are:\n\n1) {FIX}\n\n2) {FIX}\n", [FIX, FIX]),
        (f"**1.** {FIX}\n\n**2.** {FIX}", [FIX, FIX]),
        ("1. " + FIX.replace("\n", "\n   ") + "\n2. b", [FIX, "b"]),
        ("1. ```py\n2. x\n```\n2. b", ["```py\n2. x\n```", "b"]),
        ("10. def f(x):\n    return x\n11. b", ["def f(x):\n    return x", "b"]),
        ("1. Steps:\n1. one\n3. three\n2. b", ["Steps:\n1. one\n3. three", "b"]),
        (f"{FIX}\n---\n    b\nc\n---\n  d", [FIX, "    b\nc", "d"]),
        (f"---\n{FIX}\n-----\nb\r\n---\n", [FIX, "b"]),
        ("Here are two more:\n---\na:\n  b\n---\nc", ["a:\n  b", "c"]),
        ("```\n---\n```\n---\nb", ["```\n---\n```", "b"]),
        ("~~~~\n---\n~~~\n---\n~~~~\n---\nb", ["~~~~\n---\n~~~\n---\n~~~~", "b"]),
        ("```\nnever closed\n---\nb\n---\nc", ["```\nnever closed", "b", "c"]),
        ("```\na\n---\nb\n```", ["a", "b"]),
        ("1. a\n---\n2. b", ["a", "b"]),
        ("1. a\n2. b\n---\n1. c\n2. d", ["1. a\n2. b", "1. c\n2. d"]),
        ('["a\\n b", "c"]', ["a\n b", "c"]),
        ('Read this:\n["a"]\n---\nb', ['Read this:\n["a"]', "b"]),
        ('1. Read:\n["a", "b"]\n2. c', ['Read:\n["a", "b"]', "c"]),
        ("I can't help with that.", []),
        ("", []),
    ],
)
def test_prompts_of_several_lines_keep_them(answer, items) -> None:
    assert read_answer(answer, "chat", "blocks", True, 9) == items


def test_the_last_block_may_be_cut_off() -> None:
    for answer in ("a\n b\n---\nc\n---\ncut", "1. a\n b\n2. c\n3. cut", "a\n b\n---\nc\n---\n"):
        assert read_answer(answer, "chat", "blocks", False, 9) == ["a\n b", "c"]
    assert read_answer("a\n b", "continuation", "blocks", True, 9) == ["a\n b"]
    assert read_answer("a\n1. b\n2. c", "continuation", "blocks", True, 9) == ["a\n1. b\n2. c"]
    assert read_answer("a\n b", "continuation", "blocks", False, 9) == []
    assert read_answer("a\n b", "chat", "blocks", True, 1) == ["a\n b"]


def test_a_list_is_of_single_lines() -> None:
    assert read_answer("1. a\nb\n2. c", "chat", "list", True, 9) == ["a", "c"]


@pytest.mark.parametrize(
    ("text", "asked", "finished", "expected"),
    [
        (" a:\n\n  b\n---\nTopic: x", True, False, ["a:\n\n  b"]),
        (" a\n```\n---\n```\n---", True, False, ["a\n```\n---\n```"]),
        (" a\n  b", True, True, ["a\n  b"]),
        (" a\n  b", True, False, []),
        (" some\nresponse\nQuestion: a\n  b\n---\n", False, True, ["a\n  b"]),
        (" some response", False, True, []),
    ],
)
def test_a_labelled_block_is_read_up_to_its_end(text, asked, finished, expected) -> None:
    assert parse_labelled(text, TEMPLATE, asked, finished, "---") == expected


def test_what_ends_a_template_ends_the_prompt() -> None:
    assert parse_labelled(" a\n  b\nEnd\nmore", "{response}: {prompt}\nEnd", True, False, "---") == ["a\n  b"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("  a ", "a"), ("\n \n  a\n b \n\n", "  a\n b"), ("\n  a\n", "a"), (" \n", ""), ("\ta\n\nb", "\ta\n\nb")],
)
def test_blank_lines_around_a_prompt_go_and_indentation_stays(text, expected) -> None:
    assert trimmed(text) == expected


@pytest.mark.parametrize(
    ("text", "items"),
    [
        (
            "Samples:\n\n---\n**1.** Where is my card?\n\n**2.** Why?\n\n***\n* * *\n_ _ _",
            ["Where is my card?", "Why?"],
        ),
        ("-5 degrees is cold\n3.5 miles is far\n12:30 is noon\n- 5 apples\n1. 3.5 miles", ["5 apples", "3.5 miles"]),
        ("**Where** is it?\n1.First\n-second\n*third", ["First", "second", "third"]),
        ("1. \u200b\n2. seen\u200b", ["", "seen"]),
    ],
)
def test_parse_list_takes_no_rules_numbers_or_bold_text_for_items(text: str, items: list[str]) -> None:
    assert parse_list(text, "chat", finished=True) == items
