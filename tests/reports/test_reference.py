"""The reference page says what the code says."""

from pathlib import Path

from tuneshift_dag.config.transfer import TransferConfig
from tuneshift_dag.reports.reference import render

PAGE = Path(__file__).parents[2] / "docs" / "reference.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == render(), "run `python -m tuneshift_dag.reports.reference > docs/reference.md`"


def test_every_key_says_what_it_means() -> None:
    for line in render().splitlines():
        if line.startswith("| `"):
            assert line.split(" | ")[-1].strip(" |"), line


def test_every_section_is_on_the_page() -> None:
    text = render()
    for name in TransferConfig.model_fields:
        assert f"`{name}" in text
