"""A key-value cache that grows in blocks, so that most decode steps copy none of the older keys and values.

Transformers' `DynamicCache` grows by concatenation, which copies the whole cache at every step: an eighth of a
decode step of SmolLM2 at batch 32. Its `StaticCache` copies nothing but attends over its full length from the start.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

KeysValues = tuple[torch.Tensor, torch.Tensor]


def growing_cache(keys_values: Sequence[KeysValues], block: int) -> Cache:
    """A cache that starts with a copy of these tensors (B, H, L, D) per layer and grows by ``block`` tokens at a time.

    What isn't filled yet is zero, and the attention mask leaves it out.
    """
    return Cache(layers=[_Layer(keys, values, block) for keys, values in keys_values])


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, block: int) -> None:
        super().__init__()
        self.block = block
        self.length = keys.shape[2]
        self.keys, self.values = _longer(keys, block), _longer(values, block)
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the tensors are there from the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        missing = self.get_mask_sizes(key_states.shape[2])[0] - self.keys.shape[2]
        if missing:
            self.keys, self.values = _longer(self.keys, missing), _longer(self.values, missing)
        start, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        own = indices.to(self.keys.device)  # layers may be on several GPUs
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
    return torch.nn.functional.pad(tensor, (0, 0, 0, tokens))
