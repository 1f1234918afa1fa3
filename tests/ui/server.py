"""A real `dagster dev` (webserver and daemon) in a folder of its own, and its GraphQL API."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import requests

ROOT = Path(__file__).parents[2]
START_SECONDS = 120.0
REPOSITORY = {"repositoryName": "__repository__", "repositoryLocationName": "tuneshift_dag.definitions"}


class Server:
    """`make ui` on a port of its own, with the home folder ``root/home`` and the transfers in ``root/transfers``.

    Args:
        settings: what becomes its dagster.yaml.
        workspace: what it loads, seen from the project's root.
        program: ``dagster``, webserver and daemon, or ``dagster_webserver`` alone.
    """

    def __init__(
        self,
        root: Path,
        settings: Path = ROOT / "tuneshift_dag" / "dagster_template.yaml",
        workspace: Path = Path("workspace.yaml"),
        program: Literal["dagster", "dagster_webserver"] = "dagster",
    ) -> None:
        self.root, self.settings, self.workspace, self.program = root, settings, workspace, program
        self.url = f"http://127.0.0.1:{free_port()}"
        self.log = root / "dagster-dev.log"
        self.environment = {
            "TUNESHIFT_HOME": str(root / "home"),
            "TUNESHIFT_TRANSFERS": str(root / "transfers"),
            "DAGSTER_HOME": str(root / "home" / "dagster"),
        }

    def start(self) -> None:
        folder = Path(self.environment["DAGSTER_HOME"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "dagster.yaml").write_text(self.settings.read_text())
        self.root.mkdir(exist_ok=True)
        command = [sys.executable, "-m", self.program, *(["dev"] if self.program == "dagster" else [])]
        command += ["-w", str(self.workspace), "-h", "127.0.0.1"]
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
        end_group(self.process)

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

    def reload(self) -> None:
        """What "Reload definitions" does."""
        query = "mutation($l: String!) { reloadRepositoryLocation(repositoryLocationName: $l) { __typename } }"
        answer = self.query(query, l=REPOSITORY["repositoryLocationName"])
        assert answer["reloadRepositoryLocation"]["__typename"] == "WorkspaceLocationEntry"

    def launch_backfill(self, transfer: str, assets: Sequence[str], rounds: Sequence[str]) -> None:
        """What "Launch backfill" does on the page of a group."""
        params: dict[str, Any] = {
            "assetSelection": [{"path": [transfer, asset]} for asset in assets],
            "partitionNames": list(rounds),
            "fromFailure": False,
        }
        query = "mutation($p: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $p) { __typename } }"
        answer = self.query(query, p=params)["launchPartitionBackfill"]
        assert answer["__typename"] == "LaunchBackfillSuccess", answer

    def launch(self, job: str) -> str:
        """What "Launch run" does on the page of a job; the run's id."""
        return self._launch({**REPOSITORY, "jobName": job}, [])

    def materialize(
        self,
        transfer: str,
        *assets: str,
        round_: str | None = None,
        location: str = REPOSITORY["repositoryLocationName"],
    ) -> str:
        """Launch one run, as "Materialize" does for one round or an unpartitioned asset; its id."""
        selector = {
            **REPOSITORY,
            "repositoryLocationName": location,
            "jobName": "__ASSET_JOB",
            "assetSelection": [{"path": [transfer, asset]} for asset in assets],
        }
        return self._launch(selector, [{"key": "dagster/partition", "value": round_}] if round_ else [])

    def _launch(self, selector: dict[str, Any], tags: list[dict[str, str]]) -> str:
        params = {"selector": selector, "mode": "default", "executionMetadata": {"tags": tags}}
        query = """
            mutation($p: ExecutionParams!) { launchPipelineExecution(executionParams: $p) {
                __typename ... on LaunchRunSuccess { run { runId } } ... on Error { message } } }"""
        answer = self.query(query, p=params)["launchPipelineExecution"]
        assert answer["__typename"] == "LaunchRunSuccess", answer
        run_id: str = answer["run"]["runId"]
        return run_id

    def terminate(self, run_id: str) -> None:
        query = "mutation($r: String!) { terminateRun(runId: $r) { __typename } }"
        assert self.query(query, r=run_id)["terminateRun"]["__typename"] == "TerminateRunSuccess"

    def start_sensor(self, name: str) -> None:
        query = "mutation($s: SensorSelector!) { startSensor(sensorSelector: $s) { __typename } }"
        answer = self.query(query, s={**REPOSITORY, "sensorName": name})
        assert answer["startSensor"]["__typename"] == "Sensor"

    def slots(self, pool: str) -> list[dict[str, str]]:
        """The runs that hold a slot of a pool."""
        query = "query($p: String!) { instance { concurrencyLimit(concurrencyKey: $p) { claimedSlots { runId } } } }"
        held: list[dict[str, str]] = self.query(query, p=pool)["instance"]["concurrencyLimit"]["claimedSlots"]
        return held

    def assets(self, transfer: str, assets: Sequence[str], by_round: bool) -> dict[str, dict[str, Any]]:
        """Staleness and data versions of assets that all are partitioned, or all are not."""
        query = """
            query($k: [AssetKeyInput!]!, $p: Boolean!) { assetNodes(assetKeys: $k) {
                assetKey { path }
                staleStatus @skip(if: $p) staleCauses @skip(if: $p) { ...cause } dataVersion @skip(if: $p)
                staleStatusByPartition @include(if: $p) staleCausesByPartition @include(if: $p) { ...cause }
                dataVersionByPartition @include(if: $p) } }
            fragment cause on StaleCause { key { path } reason }"""
        nodes = self.query(query, k=[{"path": [transfer, asset]} for asset in assets], p=by_round)["assetNodes"]
        assert len(nodes) == len(assets)
        return {node["assetKey"]["path"][-1]: node for node in nodes}


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """End a process that leads a group, and then whatever is left of the group."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def wait_for(condition: Callable[[], Any], seconds: float, otherwise: str, pause: float = 0.5) -> Any:
    """The first true value of ``condition``; fails with ``otherwise`` after ``seconds``."""
    give_up = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < give_up, otherwise
        time.sleep(pause)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
