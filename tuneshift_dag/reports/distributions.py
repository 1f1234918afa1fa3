"""What the pictures of a threshold are drawn from, read with SQL and judged by the current filter.

Nothing is drawn here, and the verdicts are those of ``method.filters``: the pictures show what
``filter`` in ``transfer.yaml`` says now.
"""

from typing import Any

import polars as pl

from tuneshift_dag.config.transfer import Transfer
from tuneshift_dag.store.database import Store

# Points in one picture: more only paint over each other and make the PNG large.
_MOST_POINTS = 3000
_BUCKETS = 12


def perplexities(store: Store, transfer: Transfer) -> pl.DataFrame:
    """(ppl_fine_tuned, ppl_base, ppl_base_cross, kept) of the pairs that have finite perplexities.

    At most `_MOST_POINTS` of them, and the same ones each time: a prompt_id is a hash, so the first by
    prompt_id are a fair sample.
    """
    return _judged(
        store,
        transfer,
        f"""
        SELECT ppl_fine_tuned, ppl_base, ppl_base_cross, reason IS NULL AS kept FROM judged
        WHERE isfinite(ppl_fine_tuned) AND isfinite(ppl_base) AND isfinite(ppl_base_cross)
        ORDER BY prompt_id, round LIMIT {_MOST_POINTS}
        """,
    )


def verdicts_by_round(store: Store, transfer: Transfer) -> list[dict[str, Any]]:
    """``{round, reason, pairs}`` of every round and reason; the kept ones have the reason ``kept``."""
    return _judged(
        store,
        transfer,
        "SELECT round, coalesce(reason, 'kept') AS reason, count(*) AS pairs FROM judged"
        " GROUP BY ALL ORDER BY round, reason",
    ).to_dicts()


def response_lengths(store: Store, transfer: Transfer) -> list[dict[str, Any]]:
    """``{low, high, kept, dropped}``: verdicts by the fine-tuned response's length in tokens.

    Buckets of equal width from the shortest to the longest response, at most `_BUCKETS`, both ends included.
    """
    return _judged(
        store,
        transfer,
        f"""
        , ends AS (
            SELECT min(fine_tuned_tokens) AS shortest,
                ((max(fine_tuned_tokens) - min(fine_tuned_tokens)) // {_BUCKETS} + 1)::INTEGER AS width
            FROM judged
        ),
        buckets AS (SELECT *, (fine_tuned_tokens - shortest) // width AS bucket FROM judged, ends)
        SELECT any_value(shortest + bucket * width)::INTEGER AS low,
            any_value(shortest + (bucket + 1) * width - 1)::INTEGER AS high,
            count(*) FILTER (reason IS NULL) AS kept, count(*) FILTER (reason IS NOT NULL) AS dropped
        FROM buckets WHERE bucket IS NOT NULL GROUP BY bucket ORDER BY bucket
        """,
    ).to_dicts()


def _judged(store: Store, transfer: Transfer, query: str) -> pl.DataFrame:
    return store.read(f"WITH judged AS ({transfer.verdict_sql()}) {query}", schema=transfer.name)
