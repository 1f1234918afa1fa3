"""Moved to `tuneshift_dag.cli`."""  # shim, removed at integration

from tuneshift_dag.cli import app, main  # noqa: F401
