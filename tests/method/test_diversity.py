from tuneshift_dag.method.diversity import distinct_bigrams, novel_bigrams


def test_repeated_bigrams_lower_the_share() -> None:
    assert distinct_bigrams(["where is my card"]) == 1
    assert distinct_bigrams(["where is my card", "Where is my money?"]) == 4 / 6


def test_novelty_counts_what_no_known_prompt_has() -> None:
    assert novel_bigrams(["where is my money"], ["Where is my card?"]) == 1 / 3
    assert novel_bigrams(["where is my card"], ["where is my card"]) == 0


def test_without_two_words_there_is_no_figure() -> None:
    assert distinct_bigrams(["card", ""]) is None
    assert novel_bigrams([], ["where is my card"]) is None
