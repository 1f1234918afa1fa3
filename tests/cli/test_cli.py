"""The command line, with fake models: what it prints where, and how it fails."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from tests.conftest import Project, Run
from tests.fakes import FakeEngine, FakeModels

MODELS = ["source_base", "source_fine_tuned", "target_base", "target_distilled"]


@pytest.fixture
def done(finished: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A transfer that was run before."""
    monkeypatch.setenv("TUNESHIFT_HOME", str(finished.store.path.parent))
    monkeypatch.setenv("TUNESHIFT_TRANSFERS", str(finished.folder.parent))
    return finished


class TestRun:
    def test_prints_one_json_object_and_nothing_else(
        self, tuneshift: Run, models: FakeModels, transfer_folder: Path
    ) -> None:
        status, out, err = tuneshift("run", "banking", "--json")
        assert status == 0
        figures = json.loads(out)
        assert figures["rounds"] == 2
        assert figures["model_calls"] > 0
        assert "seed_set" in err and "evaluation" in err

        # The same again: nothing to do, and so nothing was spent.
        calls = models.calls()
        status, out, err = tuneshift("run", "banking", "--json")
        assert status == 0
        again = json.loads(out)
        assert (again["model_calls"], again["seconds"]) == (0, {})
        assert again["pairs_kept"] == figures["pairs_kept"]
        assert "Everything is up to date." in err
        assert models.calls() == calls

    def test_a_failing_step_is_one_message_and_prints_no_figures(
        self, tuneshift: Run, models: FakeModels, transfer_folder: Path
    ) -> None:
        models.generator = FakeEngine("generator", fail_after=0)
        status, out, err = tuneshift("run", "banking", "--json")
        assert (status, out) == (1, "")
        (line,) = [line for line in err.splitlines() if line.startswith("error:")]
        assert "synthetic_prompts of round_01 failed" in line and "the engine was killed" in line


class TestReport:
    def test_json(self, tuneshift: Run, done: Project) -> None:
        status, out, err = tuneshift("report", "banking", "--json")
        assert (status, err) == (0, "")
        figures = json.loads(out)
        assert figures.keys() >= {
            "rounds",
            "prompts",
            "pairs_scored",
            "pairs_kept",
            "distinct_responses_kept",
            "model_calls",
            "seconds",
            "accuracy",
        }
        assert list(figures["accuracy"]) == MODELS
        for row in figures["accuracy"].values():
            assert row.keys() == {"value", "low", "high", "n"}
            assert row["low"] <= row["value"] <= row["high"]
        (counts,) = done.rows(
            "SELECT (SELECT count(*) FROM synthetic_prompts), (SELECT count(*) FROM scored_pairs),"
            " (SELECT count(*) FROM filtered_dataset), (SELECT count(DISTINCT response) FROM filtered_dataset)"
        )
        assert counts == tuple(figures[k] for k in ("prompts", "pairs_scored", "pairs_kept", "distinct_responses_kept"))
        # A new prompt costs two responses and two scores; a generator call is one; a seed three in seed_set.
        assert figures["model_calls"] == 4 * figures["pairs_scored"] + 2 * 3 + 3 * 2
        assert set(figures["seconds"]) == {
            "seed_set",
            "synthetic_prompts",
            "scored_pairs",
            "filtered_dataset",
            "threshold_report",
            "distilled_model",
            "evaluation",
        }

    def test_for_people(self, tuneshift: Run, done: Project) -> None:
        status, out, _ = tuneshift("report", "banking")
        assert status == 0
        assert "round_02" in out and "target_distilled" in out
        assert "General text" in out and "bits per byte" in out

    def test_before_any_run_counts_nothing(self, tuneshift: Run, transfer_folder: Path) -> None:
        status, out, _ = tuneshift("report", "banking", "--json")
        assert status == 0
        figures = json.loads(out)
        assert (figures["rounds"], figures["accuracy"], figures["model"]) == (0, {}, None)
        assert figures["retention"] == {}


