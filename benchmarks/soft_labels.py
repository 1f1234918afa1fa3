"""Does the target learn more from the source's token distributions than from its text? The same pairs, both ways.

The source's tokens and the target's are cut into the shortest pieces with the same bytes, as TRL's GOLD does
(huggingface.co/docs/trl, "General Online Logit Distillation"; Boizard et al., arXiv 2402.12030, for models of unlike
vocabularies). At the first token of a piece the target is to have the source's probabilities: that of the piece, and
those of other tokens of the source that are a token of the target as well. Of the rest of the source's distribution
nothing is said, so what is known is scaled to one.
"""

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from tuneshift_dag.config import Transfer
from tuneshift_dag.method import Decoding
from tuneshift_dag.method.evaluation import mark
from tuneshift_dag.models.loading import dtype_name, load_for_training, load_tokenizer
from tuneshift_dag.models.prompts import continuation_ids, end_id, response_text
from tuneshift_dag.resources import EngineResource
from tuneshift_dag.store import Store
from tuneshift_dag.store.queries import verdicts
from tuneshift_dag.training.batches import (
    TokenizedExample,
    balanced_epochs,
    chunks,
    collate,
    head_only_at,
    length_bucketed_batches,
    tokenize_example,
)
from tuneshift_dag.training.loop import LoraTraining, cosine_with_warmup
from tuneshift_dag.training.lora import add_lora

TOP = 16
"""Tokens of the source at each place; with the greedy answers of a fine-tune they hold nearly all of its mass."""
PAIRS, SEEDS = 96, 5
LABELS = ("text", "distribution")
"""The rival ways to teach: the text alone, or the source's probabilities."""


@dataclass(frozen=True)
class Labelled(TokenizedExample):
    """An example of the target with its labels: (place in the response, token, probability)."""

    labels: tuple[tuple[int, int, float], ...]


@dataclass(frozen=True)
class Told:
    """What the source says of one response: its tokens, and at each the log-probabilities of the likeliest."""

    ids: list[int]
    likeliest: list[dict[int, float]]


