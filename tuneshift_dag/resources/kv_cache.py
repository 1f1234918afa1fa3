"""A key-value cache that grows in blocks, so that most decode steps copy none of the older keys and values.

Transformers' `DynamicCache` grows by concatenation, which copies the whole cache at every step: an eighth of a
decode step of SmolLM2 at batch 32. Its `StaticCache` copies nothing but attends over its full length from the start.

The cache is the most that a step holds beside the model, so there is never a second copy of it: it takes the prompts'
keys and values over a layer at a time, and gives them back at the end.
"""

import math
import mmap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

KeysValues = tuple[torch.Tensor, torch.Tensor]
# Tensors from this size on have pages of their own.
_OWN_PAGES_FROM = 1 << 19


def growing_cache(keys_values: Iterable[KeysValues], block: int) -> Cache:
    """A cache that starts with these tensors (B, H, L, D) per layer and grows by ``block`` tokens at a time.

    What isn't filled yet is zero, and the attention mask leaves it out.
    """
    return Cache(layers=[_Layer(keys, values, block) for keys, values in keys_values])


def handed_over(keys_values: list[KeysValues]) -> Iterator[KeysValues]:
    """These, each let go when the next one is asked for."""
    while keys_values:
        yield keys_values.pop(0)


def set_aside(cache: Cache, rows: Sequence[int]) -> None:
    """Keep what the cache started with of these rows, which are about to leave it."""
    for layer in cache.layers:
        layer.set_aside(torch.tensor(list(rows), device=layer.keys.device))


def give_back(cache: Cache, rows: Sequence[int]) -> list[KeysValues]:
    """What the cache started with; the cache is emptied.

    Args:
        rows: which rows these are: those set aside, in that order, then those still in the cache.
    """
    place = torch.tensor(list(rows)).argsort()
    keys_values = []
    while cache.layers:
        keys_values.append(cache.layers.pop(0).start(place))
    return keys_values


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, block: int) -> None:
        super().__init__()
        self.block = block
        self.length = self.started = keys.shape[2]
        self.aside: list[KeysValues] = []
        self.keys, self.values = _longer(keys, block), _longer(values, block)
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the tensors are there from the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        missing = self.get_mask_sizes(key_states.shape[2])[0] - self.keys.shape[2]
        if missing:
            self.keys = _longer(self.keys, missing)
            self.values = _longer(self.values, missing)
        start, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys, self.values

    def set_aside(self, rows: torch.Tensor) -> None:
        self.aside.append((self.keys[rows, :, : self.started], self.values[rows, :, : self.started]))

    def start(self, place: torch.Tensor) -> KeysValues:
        keys, values = zip(*self.aside, (self.keys, self.values), strict=True)
        own = place.to(self.keys.device)  # layers may be on several GPUs
        first = self.started
        return torch.cat([k[:, :, :first] for k in keys])[own], torch.cat([v[:, :, :first] for v in values])[own]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        own = indices.to(self.keys.device)
        self.keys, self.values = self.keys[own], self.values[own]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of the tensors once ``query_length`` more tokens are in, and where they begin."""
        size: int = self.keys.shape[2]
        blocks = max(0, -(-(self.length + query_length - size) // self.block))
        return size + blocks * self.block, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


def _longer(tensor: torch.Tensor, tokens: int) -> torch.Tensor:
    batch, heads, length, width = tensor.shape
    longer = zeros((batch, heads, length + tokens, width), tensor)
    longer[:, :, :length] = tensor
    return longer


def zeros(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Zeros; large ones on the CPU are mapped, so that nothing is resident that isn't written, and all of it is given
    back at once. Freed memory of the C library's heap stays resident, and its holes never fit the next, longer tensor.
    """
    size = math.prod(shape) * like.dtype.itemsize
    if like.device.type != "cpu" or size < _OWN_PAGES_FROM:
        return like.new_zeros(shape)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE)
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)
