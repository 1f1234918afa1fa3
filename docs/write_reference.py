"""Writes ``docs/reference.md`` from the code: keys of transfer.yaml, commands, tables.

python docs/write_reference.py
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from tuneshift_dag.cli import app
from tuneshift_dag.config.schema import TransferConfig
from tuneshift_dag.store.tables import CACHE, CACHE_TABLES, TRANSFER_TABLES, Table

PAGE = Path(__file__).with_name("reference.md")


def render() -> str:
    """The whole page as Markdown."""
    lines = ["# Reference", "", "Written by `python docs/write_reference.py`; a test keeps it current.", ""]
    lines += ["## transfer.yaml", "", "| Key | Default | Meaning |", "| --- | --- | --- |", *_keys(TransferConfig)]
    lines += ["", "## Commands", ""]
    for name, command in sorted(_commands().items()):
        lines += [f"### tuneshift {name}", "", (command.help or "").strip(), ""]
        lines += [f"- `{_usage(parameter)}`: {getattr(parameter, 'help', '')}" for parameter in command.params]
        lines.append("")
    lines += ["## Tables", "", "One DuckDB file; one schema per transfer, and `cache` for all.", ""]
    for schema, tables in (("<transfer>", TRANSFER_TABLES), (CACHE, CACHE_TABLES)):
        for table in tables:
            lines += _table(schema, table)
    return "\n".join(lines).rstrip() + "\n"


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        section = next((k for k in (field.annotation, *get_args(field.annotation)) if _is_section(k)), None)
        if section:
            if field.default is None:
                yield f"| `{prefix}{name}` | `None` | {_cell(field.description or '')} |"
            yield from _keys(section, f"{prefix}{name}.")
            continue
        default = "required" if field.default is PydanticUndefined else f"`{field.default!r}`"
        yield f"| `{prefix}{name}` | {_cell(default)} | {_cell(field.description or '')} |"


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _commands() -> dict[str, Any]:
    def flat(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from flat(command, f"{prefix}{name} ")
            else:
                yield f"{prefix}{name}", command

    return dict(flat(typer.main.get_command(app), ""))


def _usage(parameter: Any) -> str:
    return (
        "/".join([*parameter.opts, *parameter.secondary_opts])
        if parameter.param_type_name == "option"
        else (str(parameter.name).upper())
    )


def _table(schema: str, table: Table) -> list[str]:
    rows = [f"| `{c.name}` | {c.type} | {_cell(c.description)} |" for c in table.columns]
    head = [
        f"### {schema}.{table.name}",
        "",
        table.description,
        "",
        "| Column | Type | Meaning |",
        "| --- | --- | --- |",
    ]
    return [*head, *rows, ""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    PAGE.write_text(render(), "utf-8")
