"""What the processes of `test_processes` do. It imports little: each of them imports it anew."""

import multiprocessing
import os
import signal
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

from tuneshift_dag import TuneshiftError
from tuneshift_dag.training.processes import _process


def second_fails(send: Any) -> None:
    if torch.distributed.get_rank() == 1:
        raise ValueError("the second can't")
    torch.distributed.barrier()  # would wait for ever


def second_refuses(send: Any) -> None:
    if torch.distributed.get_rank() == 1:
        raise TuneshiftError("the loss is nan: lower it")
    torch.distributed.barrier()


def both_refuse(send: Any) -> None:
    raise TuneshiftError("the loss is nan: lower it")


def second_is_killed(send: Any) -> None:
    if torch.distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()


def start_the_second_of_two(meeting_point: str) -> None:
    """It waits for the first, in code that no signal reaches."""
    _, outbox = multiprocessing.get_context("spawn").Pipe(duplex=False)
    spawn(_second_alone, (2, meeting_point, 1, outbox, print, ()), nprocs=1)


def _second_alone(_: int, *passed: Any) -> None:
    _process(1, *passed)
