"""The assets of one transfer: one file each, read as the method's steps."""

import dagster as dg

from tuneshift_dag.assets.common import with_code_references
from tuneshift_dag.assets.comparison import build_comparison
from tuneshift_dag.assets.distilled_model import build_distilled_model
from tuneshift_dag.assets.diversity_map import build_diversity_map
from tuneshift_dag.assets.evaluation import build_evaluation
from tuneshift_dag.assets.filtered_dataset import build_filtered_dataset
from tuneshift_dag.assets.scored_pairs import build_scored_pairs
from tuneshift_dag.assets.seed_set import build_round_seeds, build_seed_set
from tuneshift_dag.assets.synthetic_prompts import build_synthetic_prompts
from tuneshift_dag.assets.threshold_report import build_threshold_report
from tuneshift_dag.config import Transfer


def build_assets(transfer: Transfer) -> list[dg.AssetsDefinition | dg.AssetSpec]:
    """All assets; ``evaluation`` needs a held-out file or tasks; two have a switch in ``transfer.yaml``."""
    assets: list[dg.AssetsDefinition | dg.AssetSpec] = [
        build_seed_set(transfer),
        build_round_seeds(transfer),
        build_synthetic_prompts(transfer),
        build_scored_pairs(transfer),
        build_filtered_dataset(transfer),
        build_threshold_report(transfer),
        build_distilled_model(transfer),
    ]
    if transfer.heldout or transfer.config.evaluation.tasks:
        assets.append(build_evaluation(transfer))
    if transfer.config.diversity_map:
        assets.append(build_diversity_map(transfer))
    if transfer.config.compare:
        assets.append(build_comparison(transfer))
    return with_code_references(assets, transfer)
