"""The method, without dagster: prompting, scoring, filters, seed sampling, distillation, preflight."""
