# mypy: implicit-reexport
"""shim, removed at integration: ``new.py`` under its old name."""

# ruff: noqa: F401
from tuneshift_dag.cli.new import Answers, ask_for_the_rest, check_name, create, missing
