"""The processes of a run, and what kills one of them."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random

Find = Callable[[int], list[int]]
"""Process ids of one kind of part, of the run with a process id."""


def command(pid: int) -> str:
    """Empty for one that has ended, also before somebody has waited for it."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def children(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def descendants(pid: int) -> list[int]:
    return [other for child in children(pid) for other in (child, *descendants(child))]


def everything() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def workers(run: int) -> list[int]:
    """Forked, so they have the command of the run."""
    own = command(run)
    return [pid for pid in children(run) if command(pid) == own]


def trainers(run: int) -> list[int]:
    return [pid for pid in children(run) if "spawn_main" in command(pid)]


def actors(run: int) -> list[int]:
    return [pid for pid in descendants(run) if command(pid).startswith("ray::_Actor")]


def servers(run: int) -> list[int]:
    """The stand-in for vLLM, without what it has started and what keeps it."""
    commands = {pid: command(pid) for pid in descendants(run)}
    return [pid for pid, words in commands.items() if "fake_vllm.py" in words and "server_process.py" not in words]


def engines(run: int) -> list[int]:
    return [pid for server in servers(run) for pid in children(server)]


def keepers(run: int) -> list[int]:
    return [pid for pid in children(run) if "server_process.py" in command(pid)]


def kill_one(run: BaseProcess, find: Find, dice: Random, seen: set[int], skip: int, longest: float) -> bool:
    """Kill a part that isn't ``seen`` yet, after ``skip`` others have come, at most ``longest`` seconds after it has;
    False when the run ended before."""
    assert run.pid is not None
    while run.exitcode is None:
        for pid in find(run.pid):
            if pid in seen:
                continue
            seen.add(pid)
            if skip > 0:
                skip -= 1
                continue
            time.sleep(dice.uniform(0.01, max(longest, 0.01)))
            if pid in find(run.pid):  # it may have ended, or become another program: of a training, say
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    return True
        time.sleep(0.002)
    return False


def still_there(pids: list[int], seconds: float) -> list[int]:
    """Those that haven't ended some seconds later."""
    give_up = time.monotonic() + seconds
    while (left := [pid for pid in pids if command(pid)]) and time.monotonic() < give_up:
        time.sleep(0.05)
    return left
