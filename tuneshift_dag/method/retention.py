# shim, removed at integration
from tuneshift_dag.method.evaluation import Retention, general_texts, retention

__all__ = ["Retention", "general_texts", "retention"]
