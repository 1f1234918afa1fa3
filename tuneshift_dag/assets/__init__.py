"""The assets of one transfer: one file each, read as the method's steps."""

import warnings
from pathlib import Path

import dagster as dg

from tuneshift_dag.assets.comparison import build_comparison
from tuneshift_dag.assets.distilled_model import build_distilled_model
from tuneshift_dag.assets.diversity_map import build_diversity_map
from tuneshift_dag.assets.evaluation import build_evaluation
from tuneshift_dag.assets.filtered_dataset import build_filtered_dataset
from tuneshift_dag.assets.rehearsal_set import build_rehearsal_set
from tuneshift_dag.assets.scored_pairs import build_scored_pairs
from tuneshift_dag.assets.seed_set import build_round_seeds, build_seed_set
from tuneshift_dag.assets.synthetic_prompts import build_synthetic_prompts
from tuneshift_dag.assets.threshold_report import build_threshold_report
from tuneshift_dag.config import Transfer

Assets = list[dg.AssetsDefinition | dg.AssetSpec]


def build_assets(transfer: Transfer) -> Assets:
    """All assets; ``evaluation`` needs a held-out file or tasks; three have a switch in ``transfer.yaml``."""
    assets: Assets = [
        build_seed_set(transfer),
        build_round_seeds(transfer),
        build_synthetic_prompts(transfer),
        build_scored_pairs(transfer),
        build_filtered_dataset(transfer),
        build_threshold_report(transfer),
        build_distilled_model(transfer),
    ]
    if transfer.rehearses:
        assets.append(build_rehearsal_set(transfer))
    if transfer.evaluates:
        assets.append(build_evaluation(transfer))
    if transfer.config.diversity_map:
        assets.append(build_diversity_map(transfer))
    if transfer.config.compare:
        assets.append(build_comparison(transfer))
    with warnings.catch_warnings():
        # Code references are beta in Dagster 1.13, and would warn at every start.
        warnings.simplefilter("ignore", dg.BetaWarning)
        return _with_code_references(assets, transfer)


def _with_code_references(assets: Assets, transfer: Transfer) -> Assets:
    settings = dg.LocalFileCodeReference(file_path=str(transfer.folder / "transfer.yaml"), label="transfer.yaml")

    def link(spec: dg.AssetSpec) -> dg.AssetSpec:
        references = [settings]
        if spec.key.path[-1] == "round_seeds":
            # It is without a function of its own, so Dagster can't find the file.
            references.append(dg.LocalFileCodeReference(file_path=str(Path(__file__).with_name("seed_set.py"))))
        value = dg.CodeReferencesMetadataValue(code_references=references)
        return spec.merge_attributes(metadata={"dagster/code_references": value})

    return list(dg.with_source_code_references(dg.map_asset_specs(link, assets)))  # type: ignore[arg-type]
