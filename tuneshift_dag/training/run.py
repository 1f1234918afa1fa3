# shim, removed at integration
from tuneshift_dag.training import distill

__all__ = ["distill"]