def ask_source(transfer: Transfer, pairs: Sequence[tuple[str, str]], batch_size: int = 32) -> list[Told]:
    """The fine-tuned source's distributions along its own responses."""
    engine, told = EngineResource().source(transfer), list[Told]()
    format, tokenizer = transfer.config.source_format, engine.tokenizer
    with engine.side("fine_tuned") as model, torch.inference_mode():
        for some in chunks(pairs, batch_size):
            examples = [tokenize_example(tokenizer, format, *pair) for pair in some]
            batch = collate(examples)
            with head_only_at(model, batch.predicts):
                logits = model(input_ids=batch.ids, use_cache=False).logits.squeeze(0).float()
            best, first = logits.log_softmax(1).topk(TOP, dim=1), 0
            likeliest = [
                dict(zip(*row, strict=True)) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
            for example in examples:
                own = slice(first, first := first + len(example.response_ids))
                told.append(Told(example.response_ids, likeliest[own]))
    EngineResource().release()
    return told


def pieces(left: Sequence[int], right: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Two tokenizations of one text, given by the end of each token in bytes, cut into the shortest runs of tokens that
    end at the same byte."""
    common = set(left) & set(right)
    starts = [0, 0]
    for end in sorted(common):
        ends = [max(i for i, e in enumerate(side) if e == end) + 1 for side in (left, right)]
        yield slice(starts[0], ends[0]), slice(starts[1], ends[1])
        starts = ends


def token_ends(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Where each token of a response ends, in bytes of its text; the last token, which ends it, one byte further."""
    ends = [len(response_text(tokenizer, list(ids[: i + 1])).encode()) for i in range(len(ids) - 1)]
    return [*ends, (ends[-1] if ends else 0) + 1]


class Vocabulary:
    """Which token of the target has the same text as one of the source, as the continuation of a text."""

    def __init__(self, source: Any, target: Any, ends: tuple[int, int]) -> None:
        self._source, self._target = source, target
        self._known: dict[int, int | None] = {ends[0]: ends[1]}

    def __getitem__(self, token: int) -> int | None:
        if token not in self._known:
            text = response_text(self._source, [token])
            ids = continuation_ids(self._target, text) if text and "\ufffd" not in text else []
            self._known[token] = ids[0] if len(ids) == 1 else None
        return self._known[token]


def label(
    told: Told, ids: list[int], ends: tuple[list[int], list[int]], same: Vocabulary
) -> list[tuple[int, int, float]]:
    """Labels of the target's response ``ids``: (place, token, probability)."""
    labels = []
    for of_source, of_target in pieces(*ends):
        says, written = told.likeliest[of_source], told.ids[of_source]
        own = math.exp(sum(at.get(token, -math.inf) for at, token in zip(says, written, strict=True)))
        others = {
            token: math.exp(value)
            for number, value in says[0].items()
            if number != written[0] and (token := same[number]) is not None and token != ids[of_target.start]
        }
        if not own:  # the source's own greedy text in other tokens than it wrote
            others, own = {}, 1.0
        whole = own + sum(others.values())
        labels += [(place, ids[place], own / whole) for place in range(of_target.start, of_target.stop)]
        labels += [(of_target.start, token, probability / whole) for token, probability in others.items()]
    return labels


def make_examples(
    transfer: Transfer, pairs: Sequence[tuple[str, str]], told: Sequence[Told], labels: str
) -> tuple[list[Labelled], dict[str, float]]:
    """The target's examples, with one of `LABELS`; and the share of its response tokens that are a piece by themselves
    on both sides, and the mean probability that the labels leave to other tokens than the text's."""
    config = transfer.config
    source = load_tokenizer(transfer.named("source.base").files())
    target = load_tokenizer(transfer.named("target.base").files())
    same = Vocabulary(source, target, (end_id(source, config.source_format), end_id(target, config.target_format)))
    examples, alike, elsewhere = list[Labelled](), list[bool](), list[float]()
    for (prompt, response), said in zip(pairs, told, strict=True):
        plain = tokenize_example(target, config.target_format, prompt, response)
        ids = plain.response_ids
        ends = (token_ends(source, said.ids), token_ends(target, ids))
        own = [(place, token, 1.0) for place, token in enumerate(ids)]
        if labels == "distribution":
            own = label(said, ids, ends, same)
        examples.append(Labelled(plain.prompt_ids, ids, tuple(own)))
        for left, right in pieces(*ends):
            alike += [left.stop - left.start == right.stop - right.start == 1] * (right.stop - right.start)
        elsewhere.append(sum(p for place, token, p in own if token != ids[place]) / len(ids))
    return examples, {"alike": sum(alike) / len(alike), "elsewhere": sum(elsewhere) / len(elsewhere)}


def train(transfer: Transfer, examples: Sequence[Labelled], seed: int, folder: Path) -> None:
    """The product's training without its rehearsal and its processes, on labels in place of text."""
    config, own = transfer.config, transfer.config.distill
    asked = own.model_dump(exclude={"quantization", "processes", "retain", "keep"})
    settings = LoraTraining(seed=seed, **asked)
    files = transfer.named("target.base").files()
    dtype = getattr(torch, dtype_name(config.models.compute_dtype))
    model = add_lora(load_for_training(files, own.quantization, dtype), settings)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=settings.weight_decay)
    rng = random.Random(seed)
    steps = [
        batch
        for epoch in balanced_epochs(examples, settings.epochs, rng)
        for batch in length_bucketed_batches(epoch, settings.batch_size, rng)
    ]
    for step, chosen in enumerate(steps):
        for group in adamw.param_groups:
            group["lr"] = settings.learning_rate * cosine_with_warmup(step, len(steps), settings.warmup_ratio)
        loss = label_loss(model, chosen)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        if step % 20 == 0:
            print(f"step {step} of {len(steps)}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder, save_embedding_layers=False)


def label_loss(model: Any, examples: Sequence[Labelled]) -> torch.Tensor:
    """Mean cross-entropy (nats a response token) of the model with the labels."""
    batch, first, rows = collate(examples), 0, list[tuple[int, int, float]]()
    for example in examples:
        rows += [(first + place, token, weight) for place, token, weight in example.labels]
        first += len(example.response_ids)
    places, tokens, weights = zip(*rows, strict=True)
    with head_only_at(model, batch.predicts):
        logits = model(input_ids=batch.ids, use_cache=False).logits.squeeze(0).float()
    surprise = logits.logsumexp(1)[list(places)] - logits[list(places), list(tokens)]
    loss: torch.Tensor = (surprise * torch.tensor(weights)).sum() / first
    return loss


def accuracy(transfer: Transfer, adapter: Path) -> list[bool]:
    """Which held-out prompts a target answers right."""
    engine, settings = EngineResource().target(transfer, adapter), transfer.config.evaluation
    asked = [engine.prompt_ids(prompt, transfer.config.target_format) for prompt, _ in transfer.heldout]
    decoding = Decoding(settings.max_new_tokens, stops=transfer.stops)
    found = dict(chain.from_iterable(engine.generate(asked, "fine_tuned", decoding)))
    EngineResource().release()
    return [
        mark(settings.metric, found[place].text, expected)[0] for place, (_, expected) in enumerate(transfer.heldout)
    ]


def kept(store: Store, transfer: Transfer, count: int) -> list[tuple[str, str]]:
    """As many of the pairs that the transfer's filter keeps: those of the lowest prompt ids, which are hashes."""
    verdict = verdicts(transfer, transfer.config.filter.rule)
    columns = "prompt, fine_tuned_response"
    query = f"SELECT {columns} FROM ({verdict}) WHERE reason IS NULL ORDER BY prompt_id LIMIT {count}"
    return list(store.read(query, schema=transfer.name).iter_rows())


def compare(transfer: Transfer, texts: Sequence[tuple[str, str]], home: Path) -> dict[str, dict[str, Any]]:
    """By way to teach: the marks of each seed's target, and the figures of `make_examples`; what is there stays."""
    found: dict[str, dict[str, Any]] = {}
    told: list[Told] = []
    for seed in range(SEEDS):
        for name in LABELS:
            folder = home / "soft_labels" / f"{name}_{seed}"
            file = folder / "marks.json"
            if not file.is_file():
                told = told or ask_source(transfer, texts)
                examples, figures = make_examples(transfer, texts, told, name)
                print(f"{name}, seed {seed}: {figures}", flush=True)
                train(transfer, examples, seed, folder)
                file.write_text(json.dumps({"marks": accuracy(transfer, folder), **figures}), "utf-8")
            run = json.loads(file.read_text("utf-8"))
            own = found.setdefault(name, {"marks": [], "alike": run["alike"], "elsewhere": run["elsewhere"]})
            own["marks"].append(run["marks"])
    return found
