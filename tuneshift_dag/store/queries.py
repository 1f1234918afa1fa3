"""SQL that assets and reports share."""  # shim, removed at integration

from tuneshift_dag.config.transfer import Transfer
from tuneshift_dag.method.filters import Rule


def verdicts(transfer: Transfer, rule: Rule | None = None, threshold: float | str | None = None) -> str:
    return transfer.verdict_sql(rule, threshold)


def of_its_rounds(transfer: Transfer, table: str) -> str:
    return transfer.of_its_rounds(table)
