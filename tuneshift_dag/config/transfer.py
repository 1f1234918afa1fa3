# mypy: implicit-reexport
"""shim, removed at integration: the names that were here before config/ had a file for each concern."""

# ruff: noqa: F401
from tuneshift_dag.config import Transfer, round_key, round_number
from tuneshift_dag.config.files import (
    HELD_OUT_SHAPE,
    SEED_SHAPE,
    Rows,
    check_examples,
    find_transfers,
    is_same_base,
    load_transfer,
    name_problem,
    read_jsonl,
    read_text,
)
from tuneshift_dag.config.schema import (
    Arm,
    Compare,
    Distill,
    Evaluation,
    Filter,
    Response,
    Source,
    Target,
    TransferConfig,
)
from tuneshift_dag.config.schema import check_threshold as check_cut
from tuneshift_dag.config.schema_models import (
    EngineConfig,
    Generator,
    Mode,
    Models,
    Probability,
    RayCluster,
    ServedModel,
    Server,
)
