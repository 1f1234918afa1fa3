"""Memory of this machine and of this process: what there is, the peak, giving it back, and how many rows run at once
with it. torch is imported only where it is needed: every Dagster process imports this module."""

import contextlib
import ctypes
import gc
import itertools
import multiprocessing
import multiprocessing.connection
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

T = TypeVar("T")
BATCH_SHARE = 0.5
"""Share of the free memory that a batch may plan with: estimates leave out activations and the allocator's waste."""
_PROC = Path("/proc/self")
_MADV_PAGEOUT = 21
# Rows from which on a batch is divided among workers.
_WORTH_A_WORKER = 16


def _cuda() -> Any:
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def reset_peak() -> None:
    """Let the peak start again from what is used now. Where only Linux can, elsewhere it stays the process's."""
    if cuda := _cuda():
        for number in range(cuda.device_count()):
            cuda.reset_peak_memory_stats(number)
    with contextlib.suppress(OSError):
        (_PROC / "clear_refs").write_text("5")


def gpu_count() -> int:
    """How many GPUs PyTorch sees; where there is no driver it isn't imported to find out, which takes seconds."""
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return 0
    import torch

    return int(torch.cuda.device_count()) if torch.cuda.is_available() else 0


def total_bytes(gpus: int | None = None) -> int:
    """Memory of the first ``gpus`` GPUs (None: all) together, or of this machine and this container."""
    if count := gpu_count():
        import torch

        return sum(int(torch.cuda.mem_get_info(number)[1]) for number in range(gpus or count))
    total, limit = int(psutil.virtual_memory().total), container_bytes("max")
    return total if limit is None else min(total, limit)


def free_bytes() -> int:
    """Bytes that can be allocated: of the GPU, or of this machine and this container."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    free = int(psutil.virtual_memory().available)
    limit, used = container_bytes("max"), container_bytes("current")
    return free if limit is None or used is None else min(free, limit - used)


def container_bytes(what: str) -> int | None:
    """Memory of this container, ``max`` or ``current``; None without a container, or for "max" without a limit."""
    try:
        return int(Path(f"/sys/fs/cgroup/memory.{what}").read_text())
    except (OSError, ValueError):
        return None


def peak_bytes() -> int:
    """The most bytes in use at once since `reset_peak`: of all GPUs together, or of the process."""
    if cuda := _cuda():
        return sum(int(cuda.max_memory_allocated(number)) for number in range(cuda.device_count()))
    try:
        peak = re.search(r"VmHWM:\s+(\d+) kB", (_PROC / "status").read_text())
    except OSError:
        peak = None
    if peak is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(peak.group(1)) * 1024


def trim() -> None:
    """Give freed memory back to the system. glibc keeps it, and its holes seldom fit the next, longer tensor."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


def release_unused() -> None:
    gc.collect()
    if cuda := _cuda():
        cuda.empty_cache()


def keep_few_kernels() -> None:
    """Bound what oneDNN, and PyTorch's wrapper around it, keep for every shape of a matrix product they have seen:
    1,024 shapes each by default, which grew with every batch. A forward pass needs about ten; a training step is 1.6
    times as slow with room for 16, and with 24 as fast as with 1,024. What the user has set stays."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "32")


def drop_file_pages(folder: Path) -> None:
    """Drop what is resident of mapped files below ``folder``; what is still used is read again. 4-bit weights are
    repacked into memory of their own, and the pages they came from would stay beside them."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    for line in (_PROC / "maps").read_text().splitlines():
        addresses, *_, path = line.split(maxsplit=5)
        if path.startswith(f"{folder}/"):
            start, end = (int(address, 16) for address in addresses.split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_PAGEOUT)


def in_batches(
    lengths: Sequence[int],
    most_rows: int,
    bytes_per_row: Callable[[int], int],
    work: Callable[[list[int]], T],
    workers: int = 1,
) -> Iterator[tuple[list[int], T]]:
    """``work`` done on batches of indices of similar length, longest first: memory peaks at the start.

    A batch that runs out of memory is halved and done again, and the ones after it are no larger; a single row that
    doesn't fit raises what it raised. A row of n tokens (``lengths``) needs ``bytes_per_row(n)`` beside the model.

    Args:
        workers: processes that do batches side by side, as `in_workers` says. What doesn't succeed there is done here.
    """
    left = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))

    def batch_size(side_by_side: int = 1) -> int:
        fitting = int(free_bytes() * BATCH_SHARE / side_by_side / max(1, bytes_per_row(lengths[left[0]])))
        return max(1, min(most_rows, fitting))

    if workers > 1 and left:
        size = batch_size(workers)
        if len(left) >= _WORTH_A_WORKER * workers:
            # As many for each, or one would work on the last batch while the others wait.
            size = -(-len(left) // (workers * -(-len(left) // (size * workers))))
        done: set[int] = set()
        batches = [left[i : i + size] for i in range(0, len(left), size)]
        for batch, result in in_workers(batches, work, workers) if len(batches) > 1 else ():
            done.update(batch)
            yield batch, result
        left = [row for row in left if row not in done]
    while left:
        batch = left[: batch_size()]
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
        release_unused()


def in_workers(
    batches: Sequence[list[int]], work: Callable[[list[int]], T], count: int
) -> Iterator[tuple[list[int], T]]:
    """``work`` done on batches by forked processes with a thread each, as they finish.

    Two threads on one small model wait for each other at every operation, and two processes don't. The model's weights
    are this process's own pages, shared until somebody writes to them. A worker that fails or dies costs its batch,
    which is left out, and does no other.
    """
    context = multiprocessing.get_context("fork")
    waiting = iter(batches)
    processes: list[Any] = []
    pipes: list[Any] = []
    busy: dict[Any, list[int]] = {}

    def hand(pipe: Any, batch: list[int]) -> None:
        with contextlib.suppress(OSError):  # a worker that has died takes nothing any more
            pipe.send(batch)
            busy[pipe] = batch

    try:
        for batch in itertools.islice(waiting, count):
            ours, theirs = context.Pipe()
            pipes.append(ours)
            processes.append(context.Process(target=_work, args=(theirs, tuple(pipes), work), daemon=True))
            processes[-1].start()
            theirs.close()
            hand(ours, batch)
        while busy:
            ready: list[Any] = multiprocessing.connection.wait(list(busy))
            for pipe in ready:
                batch = busy.pop(pipe)
                try:
                    result: T = pipe.recv()
                except (EOFError, OSError):  # which of them: by what it was at when it died
                    continue
                following = next(waiting, None)
                if following is not None:
                    hand(pipe, following)
                yield batch, result
    finally:
        for process in processes:
            process.kill()
            process.join()


def _work(pipe: Any, inherited: Sequence[Any], work: Callable[[list[int]], Any]) -> None:
    """What a worker does. If it fails it goes without a word: the batch is done again, and fails, where it is heard.

    It closes the ends of pipes that it has ``inherited``: else it would wait for ever for one who was killed, since it
    held the other end itself."""
    import torch

    for other in inherited:
        other.close()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads weren't forked
    with contextlib.suppress(Exception):
        while True:
            pipe.send(work(pipe.recv()))


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: on a GPU, in Python, or in PyTorch's CPU allocator (a plain RuntimeError)."""
    import torch

    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or bool(re.search(r"can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED", str(error)))
