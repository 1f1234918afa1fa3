"""What `evaluation` measures beside the skill: general text, the scales of the adapter, and its two verdicts."""

import json
from typing import Any

import dagster as dg
import pytest

from tests.conftest import Project
from tests.fake_engine import FakeEngine
from tuneshift_dag import TuneshiftError
from tuneshift_dag.assets.retention import chosen_scale
from tuneshift_dag.config.schema import Evaluation
from tuneshift_dag.method import Side
from tuneshift_dag.method.evaluation import SCALES, general_texts
from tuneshift_dag.reports import report, verdicts
from tuneshift_dag.reports.export import export, model_card


class Forgetful(FakeEngine):
    """A target that knows the skill the better and general text the worse, the larger the scale of its adapter."""

    def _intent(self, prompt: str, side: Side) -> tuple[str, float]:
        return (" intent_1" if side == "fine_tuned" and self.scale >= 0.6 else " nothing"), -0.05

    def score(self, prompts, responses, side):
        for batch in self._batches(responses):
            cost = 2 + (0.1 * self.scale if side == "fine_tuned" else 0)
            yield [(i, -cost * len(responses[i])) for i in batch]


@pytest.fixture
def forgetful(project: Project) -> Project:
    project.models.target_kind = Forgetful
    project.models.source = _Knowing("source")
    return project


class _Knowing(FakeEngine):
    def _intent(self, prompt: str, side: Side) -> tuple[str, float]:
        text, logprob = super()._intent(prompt, side)
        return (" intent_1" if "transfer late" in prompt and side == "fine_tuned" else text), logprob


def frontier(project: Project) -> list[tuple[Any, ...]]:
    return project.rows("SELECT scale, value, round(ratio, 3), chosen FROM frontier ORDER BY scale")


def test_every_scale_of_the_adapter_is_measured_and_the_whole_one_taken(forgetful: Project) -> None:
    forgetful.run()
    expected = [(0.4, 0.0, 1.041, False), (0.6, 1.0, 1.062, False), (0.8, 1.0, 1.083, False), (1.0, 1.0, 1.105, True)]
    assert frontier(forgetful) == expected
    found = report(forgetful.store, forgetful.transfer)
    assert [verdict["passed"] for verdict in found["verdicts"]] == [True, False]
    assert "Skill: 1.00 of the source's held-out accuracy" in found["verdicts"][0]["words"]
    assert "General text: 1.11 times the perplexity" in found["verdicts"][1]["words"]
    card = model_card(forgetful.transfer, found)
    assert all(f"- {verdict['words']}" in card for verdict in found["verdicts"])
    assert "| 0.6 | 1.000 (0.207 to 1.000) | 1.062 times |  |" in card and "| german |" in card


def test_distill_keep_chooses_a_scale_and_trains_nothing(forgetful: Project, edit_config) -> None:
    forgetful.run()
    trained = len(forgetful.models.trained)
    edit_config("distill.keep", 1.07)
    result = forgetful.run()
    assert [asset for asset, _ in result.materialized] == ["evaluation"]
    assert len(forgetful.models.trained) == trained
    assert [row[0] for row in frontier(forgetful) if row[3]] == [0.6]
    ratio = forgetful.rows("SELECT perplexity FROM retention ORDER BY model DESC")
    assert ratio[0][0] / ratio[1][0] == pytest.approx(1.062, abs=1e-3), "of the scale that is exported"


