import math

import pytest

from tuneshift_dag.method.retention import general_texts, retention


def test_the_text_is_twenty_different_paragraphs():
    texts = general_texts()
    assert len(set(texts)) == 20
    assert all(len(text) > 100 for text in texts)
    assert all(text == text.strip() for text in texts)


def test_longer_texts_count_for_more():
    found = retention(["é", "abc"], [[1], [2, 3, 4]], [-1.0, -1.5])
    assert found.perplexity == pytest.approx(math.exp(2.5 / 4))
    assert found.bits_per_byte == pytest.approx(2.5 / math.log(2) / 5)
    assert (found.tokens, found.bytes) == (4, 5)


def test_no_text_is_an_error():
    with pytest.raises(ValueError, match="no text"):
        retention([], [], [])
