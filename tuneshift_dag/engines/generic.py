"""Answers and scores of any causal language model, through transformers' own `generate` and plain forward passes.

It offers what ``decoding.py`` offers. That one knows what a prompt leaves behind in a model: keys and values. Here
nothing is known: models with recurrent or convolutional layers, or with experts, keep other things. So a prompt is run
again for every use, and rows run together only when their prompts are of one length, for not every family masks padding
in such layers. That is right, and slower."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from tuneshift_dag.engines.rows import Rows, choose, chunks, logprobs_of
from tuneshift_dag.method import Decoding, Response


@dataclass(frozen=True)
class Prefix:
    prompts: list[list[int]]

    def select(self, rows: Sequence[int]) -> "Prefix":
        return Prefix([self.prompts[row] for row in rows])


def prefill(model: Any, prompts: Sequence[list[int]], new_tokens: int = 0, kv_dtype: str = "auto") -> Prefix:
    return Prefix(list(prompts))


@torch.inference_mode()
def next_logits(model: Any, prefix: Prefix) -> torch.Tensor:
    """Logits (B, V) of the token after each prompt."""
    found: list[torch.Tensor] = []
    for prompt in prefix.prompts:
        ids = torch.tensor([prompt], device=model.device)
        found.append(model(input_ids=ids, use_cache=False).logits[0, -1])
    return torch.stack(found)


@torch.inference_mode()
def decode(
    model: Any,
    rows: Rows,
    prefix: Prefix,
    decoding: Decoding,
    seeds: Sequence[int] | None = None,
    keep_prefix: bool = True,
) -> list[Response]:
    """Generate one response per prompt. For sampling ``seeds`` has a number for each, which makes its choices its
    own."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or []]
    by_length = defaultdict(list)
    for row, prompt in enumerate(prefix.prompts):
        by_length[len(prompt)].append(row)
    for same in by_length.values():
        ids = torch.tensor([prefix.prompts[row] for row in same], device=model.device)
        chooser = _Chooser(rows, same, decoding, [generators[row] for row in same] if generators else [])
        model.generate(
            inputs=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                max_new_tokens=decoding.max_new_tokens, do_sample=False, pad_token_id=0, use_cache=True
            ),
            logits_processor=LogitsProcessorList([chooser]),
            stopping_criteria=StoppingCriteriaList([_Finished(rows, same)]),
        )
    return rows.responses()


@torch.inference_mode()
def score(model: Any, prefix: Prefix, responses: Sequence[list[int]]) -> list[float]:
    """Log-likelihoods (nats) of given response token ids, each after its prompt of ``prefix``; 0 without tokens."""
    found = [0.0] * len(responses)
    whole = [prompt + response for prompt, response in zip(prefix.prompts, responses, strict=True)]
    by_length = sorted((i for i, response in enumerate(responses) if response), key=lambda i: len(whole[i]))
    for chunk in chunks([len(whole[i]) for i in by_length], model.device) if by_length else ():
        some = [by_length[i] for i in chunk]
        # Padding stands on the right, where a causal model sees it from no real token. The final token predicts
        # nothing.
        length = len(whole[some[-1]]) - 1
        ids = torch.tensor([whole[i][:-1] + [0] * (length + 1 - len(whole[i])) for i in some], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits
        for row, i in enumerate(some):
            own = logits[row, len(prefix.prompts[i]) - 1 : len(whole[i]) - 1]
            targets = torch.tensor(responses[i], device=own.device)
            found[i] = sum(logprobs_of(own, targets).tolist(), 0.0)
    return found


class _Chooser(LogitsProcessor):  # type: ignore[misc]
    """Chooses every token itself, by the raw logits, and leaves `generate` no other."""

    def __init__(self, rows: Rows, numbers: list[int], decoding: Decoding, generators: list[torch.Generator]) -> None:
        self.rows = rows
        self.numbers = numbers
        self.decoding = decoding
        self.generators = generators

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens = choose(scores, self.decoding, self.generators)
        self.rows.add(self.numbers, tokens.tolist(), logprobs_of(scores, tokens).tolist())
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


class _Finished(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, rows: Rows, numbers: list[int]) -> None:
        self.rows = rows
        self.numbers = numbers

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([self.rows.done[number] for number in self.numbers], device=input_ids.device)
