import pytest

from tuneshift_dag.method.numeric import expected_number, flexible_number, next_question, strict_number


@pytest.mark.parametrize(
    ("response", "strict", "flexible"),
    [
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
    ],
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
    ],
)
def test_a_response_is_over_where_the_template_would_open_anew(template: str, stop: str) -> None:
    assert next_question(template) == stop
