"""``evaluation`` in the graph with fake models."""

import sys

import pytest

from tests.conftest import Project, write_jsonl
from tests.fakes import FakeEngine
from tuneshift_dag import TuneshiftError
from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.method import Side
from tuneshift_dag.reports import report
from tuneshift_dag.reports.export import model_card

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


class TestStandardTasks:
    """With a harness that counts its runs; tests/resources/test_harness.py has the real one."""

    def test_the_target_is_measured_before_and_after_and_only_anew_when_it_changed(
        self, project: Project, asked: list[tuple[str, str, Side]], edit_config
    ) -> None:
        project.run()
        distilled = project.rows("SELECT path FROM distilled_models WHERE current")[0][0].rsplit("/", 1)[1]
        first = [
            ("sums", f"target|{distilled}", "base"),
            ("words", f"target|{distilled}", "base"),
            ("sums", f"target|{distilled}", "fine_tuned"),
            ("words", f"target|{distilled}", "fine_tuned"),
        ]
        assert asked == first
        rows = report(project.store, project.transfer)["tasks"]
        assert [(r["task"], r["model"], r["metric"], r["n"]) for r in rows] == [
            (task, model, "acc", 3) for task in ("sums", "words") for model in ("target_base", "target_distilled")
        ]

        # Another held-out file: the evaluation runs again, the tasks don't.
        write_jsonl(project.folder / "heldout.jsonl", [{"prompt": "Is it late?", "response": "intent_1"}])
        assert ("evaluation", None) in project.run().materialized
        assert asked == first

        # Without a held-out file the tasks alone are an evaluation; one that is left out is no longer shown.
        (project.folder / "heldout.jsonl").unlink()
        edit_config("evaluation.tasks", ["words"])
        assert ("evaluation", None) in project.run().materialized
        assert asked == first
        found = report(project.store, project.transfer)
        assert {row["task"] for row in found["tasks"]} == {"words"}
        assert found["accuracy"] == {}

    def test_a_killed_evaluation_goes_on_after_the_last_task(
        self, project: Project, asked: list[tuple[str, str, Side]]
    ) -> None:
        project.models.failing_task = "words"
        with pytest.raises(TuneshiftError, match=r"evaluation failed: .*killed"):
            project.run()
        assert [task for task, *_ in asked] == ["sums"]
        project.models.failing_task = ""
        project.run()
        assert [task for task, *_ in asked] == ["sums", "words", "sums", "words"]

    def test_without_the_package_the_transfer_says_what_to_install(
        self, project: Project, edit_config, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        edit_config("evaluation.tasks", ["sums"])
        with pytest.raises(
            TuneshiftError, match=r"evaluation\.tasks \['sums'\] .*pip install 'tuneshift-dag\[lm-eval\]'"
        ):
            load_transfer(project.folder)

    def test_a_folder_that_is_not_there_is_named(self, project: Project, edit_config) -> None:
        edit_config("evaluation.task_folder", "nowhere")
        with pytest.raises(TuneshiftError, match=r"evaluation\.task_folder: there is no folder .*nowhere"):
            load_transfer(project.folder)
