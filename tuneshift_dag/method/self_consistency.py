"""shim, removed at integration"""

from tuneshift_dag.method.scoring import agreement, agreements

__all__ = ["agreement", "agreements"]
