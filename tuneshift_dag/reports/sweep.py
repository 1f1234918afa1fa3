"""What each rule would keep at each threshold: choosing the cut by looking, without a model.

Every number comes from the scored pairs with the SQL that also makes ``filtered_dataset``, so a cell is
what the dataset becomes when ``filter`` is set to it. What is kept also decides the seeds of later
rounds; a sweep judges the prompts that there are.
"""

import math
from collections.abc import Sequence
from typing import Any

from tuneshift_dag.config.transfer import Transfer, check_cut
from tuneshift_dag.errors import TuneshiftError
from tuneshift_dag.method.filters import GUARD_REASONS, KEEP_RULES, RULES, Rule
from tuneshift_dag.store.database import Store

PAPER_THRESHOLD = 1.5
_MOST_THRESHOLDS = 1000
_QUANTILES = [round(0.05 + 0.1 * place, 2) for place in range(10)]
_SHARES = [0.1, 0.25, 0.5, 0.75, 1.0]
_PARTS = [0.25, 0.5, 1.5, 2.0]

# What a threshold of the rule is compared with.
_COMPARED: dict[Rule, tuple[str, ...]] = {
    "both": ("ppl_fine_tuned", "ppl_base"),
    "difference": ("ppl_base - ppl_fine_tuned",),
    "ratio": ("ppl_base / ppl_fine_tuned",),
    "cross_ratio": ("ppl_base_cross / ppl_fine_tuned",),
    "ifd": ("ppl_base_cross / ppl_base_alone",),
}


def sweep(
    store: Store, transfer: Transfer, rules: Sequence[str] = (), grid: Sequence[float] = ()
) -> list[dict[str, Any]]:
    """One cell for each rule and threshold, in the order of `RULES` and of the thresholds.

    Args:
        rules: the rules to try; without any, all of them: of a grid, those that can take all of it.
        grid: the thresholds to try, or of `filters.KEEP_RULES` what to keep (`filter.keep`); without
            any, `default_grid` of each rule.

    Returns:
        Cells ``{rule, threshold, pairs_kept, kept_share, distinct_responses, mean_margin, by_round,
        current}``. ``kept_share`` is of all scored pairs; ``mean_margin`` is None where there is none;
        ``by_round`` maps every scored round to its kept pairs. A rule whose perplexities were never
        scored (`ifd`, unless ``transfer.yaml`` asks for it) has no cells when it isn't named.

    Raises:
        TuneshiftError: for an unknown rule, a threshold that can't separate anything, or a named rule whose
            perplexities were never scored.
    """
    for rule in rules:
        if rule not in RULES:
            raise TuneshiftError(f"There is no rule {rule!r}: use {', '.join(RULES)}.")
    wanted = [rule for rule in RULES if rule in rules] or _rules_for(grid)
    for rule in wanted:
        for threshold in grid:
            _refuse_impossible(rule, threshold)
    if "ifd" in wanted and not _has_ifd(store, transfer):
        if "ifd" in rules:
            raise TuneshiftError(
                "No pair has a PPL_b(y_f) without its prompt, which rule 'ifd' reads and no other: set filter.rule to"
                f" ifd and a threshold below 1, and `tuneshift run {transfer.name}` scores it."
            )
        wanted.remove("ifd")
    scored = dict(
        store.read(
            f"SELECT round, count(*) FROM {transfer.of_its_rounds('scored_pairs')} GROUP BY round ORDER BY round",
            schema=transfer.name,
        ).iter_rows()
    )
    cells = []
    for rule in wanted:
        thresholds = sorted(set(grid)) or default_grid(store, transfer, rule)
        cells += _cells(store, transfer, rule, thresholds, scored)
    return cells


def default_grid(store: Store, transfer: Transfer, rule: Rule) -> list[float]:
    """Thresholds where the rule's verdict changes: quantiles of what it compares, and the paper's 1.5.

    The rule of ``transfer.yaml`` gets its current threshold too; it means nothing to the other rules.
    Quantiles rather than equal steps, because perplexity ratios may span four orders of magnitude. Of
    `filters.KEEP_RULES`, shares; `unfiltered` has the one value 1.
    """
    settings = transfer.config.filter
    mine = [settings.cut] if rule == settings.rule else []
    if rule == "unfiltered":
        return [1.0]
    if rule in KEEP_RULES:
        number = mine[0] if mine and mine[0] > 1 else None
        return sorted({*mine, *(_SHARES if number is None else (max(2, round(number * part)) for part in _PARTS))})
    floor = _floor(rule)
    # Judged at any threshold: a pair without a perplexity, or truncated, or empty, is out at every one.
    usable = f"""
        SELECT * FROM ({transfer.verdict_sql(rule, PAPER_THRESHOLD)})
        WHERE coalesce(reason, '') NOT IN {GUARD_REASONS}
    """
    values = " UNION ALL ".join(f"SELECT {value} AS value FROM usable" for value in _COMPARED[rule])
    found = store.read(
        f"WITH usable AS ({usable}) SELECT unnest(quantile_cont(value, {_QUANTILES})) FROM ({values})"
        f" WHERE value > {floor} AND isfinite(value)",
        schema=transfer.name,
    ).to_series()
    fixed = {*mine, *([] if rule == "ifd" else [PAPER_THRESHOLD])}
    ceiling = 1 if rule == "ifd" else math.inf
    return sorted(t for t in fixed | {_readable(value, floor) for value in found} if floor < t < ceiling)


