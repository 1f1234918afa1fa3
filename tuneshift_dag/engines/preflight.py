"""shim, removed at integration"""

from tuneshift_dag.method.engine import AdapterCheck

__all__ = ["AdapterCheck"]
