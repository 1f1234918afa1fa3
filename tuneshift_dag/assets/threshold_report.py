"""``threshold_report``: what every rule would keep at every threshold, as a table and as pictures."""

import json

import dagster as dg

from tuneshift_dag.assets.common import check_rounds, definition, every_round_read, example_rows, key, step
from tuneshift_dag.config import Transfer
from tuneshift_dag.home import output_dir
from tuneshift_dag.reports import plots, thresholds
from tuneshift_dag.resources import StoreResource
from tuneshift_dag.store import Store
from tuneshift_dag.store.records import content_version
from tuneshift_dag.store.tables import THRESHOLD_REPORT


def build_threshold_report(transfer: Transfer) -> dg.AssetsDefinition:
    @dg.asset(
        **definition(transfer, THRESHOLD_REPORT, "threshold_report"),
        # scored_pairs holds all the numbers; filtered_dataset makes a moved threshold redraw the pictures.
        deps=[key(transfer, "scored_pairs"), key(transfer, "filtered_dataset")],
        check_specs=[every_round_read(transfer, "threshold_report")],
    )
    def threshold_report(context: dg.AssetExecutionContext, store: StoreResource) -> dg.MaterializeResult:
        """How many pairs each filter rule would keep at each threshold of a grid, to choose the cut by looking.

        No model is needed. The pictures show where the current cut lies among the perplexities, and which
        pairs it drops; `tuneshift sweep` prints the same table for any grid.
        """
        with step(context, store.store(), transfer, "threshold_report") as current:
            rounds = check_rounds(current, "scored_pairs")
            cells = thresholds.sweep(current.store, transfer)
            rows = THRESHOLD_REPORT.frame([{**cell, "by_round": json.dumps(cell["by_round"])} for cell in cells])
            version = current.write([(THRESHOLD_REPORT, rows)], content_version(rows))
            pictures = _draw(current.store, transfer, cells)
            for name, picture in pictures.items():
                picture.save(output_dir(transfer.name) / f"{name}.png")
        now = rows.filter(rows["current"])
        mine = rows.filter(rows["rule"] == transfer.config.filter.rule)
        columns = ["threshold", "pairs_kept", "kept_share", "distinct_responses", "mean_margin", "current"]
        return dg.MaterializeResult(
            data_version=dg.DataVersion(version),
            metadata={
                "dagster/row_count": len(rows),
                "rule": transfer.config.filter.rule,
                "threshold": transfer.config.filter.threshold,
                "pairs_kept": int(now["pairs_kept"].sum()),
                "thresholds_of_the_rule": example_rows(mine, columns, limit=len(mine)),
                **{name: dg.MetadataValue.md(picture.markdown()) for name, picture in pictures.items()},
                **current.metadata(),
            },
            check_results=[rounds],
        )

    return threshold_report


def _draw(database: Store, transfer: Transfer, cells: list[dict[str, object]]) -> dict[str, plots.Picture]:
    rule, threshold = transfer.config.filter.rule, transfer.config.filter.threshold
    pairs = thresholds.perplexities(database, transfer)
    return {
        "perplexity_histograms": plots.perplexity_histograms(pairs, rule, threshold),
        "perplexity_scatter": plots.perplexity_scatter(pairs, rule, threshold),
        "kept_by_threshold": plots.kept_by_threshold(cells),
        "acceptance_by_round": plots.acceptance_by_round(thresholds.verdicts_by_round(database, transfer)),
        "response_lengths": plots.response_lengths(thresholds.response_lengths(database, transfer)),
    }
