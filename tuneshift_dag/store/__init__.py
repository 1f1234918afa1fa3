"""The DuckDB file: its tables, the cache of model calls, the record of what was made from what."""
