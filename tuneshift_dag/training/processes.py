"""A function in several processes of this machine that form one group, through accelerate, one for each GPU or all on
the CPU. They find each other through a file, so nothing listens on a port that others could know."""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.multiprocessing
from accelerate import PartialState
from torch.multiprocessing.spawn import spawn

T = TypeVar("T")
# How long the messages of a process may wait, in seconds.
_EVERY = 0.2


def in_processes(count: int, work: Callable[..., T], *arguments: Any, on_message: Callable[..., None]) -> T:
    """Run ``work(send, *arguments)``, a function of a module, in ``count`` new processes; return what the first one
    returns. ``on_message`` is called here with the arguments with which the first one calls ``send``. When one fails,
    the others are ended and `torch.multiprocessing.ProcessRaisedException` is raised with its traceback."""
    inbox = torch.multiprocessing.get_context("spawn").SimpleQueue()
    results: list[T] = []
    with tempfile.TemporaryDirectory() as folder:
        meeting_point = (Path(folder) / "group").as_uri()
        threads = max(1, torch.get_num_threads() // count)
        passed = (count, meeting_point, threads, inbox, work, arguments)
        running = spawn(_process, passed, nprocs=count, join=False)  # type: ignore[no-untyped-call]
        ended = False
        while not ended:
            ended = running.join(timeout=_EVERY)
            while not inbox.empty():
                is_result, content = inbox.get()
                if is_result:
                    results.append(content)
                else:
                    on_message(*content)
    return results[0]


def _process(rank: int, count: int, meeting_point: str, threads: int, outbox: Any, work: Any, arguments: Any) -> None:
    torch.set_num_threads(threads)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(number) for name, number in numbers.items()}, OMP_NUM_THREADS=str(threads))
    # Puts the process on its own GPU, and chooses NCCL there and Gloo on a CPU.
    PartialState(cpu=not torch.cuda.is_available(), init_method=meeting_point, rank=rank, world_size=count)

    def send(*message: Any) -> None:
        if rank == 0:
            outbox.put((False, message))

    try:
        result = work(send, *arguments)
        if rank == 0:
            outbox.put((True, result))
    finally:
        torch.distributed.destroy_process_group()


def is_first_process() -> bool:
    """Whether this is the first process of its group, or the only one."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def own_share(items: Sequence[T]) -> Sequence[T]:
    """What this process does of ``items``: all of them, or one of as many as the group has processes."""
    if not torch.distributed.is_initialized():
        return items
    return items[torch.distributed.get_rank() :: torch.distributed.get_world_size()]


def add_over_processes(tensors: list[torch.Tensor]) -> None:
    """Replace each tensor by its sum over the processes of the group, in one exchange."""
    if not torch.distributed.is_initialized():
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    for tensor, added in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(added.view_as(tensor))
