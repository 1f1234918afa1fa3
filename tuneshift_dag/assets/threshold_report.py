"""``threshold_report``: what every rule would keep at every threshold, as a table and as pictures."""

import json

import dagster as dg

from tuneshift_dag.assets.common import EVERY_ROUND, Context, Step, check_rounds, definition, example_rows, step
from tuneshift_dag.config import Transfer
from tuneshift_dag.reports import plots, thresholds
from tuneshift_dag.resources import StoreResource
from tuneshift_dag.store.records import content_version
from tuneshift_dag.store.tables import THRESHOLD_REPORT


def build_threshold_report(transfer: Transfer) -> dg.AssetsDefinition:
    # Made from scored_pairs, which holds all the numbers; filtered_dataset makes a moved threshold redraw the pictures.
    @dg.asset(**definition(transfer, "threshold_report", THRESHOLD_REPORT, checks=EVERY_ROUND))
    def threshold_report(context: Context, store: StoreResource) -> dg.MaterializeResult:
        """How many pairs each filter rule would keep at each threshold of a grid, to choose the cut by looking.

        No model is needed. The pictures show where the current cut lies among the perplexities, and which
        pairs it drops; `tuneshift sweep` prints the same table for any grid.
        """
        with step(context, store.store(), transfer, "threshold_report") as current:
            rounds = check_rounds(current, "scored_pairs")
            cells = thresholds.sweep(current.store, transfer)
            rows = THRESHOLD_REPORT.frame([{**cell, "by_round": json.dumps(cell["by_round"])} for cell in cells])
            current.write([(THRESHOLD_REPORT, rows)], content_version(rows))
            pictures = _draw(current, cells)
        mine = rows.filter(rows["rule"] == transfer.config.filter.rule)
        columns = ["threshold", "pairs_kept", "kept_share", "distinct_responses", "mean_margin", "current"]
        figures = {
            "rule": transfer.config.filter.rule,
            "threshold": transfer.config.filter.threshold,
            "pairs_kept": int(rows.filter(rows["current"])["pairs_kept"].sum()),
            "thresholds_of_the_rule": example_rows(mine, columns, limit=len(mine)),
        }
        return current.result(len(rows), {**figures, **pictures}, rounds)

    return threshold_report


def _draw(current: Step, cells: list[dict[str, object]]) -> dict[str, dg.MetadataValue]:
    store, transfer = current.store, current.transfer
    rule, threshold = transfer.config.filter.rule, transfer.config.filter.threshold
    pairs = thresholds.perplexities(store, transfer)
    pictures = {
        "perplexity_histograms": plots.perplexity_histograms(pairs, rule, threshold),
        "perplexity_scatter": plots.perplexity_scatter(pairs, rule, threshold),
        "kept_by_threshold": plots.kept_by_threshold(cells),
        "acceptance_by_round": plots.acceptance_by_round(thresholds.verdicts_by_round(store, transfer)),
        "response_lengths": plots.response_lengths(thresholds.response_lengths(store, transfer)),
    }
    return {name: current.picture(name, picture) for name, picture in pictures.items()}
