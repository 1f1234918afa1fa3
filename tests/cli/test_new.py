"""`tuneshift new`: the folder that it writes, what it asks, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from tests.conftest import make_transfer_folder, write_jsonl
from tuneshift_dag import TuneshiftError, cli
from tuneshift_dag.cli import new as new_command
from tuneshift_dag.cli.new import Answers, create
from tuneshift_dag.config import Transfer
from tuneshift_dag.config.schema import TransferConfig
from tuneshift_dag.method import PromptFormat

New = Callable[..., Transfer]


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Answers:
    """Everything needed, as a user in the folder ``work`` would name it."""
    made = make_transfer_folder(tmp_path / "elsewhere")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    shutil.copytree(made / "models" / "tiny-base", work / "tiny-base")
    shutil.copytree(made / "adapter", work / "my-adapter")
    write_jsonl(work / "seeds.jsonl", [{"prompt": "Where is it?"}, {"prompt": "Who is “she”?"}])
    return Answers("my-adapter", "tiny-base", "org/new-base@v2", "Q: {prompt}\\nA:", "seeds.jsonl")


@pytest.fixture
def new(tmp_path: Path, given: Answers) -> New:
    def call(name: str = "my_skill", **changes: object) -> Transfer:
        return create(tmp_path / "transfers", name, Answers(**{**vars(given), **changes}))  # type: ignore[arg-type]

    return call


class TestCreate:
    def test_the_folder_holds_everything_it_needs(self, new: New, tmp_path: Path) -> None:
        transfer = new()
        assert transfer.folder == tmp_path / "transfers" / "my_skill"
        assert transfer.seeds == ["Where is it?", "Who is “she”?"]
        assert transfer.config.prompt_template == "Q: {prompt}\nA:"
        # A path means the same from there; a hub id stays as it is.
        assert transfer.config.source.base == str(tmp_path / "work" / "tiny-base")
        assert transfer.config.target.base == transfer.config.generator.model == "org/new-base@v2"
        assert {path.name for path in (transfer.folder / "adapter").iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        assert sorted(path.name for path in transfer.folder.parent.iterdir()) == ["my_skill"]

    def test_the_adapter_can_stay_where_it_is(self, new: New, tmp_path: Path) -> None:
        transfer = new(copy_adapter=False)
        assert transfer.config.source.adapter == str(tmp_path / "work" / "my-adapter")
        assert not (transfer.folder / "adapter").exists()

    def test_an_adapter_on_the_hub_is_named(self, new: New) -> None:
        assert new(adapter="org/their-adapter").config.source.adapter == "org/their-adapter"

    def test_chat_mode_writes_the_defaults(self, new: New) -> None:
        written = new(description="A skill.").config
        shown = {"evaluation": {"max_new_tokens": written.evaluation.max_new_tokens}}
        least = written.model_dump(include={"source", "target", "prompt_template", "description"})
        assert written == TransferConfig.model_validate(
            {**least, **shown, "generator": {"model": written.generator.model}}
        )

    def test_a_chat_and_the_system_message_of_the_examples(self, new: New, tmp_path: Path) -> None:
        seeds = [{"prompt": prompt, "system": "Be brief."} for prompt in ("Where is it?", "Who is it?")]
        write_jsonl(tmp_path / "work" / "seeds.jsonl", seeds)
        with pytest.raises(TuneshiftError, match=r"seeds\.jsonl:1: system is shown nowhere: put \{system\} into"):
            new()
        transfer = new(template="chat")
        assert transfer.config.source_format == transfer.config.target_format == PromptFormat(system="Be brief.")
        assert [json.loads(line) for line in (transfer.folder / "seeds.jsonl").open()] == seeds

    @pytest.mark.parametrize("mode", ["continuation", "by_response"])
    def test_the_other_modes_and_texts_with_odd_characters(self, new: New, mode: str) -> None:
        config = new(mode=mode, instruction='Say "yes": # {x}', description="a: b # c\\").config
        assert (config.generator.mode, config.generator.instruction) == (mode, 'Say "yes": # {x}')
        assert config.description == "a: b # c\\"
        odd = "a\x7f\x85\u2028\u2029\ufeffb\uffff🙂"
        made = new("odd", mode=mode, instruction=odd, template=f"{odd} {{prompt}}").config
        assert (made.generator.instruction, made.prompt_template) == (odd, f"{odd} {{prompt}}")
        assert config.generator.original_seeds_per_call > 0
        assert (config.filter.rule, config.filter.threshold) == ("both", 1.3 if mode == "by_response" else 1.5)

    def test_the_base_is_the_one_that_the_adapter_names(self, new: New, given: Answers) -> None:
        _edit_adapter(base_model_name_or_path="org/named-base")
        assert new(base="").config.source.base == "org/named-base"

    @pytest.mark.parametrize("cache", ["/home/me/.cache/huggingface/hub", "C:\\Users\\me\\hub"])
    def test_a_path_into_a_hub_cache_elsewhere_means_the_hub_id(self, new: New, cache: str) -> None:
        slash = "\\" if "\\" in cache else "/"
        _edit_adapter(base_model_name_or_path=slash.join([cache, "models--org--tiny-base", "snapshots", "01ab"]))
        assert new(base="").config.source.base == "org/tiny-base"
        assert new("other", base="tiny-base").config.source.base.endswith("tiny-base")

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("S.TXT", "One?\nTwo, or three?"),
            ("s.txt", "\ufeffOne?\n\nTwo, or three?\n"),
            ("s.csv", '\ufeffid,prompt\r\n1,One?\r\n2,"Two, or three?"\r\n'),
            ("s.jsonl", '{"prompt": "One?", "id": 1}\n{"prompt": "Two, or three?"}'),
        ],
    )
    def test_seeds_may_be_text_csv_or_jsonl(self, new: New, name: str, content: str) -> None:
        Path(name).write_bytes(content.encode())
        assert new(seeds=name).seeds == ["One?", "Two, or three?"]

    def test_a_held_out_csv(self, new: New) -> None:
        Path("h.csv").write_text("response,prompt\nyes,Really?\n")
        assert new(heldout="h.csv").heldout == [("Really?", "yes")]


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"name": "my-skill"}, ["NAME 'my-skill'", "'my_skill'"]),
            ({"adapter": "", "target": "", "seeds": ""}, ["--adapter, --target, --seeds missing", "terminal"]),
            ({"adapter": "./nowhere"}, ["--adapter", "nowhere", "doesn't exist"]),
            ({"adapter": "tiny-base"}, ["--adapter: tiny-base", "a whole model, not an adapter", "source.fine_tuned"]),
            ({"adapter": "."}, ["--adapter: .", "but my-adapter in it", "Name one of these"]),
            ({"base": "org/other-base"}, ["--base 'org/other-base'", "someone/tiny-base", "adapter_config.json"]),
            ({"base": "", "adapter": "org/on-the-hub"}, ["--base missing", "doesn't say"]),
            ({"target": "./nowhere"}, ["--target", "'./nowhere'", "hub id"]),
            ({"target": "~nobody-here/model"}, ["--target", "'~nobody-here/model'", "hub id"]),
            ({"adapter": "~nobody-here/adapter"}, ["--adapter", "~nobody-here/adapter", "doesn't exist"]),
            ({"generator": "package://no_such_package"}, ["--generator", "pip install no-such-package"]),
            ({"template": "Question:"}, ["--template 'Question:'", "{prompt} exactly once"]),
            ({"seeds": "none.jsonl"}, ["--seeds 'none.jsonl'", "no such file"]),
            ({"seeds": "my-adapter/adapter_config.json"}, ["--seeds", "must be a .jsonl, .csv or .txt file"]),
            ({"seeds": "empty.txt"}, ["--seeds 'empty.txt'", "no examples"]),
            ({"seeds": "twice.txt"}, ["twice.txt:3", "is the prompt of twice.txt:1 again"]),
            ({"seeds": "wrong.csv"}, ["wrong.csv", "'prompt'", "'question'"]),
            ({"heldout": "leak.csv"}, ["leak.csv:2", "'where is it'", "also a seed"]),
            ({"heldout": "short.csv"}, ["short.csv:3", "fewer cells than the first line", "comma"]),
            ({"seeds": "commas.csv"}, ["commas.csv:2", "more cells than the first line", "quotation marks"]),
            ({"seeds": "bare.csv"}, ["bare.csv is empty", "below its columns"]),
            ({"seeds": "open.csv"}, ["open.csv:", "unexpected end of data", "Close the quotation mark"]),
            ({"seeds": "two.csv"}, ["two.csv", "columns ['prompt'] once", "['prompt', 'prompt']"]),
            ({"heldout": "twice.txt"}, ["--heldout", "must be a .jsonl or .csv file"]),
            ({"seeds": "quote.csv"}, ["quote.csv:2", "field larger than field limit", "Close the quotation mark"]),
            ({"heldout": "latin.csv"}, ["latin.csv", "not UTF-8", "Save it as UTF-8"]),
            ({"seeds": "half.jsonl"}, ["half.jsonl:1", "'\\ud83d' is half of a character", "remove it"]),
            ({"description": "cut \ud83d"}, ["my_skill can't be written", "surrogates"]),
        ],
    )
    def test_names_the_flag_or_file_and_the_repair(
        self, new: New, tmp_path: Path, changes: dict[str, str], words: list[str]
    ) -> None:
        Path("empty.txt").write_text("\n")
        Path("bare.csv").write_text("prompt\n")
        Path("twice.txt").write_text("one\n\nOne.\n")
        Path("wrong.csv").write_text("question\nWhy?\n")
        Path("leak.csv").write_text("prompt,response\nwhere is it,here\n")
        Path("quote.csv").write_text('prompt\n"' + "x" * 200_000 + "\n")
        Path("commas.csv").write_text("prompt\nWhere is it, please?\nWho?\n")
        Path("open.csv").write_text('prompt\n"Where is it?\nWho?\n')
        Path("two.csv").write_text("prompt,prompt\na,b\n")
        Path("latin.csv").write_bytes("prompt,response\nOù?,là\n".encode("latin-1"))
        Path("half.jsonl").write_text(r'{"prompt": "cut \ud83d"}')
        Path("short.csv").write_text("prompt,response\na,b\nc\n")
        with pytest.raises(TuneshiftError) as error:
            new(**changes)
        for word in words:
            assert word in str(error.value)
        assert not list((tmp_path / "transfers").glob("*")), "nothing is left behind"

    def test_nothing_is_overwritten(self, new: New) -> None:
        before = (new().folder / "transfer.yaml").read_text()
        with pytest.raises(TuneshiftError, match="my_skill exists already, and nothing is overwritten"):
            new(template="Other: {prompt}")
        assert yaml.safe_load(before)["prompt_template"] == "Q: {prompt}\nA:"

    def test_a_name_that_differs_from_a_transfers_only_in_case(self, new: New) -> None:
        new()
        with pytest.raises(TuneshiftError, match=r"NAME 'My_Skill': .*my_skill differs only in case"):
            new(name="My_Skill")

    def test_a_folder_that_cannot_be_written_to(self, given: Answers, tmp_path: Path) -> None:
        (tmp_path / "transfers").write_text("a file")
        with pytest.raises(TuneshiftError, match="my_skill can't be written"):
            create(tmp_path / "transfers", "my_skill", given)

    def test_a_link_out_of_the_adapters_folder(self, new: New, tmp_path: Path) -> None:
        (tmp_path / "private.json").write_text("{}")
        Path("my-adapter/special_tokens_map.json").symlink_to(tmp_path / "private.json")
        for copy in (True, False):
            with pytest.raises(TuneshiftError, match=r"special_tokens_map\.json is a link to .*private\.json"):
                new(copy_adapter=copy)

    def test_links_within_the_hubs_cache_are_copied(self, new: New, tmp_path: Path) -> None:
        snapshot = tmp_path / "hub" / "models--org--a" / "snapshots" / "1"
        shutil.copytree("my-adapter", snapshot.parents[1] / "blobs")
        snapshot.mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (snapshot / name).symlink_to(f"../../blobs/{name}")
        copied = new(adapter=str(snapshot)).folder / "adapter" / "adapter_model.safetensors"
        assert copied.is_file() and not copied.is_symlink()

    def test_a_pickle_adapter(self, new: New) -> None:
        Path("my-adapter/adapter_model.safetensors").rename("my-adapter/adapter_model.bin")
        with pytest.raises(TuneshiftError, match=r"--adapter: .*pickle adapter.*safe_serialization"):
            new()


class TestCommand:
    def test_flags_alone(self, given: Answers, tmp_path: Path) -> None:
        flags = {"adapter": given.adapter, "base": given.base, "target": given.target, "seeds": given.seeds}
        options = [part for name, value in flags.items() for part in (f"--{name}", value)]
        result = CliRunner().invoke(cli.app, ["new", "my_skill", *options, "--template", given.template])
        assert result.exit_code == 0
        assert result.stdout.strip() == str(tmp_path / "transfers" / "my_skill")
        assert "2 seeds, no held-out file" in result.stderr
        assert "tuneshift doctor my_skill" in result.stderr

    def test_without_a_terminal_nothing_is_asked(self, given: Answers) -> None:
        result = CliRunner().invoke(cli.app, ["new", "my_skill", "--adapter", given.adapter], input="x\n")
        assert isinstance(result.exception, TuneshiftError)
        assert "--target, --template, --seeds missing" in str(result.exception)

    def test_in_a_terminal_the_rest_is_asked_and_a_wrong_answer_again(
        self, given: Answers, new: New, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asking = typer.Typer()
        got: list[Answers] = []
        asking.command()(lambda: got.append(new_command.ask_for_the_rest(Answers(target=given.target))))
        typed = [
            "./nowhere",
            "my-adapter",
            "org/other-base",
            "tiny-base",
            "",
            "poetry",
            "continuation",
            "Q:",
            given.template,
        ]
        typed += ["", "Where?", "Who?", "", ""]
        result = CliRunner().invoke(asking, [], input="\n".join(typed) + "\n")
        assert result.exit_code == 0, result.output
        assert "nowhere" in result.stderr and "{prompt} exactly once" in result.stderr
        (answers,) = got
        assert answers == Answers(
            adapter="my-adapter",
            base="tiny-base",
            target=given.target,
            template=given.template,
            generator=given.target,
            mode="continuation",
            typed_seeds=("Where?", "Who?"),
        )
        assert new(**vars(answers)).seeds == ["Where?", "Who?"]


def _edit_adapter(**changes: str) -> None:
    file = Path("my-adapter/adapter_config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
