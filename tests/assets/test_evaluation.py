"""``evaluation`` in the graph with fake models."""

import pytest

from tests.conftest import Project, write_jsonl
from tests.fakes import FakeEngine
from tuneshift_dag.method.engine import Side
from tuneshift_dag.reports.export import model_card
from tuneshift_dag.reports.summary import report

WAYS = ["value", "low", "high", "n", "flexible", "flexible_low", "flexible_high"]


class Calculator(FakeEngine):
    """Fine-tuned, it writes the number as GSM8K does and then asks itself another question; the base only names it."""

    def _intent(self, prompt: str, side: Side) -> tuple[str, float]:
        if side == "fine_tuned":
            return " One and one is 2.\n#### 2\nQuery: What is 3?", -0.05
        return " It is 2, I think.", -1.5


@pytest.fixture
def sums(project: Project, edit_config) -> Project:
    write_jsonl(
        project.folder / "heldout.jsonl",
        [
            {"prompt": "What is 1 + 1?", "response": "Added up, that is 2.\n#### 2"},
            {"prompt": "What is 1 + 2?", "response": "3"},
        ],
    )
    edit_config("evaluation", {"metric": "numeric", "max_new_tokens": 64})
    project.models.source = Calculator("source")
    return project


def test_a_numeric_answer_counts_strictly_and_flexibly(sums: Project) -> None:
    sums.run()
    found = report(sums.store, sums.transfer)
    assert found["metric"] == "numeric"
    tuned, base = found["accuracy"]["source_fine_tuned"], found["accuracy"]["source_base"]
    assert list(tuned) == list(base) == WAYS
    assert (tuned["value"], tuned["flexible"]) == (0.5, 0.5)
    assert (base["value"], base["flexible"]) == (0.0, 0.5)
    assert base["flexible_low"] <= 0.5 <= base["flexible_high"]
    answers = "SELECT response, correct, correct_flexible FROM evaluations WHERE model = '{}' ORDER BY expected"
    assert sums.rows(answers.format("source_fine_tuned")) == [
        ("One and one is 2.\n#### 2", False, False),
        ("One and one is 2.\n#### 2", True, True),
    ]
    card = model_card(sums.transfer, found)
    assert "## Held-out numeric answers" in card
    assert "| source base, strict | 0.000 |" in card and "| source base, flexible | 0.500 |" in card
