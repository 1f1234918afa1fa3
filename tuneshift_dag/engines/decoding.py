"""The decode loop: prefill a batch of prompts once, then generate from it and score against it.

A prompt's keys and values are kept (`Prefix`), so another model's response is scored by running only its tokens. Rows
that finish leave the batch; what they have answered is in ``rows.py``.

Prompts are padded on the left, so that all rows write their next token at the same place; position ids count real
tokens only. An opening that all prompts share runs once. Rows of similar length run together: little is padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache

from tuneshift_dag.engines.kv_cache import (
    KeysValues,
    KVDtype,
    give_back,
    growing_cache,
    rows_of,
    stored,
    zeros,
)
from tuneshift_dag.engines.rows import Rows, choose, chunks, logprobs_of
from tuneshift_dag.method import Decoding, Response
from tuneshift_dag.models import memory
from tuneshift_dag.models.capabilities import head_inputs, head_logits, keys_values_bytes

# Share of a batch that has finished before it leaves: copying the cache costs as much as decoding a row in eight.
_COMPACT_AT = 1 / 8
SHARE_FROM = 16
"""Prompts that open with at least this many equal tokens share their computation."""
# Tokens by which a decoding batch's cache grows.
_GROW_BY = 32
# Logits computed at once when a response is scored, in elements (8 MB in bfloat16), but of at least so many rows: fewer
# wait for the head's weights (262,144 x 640 on a core with AMX, 1,024 tokens: 2.9 s with 32 rows, 1.7 with 128).
_LOGITS_AT_ONCE = 1 << 22
_LEAST_LOGIT_ROWS = 128


@dataclass
class Prefix:
    """Prompts after the forward pass. Shapes: stored keys and values (B, H, L, *) per layer; mask (B, L), 1 for real
    tokens; the head's input at the last token (B, D): the logits are hundreds of times larger."""

    keys_values: list[KeysValues]
    mask: torch.Tensor
    hidden: torch.Tensor

    def select(self, rows: Sequence[int]) -> "Prefix":
        # On the CPU: layers may be on several GPUs.
        index = torch.tensor(list(rows))
        kv = [rows_of(keys_values, index) for keys_values in self.keys_values]
        return Prefix(kv, self.mask[index], self.hidden[index])


@torch.inference_mode()
def prefill(model: Any, prompts: Sequence[list[int]], new_tokens: int = 0, kv_dtype: KVDtype = "auto") -> Prefix:
    """Run prompts (token ids), which at most ``new_tokens`` will follow, through the model once, what they all open
    with only for one of them. A row of the result is the shared opening, then padding, then the row's own tokens."""
    shared = _shared_length(model, prompts, new_tokens)
    opening = DynamicCache()
    if shared:
        model(
            input_ids=torch.tensor([prompts[0][:shared]], device=model.device), past_key_values=opening, use_cache=True
        )
    own = [len(p) - shared for p in prompts]
    keys_values: list[KeysValues] = []
    hidden = []
    for rows in chunks(own, model.device):
        mask = _mask(shared, [own[i] for i in rows], model.device)
        width = mask.shape[1] - shared
        cache = DynamicCache()
        for number, layer in enumerate(opening.layers):
            cache.update(layer.keys.expand(len(rows), -1, -1, -1), layer.values.expand(len(rows), -1, -1, -1), number)
        ids = torch.tensor([[0] * (width - own[i]) + prompts[i][shared:] for i in rows], device=model.device)
        with head_inputs(model, torch.arange(len(rows))) as captured:
            model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=_positions(mask)[:, shared:],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        hidden += captured
        for number, layer in enumerate(cache.layers):
            new = stored(layer.keys, layer.values, kv_dtype)
            layer.keys = layer.values = None
            if number == len(keys_values):
                length = shared + max(own)
                keys_values.append(tuple(zeros((len(prompts), n.shape[1], length, n.shape[3]), n) for n in new))
            for all_rows, some in zip(keys_values[number], new, strict=True):
                target = all_rows[rows[0] : rows[-1] + 1]
                target[:, :, :shared] = some[:, :, :shared]
                target[:, :, target.shape[2] - width :] = some[:, :, shared:]
        del cache
    memory.trim()
    return Prefix(keys_values, _mask(shared, own, model.device), torch.cat(hidden))


def _mask(shared: int, own: Sequence[int], device: torch.device) -> torch.Tensor:
    """1 for the shared opening, 0 for padding, 1 for each row's own tokens."""
    width = max(own)
    return torch.tensor([[1] * shared + [0] * (width - n) + [1] * n for n in own], device=device)


def _shared_length(model: Any, prompts: Sequence[list[int]], new_tokens: int) -> int:
    """How many opening tokens all prompts share, if computing them once pays and is exact."""
    first, last = min(prompts), max(prompts)
    most = min(map(len, prompts)) - 1  # every row keeps a token of its own, whose logits are wanted
    shared = min(most, next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), most))
    # Padding between the opening and a row's own tokens would count in a sliding window.
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if window and max(map(len, prompts)) + new_tokens > window:
        return 0
    return shared if len(prompts) > 1 and shared >= SHARE_FROM else 0


@torch.inference_mode()
def next_logits(model: Any, prefix: Prefix) -> torch.Tensor:
    """Logits (B, V) of the token after each prompt."""
    return head_logits(model, prefix.hidden)


