"""The house: nothing private of a dependency is imported, and files stay short. (`make check` holds the rooms.)"""

import ast
from pathlib import Path

import tuneshift_dag

PACKAGE = Path(tuneshift_dag.__file__).parent


def test_nothing_private_of_another_package_is_imported() -> None:
    """One minor release of Dagster moved `dagster._core`, and the package was pinned to another for it."""
    found = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            own = ("tuneshift_dag.", "__future__.")
            private = [n for n in names if not n.startswith(own) and any(p.startswith("_") for p in n.split("."))]
            found += [f"{file.relative_to(PACKAGE.parent)}: {name}" for name in private]
    assert found == []


def test_files_are_few_and_short() -> None:
    """A file that grows past this has more than one idea in it."""
    lines = {file: len(file.read_text("utf-8").splitlines()) for file in PACKAGE.rglob("*.py")}
    assert {file.name: n for file, n in lines.items() if n > 400} == {}
    assert len(lines) <= 82
    assert sum(lines.values()) <= 16_371, "take something out, or raise this with the reason"
