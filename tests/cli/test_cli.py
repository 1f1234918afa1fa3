"""The command line, with fake models: what it prints where, and how it fails."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from tests.conftest import Project, Run
from tests.fake_engine import FakeEngine
from tests.fakes import FakeModels
from tests.method.test_format_detection import Tuned
from tuneshift_dag.cli import rendering
from tuneshift_dag.cli.doctor import quantized_in_use
from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.config.schema_models import Prompt
from tuneshift_dag.home import cache_dir
from tuneshift_dag.method import Decoding, PromptFormat, Response
from tuneshift_dag.reports import describe_filter, escape_markdown
from tuneshift_dag.reports import report as make_report
from tuneshift_dag.reports.export import export, model_card
from tuneshift_dag.store import Store
from tuneshift_dag.store.cache import ResponseCache
from tuneshift_dag.store.records import Records

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
        assert "banking: 11 steps to do, 2 rounds (round_01 to round_02); no recorded speed yet." in err
        assert "\nsynthetic_prompts round_01 of 2\n" in err and "\nevaluation\n" in err

        # The same again: nothing to do, and so nothing was spent.
        calls = models.calls()
        status, out, err = tuneshift("run", "banking", "--json")
        assert status == 0
        again = json.loads(out)
        assert (again["model_calls"], again["seconds"]) == (0, {})
        assert again["pairs_kept"] == figures["pairs_kept"]
        assert "Everything is up to date." in err
        assert models.calls() == calls

    def test_of_fewer_rounds_than_there_are_changes_nothing(
        self, tuneshift: Run, ran: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TUNESHIFT_HOME", str(ran.store.path.parent))
        monkeypatch.setenv("TUNESHIFT_TRANSFERS", str(ran.folder.parent))
        status, _, err = tuneshift("run", "banking", "--rounds", "1")
        assert status == 0 and "Everything is up to date." in err

    @pytest.mark.parametrize("command", ["report", "sweep", "export"])
    def test_the_results_of_another_folder_of_that_name_are_not_shown(
        self, tuneshift: Run, done: Project, tmp_path: Path, command: str
    ) -> None:
        other = tmp_path / "other" / "banking"
        shutil.copytree(done.folder, other)
        more = ["--to", str(tmp_path / "out")] if command == "export" else []
        status, _, err = tuneshift(command, str(other), *more)
        assert status == 1 and f"the name 'banking' (in whatever case) is that of {done.folder}" in err

    def test_of_fewer_rounds_trains_on_those_and_goes_on_later(
        self, tuneshift: Run, models: FakeModels, transfer_folder: Path, tmp_path: Path
    ) -> None:
        status, out, err = tuneshift("run", "banking", "--rounds", "1")
        assert status == 0
        assert "banking: 8 steps to do, 1 rounds (round_01 to round_01)" in err
        assert "round_02" not in out + err
        # What to look at: the pictures that there are, and what to type.
        output = tmp_path / "home" / "output" / "banking"
        shown = [line.strip() for line in err.partition("Pictures:\n")[2].partition("Next:")[0].splitlines()]
        drawn = ("perplexity_scatter", "kept_by_threshold", "training_curve", "accuracy", "frontier")
        assert shown == [str(output / f"{name}.png") for name in drawn] and all(Path(path).is_file() for path in shown)
        assert all(f"tuneshift {command} banking" in err for command in ("report", "sweep", "export"))
        assert "out of date" not in tuneshift("report", "banking")[1], "nothing changed"
        assert tuneshift("export", "banking", "--to", str(tmp_path / "first"))[0] == 0

        status, out, err = tuneshift("run", "banking", "--json")
        assert status == 0
        assert json.loads(out)["rounds"] == 2
        assert (
            "1 rounds (round_02 to round_02); at most" in err and "at recorded speeds, less what the cache has" in err
        )
        assert "synthetic_prompts round_01" not in err and "Pictures:" not in err

    def test_interrupted_says_what_to_do_in_one_line(
        self, tuneshift: Run, models: FakeModels, transfer_folder: Path
    ) -> None:
        """As Ctrl-C does it, while a model answers."""
        models.source = FakeEngine("source", on_batch=lambda number: os.kill(os.getpid(), signal.SIGINT))
        status, out, err = tuneshift("run", "banking")
        assert (status, out) == (130, ""), err
        assert err.splitlines()[-1] == "interrupted; what was computed is kept: run the same command again"
        assert "Traceback" not in err
        models.source = FakeEngine("source")
        assert tuneshift("run", "banking")[0] == 0

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
        # The preflight on the seeds answers nothing, and counts as no call.
        assert figures["model_calls"] == 4 * figures["pairs_scored"] + 2 * 3 + 2
        assert set(figures["seconds"]) == {
            "seed_set",
            "synthetic_prompts",
            "scored_pairs",
            "filtered_dataset",
            "threshold_report",
            "rehearsal_set",
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

    @pytest.mark.parametrize("name", ["n" * 300, "x/" * 3000])
    def test_a_name_that_no_folder_can_have(self, tuneshift: Run, transfer_folder: Path, name: str) -> None:
        for words in (["report", name], ["lineage", name, "x"], ["sweep", "banking", "--truth", f"{name}.jsonl"]):
            status, out, err = tuneshift(*words)
            assert (status, out) == (1, "") and err.startswith("error: ") and "Traceback" not in err
        status, _, err = tuneshift("new", name)
        assert status == 1 and "Traceback" not in err

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


class TestHomes:
    """``DAGSTER_HOME`` and ``TUNESHIFT_HOME`` as people write them."""

    @pytest.fixture(autouse=True)
    def working_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        folder = tmp_path / "work"
        folder.mkdir()
        monkeypatch.chdir(folder)
        monkeypatch.setenv("HOME", str(tmp_path / "user"))
        return folder

    @pytest.mark.parametrize(
        ("given", "where"), [("dagster", "work/dagster"), ("~/dagster", "user/dagster"), ("", "home/dagster")]
    )
    def test_are_made_absolute(
        self, tuneshift: Run, project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str, where: str
    ) -> None:
        monkeypatch.setenv("DAGSTER_HOME", given)
        # Without `compare:` it ends before anything runs, with Dagster's instance open.
        status, _, err = tuneshift("compare", "banking")
        assert status == 1 and "compare: missing" in err
        assert (tmp_path / where / "dagster.yaml").is_file()
        assert os.environ["DAGSTER_HOME"] == str(tmp_path / where)
        assert [path.name for path in (tmp_path / "work").iterdir()] == (["dagster"] if given == "dagster" else [])

    def test_of_tuneshift_itself_too(
        self, tuneshift: Run, transfer_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("TUNESHIFT_HOME", "~/ts")
        monkeypatch.setenv("TUNESHIFT_CACHE", "~/models")
        _, out, _ = tuneshift("doctor", "--no-models")
        assert cache_dir() == tmp_path / "user" / "models" and cache_dir().is_dir()
        assert f"database: {tmp_path / 'user' / 'ts' / 'tuneshift.duckdb'}\n" in out
        assert list((tmp_path / "work").iterdir()) == []

    @pytest.mark.parametrize("variable", ["DAGSTER_HOME", "TUNESHIFT_HOME", "TUNESHIFT_CACHE"])
    def test_that_are_a_file_are_one_line(
        self, tuneshift: Run, transfer_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
    ) -> None:
        file = tmp_path / "file"
        file.touch()
        monkeypatch.setenv(variable, str(file))
        status, out, err = tuneshift("run", "banking")
        assert (status, out) == (1, "")
        assert err == f"error: {variable}: {file} is no folder. Name one, or unset the variable.\n"

    @pytest.mark.parametrize("value", ["~nobody-here/x", "x" * 300])
    @pytest.mark.parametrize(
        ("command", "variable"),
        [
            ("run", "DAGSTER_HOME"),
            ("run", "TUNESHIFT_CACHE"),
            *itertools.product(["run", "report", "doctor"], ["TUNESHIFT_HOME", "TUNESHIFT_TRANSFERS"]),
        ],
    )
    def test_that_can_be_nowhere_are_one_line(
        self,
        tuneshift: Run,
        transfer_folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        command: str,
        variable: str,
        value: str,
    ) -> None:
        monkeypatch.setenv(variable, value)
        status, _, err = tuneshift(command, "banking")
        assert status == 1
        assert err.startswith(f"error: {variable}") and len(err.splitlines()) == 1
        assert list(Path().iterdir()) == []

    @pytest.mark.parametrize("command", ["run", "report", "doctor"])
    def test_that_cannot_be_made_are_one_line(
        self, tuneshift: Run, transfer_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("TUNESHIFT_HOME", str(tmp_path / "file" / "home"))
        monkeypatch.delenv("DAGSTER_HOME")
        status, _, err = tuneshift(command, "banking")
        assert status == 1
        assert "Not a directory. Name a folder that can be written." in err and len(err.splitlines()) == 1

    @pytest.mark.parametrize("text", ["storage: [", "storage:\n  postgres:\n    postgres_db: {}\n", "no: such key\n"])
    def test_with_a_broken_dagster_yaml_are_one_line(
        self, tuneshift: Run, transfer_folder: Path, tmp_path: Path, text: str
    ) -> None:
        file = tmp_path / "home" / "dagster" / "dagster.yaml"
        file.parent.mkdir(parents=True)
        file.write_text(text)
        status, out, err = tuneshift("run", "banking")
        assert (status, out) == (1, "")
        assert err.startswith(f"error: {file}: Dagster can't open its instance (") and len(err.splitlines()) == 1
        assert file.read_text() == text


def test_the_program_starts_without_what_takes_long() -> None:
    """`tuneshift --help` in a tenth of the time that Dagster takes."""
    heavy = ("dagster", "torch", "transformers", "matplotlib", "polars", "duckdb", "pydantic")
    program = f"import sys, tuneshift_dag.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


class TestCache:
    @pytest.fixture
    def unused(self, transfer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ResponseCache:
        monkeypatch.setenv("TUNESHIFT_CACHE", str(tmp_path / "cache"))
        cache = ResponseCache(Store(tmp_path / "home" / "tuneshift.duckdb"))
        cache.put({cache.response_key("f", [1], Decoding(8)): Response("yes", [1, 0], "stop", -1.0, -0.5)}, {})
        return cache

    def entries(self, cache: ResponseCache) -> int:
        return int(cache.store.read("SELECT count(*) FROM cache.responses").item())

    def test_gc_lists_and_removes_only_when_told(self, tuneshift: Run, unused: ResponseCache) -> None:
        for arguments, removed in (([], False), (["--dry-run", "--yes"], False), (["--yes"], True)):
            status, out, err = tuneshift("cache", "gc", "--json", *arguments)
            assert status == 0
            (row,) = json.loads(out)
            assert (row["kind"], row["why"]) == ("responses", "1 of 1, which no materialization uses")
            assert ("--yes removes it" in err) == (not arguments)
            assert self.entries(unused) == (0 if removed else 1)
        assert json.loads(tuneshift("cache", "gc", "--json", "--yes")[1]) == []

    def test_gc_leaves_copies_of_weights_alone_when_a_transfer_cannot_be_read(
        self, tuneshift: Run, unused: ResponseCache, transfer_folder: Path, tmp_path: Path
    ) -> None:
        copy = tmp_path / "cache" / "quantized" / ("0" * 16)
        copy.mkdir(parents=True)
        os.utime(copy, (0, 0))
        assert [row["kind"] for row in json.loads(tuneshift("cache", "gc", "--json")[1])] == ["responses", "quantized"]
        (transfer_folder / "transfer.yaml").write_text("source: [")
        status, out, err = tuneshift("cache", "gc", "--json")
        assert status == 0 and [row["kind"] for row in json.loads(out)] == ["responses"]
        assert err.startswith("note: 4-bit copies of weights are left alone, ")

    def test_copies_in_use_are_named_by_all_that_makes_them(self, transfer_folder: Path, edit_config: Any) -> None:
        """One model, in 4 bits for answers in one of the two dtypes that `auto` stands for; then in another."""
        before = quantized_in_use([load_transfer(transfer_folder)])
        edit_config("models.compute_dtype", "bfloat16")
        some = quantized_in_use([load_transfer(transfer_folder)])
        edit_config("models.quantization", "fp4")
        other = quantized_in_use([load_transfer(transfer_folder)])
        assert some < before and not other & some
        assert all(len(name) == 16 for name in before | other)


@pytest.mark.parametrize("variables", [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}], ids=str)
def test_any_letter_can_be_told_without_a_home_and_in_any_locale(
    transfer_folder: Path, variables: dict[str, str]
) -> None:
    environment = {**os.environ, **variables}
    environment.pop("HOME", None)
    command = [
        sys.executable,
        "-c",
        "from tuneshift_dag.cli import main; main()",
        "lineage",
        str(transfer_folder),
        "où→\x1b",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "has no prompt 'o" in done.stderr


class TestCards:
    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("Where is my card?", "Where is my card?"),
            ("![x](http://a) <b>*no*</b> | [l](u)", "\\!\\[x\\](http\\://a) \\<b\\>\\*no\\*\\</b\\> \\| \\[l\\](u)"),
            ("- item", "\\- item"),
            ("www.a.b a@b.c\r# no", "www\\.a.b a\\@b.c ⏎ \\# no"),
            ("1. one", "1\\. one"),
            ("two\nlines `x`", "two ⏎ lines \\`x\\`"),
        ],
    )
    def test_texts_are_data_and_no_markdown(self, text: str, shown: str) -> None:
        assert escape_markdown(text) == shown

    def test_a_filter_is_described(self, transfer_folder: Path, edit_config: Any) -> None:
        def described() -> str:
            return describe_filter(load_transfer(transfer_folder))

        assert described() == "`both`, threshold 1.5"
        edit_config("filter", {"rule": "top_excess", "threshold": 0.5})
        assert described() == "`top_excess`, threshold 0.5"
        edit_config("filter", {"rule": "unfiltered"})
        assert described() == "`unfiltered`"


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
        # Into the same folder once more: what is of others stays there.
        (to / "notes.txt").write_text("mine")
        (to / "adapter" / "stale.bin").touch()
        assert tuneshift("export", "banking", "--to", str(to))[0] == 0
        assert {path.name for path in to.iterdir()} == {
            ".tuneshift-export", "adapter", "dataset.jsonl", "dataset.parquet", "README.md", "notes.txt",
        }  # fmt: skip
        assert not (to / "adapter" / "stale.bin").exists()
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    def test_names_of_files_are_no_markup(
        self, tuneshift: Run, done: Project, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        for name in ("out[/b]", "out[red]x", "[link=http:x]y"):
            status, out, err = tuneshift("export", "banking", "--to", str(tmp_path / name))
            assert status == 0, err
            assert out.splitlines()[0] == str(tmp_path / name / "adapter")
        (tmp_path / "h[/b]").mkdir(parents=True)
        (tmp_path / "h[/b]" / "frontier.png").touch()
        rendering.after_run("banking", tmp_path / "h[/b]")
        assert f"{tmp_path / 'h[/b]' / 'frontier.png'}\n" in capfd.readouterr().err

    def test_an_error_leaves_no_half_folder(self, tuneshift: Run, done: Project, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        status, out, err = tuneshift("export", "banking", "--to", str(tmp_path / "file" / "to"))
        assert (status, out) == (1, "")
        assert err.startswith(f"error: --to {tmp_path / 'file' / 'to'}: ") and len(err.splitlines()) == 1
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pl.DataFrame, "write_parquet", _interrupt)
            export(done.store, done.transfer, tmp_path / "to")
        assert {path.name for path in tmp_path.iterdir()} == {"file"}

    def test_the_card_shows_prompts_and_template_as_they_are(
        self, done: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Records, "changed", lambda self: [])  # or it would be refused
        transfer, figures = done.transfer, make_report(done.store, done.transfer)
        config = transfer.config.model_copy(update={"prompt_template": "```\n{prompt}\n```"})
        object.__setattr__(transfer, "config", config)
        card = model_card(transfer, {**figures, "seeds": ["# <img src=x>"]})
        assert "- \\# \\<img src=x\\>\n" in card
        assert "\n````\n```\n{prompt}\n```\n````\n" in card
        source = config.source.model_copy(update={"prompt": Prompt(format="chat", system="Sort.")})
        chat = config.model_copy(update={"prompt_template": None, "source": source})
        object.__setattr__(transfer, "config", chat)
        export(done.store, transfer, tmp_path / "to")
        card = (tmp_path / "to" / "adapter" / "README.md").read_text("utf-8")
        assert "`apply_chat_template`" in card and '"content": "Sort."' in card and '"content": "{prompt}"' in card
        line = json.loads((tmp_path / "to" / "dataset.jsonl").read_text("utf-8").splitlines()[0])
        assert [message["role"] for message in line["messages"]] == ["system", "user", "assistant"]

    def test_what_no_export_wrote_is_not_replaced(self, tuneshift: Run, done: Project, tmp_path: Path) -> None:
        mine = tmp_path / "mine"
        (mine / "merged").mkdir(parents=True)
        assert tuneshift("export", "banking", "--to", str(mine))[0] == 0
        assert (mine / "merged").is_dir()
        (mine / ".tuneshift-export").unlink()
        status, _, err = tuneshift("export", "banking", "--to", str(mine))
        assert status == 1 and f"error: --to {mine}: adapter, dataset.jsonl, dataset.parquet, README.md there" in err
        before = {file: file.read_bytes() for file in done.folder.rglob("*") if file.is_file()}
        assert tuneshift("export", "banking", "--to", str(done.folder))[0] == 1
        assert {file: file.read_bytes() for file in done.folder.rglob("*") if file.is_file()} == before

    def test_a_model_without_weights_is_none(self, tuneshift: Run, done: Project, tmp_path: Path) -> None:
        (path,) = done.rows("SELECT path FROM distilled_models WHERE current")[0]
        weights = done.store.absolute(path) / "adapter_model.safetensors"
        weights.rename(tmp_path / "weights")
        status, _, err = tuneshift("export", "banking", "--to", str(tmp_path / "to"))
        (tmp_path / "weights").rename(weights)
        assert status == 1 and "no distilled model yet" in err and not (tmp_path / "to").exists()

    def test_names_that_no_folder_can_have_are_one_message(self, tuneshift: Run, done: Project, tmp_path: Path) -> None:
        status, _, err = tuneshift("export", "banking", "--to", str(tmp_path / ("x" * 300)))
        assert (status, len(err.splitlines())) == (1, 1) and "name a folder that can be written" in err
        status, _, err = tuneshift("lineage", "banking", "caf\udce9")
        assert (status, err) == (1, "error: The argument 'caf\\udce9' is no text in UTF-8.\n")

    def test_before_any_run_is_an_error(self, tuneshift: Run, transfer_folder: Path, tmp_path: Path) -> None:
        status, out, err = tuneshift("export", "banking", "--to", str(tmp_path / "to"))
        assert (status, out) == (1, "")
        assert err == "error: banking has no distilled model yet: `tuneshift run banking` first.\n"
        assert not (tmp_path / "to").exists()


def _interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


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

    def test_shows_what_the_weights_are_known_by(self, tuneshift: Run, transfer_folder: Path) -> None:
        fingerprint = load_transfer(transfer_folder).fingerprints["source.base"].value
        _, out, _ = tuneshift("doctor", "--no-models", "banking")
        (line,) = (line for line in out.splitlines() if line.startswith("ok   banking weights: "))
        assert f"source.base models/tiny-base ({fingerprint[:12]})" in line
        assert "source.adapter adapter (" in line

    def test_names_the_prompt_format_that_the_fine_tune_was_made_with(
        self, tuneshift: Run, transfer_folder: Path, edit_config: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        models = FakeModels(Tuned(PromptFormat(), load_transfer(transfer_folder).seeds))
        monkeypatch.setattr("tuneshift_dag.resources.EngineResource", models.resource)
        _, out, _ = tuneshift("doctor", "banking")
        assert "note banking prompt format: the fine-tuned model answers best in 'chat' (surprise" in out
        edit_config("prompt_template", None)
        edit_config("source.prompt", "chat")
        _, out, _ = tuneshift("doctor", "banking")
        assert "ok   banking prompt format: the fine-tuned model answers best in that of source.prompt" in out
        assert "ok   banking target prompt: models/tiny-base has a chat template" in out

    def test_a_server_that_was_not_asked_is_not_said_to_have_a_template(
        self, tuneshift: Run, transfer_folder: Path, edit_config: Callable[[str, Any], None]
    ) -> None:
        edit_config("generator.server", {"base_url": "http://127.0.0.1:9/v1"})
        edit_config("engine", {"type": "ray", "ray": {"address": "127.0.0.1:9"}})
        edit_config("source.adapter", "someone/adapter-on-the-hub")  # not here, so no preflight
        _, out, _ = tuneshift("doctor", "banking")
        assert "note banking generator: models/tiny-base on http://127.0.0.1:9/v1 wasn't asked" in out
        assert "has a chat template" not in out
