"""What a training has come to, kept in a file from time to time, so that one that was ended goes on from there."""

import os
import pickle
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Writing takes at most this share of the training's time.
_SHARE = 0.02


class TrainingCheckpoint:
    """A file with the state of one training: of these examples, with these settings.

    Which training it is says the file's name alone, so it must follow from all of that.
    """

    def __init__(self, file: Path, every: float = 60) -> None:
        """
        Args:
            every: seconds from one writing to the next, more when writing takes long.
        """
        self.file = file
        self.every = every
        self._next = time.monotonic() + every

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last, on the CPU; None when there is none, or none that can be read."""
        if not self.file.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self.file, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            warnings.warn(f"{self.file} can't be read, so the training starts anew: {error}", stacklevel=2)
            return None
        return state

    def save(self, state: Callable[[], dict[str, Any]]) -> None:
        """Write ``state()``, when it is time to; a reader sees the old file or the new one."""
        started = time.monotonic()
        if started < self._next:
            return
        partial = self.file.with_name(f"{self.file.name}.partial")
        torch.save(state(), partial)
        os.replace(partial, self.file)
        ended = time.monotonic()
        self._next = ended + max(self.every, (ended - started) / _SHARE)

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)
