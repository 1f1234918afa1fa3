import pytest

from tuneshift_dag.method.evaluation import bootstrap_accuracy, is_exact_match


def test_exact_match_ignores_surrounding_white_space_only():
    assert is_exact_match(" card_arrival\n", "card_arrival")
    assert not is_exact_match("Card_arrival", "card_arrival")
    assert not is_exact_match("card_arrival.", "card_arrival")


def test_accuracy_is_the_share_of_correct_answers_inside_its_interval():
    accuracy = bootstrap_accuracy([True] * 30 + [False] * 70, samples=5000, seed=0)
    assert (accuracy.value, accuracy.n) == (0.3, 100)
    # Normal approximation: 0.3 ± 1.96 · sqrt(0.3 · 0.7 / 100).
    assert accuracy.low == pytest.approx(0.21, abs=0.02)
    assert accuracy.high == pytest.approx(0.39, abs=0.02)


def test_the_interval_is_reproducible_and_narrows_with_more_prompts():
    few, many = [True, False] * 20, [True, False] * 500
    assert bootstrap_accuracy(few, 1000, 3) == bootstrap_accuracy(few, 1000, 3)
    wide, narrow = bootstrap_accuracy(few, 1000, 3), bootstrap_accuracy(many, 1000, 3)
    assert narrow.high - narrow.low < (wide.high - wide.low) / 3


def test_all_correct_has_no_spread():
    accuracy = bootstrap_accuracy([True] * 5, 100, 0)
    assert (accuracy.value, accuracy.low, accuracy.high) == (1, 1, 1)


def test_no_prompts_is_an_error():
    with pytest.raises(ValueError, match="no held-out prompts"):
        bootstrap_accuracy([], 100, 0)
