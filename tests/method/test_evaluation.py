import math
from pathlib import Path

import pytest
import yaml

from tuneshift_dag.method.evaluation import (
    expected_number,
    flexible_number,
    general_texts,
    mark,
    next_question,
    retention,
    strict_number,
)


def test_exact_match_ignores_surrounding_white_space_only():
    assert mark("exact_match", " card_arrival\n", "card_arrival") == (True, None)
    assert mark("exact_match", "Card_arrival", "card_arrival") == (False, None)
    assert mark("exact_match", "card_arrival.", "card_arrival") == (False, None)


FOUND = [
    ("He has 3 + 4 = 7 apples.\n#### 7", "7", "7"),
    ("That is $1,234.50.\n#### 1,234.50", "1234.50", "1234.50"),
    ("#### -12\nso it is 13", "-12", "13"),
    ("#### 5. #### 6.", "5", "6"),
    ("The answer is $18.", None, "18"),
    ("The answer is 18 dollars, at 3% a year.", None, "3"),
    ("#### eighteen", None, None),
    ("####18", None, "18"),
    ("I don't know", None, None),
    ("", None, None),
    # The harness's own pattern takes any run of two of these marks for a number.
    ("It is 4...", None, "4.."),
    ("4, then ...", None, ".."),
]


@pytest.mark.parametrize(
    ("response", "strict", "flexible"),
    FOUND,
)
def test_numbers_are_found_strictly_and_flexibly(response: str, strict: str | None, flexible: str | None) -> None:
    assert (strict_number(response), flexible_number(response)) == (strict, flexible)


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("Half of 96 is 48.\n#### 48", "48"),
        ("1,000", "1000"),
        (" $2.50 ", "2.50"),
        ("-3.", "-3"),
        ("forty", None),
        ("about 40", None),
        ("#### ", None),
        ("1.2.3", None),
        ("5..", None),
        ("٣", None),
        ("３", None),
    ],
)
def test_a_held_out_answer_gives_its_last_number_or_is_one(answer: str, number: str | None) -> None:
    assert expected_number(answer) == number


@pytest.mark.parametrize(
    ("template", "stop"),
    [
        ("Question: {prompt}\nAnswer:", "\nQuestion:"),
        ("Think.\n\n### Problem\n{prompt}\n### Solution\n", "\n### Problem"),
        ("{prompt}\nAnswer:", ""),
        # What begins a number's line, too, needs what tells them apart.
        ("### {prompt}\n", "\n### "),
        ("##\n{prompt}\n", "\n##\n"),
        ("#{prompt}", ""),
        ("#### {prompt}\n", ""),
    ],
)
def test_a_response_is_over_where_the_template_would_open_anew(template: str, stop: str) -> None:
    assert next_question(template) == stop


def test_responses_are_marked_as_the_harness_marks_them() -> None:
    """Its own task file, filters and comparison, on the responses above and some more."""
    harness = pytest.importorskip("lm_eval", reason="the extra lm-eval isn't installed")
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    task = yaml.safe_load((Path(harness.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml").read_text())
    assert task["metadata"]["version"] == 3.0
    filters = {f["name"]: dict(f["filter"][0]) for f in task["filter_list"]}
    (metric,) = task["metric_list"]
    responses = [response for response, *_ in FOUND] + ["#### 7.", "$7", "7.0", "-7", "7 of 8", "#### 7,000 or 7"]
    for answer in ("3 + 4 = 7\n#### 7", "#### 1,234.50", "18", "#### -12"):
        for response in responses:
            marks = []
            for name in ("strict-match", "flexible-extract"):
                options = {key: value for key, value in filters[name].items() if key != "function"}
                ((found,),) = RegexFilter(**options).apply([[response]], [{}])
                rules = {"regexes_to_ignore": metric["regexes_to_ignore"], "ignore_case": metric["ignore_case"]}
                marks.append(bool(exact_match_hf_evaluate([found], [answer], **rules)["exact_match"]))
            assert mark("numeric", response, answer) == tuple(marks), (response, answer)


def test_the_general_text_is_many_different_paragraphs_of_several_kinds_and_languages():
    kinds = general_texts()
    assert list(kinds) == ["prose", "explanation", "code", "dialogue", "everyday", "german", "spanish", "french"]
    texts = [text for kind in kinds.values() for text in kind]
    assert len(set(texts)) == len(texts) and min(map(len, kinds.values())) >= 15
    assert all(len(text) > 100 and text == text.strip() for text in texts)
    # A token of Gemma 3 is 3.9 bytes of it.
    assert sum(len(text.encode()) for text in texts) > 100_000


def test_longer_texts_count_for_more():
    found = retention(["é", "abc"], [[1], [2, 3, 4]], [-1.0, -1.5])
    assert found.perplexity == pytest.approx(math.exp(2.5 / 4))
    assert found.bits_per_byte == pytest.approx(2.5 / math.log(2) / 5)
    assert (found.tokens, found.bytes) == (4, 5)


def test_no_text_is_an_error():
    with pytest.raises(ValueError, match="no text"):
        retention([], [], [])
