"""Moved to `tuneshift_dag.reports.thresholds`."""  # shim, removed at integration

from tuneshift_dag.reports.thresholds import *  # noqa: F403
