"""Memory of this machine and of this process: what there is, the peak, and giving it back."""

import contextlib
import ctypes
import os
import re
import resource
import sys
from pathlib import Path

import psutil

_PROC = Path("/proc/self")


def reset_peak() -> None:
    """Let the peak start again from what is used now. Where only Linux can, elsewhere it stays the process's."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(number)
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
    count = gpu_count()
    if count:
        import torch

        return sum(int(torch.cuda.mem_get_info(number)[1]) for number in range(gpus or count))
    total, limit = int(psutil.virtual_memory().total), container_bytes("max")
    return total if limit is None else min(total, limit)


def container_bytes(what: str) -> int | None:
    """Memory of this container, ``max`` or ``current``; None without a container, or for "max" without a limit."""
    try:
        return int(Path(f"/sys/fs/cgroup/memory.{what}").read_text())
    except (OSError, ValueError):
        return None


def peak_bytes() -> int:
    """The most bytes in use at once since `reset_peak`: of all GPUs together, or of the process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return sum(int(torch.cuda.max_memory_allocated(number)) for number in range(torch.cuda.device_count()))
    try:
        peak = re.search(r"VmHWM:\s+(\d+) kB", (_PROC / "status").read_text())
    except OSError:
        peak = None
    if peak is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(peak.group(1)) * 1024


_MADV_PAGEOUT = 21


def trim() -> None:
    """Give freed memory back to the system. glibc keeps it, and its holes seldom fit the next, longer tensor."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


def keep_few_kernels() -> None:
    """Bound what oneDNN, and PyTorch's wrapper around it, keep for every shape of a matrix product they have seen.

    Up to 1,024 shapes each by default, which grew with every batch. A forward pass needs about ten; a training step
    is 1.6 times as slow with room for 16, and with 24 as fast as with 1,024.
    Read at the first product; what the user has set stays.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "32")


def drop_file_pages(folder: Path) -> None:
    """Drop what is resident of mapped files below ``folder``; what is still used is read again at its next use.

    4-bit weights are repacked into memory of their own, and the pages they came from would stay beside them.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    for line in (_PROC / "maps").read_text().splitlines():
        addresses, *_, path = line.split(maxsplit=5)
        if path.startswith(f"{folder}/"):
            start, end = (int(address, 16) for address in addresses.split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_PAGEOUT)
