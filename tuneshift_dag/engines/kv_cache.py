"""A key-value cache that grows in blocks, so that most decode steps copy none of the older keys and values.

Transformers' `DynamicCache` copies the whole cache at every step, an eighth of a decode step of SmolLM2 at batch 32;
its `StaticCache` copies nothing but attends over its full length from the start.

The cache is the most that a step holds beside the model, so there is never a second copy: it takes the prompts' keys
and values over layer by layer, and gives them back at the end. In 8 bits, a layer's are turned back when it needs them.
"""

import math
import mmap
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

KVDtype = Literal["auto", "int8"]
# What a layer's keys and then its values are stored in, shapes (B, H, L, *): a tensor each in the compute dtype, or
# 8-bit numbers and their scales.
KeysValues = tuple[torch.Tensor, ...]
# Tensors from this size on have pages of their own.
_OWN_PAGES_FROM = 1 << 16


def stored(keys: torch.Tensor, values: torch.Tensor, dtype: KVDtype) -> KeysValues:
    """Keys and values (B, H, L, D) as they are kept; in 8 bits each head of each token has a scale of its own."""
    return (keys, values) if dtype == "auto" else (*_to_int8(keys), *_to_int8(values))


def restored(keys_values: KeysValues) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (B, H, L, D) in the compute dtype."""
    if len(keys_values) == 2:
        return keys_values[0], keys_values[1]
    keys, key_scales, values, value_scales = keys_values
    return keys * key_scales, values * value_scales


def rows_of(keys_values: KeysValues, index: torch.Tensor) -> KeysValues:
    return tuple(tensor[index] for tensor in keys_values)


def growing_cache(keys_values: Iterable[KeysValues], block: int) -> Cache:
    """A cache that starts with these per layer and grows by ``block`` tokens at a time; the mask hides its end."""
    return Cache(layers=[_Layer(stored_in, block) for stored_in in keys_values])


def give_back(cache: Cache, rows: Sequence[int]) -> list[KeysValues]:
    """What the cache started with; the cache is emptied. ``rows`` says which rows these are: those set aside, in that
    order, then those still in the cache."""
    place = torch.tensor(list(rows)).argsort()
    return [cache.layers.pop(0).start(place) for _ in range(len(cache.layers))]


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    is_sliding = False

    def __init__(self, keys_values: KeysValues, block: int) -> None:
        super().__init__()
        self.block = block
        self.length = self.started = keys_values[0].shape[2]
        self.aside: list[KeysValues] = []
        self.stored = tuple(_longer(tensor, block) for tensor in keys_values)
        self.kv_dtype: KVDtype = "auto" if len(keys_values) == 2 else "int8"
        self.is_initialized = True

    @property
    def device(self) -> torch.device:
        return self.stored[0].device

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the tensors are there from the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        missing = self.get_mask_sizes(key_states.shape[2])[0] - self.stored[0].shape[2]
        if missing:
            self.stored = tuple(_longer(tensor, missing) for tensor in self.stored)
        start, self.length = self.length, self.length + key_states.shape[2]
        for tensor, new in zip(self.stored, stored(key_states, value_states, self.kv_dtype), strict=True):
            tensor[:, :, start : self.length] = new
        return restored(self.stored)

    def set_aside(self, rows: Sequence[int]) -> None:
        """Keep what the cache started with of these rows, which are about to leave it."""
        index = torch.tensor(list(rows), device=self.device)
        self.aside.append(tuple(tensor[index, :, : self.started] for tensor in self.stored))

    def start(self, place: torch.Tensor) -> KeysValues:
        own = place.to(self.device)  # layers may be on several GPUs
        parts = zip(*self.aside, self.stored, strict=True)
        return tuple(torch.cat([part[:, :, : self.started] for part in tensors])[own] for tensors in parts)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.stored = rows_of(self.stored, indices.to(self.device))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of the tensors once ``query_length`` more tokens are in, and where they begin."""
        size: int = self.stored[0].shape[2]
        blocks = max(0, -(-(self.length + query_length - size) // self.block))
        return size + blocks * self.block, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


def _to_int8(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # A scale of zero would make numbers that aren't any. The quotient in float32, or rounding it would err twice.
    scales = (states.abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(states.dtype).tiny)
    return (states.float() / scales.float()).round_().clamp_(-127, 127).to(torch.int8), scales


def _longer(tensor: torch.Tensor, tokens: int) -> torch.Tensor:
    batch, heads, length, width = tensor.shape
    longer = zeros((batch, heads, length + tokens, width), tensor)
    longer[:, :, :length] = tensor
    return longer


def zeros(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Zeros; large ones on the CPU are mapped: nothing is resident that isn't written, and all is given back at once,
    while freed memory of the C library's heap stays, in holes that never fit the next, longer tensor."""
    size = math.prod(shape) * like.dtype.itemsize
    if like.device.type != "cpu" or size < _OWN_PAGES_FROM:
        return like.new_zeros(shape)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE)
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)