def test_what_distill_keep_chose_is_not_exported_without_it(
    forgetful: Project, edit_config, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales: list[float] = []
    monkeypatch.setattr("tuneshift_dag.reports.export.scale_adapter", lambda folder, scale: scales.append(scale))
    edit_config("distill.keep", 1.07)
    forgetful.run()
    export(forgetful.store, forgetful.transfer, tmp_path / "part")
    assert scales == [0.6]
    edit_config("distill.keep", None)
    with pytest.raises(TuneshiftError, match=r"distill.keep chooses .*`tuneshift run banking` first"):
        export(forgetful.store, forgetful.transfer, tmp_path / "refused")
    held_out = (forgetful.folder / "heldout.jsonl").read_bytes()
    (forgetful.folder / "heldout.jsonl").unlink()
    found = report(forgetful.store, forgetful.transfer)
    assert (found["accuracy"], found["frontier"]) == ({}, []), "nothing is measured any more"
    assert found["out_of_date"] == ["synthetic_prompts"], "which the file's prompts were kept out of"
    export(forgetful.store, forgetful.transfer, tmp_path / "whole")
    (forgetful.folder / "heldout.jsonl").write_bytes(held_out)
    forgetful.run()
    export(forgetful.store, forgetful.transfer, tmp_path / "whole")
    assert scales == [0.6], "the whole adapter, both times"


def test_both_verdicts_are_asset_checks_that_warn(forgetful: Project) -> None:
    forgetful.run()
    records = forgetful.instance.event_log_storage.get_asset_check_summary_records(
        [dg.AssetCheckKey(forgetful.key("evaluation"), name) for name in ("keeps_skill", "keeps_general_text")]
    )
    outcomes = {key.name: record.last_check_execution_record.event.dagster_event for key, record in records.items()}
    checks = {name: event.asset_check_evaluation_data for name, event in outcomes.items()}
    assert {name: check.passed for name, check in checks.items()} == {"keeps_skill": True, "keeps_general_text": False}
    assert {check.severity for check in checks.values()} == {dg.AssetCheckSeverity.WARN}


def test_general_text_is_measured_by_kind_and_a_chat_target_also_on_its_own_answers(
    project: Project, edit_config
) -> None:
    edit_config("target.prompt", "chat")
    project.run()
    rows = project.rows("SELECT kind, model, tokens FROM retention_by_kind")
    assert {kind for kind, *_ in rows} == {*general_texts(), "own_answers"}
    assert {model for _, model, _ in rows} == {"target_base", "target_distilled"}
    of_kinds = sum(tokens for kind, model, tokens in rows if model == "target_base" and kind != "own_answers")
    assert project.rows("SELECT tokens FROM retention WHERE model = 'target_base'") == [(of_kinds,)]


def test_the_training_is_held_to_the_texts_of_the_rehearsal_set(project: Project, edit_config) -> None:
    project.run()
    written = project.rows("SELECT token_ids FROM rehearsal_set")
    assert len(written) == 6 and sorted(project.models.texts[-1]) == sorted(ids for (ids,) in written)
    edit_config("distill.retain", 0)
    result = project.run()
    assert [asset for asset, _ in result.materialized] == ["distilled_model", "evaluation"]
    assert project.models.texts[-1] == []
    assert "rehearsal_set" not in json.dumps([str(key) for key in project.runner().job.asset_layer.selected_asset_keys])


def rows_of(*shares: float) -> list[dict[str, Any]]:
    return [{"scale": scale, "value": 0.5, "ratio": ratio} for scale, ratio in zip(SCALES, shares, strict=True)]


def test_the_best_scale_within_the_bound_is_chosen() -> None:
    assert chosen_scale(rows_of(1.01, 1.02, 1.04, 1.2), None) == 1.0
    assert chosen_scale(rows_of(1.01, 1.02, 1.04, 1.2), 1.05) == 0.8, "of equal ones the largest"
    assert chosen_scale(rows_of(1.2, 1.3, 1.4, 1.5), 1.05) == 1.0, "none keeps it"
    better = [{**row, "value": 0.6 if row["scale"] == 0.6 else 0.5} for row in rows_of(1.0, 1.0, 1.0, 1.0)]
    assert chosen_scale(better, 1.05) == 0.6
    assert chosen_scale([{**row, "value": None} for row in better], 1.05) == 1.0, "without a held-out file"


def test_a_source_that_knows_nothing_is_said() -> None:
    answers = [{"model": m, "prompt_id": "a", "correct": False} for m in ("target_distilled", "source_fine_tuned")]
    retained = [{"model": "target_base", "perplexity": 10.0}, {"model": "target_distilled", "perplexity": 10.4}]
    skill, text = verdicts(answers, retained, Evaluation(), 0)
    assert not skill.passed and "answers no held-out prompt right" in skill.words
    assert text.passed and "1.04 times" in text.words
    assert verdicts([], retained, Evaluation(), 0)[0].passed, "without a held-out file nothing is asked"
