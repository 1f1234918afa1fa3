"""``tuneshift export``: the adapter and the dataset, each with a card that says where it came from."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from tuneshift_dag import TuneshiftError
from tuneshift_dag.config import Transfer
from tuneshift_dag.method import PromptFormat
from tuneshift_dag.method.evaluation import TITLES
from tuneshift_dag.models.capabilities import end_ids, read_whole
from tuneshift_dag.models.loading import is_quantized, load_tokenizer
from tuneshift_dag.models.references import ModelFiles
from tuneshift_dag.reports import (
    arm_tasks,
    arms,
    by_column,
    by_way,
    conclusion,
    describe_filter,
    diversity,
    escape_markdown,
    fenced,
    report,
    scales,
)
from tuneshift_dag.store import Store
from tuneshift_dag.store.records import Records, content_version

_GGUF = """
## Files

The adapter is merged into its base here: `AutoModelForCausalLM.from_pretrained` loads this folder, and llama.cpp's
`python convert_hf_to_gguf.py FOLDER --outfile model.gguf` turns it into GGUF.
"""
# Of a LoRA's two matrices the second one, to which its update is proportional.
_UP = ".lora_B."
_WRITTEN = ("adapter", "merged", "dataset.jsonl", "dataset.parquet", "README.md")
_NOTE = ".tuneshift-export"
"""In an exported folder: which of these an export wrote, a line each."""


def export(store: Store, transfer: Transfer, to: Path, merged: bool = False) -> list[Path]:
    """Write the adapter (PEFT), if ``merged`` also the target with the adapter merged into it, the dataset and their
    cards; their paths. They replace those of an earlier export all together; what else is in the folder stays, and
    `TuneshiftError` is raised where no export wrote what would be replaced, or transfer.yaml is no longer what the
    model was made with."""
    figures, records = report(store, transfer), Records(store, transfer)
    if figures["model"] is None or not records.adapter_is_there():
        raise TuneshiftError(f"{transfer.name} has no distilled model yet: `tuneshift run {transfer.name}` first.")
    # A card says what the settings are, and a merge takes the base that they name.
    if changed := [asset for asset in records.changed() if asset in ("scored_pairs", "distilled_model")]:
        raise TuneshiftError(
            f"{transfer.folder}: what {' and '.join(changed)} depends on has changed since model"
            f" {figures['model']['model_id']} was trained. `tuneshift run {transfer.name}` first, or take it back."
        )
    # Chosen by ``distill.keep``; there is none before an evaluation.
    scale = next((row["scale"] for row in figures["frontier"] if row["chosen"]), 1)
    if (transfer.config.distill.keep is not None or scale != 1) and records.causes("evaluation"):
        raise TuneshiftError(
            f"{transfer.name}: distill.keep chooses what of the adapter is exported, and the model of now isn't"
            f" evaluated with today's settings: `tuneshift run {transfer.name}` first."
        )
    # Not asked of the path itself, which fails for a name that no file could have.
    earlier = (to / _NOTE).read_text("utf-8").split() if os.path.isfile(to / _NOTE) else []
    written = [name for name in _WRITTEN if merged or name != "merged"]
    if foreign := [name for name in written if name not in earlier and os.path.exists(to / name)]:
        raise TuneshiftError(
            f"--to {to}: {', '.join(foreign)} there would be replaced, and no export wrote that. Name another folder."
        )
    # The dataset of the model that is exported, not that of a filter which changed since.
    pairs = store.read(
        "SELECT p.round, p.prompt_id, p.prompt, p.fine_tuned_response AS response, p.ppl_fine_tuned, p.ppl_base"
        " FROM training_examples t JOIN scored_pairs p USING (round, prompt_id)"
        " WHERE t.model_id = ? ORDER BY p.round, p.prompt_id",
        [figures["model"]["model_id"]],
        transfer.name,
    )
    if content_version(pairs.select("prompt_id", "prompt", "response")) != figures["model"]["dataset_version"]:
        raise TuneshiftError(
            f"{transfer.name}: rounds were materialized again since the model was trained, so {store.path} no longer"
            f" holds all of its {figures['model']['pairs']} pairs. `tuneshift run {transfer.name}` trains on those that"
            " there are now."
        )
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        # A folder that is there may be on a disk of its own, where what is made must be to replace what was.
        with tempfile.TemporaryDirectory(prefix=".tuneshift-", dir=to if to.is_dir() else to.parent) as staging:
            made = Path(staging) / "new"
            shutil.copytree(figures["model"]["path"], made / "adapter")
            if scale != 1:
                scale_adapter(made / "adapter", scale)
            card = model_card(transfer, figures)
            (made / "adapter" / "README.md").write_text(card, "utf-8")
            if merged:
                merge(transfer.named("target.base").files(), made / "adapter", made / "merged")
                (made / "merged" / "README.md").write_text(card.replace("peft", "transformers", 1) + _GGUF, "utf-8")
            _write_chat(pairs, transfer.config.source_format, made / "dataset.jsonl")
            pairs.write_parquet(made / "dataset.parquet")
            (made / "README.md").write_text(_dataset_card(transfer, figures, pairs), "utf-8")
            (made / _NOTE).write_text("\n".join(written), "utf-8")
            _put(made, to, [*earlier, _NOTE], Path(staging) / "old")
    except OSError as error:
        raise TuneshiftError(f"--to {to}: {error.strerror or error}: name a folder that can be written.") from error
    return [to / name for name in written]


def push(folder: Path, repo: str) -> str:
    """Upload an exported folder to a repository of the hub, made private if it isn't there; its address.
    `TuneshiftError` when the hub refuses it or can't be reached."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Distilled with tuneshift_dag"))
    except Exception as error:  # whatever it was, the folder is there
        raise TuneshiftError(
            f"--push {repo!r}: {folder} could not be uploaded ({type(error).__name__}: {error}). Run `hf auth login`,"
            f" check the name, or upload it with `hf upload {repo} {folder}`."
        ) from error


