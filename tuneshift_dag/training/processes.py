"""A function in several processes of this machine that form one group, through accelerate, one for each GPU or all on
the CPU. They find each other through a file, so nothing listens on a port that others could know."""

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.multiprocessing
from accelerate import PartialState
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from tuneshift_dag import TuneshiftError

T = TypeVar("T")
Items = TypeVar("Items", bound=Sequence[Any] | torch.Tensor)
# How long the messages of a process may wait, in seconds.
_EVERY = 0.2


def in_processes(count: int, work: Callable[..., T], *arguments: Any, on_message: Callable[..., None]) -> T:
    """Run ``work(send, *arguments)``, a function of a module, in ``count`` new processes; return what the first one
    returns. ``on_message`` is called here with the arguments with which the first one calls ``send``. When one fails,
    the others are ended and `torch.multiprocessing.ProcessRaisedException` is raised with its traceback;
    `TuneshiftError` when one was killed, and what any of them raised if it was that."""
    # A pipe and no queue: it ends with the process that writes to it, also in the middle of a message.
    inbox, outbox = torch.multiprocessing.get_context("spawn").Pipe(duplex=False)
    results: list[T] = []
    refused: list[str] = []
    with tempfile.TemporaryDirectory() as folder, inbox:
        meeting_point = (Path(folder) / "group").as_uri()
        threads = max(1, torch.get_num_threads() // count)
        passed = (count, meeting_point, threads, outbox, work, arguments)
        running = spawn(_process, passed, nprocs=count, join=False)  # type: ignore[no-untyped-call]
        outbox.close()
        ended = False
        try:
            while not ended:
                ended = running.join(timeout=_EVERY)
                for kind, content in _arrived(inbox):
                    if kind == "message":
                        on_message(*content)
                    else:
                        (results if kind == "result" else refused).append(content)
        except (ProcessExitedException, ProcessRaisedException) as error:
            refused += [content for kind, content in _arrived(inbox) if kind == "refused"]
            if refused:
                raise TuneshiftError(refused[0]) from error
            # One that was killed may show as the lost connection of another.
            if not any(process.exitcode == -signal.SIGKILL for process in running.processes):
                raise
            raise TuneshiftError(
                "a process of the training was killed, mostly for lack of memory. Run again: it goes on from the state"
                " that it saved last. If it happens again, lower distill.batch_size, distill.processes or"
                " models.workers."
            ) from error
    return results[0]


def _arrived(inbox: Any) -> Iterator[Any]:
    """The messages that are there."""
    with suppress(EOFError, OSError):  # the one who writes them has ended
        while inbox.poll():
            yield inbox.recv()


def _process(rank: int, count: int, meeting_point: str, threads: int, outbox: Any, work: Any, arguments: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(number) for name, number in numbers.items()}, OMP_NUM_THREADS=str(threads))
    if sys.platform == "linux":  # nobody else is to hear them, whatever the host's name leads to
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # Puts the process on its own GPU, and chooses NCCL there and Gloo on a CPU.
    PartialState(cpu=not torch.cuda.is_available(), init_method=meeting_point, rank=rank, world_size=count)

    def send(*message: Any) -> None:
        if rank == 0:
            outbox.send(("message", message))

    try:
        result = work(send, *arguments)
        if rank == 0:
            outbox.send(("result", result))
    except TuneshiftError as error:
        # Of any process: which of them is seen to fail first is chance.
        outbox.send(("refused", str(error)))
        raise
    finally:
        torch.distributed.destroy_process_group()


def _end_with_parent() -> None:
    """A run that is killed takes its processes with it. While one waits for the others of its group, for up to half an
    hour, it heeds none of the signals that it gets then."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def is_first_process() -> bool:
    """Whether this is the first process of its group, or the only one."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def own_share(items: Items) -> Items:
    """What this process does of ``items`` (rows of a tensor): all of them, or one of as many shares as the group has
    processes."""
    if not torch.distributed.is_initialized():
        return items
    return items[torch.distributed.get_rank() :: torch.distributed.get_world_size()]  # type: ignore[return-value]


def add_over_processes(tensors: list[torch.Tensor]) -> None:
    """Replace each tensor by its sum over the processes of the group, in one exchange."""
    if not torch.distributed.is_initialized():
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    for tensor, added in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(added.view_as(tensor))
