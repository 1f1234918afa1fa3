"""The parts of benchmarks whose mistakes would look like results."""

import math
from pathlib import Path

import pytest

from benchmarks.pages import write_page
from benchmarks.soft_labels import Told, label, pieces


def test_two_tokenizations_are_cut_where_both_have_an_end():
    # "ab|c|d" and "a|b|cd": the shortest runs with the same bytes.
    found = list(pieces([2, 3, 4, 5], [1, 2, 4, 5]))
    assert found == [(slice(0, 1), slice(0, 2)), (slice(1, 3), slice(2, 3)), (slice(3, 4), slice(3, 4))]
    assert list(pieces([3], [3])) == [(slice(0, 1), slice(0, 1))]


def told(ids: list[int], rows: list[dict[int, float]]) -> Told:
    """What a source says that has these probabilities; what is missing to one is of tokens that aren't told."""
    return Told(ids, [{token: math.log(p) for token, p in row.items()} for row in rows])


class Same(dict[int, int]):
    def __missing__(self, token: int) -> None:
        return None


def test_labels_are_the_sources_probabilities_of_what_both_vocabularies_have():
    # Token 3 of the source has no equal, so its 0.2 is left out and the rest scaled to one.
    source = told([1, 9], [{1: 0.6, 2: 0.2, 3: 0.2}, {9: 0.9, 8: 0.1}])
    ends = ([4, 5], [4, 5])
    found = label(source, [11, 19], ends, Same({1: 11, 2: 12, 8: 18, 9: 19}))
    assert [(place, token) for place, token, _ in found] == [(0, 11), (0, 12), (1, 19), (1, 18)]
    assert [p for *_, p in found] == pytest.approx([0.75, 0.25, 0.9, 0.1])


def test_a_piece_of_several_tokens_has_the_probability_of_them_all():
    # The source writes in two tokens what is one of the target: 0.5 * 0.8, against 0.4 of another token.
    source = told([1, 2, 9], [{1: 0.5, 3: 0.4}, {2: 0.8, 4: 0.2}, {9: 1.0}])
    found = label(source, [11, 19], ([2, 4, 5], [4, 5]), Same({3: 13, 4: 14, 9: 19}))
    assert [(place, token) for place, token, _ in found] == [(0, 11), (0, 13), (1, 19)]
    assert [p for *_, p in found] == pytest.approx([0.5, 0.5, 1.0])
    # And the other way round every token of the piece has its share.
    source = told([1, 9], [{1: 0.6, 3: 0.4}, {9: 1.0}])
    found = label(source, [11, 12, 19], ([4, 5], [2, 4, 5]), Same({3: 13, 9: 19}))
    assert found == [
        (0, 11, pytest.approx(0.6)),
        (1, 12, pytest.approx(0.6)),
        (0, 13, pytest.approx(0.4)),
        (2, 19, 1.0),
    ]


def test_a_section_that_is_not_written_now_stays_as_it_is(tmp_path: Path) -> None:
    page, titles = tmp_path / "page.md", ["One: a", "Two", "Three"]
    write_page(page, titles, {"Three": "third\n\n### Under it\n\n7"}, "# Head\n", "## The end\n\nold\n")
    assert page.read_text() == "# Head\n\n## Three\n\nthird\n\n### Under it\n\n7\n\n## The end\n\nold\n"
    write_page(page, titles, {"One: a": "first\n"}, "# New head\n", "## The end\n\nnew\n")
    kept = "## Three\n\nthird\n\n### Under it\n\n7\n"
    assert page.read_text() == f"# New head\n\n## One: a\n\nfirst\n\n{kept}\n## The end\n\nnew\n"
    before = page.read_bytes()
    write_page(page, titles, {"One: a": "first\n"}, "# New head\n", "## The end\n\nnew\n")
    assert page.read_bytes() == before
