"""How many rows run at once: as many as asked for, fewer when memory is short."""

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import psutil
import torch

from tuneshift_dag.models.memory import container_bytes

T = TypeVar("T")
# Share of the free memory that a batch may plan with: the estimate leaves out activations and the allocator's waste.
_SHARE = 0.5


def in_batches(
    lengths: Sequence[int], most_rows: int, bytes_per_row: Callable[[int], int], work: Callable[[list[int]], T]
) -> Iterator[tuple[list[int], T]]:
    """``work`` done on batches of indices of similar length, longest first: memory peaks at the start.

    A batch that runs out of memory is halved and done again, and the ones after it are no larger.

    Args:
        lengths: tokens of each row.
        most_rows: rows in a batch when memory allows.
        bytes_per_row: memory that a row of a given length needs beside the model.

    Raises:
        torch.OutOfMemoryError, MemoryError, RuntimeError: when a single row doesn't fit.
    """
    left = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while left:
        fitting = int(free_memory() * _SHARE / max(1, bytes_per_row(lengths[left[0]])))
        batch = left[: max(1, min(most_rows, fitting))]
        try:
            result = work(batch)
        except Exception as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
            most_rows = len(batch) // 2
        else:
            left = left[len(batch) :]
            yield batch, result
            continue
        # Outside of the handler: there the traceback still holds the tensors.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: on a GPU, in Python, or in PyTorch's CPU allocator (a plain RuntimeError)."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def free_memory() -> int:
    """Bytes that can be allocated: of the GPU, or of this machine and this container."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    free = int(psutil.virtual_memory().available)
    limit, used = container_bytes("max"), container_bytes("current")
    return free if limit is None or used is None else min(free, limit - used)
