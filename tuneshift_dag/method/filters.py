"""Which scored pairs are kept, and why the others are not.

The filter is SQL over the scored pairs, so that a new threshold replays in the database without a
model. f is the fine-tuned model, b the base; y_f and y_b are their responses. TuneShift-KD (arXiv
2603.24518) §3 publishes one threshold (1.5) and leaves open whether the cut is on each perplexity, on
their difference or on their ratio; the first reading is the default.
"""

from typing import Literal

Rule = Literal["both", "difference", "ratio", "cross_ratio"]

# By how much a pair passes: above 0 it is kept. {t} is the threshold.
MARGIN: dict[Rule, str] = {
    "both": "least({t} - ppl_fine_tuned, ppl_base - {t})",
    "difference": "ppl_base - ppl_fine_tuned - {t}",
    "ratio": "ppl_base / ppl_fine_tuned - {t}",
    "cross_ratio": "ppl_base_cross / ppl_fine_tuned - {t}",
}


def verdict_sql(rule: Rule, allow_truncated: bool, threshold: str = "$t") -> str:
    """SELECT of every scored pair with its ``margin`` and ``reason`` (NULL when kept). Reads ``scored_pairs``.

    Args:
        threshold: SQL of the threshold: a parameter, or a column when the SELECT is joined laterally.
    """
    truncated = "FALSE" if allow_truncated else "fine_tuned_finish = 'length'"
    unsure = "ppl_base_cross" if rule == "cross_ratio" else "ppl_base"
    return f"""
        SELECT *, {MARGIN[rule].format(t=threshold)} AS margin,
            CASE
                WHEN regexp_full_match(fine_tuned_response, '\\s*') THEN 'empty_response'
                WHEN {truncated} THEN 'truncated_response'
                WHEN NOT coalesce(isfinite(ppl_fine_tuned) AND isfinite({unsure}), FALSE) THEN 'no_perplexity'
                {_reasons(rule, threshold)}
            END AS reason
        FROM scored_pairs
    """


def _reasons(rule: Rule, threshold: str) -> str:
    if rule == "both":
        return f"""
                WHEN ppl_fine_tuned >= {threshold} THEN 'fine_tuned_not_confident'
                WHEN ppl_base <= {threshold} THEN 'base_already_confident'"""
    return "WHEN margin <= 0 THEN 'below_threshold'"
