# shim, removed at integration
from tuneshift_dag.method.evaluation import expected_number, flexible_number, next_question, strict_number

__all__ = ["expected_number", "flexible_number", "next_question", "strict_number"]
