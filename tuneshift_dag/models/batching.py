"""shim, removed at integration"""

from tuneshift_dag.models.memory import free_bytes as free_memory
from tuneshift_dag.models.memory import in_batches, is_out_of_memory

__all__ = ["free_memory", "in_batches", "is_out_of_memory"]
