# shim, removed at integration
from tuneshift_dag.training import check_training, training_problem

__all__ = ["check_training", "training_problem"]
