"""Fake engines for the actors of a cluster; in a file of their own, which an actor imports quickly."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.fake_engine import FakeEngine
from tuneshift_dag.method import Response


class BrokenEngine(FakeEngine):
    """Can't answer prompts of one length: it raises, or its process dies. Calls are written to ``log``."""

    def __init__(self, length: int, fatal: bool, log: Path) -> None:
        super().__init__()
        self.length, self.fatal, self.log = length, fatal, log

    def generate(self, prompts: Any, *rest: Any) -> Iterator[list[tuple[int, Response]]]:
        with self.log.open("a") as log:
            log.write(f"{os.getpid()} {len(prompts[0])}\n")
        if len(prompts[0]) == self.length:
            if self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("too short")
        yield from super().generate(prompts, *rest)


class SlowEngine(FakeEngine):
    """Takes a moment for each batch, so that it can be killed there."""

    def _batches(self, prompts: Sequence[list[int]]) -> Iterator[list[int]]:
        for batch in super()._batches(prompts):
            time.sleep(0.1)
            yield batch
