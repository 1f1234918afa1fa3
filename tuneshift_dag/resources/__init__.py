"""Models, engines and the DuckDB store. Heavy imports stay inside functions or in modules loaded late."""
