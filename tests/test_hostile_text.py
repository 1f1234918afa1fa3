"""Texts that a shell, a browser, a database or a file would take for something else: whole to the end, or refused."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

from tests.conftest import Project, Run, edit, write_jsonl
from tests.fake_engine import FakeEngine
from tests.fake_server import save_tokenizer
from tests.fakes import FakeModels
from tuneshift_dag import TuneshiftError
from tuneshift_dag.method import Decoding, Response
from tuneshift_dag.method.prompting import prompt_id
from tuneshift_dag.reports.export import export

HOSTILE = {
    "markdown": "![x](http://evil/p.png) [l](http://evil) **b** `c` | cell | # head $x^2$",
    "html": "<script>alert(1)</script><img src=x onerror=alert(2)> &lt;",
    "ansi": "red \x1b[31mtext\x1b[0m \x1b]0;title\x07 \x9b2J gone",
    "null": "before\x00after",
    "carriage return": "hidden\rshown # head",
    "right to left": "abc \u202egnp.exe\u202c \u2066x\u2069 عربي",
    "sql": "'; DROP TABLE seed_set; -- \" $1 ? {}",
    "rich": "[bold]x[/bold] [/] [link=http://evil]y[/link]",
    "format": "{prompt} {response} {count} %s %(x)s {{ x }}",
    "separators": "a\u2028b\u2029c\x85d\x0be\x0cf",
    "yaml": "!!python/object/apply:os.system ['x']: &a *a",
    "emoji": "👩‍👩‍👧 e\u0301 \ufeff \U0010ffff",
    "cell": '=HYPERLINK("http://evil")',
}
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class HostileEngine(FakeEngine):
    """Answers with the hostile texts; a list holds all of them."""

    def _answer(self, ids: list[int], side: Any, decoding: Decoding, seed: int = 0) -> Response:
        return super()._answer(ids, side, replace(decoding, max_new_tokens=4000), seed)

    def _intent(self, prompt: str, side: Any) -> tuple[str, float]:
        text, logprob = super()._intent(prompt, side)
        return f"{text} {list(HOSTILE.values())[len(prompt) % len(HOSTILE)]}", logprob

    def _list(self, request: str, seed: int) -> str:
        items = [f"Nr {seed % 97} {name}: {text}" for name, text in HOSTILE.items() if "\r" not in text]
        return "\n".join(f"{n}. {item}" for n, item in enumerate(items, 1))


@pytest.fixture
def hostile(project: Project) -> Project:
    write_jsonl(project.folder / "seeds.jsonl", [{"prompt": text} for text in HOSTILE.values()])
    pairs = [{"prompt": f"held {text}", "response": text} for text in HOSTILE.values()]
    write_jsonl(project.folder / "heldout.jsonl", pairs)
    edit(project.folder, {"generator.calls_per_round": 1, "rounds": 1})
    project.models = FakeModels(HostileEngine("source"), HostileEngine("generator", batch_size=2))
    project.run()
    return project


def test_hostile_texts_come_through_unchanged_and_are_shown_as_text(
    hostile: Project, tuneshift: Run, tmp_path: Path
) -> None:
    whole = {text.strip() for text in HOSTILE.values()}
    assert {prompt for (prompt,) in hostile.rows("SELECT prompt FROM seed_set")} == whole
    assert {expected for (expected,) in hostile.rows("SELECT DISTINCT expected FROM evaluations")} == whole
    written = [prompt for (prompt,) in hostile.rows("SELECT prompt FROM synthetic_prompts")]
    assert {prompt.partition(": ")[2] for prompt in written} == {text for text in whole if "\r" not in text}
    # What was exported is what was stored, and the cards show it as text.
    export(hostile.store, hostile.transfer, tmp_path / "out")
    stored = set(hostile.rows("SELECT prompt, response FROM filtered_dataset"))
    assert set(pl.read_parquet(tmp_path / "out" / "dataset.parquet").select("prompt", "response").rows()) <= stored
    lines = (tmp_path / "out" / "dataset.jsonl").read_text("utf-8").split("\n")[:-1]
    assert {json.loads(line)["messages"][0]["content"] for line in lines} == {prompt for prompt, _ in stored}
    card = (tmp_path / "out" / "adapter" / "README.md").read_text("utf-8")
    assert not CONTROLS.search(card) and not CONTROLS.search((tmp_path / "out" / "README.md").read_text("utf-8"))
    listed = card.partition("Seeds:\n\n")[2].partition("\n\n## Use")[0]
    assert len(listed.split("\n")) == len(HOSTILE)
    assert not re.search(r"(?<!\\)[<`\[|*]|http:", listed)
    tables = shown_in_dagster(hostile)
    assert any("alert" in table for table in tables)
    for table in tables:
        assert not CONTROLS.search(table), table
        assert not re.search(r"(?<!\\)[<`\[*]|http:", table), table
    for text in HOSTILE.values():
        code, out, err = tuneshift("lineage", "banking", prompt_id(text), "--down")
        assert code == 0 and not CONTROLS.search(out.replace("\r\n", "\n") + err), text
    found = json.loads(tuneshift("lineage", "banking", prompt_id(HOSTILE["ansi"]), "--json")[1])
    assert found["root"]["prompt"] == HOSTILE["ansi"]
    assert tuneshift("report", "banking")[0] == tuneshift("sweep", "banking")[0] == 0


def shown_in_dagster(project: Project) -> list[str]:
    """The tables of its materializations."""
    found = []
    for asset in project.instance.all_asset_keys():
        for record in project.instance.fetch_materializations(asset, limit=10).records:
            assert record.asset_materialization
            values = record.asset_materialization.metadata.values()
            found += [str(value.value) for value in values if isinstance(value, dg.MarkdownMetadataValue)]
    return [text for text in found if text.startswith("| ")]


def test_a_line_of_a_megabyte_comes_through_or_is_named(project: Project) -> None:
    long = "long " * 200_000
    save_tokenizer(project.folder / "models" / "tiny-base")
    edit(project.folder, {"rounds": 1, "generator.calls_per_round": 1})
    write_jsonl(project.folder / "heldout.jsonl", [{"prompt": "short", "response": long}])
    project.run()
    assert project.rows("SELECT DISTINCT expected FROM evaluations") == [(long.strip(),)]
    write_jsonl(project.folder / "seeds.jsonl", [{"prompt": long}])
    with pytest.raises(TuneshiftError, match=r"seeds\.jsonl:1: the prompt has 1000014 tokens, and the context of"):
        project.run()
