"""Memory of this machine and the peak of this process: the GPU's where there is one, else what was resident."""

import contextlib
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
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        (_PROC / "clear_refs").write_text("5")


def has_gpu() -> bool:
    """Whether PyTorch sees a GPU; where there is no driver it isn't imported to find that out, which takes seconds."""
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return False
    import torch

    return bool(torch.cuda.is_available())


def total_bytes() -> int:
    """Memory of the GPU, or of this machine and this container."""
    if has_gpu():
        import torch

        return int(torch.cuda.mem_get_info()[1])
    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no cgroup, or "max": no limit
        return total


def peak_bytes() -> int:
    """The most bytes in use at once since `reset_peak`."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        peak = re.search(r"VmHWM:\s+(\d+) kB", (_PROC / "status").read_text())
    except OSError:
        peak = None
    if peak is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(peak.group(1)) * 1024