@torch.inference_mode()
def decode(
    model: Any,
    rows: Rows,
    prefix: Prefix,
    decoding: Decoding,
    seeds: Sequence[int] | None = None,
    keep_prefix: bool = True,
) -> list[Response]:
    """Generate one response per row of ``prefix``, whose keys and values the cache takes over; ``keep_prefix`` says
    whether it gets them back. For sampling ``seeds`` has a number for each row, which makes its choices its own."""
    given = (prefix.keys_values.pop(0) for _ in range(len(prefix.keys_values)))  # each let go when the next is taken
    cache = growing_cache(given, min(decoding.max_new_tokens, _GROW_BY))
    mask, logits = prefix.mask, next_logits(model, prefix)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or []]
    active = list(range(len(mask)))
    gone: list[int] = []
    for step in range(decoding.max_new_tokens):
        tokens = choose(logits, decoding, [generators[row] for row in active] if generators else [])
        logprobs = logprobs_of(logits, tokens)
        going_on = rows.add(active, tokens.tolist(), logprobs.tolist())
        if not any(going_on) or step + 1 == decoding.max_new_tokens:
            break
        if going_on.count(False) >= max(1, len(active) * _COMPACT_AT):
            keep = [i for i, go in enumerate(going_on) if go]
            if keep_prefix:
                finished = [i for i, go in enumerate(going_on) if not go]
                for layer in cache.layers:
                    layer.set_aside(finished)
                gone += [active[i] for i in finished]
            index = torch.tensor(keep, device=mask.device)
            cache.batch_select_indices(index)
            mask, tokens = mask[index], tokens[index]
            active = [active[i] for i in keep]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        logits = logits.new_empty(0)  # let go before there are new ones
        logits = model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        if step % _GROW_BY == 0:  # the cache has just grown, and let shorter tensors go
            memory.trim()
    if keep_prefix:
        prefix.keys_values = give_back(cache, gone + active)
    del cache
    memory.trim()
    return rows.responses()


@torch.inference_mode()
def score(model: Any, prefix: Prefix, responses: Sequence[list[int]]) -> list[float]:
    """Log-likelihoods (nats) of given response token ids, each after its prompt of ``prefix``; 0 without tokens."""
    first = [(r[0] if r else 0) for r in responses]
    first_logprob = logprobs_of(next_logits(model, prefix), torch.tensor(first, device=model.device))
    found = [[value] if r else [] for value, r in zip(first_logprob.tolist(), responses, strict=True)]
    # Inputs are all tokens but the last; each predicts the next.
    longer = sorted((i for i, r in enumerate(responses) if len(r) > 1), key=lambda i: len(responses[i]))
    for chunk in chunks([len(responses[i]) - 1 for i in longer], model.device) if longer else ():
        rows = [longer[i] for i in chunk]
        rest = _score_rest(model, prefix, rows, [responses[i] for i in rows])
        for row, values in zip(rows, rest, strict=True):
            found[row] += values
        memory.trim()
    return [sum(values, 0.0) for values in found]


def _score_rest(model: Any, prefix: Prefix, rows: list[int], responses: list[list[int]]) -> list[list[float]]:
    """Log-probabilities of the tokens of responses (of at least two) to some rows, without their first."""
    # Padding stands on the right, where the causal mask keeps it from every real token.
    length = max(map(len, responses)) - 1
    ids = torch.tensor([r[:-1] + [0] * (length - len(r) + 1) for r in responses], device=model.device)
    index = torch.tensor(rows)  # on the CPU: layers may be on several GPUs
    mask = torch.cat([prefix.mask[index], torch.ones_like(ids)], dim=1)
    owner = [i for i, r in enumerate(responses) for _ in r[1:]]
    predicts = [i * length + t for i, r in enumerate(responses) for t in range(len(r) - 1)]
    targets = torch.tensor([token for r in responses for token in r[1:]], device=model.device)
    with head_inputs(model, torch.tensor(predicts)) as captured:
        model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=_positions(mask)[:, prefix.mask.shape[1] :],
            past_key_values=growing_cache((rows_of(kv, index) for kv in prefix.keys_values), length),
            use_cache=True,
        )
    found: list[list[float]] = [[] for _ in responses]
    chunk = max(_LEAST_LOGIT_ROWS, _LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    for start in range(0, len(owner), chunk):
        logits = head_logits(model, captured[0][start : start + chunk])
        logprobs = logprobs_of(logits, targets[start : start + chunk])
        for row, value in zip(owner[start : start + chunk], logprobs.tolist(), strict=True):
            found[row].append(value)
    return found


def bytes_per_row(model: Any, tokens: int, logits: int, kv_dtype: KVDtype = "auto") -> int:
    """Memory that a row needs for the keys and values of ``tokens`` tokens and for ``logits`` rows of logits."""
    each = model.dtype.itemsize
    kept = keys_values_bytes(model.config, each, in_8_bits=kv_dtype == "int8")
    return int(tokens * kept + logits * model.config.get_text_config().vocab_size * each)


def contiguous_head(model: Any) -> RemovableHandle:
    """Within it the head gets contiguous input: otherwise a frozen head is copied once per row of a batch."""
    head: torch.nn.Module = model.get_output_embeddings()
    return head.register_forward_pre_hook(lambda module, inputs: inputs[0].contiguous())


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)