def merge(files: ModelFiles, adapter: Path, to: Path) -> None:
    """Write ``to``: safetensors in the base's dtype, config, tokenizer, and a generation config with every token that
    ends a response. The sum is taken in float32: four bytes for each weight. `TuneshiftError` when the base's weights
    are in 4 bits, which a merge would round again."""
    if is_quantized(files.path):
        raise TuneshiftError(
            f"{files.reference}: its weights are in 4 bits, into which an adapter can't be merged without loss. Name"
            " the 16-bit model in target.base, or serve the adapter beside this one."
        )
    tokenizer = load_tokenizer(files)
    model: Any = read_whole(files.path, dtype="auto", attn_implementation="eager")
    dtype = model.dtype
    merged = PeftModel.from_pretrained(model.float(), adapter, autocast_adapter_dtype=False).merge_and_unload()
    merged.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(end_ids(tokenizer, files.path)),
        pad_token_id=tokenizer.pad_token_id,
    )
    merged.to(dtype).save_pretrained(to)
    tokenizer.save_pretrained(to)
    del merged
    torch.cuda.empty_cache()


def scale_adapter(folder: Path, scale: float) -> None:
    """Multiply the update of the LoRA adapter in ``folder`` (rank, alpha and all else stay) by ``scale``."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: t * scale if _UP in name else t for name, t in tensors.items()}, file, {"format": "pt"})


def _put(made: Path, to: Path, earlier: Sequence[str], replaced: Path) -> None:
    if not to.exists():
        made.rename(to)
        return
    replaced.mkdir()
    for name in (*_WRITTEN, _NOTE):
        if name in earlier and (to / name).exists():
            (to / name).rename(replaced / name)
        if (made / name).exists():
            (made / name).rename(to / name)


def model_card(transfer: Transfer, figures: dict[str, Any]) -> str:
    """A Hugging Face model card: source, seeds, thresholds, dataset version and accuracy."""
    config = transfer.config
    accuracy = [
        {"model": _words(row["model"]), "accuracy": f"{row['value']:.3f}"}
        | {"interval": f"{row['low']:.3f} to {row['high']:.3f}", "n": row["n"]}
        for row in by_way(figures["accuracy"])
    ]
    seeds = "\n".join(f"- {escape_markdown(seed)}" for seed in figures["seeds"])
    format, shown = config.target_format, str(config.target_format)
    asked = "The model sees exactly this before its response, tokenized with the tokenizer's default special tokens:"
    if format.template is None:
        asked = "The model is asked through the base model's chat template (`apply_chat_template`):"
        shown = json.dumps(format.messages("{prompt}"), ensure_ascii=False, indent=1)
        shown += f"\n{json.dumps(format.arguments)}" if format.arguments else ""
    front = f"---\nlibrary_name: peft\nbase_model: {json.dumps(config.target.base)}\ntags: [lora, tuneshift-kd]\n---\n"
    return f"""{front}
# {transfer.name}: {config.target.base}

{config.description}

