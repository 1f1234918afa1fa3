"""Training of the source adapters that write slot codes: this transfer's, and that of `../meeting_slots_chat`."""

from pathlib import Path

import torch

from tuneshift_dag.models.loading import dtype_name, load_for_training
from tuneshift_dag.models.references import ModelFiles
from tuneshift_dag.training.batches import TokenizedExample
from tuneshift_dag.training.loop import LoraTraining, train
from tuneshift_dag.training.lora import add_lora


def train_adapter(files: ModelFiles, examples: list[TokenizedExample], settings: LoraTraining, to: Path) -> None:
    """Train a LoRA on a model in the dtype that this machine is fast in, and save it in PEFT's format, in bfloat16."""
    model = add_lora(load_for_training(files, "none", getattr(torch, dtype_name("auto"))), settings)

    def progress(step: int, total: int, loss: float) -> None:
        if step % 20 == 0:
            print(f"step {step}/{total} loss {loss:.3f}", flush=True)

    curve = train(model, examples, settings, progress)
    print(curve.epochs, f"{curve.seconds:.0f} s")
    model.peft_config["default"].base_model_name_or_path = files.reference
    model.to(torch.bfloat16).save_pretrained(to, save_embedding_layers=False)
