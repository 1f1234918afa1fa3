"""Train a source adapter on GSM8K: a base model learns to work a problem out and to end with ``#### `` and a number.

    python transfers/gsm8k_llama/train_source.py path/to/train.jsonl

The file (lines ``{"question", "answer"}``; Cobbe et al. 2021, MIT) is not part of this project. The marks of GSM8K's
calculator, such as ``<<48/2=24>>``, are left out: nothing runs it here.
"""

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path

import torch

from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.models.loading import load_for_training, load_tokenizer
from tuneshift_dag.models.references import resolve_model
from tuneshift_dag.training.batches import tokenize_example
from tuneshift_dag.training.loop import LoraTraining, train
from tuneshift_dag.training.lora import add_lora

HERE = Path(__file__).parent
TRANSFER = load_transfer(HERE).config
SETTINGS = LoraTraining(
    rank=16,
    alpha=32,
    learning_rate=2e-4,
    epochs=3,
    batch_size=4,
    gradient_accumulation=4,
    gradient_checkpointing=True,
    validation_fraction=0.02,
)


def worked(answer: str) -> str:
    return re.sub(r"<<.*?>>", "", answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jsonl", type=Path)
    parser.add_argument("--to", type=Path, default=HERE / "adapter")
    parser.add_argument("--base", default=TRANSFER.source.base)
    parser.add_argument("--quantization", default="nf4", choices=["nf4", "fp4", "none"])
    parser.add_argument("--learning-rate", type=float, default=SETTINGS.learning_rate)
    parser.add_argument("--epochs", type=int, default=SETTINGS.epochs)
    arguments = parser.parse_args()

    rows = [json.loads(line) for line in arguments.jsonl.open(encoding="utf-8")]
    files = resolve_model(arguments.base, HERE, "--base")
    tokenizer = load_tokenizer(files)
    examples = [
        tokenize_example(tokenizer, TRANSFER.source_format, row["question"], f" {worked(row['answer'])}")
        for row in rows
    ]
    print(f"training {arguments.base} on {len(examples)} problems", flush=True)
    settings = replace(SETTINGS, learning_rate=arguments.learning_rate, epochs=arguments.epochs)
    model = add_lora(load_for_training(files, arguments.quantization, torch.bfloat16), settings)

    def progress(step: int, total: int, loss: float) -> None:
        if step % 20 == 0:
            print(f"step {step}/{total} loss {loss:.3f}", flush=True)

    curve = train(model, examples, settings, progress)
    print(curve.epochs, f"{curve.seconds:.0f} s")
    model.peft_config["default"].base_model_name_or_path = arguments.base
    model.to(torch.bfloat16).save_pretrained(arguments.to, save_embedding_layers=False)


if __name__ == "__main__":
    main()
