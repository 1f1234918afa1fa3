# shim, removed at integration
from tuneshift_dag.method.prompting import distinct_bigrams, mean_similarity, novel_bigrams

__all__ = ["distinct_bigrams", "mean_similarity", "novel_bigrams"]
