"""``tuneshift export``: the adapter and the dataset, each with a card that says where it came from."""

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import polars as pl

from tuneshift_dag import TuneshiftError
from tuneshift_dag.config import Transfer
from tuneshift_dag.method.evaluation import TITLES
from tuneshift_dag.reports import (
    arm_tasks,
    by_way,
    conclusion,
    describe_filter,
    diversity,
    escape_markdown,
    report,
)
from tuneshift_dag.store import Store
from tuneshift_dag.store.records import content_version

_WRITTEN = ("adapter", "dataset.jsonl", "dataset.parquet", "README.md")


def export(store: Store, transfer: Transfer, to: Path) -> list[Path]:
    """Write ``to/adapter`` (PEFT), ``to/dataset.jsonl`` (chat), ``to/dataset.parquet`` and ``to/README.md``.

    They replace those of an earlier export, all together at the end; what else is in the folder stays.

    Raises:
        TuneshiftError: when nothing was distilled yet, the tables no longer hold what it was distilled from, or the
            folder can't be written.
    """
    figures = report(store, transfer)
    if figures["model"] is None or not Path(figures["model"]["path"]).is_dir():
        raise TuneshiftError(f"{transfer.name} has no distilled model yet: `tuneshift run {transfer.name}` first.")
    model_id = figures["model"]["model_id"]
    # The dataset of the model that is exported, not that of a filter which changed since.
    pairs = store.read(
        "SELECT p.round, p.prompt_id, p.prompt, p.fine_tuned_response AS response, p.ppl_fine_tuned, p.ppl_base"
        " FROM training_examples t JOIN scored_pairs p USING (round, prompt_id)"
        " WHERE t.model_id = ? ORDER BY p.round, p.prompt_id",
        [model_id],
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
        with tempfile.TemporaryDirectory(prefix=f".{to.name}-", dir=to.parent) as staging:
            made = Path(staging) / "new"
            shutil.copytree(figures["model"]["path"], made / "adapter")
            (made / "adapter" / "README.md").write_text(model_card(transfer, figures), "utf-8")
            _write_chat(pairs, made / "dataset.jsonl")
            pairs.write_parquet(made / "dataset.parquet")
            (made / "README.md").write_text(_dataset_card(transfer, figures, pairs), "utf-8")
            _put(made, to, Path(staging) / "old")
    except OSError as error:
        raise TuneshiftError(f"--to {to}: {error.strerror or error}: name a folder that can be written.") from error
    return [to / name for name in _WRITTEN]


def _put(made: Path, to: Path, replaced: Path) -> None:
    """Rename what was made into its place; what was there goes to ``replaced``."""
    if not to.exists():
        made.rename(to)
        return
    replaced.mkdir()
    for name in _WRITTEN:
        if (to / name).exists():
            (to / name).rename(replaced / name)
        (made / name).rename(to / name)


def model_card(transfer: Transfer, figures: dict[str, Any]) -> str:
    """A Hugging Face model card: source, seeds, thresholds, dataset version and accuracy."""
    config = transfer.config
    rows = "\n".join(
        f"| {a['model'].replace('_', ' ')} | {a['value']:.3f} | {a['low']:.3f} to {a['high']:.3f} | {a['n']} |"
        for a in by_way([{"model": name, **row} for name, row in figures["accuracy"].items()])
    )
    seeds = "\n".join(f"- {escape_markdown(seed)}" for seed in transfer.seeds)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", config.prompt_template)), default=0))
    front = f"---\nlibrary_name: peft\nbase_model: {json.dumps(config.target.base)}\ntags: [lora, tuneshift-kd]\n---\n"
    return f"""{front}
# {transfer.name}: {config.target.base}

{config.description}

A LoRA adapter distilled with tuneshift_dag (TuneShift-KD, arXiv 2603.24518) from example prompts alone.

| | |
| --- | --- |
| source base | `{config.source.base}` |
| source adapter | `{config.source.adapter}` |
| prompt generator | `{config.generator.model}` |
| filter | {figures["model"]["filter"] or describe_filter(transfer)} |
| dataset version | `{figures["model"]["dataset_version"]}`, {figures["model"]["pairs"]} pairs |
| model id | `{figures["model"]["model_id"]}` |

Seeds:

{seeds}

## Use

The model sees exactly this before its response, tokenized with the tokenizer's default special tokens:

{fence}
{config.prompt_template}
{fence}

## Held-out {TITLES[config.evaluation.metric]}

Greedy responses, 95 % bootstrap intervals, `heldout.jsonl`.

| model | accuracy | interval | n |
| --- | --- | --- | --- |
{rows}
{_retention(figures)}{_comparison(figures)}"""


def _retention(figures: dict[str, Any]) -> str:
    """The card's section on what the model forgot; nothing before an evaluation."""
    if not figures["retention"]:
        return ""
    rows = "\n".join(
        f"| {name.replace('_', ' ')} | {row['perplexity']:.2f} | {row['bits_per_byte']:.3f} |"
        for name, row in figures["retention"].items()
    )
    tokens = next(iter(figures["retention"].values()))["tokens"]
    return f"""
## What was forgotten

Perplexity of a small general text ({tokens} tokens of prose, code, dialogue and lists), before and after. A rise shows
that the adapter changed more than its task; equal figures don't show that nothing was lost.

| model | perplexity | bits per byte |
| --- | --- | --- |
{rows}
"""


def _comparison(figures: dict[str, Any]) -> str:
    """The card's section on rival filters; nothing before `tuneshift compare`."""
    rows = figures["comparison"]
    if not rows:
        return ""

    def cell(row: dict[str, Any], name: str) -> str:
        if row[name] is None:
            return "-"
        return f"{row[name]:+.3f} ({row[f'{name}_low']:+.3f} to {row[f'{name}_high']:+.3f})"

    lines = "\n".join(
        f"| {row['arm'].replace('_', ' ')} | {row['pairs'] or '-'} | {row['runs']} | {row['value']:.3f}"
        f" ({row['low']:.3f} to {row['high']:.3f}) | {cell(row, 'vs_random')} | {cell(row, 'vs_unfiltered')} |"
        for row in rows
    )
    card = f"""
## Is the filter worth it?

Other models, trained on equally many pairs of each filter, several times each; held-out accuracy with 95 %
bootstrap intervals over trainings and prompts, differences paired. {conclusion(rows)}

| filter | pairs | trainings | accuracy | minus random | minus unfiltered |
| --- | --- | --- | --- | --- | --- |
{lines}
"""
    if diversity(rows):
        card += f"""
How varied the pairs were: distinct bigrams are a share of all, repetition is that of word 4-grams within a prompt, and
similarity the mean cosine of all pairs of prompts (MiniLM). Means over the trainings.

{_markdown(diversity(rows))}
"""
    if arm_tasks(rows):
        card += f"""
Standard tasks through lm-evaluation-harness: the mean over the trainings, with the lowest and the highest.

{_markdown(arm_tasks(rows))}
"""
    return card


def _markdown(rows: list[dict[str, str]]) -> str:
    """A table with the columns of the first row."""
    names = list(rows[0])
    lines = [[name.replace("_", " ") for name in names], ["---"] * len(names), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _dataset_card(transfer: Transfer, figures: dict[str, Any], pairs: pl.DataFrame) -> str:
    config = transfer.config
    return f"""# {transfer.name}: distillation dataset

{len(pairs)} prompts written by `{config.generator.model}` from {len(transfer.seeds)} seeds, answered by
`{config.source.base}` with the adapter `{config.source.adapter}`, and kept by the rule
{figures["model"]["filter"] or describe_filter(transfer)}. Dataset version `{figures["model"]["dataset_version"]}`.

- `dataset.jsonl`: one conversation a line, `{{"messages": [{{"role": "user", ...}}, {{"role": "assistant", ...}}]}}`.
- `dataset.parquet`: the same pairs with their round and perplexities.
- `adapter/`: the LoRA adapter trained on them; see its card.

Synthetic text: it may hold mistakes of the models that wrote it, and is bound by their licences.
"""


def _write_chat(pairs: pl.DataFrame, path: Path) -> None:
    with path.open("w", encoding="utf-8") as handle:
        for prompt, response in pairs.select("prompt", "response").iter_rows():
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response.strip()}]
            handle.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
