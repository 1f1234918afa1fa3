"""A real `dagster dev` (webserver and daemon) in a folder of its own, and its GraphQL API."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests

ROOT = Path(__file__).parents[2]
START_SECONDS = 120.0


class Server:
    """`make ui` on a port of its own, with the home folder ``root/home`` and the transfers in ``root/transfers``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = f"http://127.0.0.1:{_free_port()}"
        self.log = root / "dagster-dev.log"
        self.environment = {
            "TUNESHIFT_HOME": str(root / "home"),
            "TUNESHIFT_TRANSFERS": str(root / "transfers"),
            "DAGSTER_HOME": str(root / "home" / "dagster"),
        }

    def start(self) -> None:
        folder = Path(self.environment["DAGSTER_HOME"])
        folder.mkdir(parents=True, exist_ok=True)
        settings = ROOT / "tuneshift_dag" / "dagster_template.yaml"
        (folder / "dagster.yaml").write_text(settings.read_text())
        command = [sys.executable, "-m", "dagster", "dev", "-w", "workspace.yaml", "-h", "127.0.0.1"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "-p", self.url.rpartition(":")[2]],
                cwd=ROOT,
                env={**os.environ, **self.environment, "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=subprocess.STDOUT,
                # Its children (webserver, daemon, code server, runs) are ended with it, as one group.
                start_new_session=True,
            )
        wait_for(self._is_up, START_SECONDS, f"dagster dev doesn't answer; see {self.log}")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def _is_up(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-2000:]
        try:
            return requests.get(f"{self.url}/server_info", timeout=5).ok
        except requests.ConnectionError:
            return False

    def query(self, query: str, **variables: Any) -> Any:
        """The ``data`` of a GraphQL request."""
        answer = requests.post(f"{self.url}/graphql", json={"query": query, "variables": variables}, timeout=60).json()
        assert not answer.get("errors"), answer["errors"]
        return answer["data"]


def wait_for(condition: Callable[[], Any], seconds: float, otherwise: str, pause: float = 0.5) -> Any:
    """The first true value of ``condition``; fails with ``otherwise`` after ``seconds``."""
    give_up = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < give_up, otherwise
        time.sleep(pause)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