def parse_grid(text: str) -> list[float]:
    """Thresholds from ``1.1,1.2,1.5`` or ``start:stop:step`` (the stop included).

    Raises:
        TuneshiftError: naming what can't be read, and the two forms.
    """
    try:
        if ":" in text:
            start, stop, step = (float(part) for part in text.split(":"))
            return _steps(text, start, stop, step)
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise TuneshiftError(
            f"--grid {text!r} can't be read: write thresholds as 1.1,1.2,1.5 or as start:stop:step, like 1.1:2:0.1."
        ) from None


def _steps(text: str, start: float, stop: float, step: float) -> list[float]:
    if not (math.isfinite(start) and math.isfinite(stop) and math.isfinite(step) and step > 0 and stop >= start):
        raise TuneshiftError(
            f"--grid {text!r} has no thresholds: the step must be above 0 and the stop not below start."
        )
    count = math.floor((stop - start) / step + 1e-9) + 1
    if count > _MOST_THRESHOLDS:
        raise TuneshiftError(
            f"--grid {text!r} has {count} thresholds, more than {_MOST_THRESHOLDS}: use a larger step."
        )
    # Rounded, so that 1.1:2:0.1 hits the 1.3 of transfer.yaml and not 1.3000000000000003.
    return [round(start + place * step, 10) for place in range(count)]


def _floor(rule: Rule) -> int:
    """Thresholds are above this, as in `tuneshift_dag.config.transfer.check_cut`."""
    return 0 if rule in ("difference", "ifd") else 1


def _refuse_impossible(rule: Rule, threshold: float) -> None:
    try:
        check_cut(rule, threshold)
    except ValueError as error:
        raise TuneshiftError(f"{error}.") from None


def _rules_for(grid: Sequence[float]) -> list[Rule]:
    """The rules that can take every threshold of a grid.

    Raises:
        TuneshiftError: when no rule can.
    """
    if not grid:
        return list(RULES)
    able: list[Rule] = []
    for rule in RULES:
        if rule == "unfiltered":
            continue
        try:
            for threshold in grid:
                check_cut(rule, threshold)
        except ValueError:
            continue
        able.append(rule)
    if not able:
        raise TuneshiftError(
            f"No rule takes all of the thresholds {', '.join(f'{t:g}' for t in grid)}: name one with --rule to see why."
        )
    return able


def _has_ifd(store: Store, transfer: Transfer) -> bool:
    """Whether any pair has the perplexity that only `ifd` reads."""
    return bool(store.read("SELECT count(ppl_base_alone) FROM scored_pairs", schema=transfer.name).item())


def _readable(value: float, floor: int) -> float:
    """Three significant digits; just above the floor, where perplexities crowd, of what is above it."""
    start = floor if value < 10 else 0
    return round(start + float(f"{value - start:.3g}"), 10)


def _cells(
    store: Store, transfer: Transfer, rule: Rule, thresholds: list[float], scored: dict[str, int]
) -> list[dict[str, Any]]:
    settings = transfer.config.filter
    rows = store.read(
        f"""
        WITH grid AS (SELECT unnest($thresholds::DOUBLE[]) AS threshold),
        kept AS (
            SELECT grid.threshold, judged.round, judged.margin, trim(judged.fine_tuned_response) AS response
            FROM grid, LATERAL ({transfer.verdict_sql(rule, "grid.threshold")}) AS judged
            WHERE judged.reason IS NULL
        )
        SELECT threshold, round, count(*), count(DISTINCT response), avg(margin)
        FROM kept GROUP BY GROUPING SETS ((threshold), (threshold, round))
        """,
        {"thresholds": thresholds},
        transfer.name,
    )
    found = {(threshold, round_): counts for threshold, round_, *counts in rows.iter_rows()}
    pairs = sum(scored.values())
    cells = []
    for threshold in thresholds:
        kept, distinct, margin = found.get((threshold, None), (0, 0, None))
        cells.append(
            {
                "rule": rule,
                "threshold": threshold,
                "pairs_kept": kept,
                "kept_share": kept / max(1, pairs),
                "distinct_responses": distinct,
                "mean_margin": margin,
                "by_round": {round_: found.get((threshold, round_), (0,))[0] for round_ in scored},
                "current": (rule, threshold) == (settings.rule, settings.cut),
            }
        )
    return cells