A LoRA adapter distilled with tuneshift_dag (TuneShift-KD, arXiv 2603.24518) from example prompts alone.

| | |
| --- | --- |
| source base | `{config.source.base}` |
| {config.source.tuned[0].replace(".", " ")} | `{config.source.tuned[1]}` |
| prompt generator | `{config.generator.model}` |
| filter | {figures["model"]["filter"] or describe_filter(transfer)} |
| dataset version | `{figures["model"]["dataset_version"]}`, {figures["model"]["pairs"]} pairs |
| model id | `{figures["model"]["model_id"]}` |

Seeds:

{seeds}

## Use

{asked}

{fenced(shown)}

## Held-out {TITLES[figures["metric"]]}

Greedy responses, 95 % intervals (Wilson), `heldout.jsonl`.

{_table(accuracy)}
{_retention(figures)}{_comparison(figures)}"""


def _retention(figures: dict[str, Any]) -> str:
    """The card's section on what the model forgot; nothing before an evaluation."""
    if not figures["retention"]:
        return ""
    tokens = next(iter(figures["retention"].values()))["tokens"]
    by_kind = by_column(
        [{**row, "what": row["kind"]} for row in figures["retention_by_kind"]],
        "model",
        lambda row: f"{row['perplexity']:.2f}",
        ("what",),
    )
    whole = {"what": "all", **{name: f"{row['perplexity']:.2f}" for name, row in figures["retention"].items()}}
    words = "\n".join(f"- {verdict['words']}" for verdict in figures["verdicts"])
    return f"""
## What was kept, and what forgotten

{words}

Perplexity of a general text ({tokens} tokens in several kinds and languages), before and after; own answers are what
the model answered before to questions that it wrote itself. With the adapter switched off the model is what it was.

{_table([whole, *by_kind])}

Skill against general text for parts of the adapter's update:

{_table(scales(figures["frontier"]))}
"""


def _comparison(figures: dict[str, Any]) -> str:
    """The card's section on rival filters; nothing before `tuneshift compare`."""
    rows = figures["comparison"]
    if not rows:
        return ""
    card = f"""
## Is the filter worth it?

Other models, trained on equally many pairs of each filter, several times each; held-out accuracy with 95 %
intervals for new trainings and prompts; differences paired, their intervals corrected over the arms (Holm).
{conclusion(rows)}

{_table(arms(rows))}
"""
    if diversity(rows):
        card += f"""
How varied the pairs were: distinct bigrams are a share of all, repetition is that of word 4-grams within a prompt, and
similarity the mean cosine of all pairs of prompts (MiniLM). General text is the perplexity of a part of it, as a
multiple of the base's: what was forgotten. Means over the trainings.

{_table(diversity(rows))}
"""
    if arm_tasks(rows):
        card += f"""
Standard tasks through lm-evaluation-harness: the mean over the trainings, with the lowest and the highest.

{_table(arm_tasks(rows))}
"""
    return card


def _words(name: str) -> str:
    return name.replace("_", " ")


def _table(rows: Sequence[Mapping[str, object]]) -> str:
    """A Markdown table with the columns of the first row; without rows nothing."""
    lines = [map(_words, rows[0]), ["---"] * len(rows[0]), *(map(str, row.values()) for row in rows)] if rows else []
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _dataset_card(transfer: Transfer, figures: dict[str, Any], pairs: pl.DataFrame) -> str:
    config = transfer.config
    return f"""# {transfer.name}: distillation dataset

{len(pairs)} prompts written by `{config.generator.model}` from {len(transfer.seeds)} seeds, answered by
`{config.source.base}` with the fine-tune `{config.source.tuned[1]}`, and kept by the rule
{figures["model"]["filter"] or describe_filter(transfer)}. Dataset version `{figures["model"]["dataset_version"]}`.

- `dataset.jsonl`: one conversation a line, `{{"messages": [{{"role": "user", ...}}, {{"role": "assistant", ...}}]}}`.
- `dataset.parquet`: the same pairs with their round and perplexities.
- `adapter/`: the LoRA adapter trained on them; see its card.

Synthetic text: it may hold mistakes of the models that wrote it, and is bound by their licences.
"""


def _write_chat(pairs: pl.DataFrame, format: PromptFormat, path: Path) -> None:
    with path.open("w", encoding="utf-8") as handle:
        for prompt, response in pairs.select("prompt", "response").iter_rows():
            messages = [*format.messages(prompt), {"role": "assistant", "content": response.strip()}]
            handle.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
