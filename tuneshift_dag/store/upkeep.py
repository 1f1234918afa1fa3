from tuneshift_dag.store.cache import collect, stats  # shim, removed at integration

__all__ = ["collect", "stats"]