class TestErrors:
    @pytest.mark.parametrize("command", ["run", "report"])
    def test_unknown_transfer(self, tuneshift: Run, transfer_folder: Path, command: str) -> None:
        status, out, err = tuneshift(command, "bankin")
        assert (status, out) == (1, "")
        assert err == (f"error: There is no transfer 'bankin' in {transfer_folder.parent} (there: banking).\n")

    @pytest.mark.parametrize("command", ["run", "report"])
    def test_broken_yaml(self, tuneshift: Run, transfer_folder: Path, command: str) -> None:
        (transfer_folder / "transfer.yaml").write_text("source: [")
        status, out, err = tuneshift(command, "banking")
        assert (status, out) == (1, "")
        assert err.startswith(f"error: {transfer_folder / 'transfer.yaml'} is not valid YAML:")
        assert "Traceback" not in err

    def test_a_message_with_square_brackets_is_printed_as_it_is(
        self, tuneshift: Run, transfer_folder: Path, edit_config: Callable[[str, Any], None]
    ) -> None:
        edit_config("prompt_template", "[INST] [bold]prompt[/bold] [/INST]")
        status, _, err = tuneshift("report", "banking")
        assert status == 1
        assert "(found '[INST] [bold]prompt[/bold] [/INST]')" in err

    def test_the_program_itself_prints_no_traceback(self, transfer_folder: Path) -> None:
        program = [sys.executable, "-c", "from tuneshift_dag.cli import main; main()"]
        done = subprocess.run([*program, "report", "nowhere"], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: There is no transfer 'nowhere'")
        assert len(done.stderr.splitlines()) == 1


class TestExport:
    def test_writes_the_adapter_and_the_dataset_with_their_cards(
        self, tuneshift: Run, done: Project, tmp_path: Path
    ) -> None:
        to = tmp_path / "exported"
        status, out, _ = tuneshift("export", "banking", "--to", str(to))
        assert status == 0
        assert out.splitlines() == [str(to / n) for n in ("adapter", "dataset.jsonl", "dataset.parquet", "README.md")]
        assert {path.name for path in (to / "adapter").iterdir()} == {
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        kept = done.rows("SELECT prompt, response FROM filtered_dataset ORDER BY round, prompt_id")
        assert kept[0][1].startswith(" ")
        assert [json.loads(line) for line in (to / "dataset.jsonl").read_text().splitlines()] == [
            {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": r.strip()}]} for p, r in kept
        ]
        assert pl.read_parquet(to / "dataset.parquet").select("prompt", "response").rows() == kept
        assert f"{len(kept)} prompts" in (to / "README.md").read_text()
        card = (to / "adapter" / "README.md").read_text()
        assert yaml.safe_load(card.split("---")[1])["base_model"] == "models/tiny-base"
        # Into the same folder once more.
        assert tuneshift("export", "banking", "--to", str(to))[0] == 0

    def test_before_any_run_is_an_error(self, tuneshift: Run, transfer_folder: Path, tmp_path: Path) -> None:
        status, out, err = tuneshift("export", "banking", "--to", str(tmp_path / "to"))
        assert (status, out) == (1, "")
        assert err == "error: banking has no distilled model yet: `tuneshift run banking` first.\n"
        assert not (tmp_path / "to").exists()


class TestDoctor:
    def test_a_sound_transfer(self, tuneshift: Run, transfer_folder: Path) -> None:
        status, out, _ = tuneshift("doctor", "--no-models")
        assert status == 0
        assert "ok   banking: 2 seeds, 1 held-out pairs, up to 2 rounds" in out
        assert "fix" not in out

    @pytest.mark.parametrize("arguments", [[], ["banking"]])
    def test_finds_a_broken_transfer(self, tuneshift: Run, transfer_folder: Path, arguments: list[str]) -> None:
        (transfer_folder / "seeds.jsonl").unlink()
        status, out, _ = tuneshift("doctor", "--no-models", *arguments)
        assert status == 1
        assert f"fix  banking: {transfer_folder / 'seeds.jsonl'} doesn't exist." in out

    def test_without_any_transfer_says_where_it_looked(self, tuneshift: Run, tmp_path: Path) -> None:
        status, out, _ = tuneshift("doctor", "--no-models")
        assert status == 1
        assert f"fix  transfers: none in {tmp_path / 'transfers'}" in out
