"""Pages of figures under ``docs/``, whose sections are written one by one."""

import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tuneshift_dag.config import Transfer
from tuneshift_dag.store import Store

DOCS = Path(__file__).parents[1] / "docs"


def write_page(page: Path, titles: Sequence[str], written: Mapping[str, str], head: str, end: str) -> None:
    """``written`` has sections by title; one that wasn't written now stays as it is on the page. ``head`` and ``end``
    come before and after the sections."""
    before = page.read_text("utf-8") if page.is_file() else ""
    parts = re.split(r"(?m)^## (.+)\n", before)
    found = dict(zip(parts[1::2], parts[2::2], strict=True)) | dict(written)
    sections = [f"## {title}\n\n{found[title].strip()}\n" for title in titles if title in found]
    page.write_text("\n".join([head, *sections, end]), "utf-8")


def took(store: Store, transfers: Sequence[Transfer]) -> str:
    """A sentence: when the steps of these transfers ran, and for how long."""
    query = "SELECT coalesce(sum(seconds), 0), max(finished_at)::DATE::VARCHAR FROM steps"
    steps = [store.read(query, schema=transfer.name).row(0) for transfer in transfers]
    minutes, day = sum(seconds for seconds, _ in steps) / 60, max(day for _, day in steps if day)
    return f"Its steps took {minutes:.0f} minutes, up to {day}, on {os.cpu_count()} cores ({platform.machine()})."


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"| {' | '.join(rows[0])} |", "|" + " --- |" * len(rows[0])]
    lines += [f"| {' | '.join(map(str, row.values()))} |" for row in rows]
    return "\n".join(lines) + "\n"


def picture(name: str, png: bytes, alt: str) -> str:
    (DOCS / "images" / f"{name}.png").write_bytes(png)
    return f"![{alt}](images/{name}.png)\n\n"
