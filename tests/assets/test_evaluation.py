"""``evaluation`` in the graph with fake models."""

import sys

import pytest

from tests.conftest import Project, write_jsonl
from tests.fake_engine import FakeEngine
from tuneshift_dag import TuneshiftError
from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.method import SIDES, PromptFormat, Side
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


def test_each_model_is_asked_in_its_own_format(sums: Project, edit_config) -> None:
    edit_config("prompt_template", None)
    edit_config("source.prompt", {"format": "chat", "system": "Count."})
    edit_config("target.prompt", "Q: {prompt}")
    sums.run()
    source, (*_, target) = sums.models.source, sums.models.targets.values()
    for side in SIDES:
        assert (side, "<system>Count.</system><user>What is 1 + 2?</user>") in source.answered
        assert (side, "Q: What is 1 + 2?") in target.answered
    assert all(prompt.startswith("<system>Count.</system><user>") for _, prompt in source.answered)
    answers = sums.rows("SELECT DISTINCT response FROM evaluations WHERE model = 'source_fine_tuned'")
    assert answers == [("One and one is 2.\n#### 2\nQuery: What is 3?",)], "in a chat no line opens a next question"


def test_a_target_that_can_t_chat_is_named_before_a_model_works(project: Project, edit_config) -> None:
    class Speechless(FakeEngine):
        def prompt_ids(self, prompt: str, format: PromptFormat) -> list[int]:
            raise TuneshiftError(f"{format.key}: no chat template")

    edit_config("prompt_template", None)
    edit_config("source.prompt", "chat")
    project.models.targets["target|"] = Speechless()
    result = project.materialize("seed_set")
    assert not result.success and project.models.calls() == 0
    [failure] = result.filter_events(lambda event: event.is_step_failure)
    assert "target.prompt: no chat template" in str(failure.step_failure_data.error)
    edit_config("target.prompt", "{prompt}:")
    assert project.materialize("seed_set").success


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
