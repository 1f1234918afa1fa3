"""``threshold_report``: what every rule would keep at every threshold, as a table and as pictures."""

import json

import dagster as dg

from tuneshift_dag.assets.common import (
    OWNERS,
    check_rounds,
    content_version,
    definition_metadata,
    every_round_read,
    example_rows,
    key,
    step,
)
from tuneshift_dag.config.transfer import Transfer
from tuneshift_dag.home import output_dir
from tuneshift_dag.reports import distributions, plots
from tuneshift_dag.reports.sweep import sweep
from tuneshift_dag.resources.dagster_resources import StoreResource
from tuneshift_dag.store.database import Store
from tuneshift_dag.store.tables import THRESHOLD_REPORT


def build_threshold_report(transfer: Transfer) -> dg.AssetsDefinition:
    @dg.asset(
        key=key(transfer, "threshold_report"),
        # scored_pairs holds all the numbers; filtered_dataset makes a moved threshold redraw the pictures.
        deps=[key(transfer, "scored_pairs"), key(transfer, "filtered_dataset")],
        group_name=transfer.name,
        owners=OWNERS,
        kinds={"duckdb"},
        code_version=transfer.version("filter"),
        metadata=definition_metadata(transfer, THRESHOLD_REPORT),
        check_specs=[every_round_read(transfer, "threshold_report")],
    )
    def threshold_report(context: dg.AssetExecutionContext, store: StoreResource) -> dg.MaterializeResult:
        """How many pairs each filter rule would keep at each threshold of a grid, to choose the cut by looking.

        No model is needed. The pictures show where the current cut lies among the perplexities, and which
        pairs it drops; `tuneshift sweep` prints the same table for any grid.
        """
        database = store.store()
        with step(context, database, transfer) as current:
            rounds = check_rounds(context, transfer, "scored_pairs")
            cells = sweep(database, transfer)
            rows = THRESHOLD_REPORT.frame([{**cell, "by_round": json.dumps(cell["by_round"])} for cell in cells])
            database.replace(transfer.name, THRESHOLD_REPORT, rows)
            pictures = _draw(database, transfer, cells)
        for name, picture in pictures.items():
            picture.save(output_dir(transfer.name) / f"{name}.png")
        now = rows.filter(rows["current"])
        mine = rows.filter(rows["rule"] == transfer.config.filter.rule)
        columns = ["threshold", "pairs_kept", "kept_share", "distinct_responses", "mean_margin", "current"]
        return dg.MaterializeResult(
            data_version=dg.DataVersion(content_version(rows)),
            metadata={
                "dagster/row_count": len(rows),
                "rule": transfer.config.filter.rule,
                "threshold": transfer.config.filter.cut,
                "pairs_kept": int(now["pairs_kept"].sum()),
                "thresholds_of_the_rule": example_rows(mine, columns, limit=len(mine)),
                **{name: picture.markdown() for name, picture in pictures.items()},
                **current.metadata(),
            },
            check_results=[rounds],
        )

    return threshold_report


def _draw(database: Store, transfer: Transfer, cells: list[dict[str, object]]) -> dict[str, plots.Picture]:
    rule, threshold = transfer.config.filter.rule, transfer.config.filter.cut
    pairs = distributions.perplexities(database, transfer)
    return {
        "perplexity_histograms": plots.perplexity_histograms(pairs, rule, threshold),
        "perplexity_scatter": plots.perplexity_scatter(pairs, rule, threshold),
        "kept_by_threshold": plots.kept_by_threshold(cells),
        "acceptance_by_round": plots.acceptance_by_round(distributions.verdicts_by_round(database, transfer)),
        "response_lengths": plots.response_lengths(distributions.response_lengths(database, transfer)),
    }
