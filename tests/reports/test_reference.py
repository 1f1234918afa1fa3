"""The reference page says what the code says."""

import importlib.util
from pathlib import Path

import pytest
import typer

from tuneshift_dag.cli import app
from tuneshift_dag.config.schema import TransferConfig

SCRIPT = Path(__file__).parents[2] / "docs" / "write_reference.py"


@pytest.fixture(scope="module")
def text() -> str:
    spec = importlib.util.spec_from_file_location("write_reference", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.render())


def test_the_page_is_current(text: str) -> None:
    assert SCRIPT.with_name("reference.md").read_text("utf-8") == text, "run `python docs/write_reference.py`"


def test_every_key_says_what_it_means(text: str) -> None:
    for line in text.splitlines():
        if line.startswith("| `"):
            assert line.split(" | ")[-1].strip(" |"), line


def test_every_section_is_on_the_page(text: str) -> None:
    for name in TransferConfig.model_fields:
        assert f"`{name}" in text


def test_every_command_and_option_is_on_the_page_and_explained(text: str) -> None:
    def walk(group: typer.core.TyperGroup, prefix: str) -> None:
        for name, command in group.commands.items():
            if isinstance(command, typer.core.TyperGroup):
                walk(command, f"{prefix}{name} ")
                continue
            _, _, after = text.partition(f"### tuneshift {prefix}{name}\n")
            section = after.partition("\n### ")[0]
            assert command.help and command.help.strip() in section
            for parameter in command.params:
                names = [*parameter.opts, *parameter.secondary_opts]
                assert all(f"{name}`" in section or f"{name}/" in section for name in names if name.startswith("-"))
                assert parameter.help, (name, names)  # type: ignore[attr-defined]

    walk(typer.main.get_command(app), "")  # type: ignore[arg-type]
