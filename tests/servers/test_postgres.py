"""deploy/: hosts that share one Dagster instance in a real Postgres server, each with its own DuckDB file.

Skipped where no Postgres server is installed (Debian: `apt-get install postgresql`) or dagster-postgres isn't.
"""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._config import process_config

from tests.conftest import Project, make_transfer_folder
from tests.ui.server import Server, end_group, free_port, wait_for
from tuneshift_dag.assets.common import MODEL_POOL
from tuneshift_dag.runner import Runner
from tuneshift_dag.store import Store
from tuneshift_dag.store.records import ROUND_ASSETS

pytest.importorskip("dagster_postgres", reason="dagster-postgres isn't installed")
psycopg2 = pytest.importorskip("psycopg2")

pytestmark = pytest.mark.servers
ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PASSWORD = "only for this test"


def binaries() -> Path | None:
    """The folder of the newest Postgres server."""
    found = shutil.which("initdb")
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda file: int(file.parts[-3]))
    return Path(found).parent if found else debian[-1].parent if debian else None


class Postgres:
    """A server with an empty data folder of its own, on 127.0.0.1."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.port = free_port()
        self.database = "postgres"
        # Postgres refuses to run as root, and the folder must belong to whoever runs it.
        owner = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        user: dict[str, Any] = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []} if owner else {}
        if owner:
            os.chown(folder, owner.pw_uid, owner.pw_gid)
        secret = folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        data, self.log = folder / "data", folder / "log"
        access = ["-U", "tuneshift", "--auth=scram-sha-256", f"--pwfile={secret}"]
        made = [programs / "initdb", "-D", data, *access, "--encoding=UTF8", "--no-sync"]
        subprocess.run(made, check=True, capture_output=True, cwd=folder, **user)
        listen = ["-h", "127.0.0.1", "-p", str(self.port), "-k", folder]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [programs / "postgres", "-D", data, *listen, "-F"], cwd=folder, stdout=log, stderr=log, **user
            )

    @property
    def environment(self) -> dict[str, str]:
        """What deploy/dagster.yaml reads."""
        return {
            "DAGSTER_PG_HOST": "127.0.0.1",
            "DAGSTER_PG_PORT": str(self.port),
            "DAGSTER_PG_DB": self.database,
            "DAGSTER_PG_USERNAME": "tuneshift",
            "DAGSTER_PG_PASSWORD": PASSWORD,
        }

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        connection = psycopg2.connect(
            host="127.0.0.1", port=self.port, dbname=self.database, user="tuneshift", password=PASSWORD
        )
        connection.autocommit = True
        with contextlib.closing(connection), connection.cursor() as cursor:
            cursor.execute(query)
            return list(cursor.fetchall()) if cursor.description else []

    def use_new_database(self) -> None:
        name = f"dagster_{uuid.uuid4().hex[:8]}"
        self.rows(f"CREATE DATABASE {name}")
        self.database = name

    def is_up(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-2000:]
        try:
            return bool(self.rows("SELECT 1"))
        except psycopg2.OperationalError:
            return False

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)  # a fast shutdown
        self.process.wait(30)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    programs = binaries()
    if programs is None:
        pytest.skip("no Postgres server is installed")
    # Not in pytest's folder, which only its owner may enter.
    with tempfile.TemporaryDirectory(prefix="tuneshift-postgres-", dir="/tmp") as folder:
        server = Postgres(Path(folder), programs)
        try:
            wait_for(server.is_up, 30, "Postgres doesn't answer", pause=0.1)
            yield server
        finally:
            server.stop()


@pytest.fixture
def shared(postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Any]]:
    """Opens the instance of deploy/dagster.yaml, as each host does with a DAGSTER_HOME of its own."""
    postgres.use_new_database()
    for name, value in postgres.environment.items():
        monkeypatch.setenv(name, value)
    with contextlib.ExitStack() as opened:

        def open_instance() -> dg.DagsterInstance:
            home = Path(tempfile.mkdtemp(dir=tmp_path))
            shutil.copy(DEPLOY / "dagster.yaml", home / "dagster.yaml")
            instance: dg.DagsterInstance = opened.enter_context(dg.DagsterInstance.from_config(str(home)))
            return instance

        yield open_instance


class TestOneHost:
    def test_runs_events_and_partitions_are_in_postgres(
        self, shared: Callable[[], dg.DagsterInstance], postgres: Postgres, transfer_folder: Path
    ) -> None:
        instance = shared()
        project = Project(transfer_folder, instance)
        done = project.run()
        assert [asset for asset, _ in done.materialized].count("scored_pairs") == 2
        (runs,) = postgres.rows("SELECT count(*) FROM runs WHERE status = 'SUCCESS'")
        # One for seed_set, one for each round and one for each asset after them.
        assert runs == (1 + 2 + 3,)
        stored = postgres.rows(
            "SELECT asset_key, partition, count(*) FROM event_logs WHERE dagster_event_type = 'ASSET_MATERIALIZATION'"
            " GROUP BY asset_key, partition"
        )
        assert {(key, partition) for key, partition, _ in stored} == {
            (f'["banking", "{asset}"]', round_) for asset, round_ in done.materialized
        }
        assert [path.name for path in Path(instance.root_directory).rglob("*.db")] == []

        # Another host sees the same, and has nothing to do.
        other = shared()
        assert other.get_materialized_partitions(project.key("scored_pairs")) == {"round_01", "round_02"}
        again = Project(transfer_folder, other)
        assert again.run().materialized == []
        assert again.models.calls() == 0

    def test_a_step_waits_for_the_pool_that_another_host_holds(
        self, shared: Callable[[], dg.DagsterInstance], transfer_folder: Path
    ) -> None:
        project, elsewhere = Project(transfer_folder, shared()), shared().event_log_storage
        assert elsewhere.initialize_concurrency_limit_to_default(MODEL_POOL)
        assert elsewhere.claim_concurrency_slot(MODEL_POOL, "another host's run", "step").is_claimed
        said: list[str] = []
        runner = Runner(project.transfer, project.instance, project.models.resource(), on_line=said.append)
        running = threading.Thread(target=runner.run)
        running.start()
        wait_for(lambda: said and "waiting for run another" in said[0], 60, "the run doesn't wait")
        assert elsewhere.get_concurrency_info(MODEL_POOL).slot_count == 1
        assert project.models.calls() == 0
        elsewhere.free_concurrency_slots_for_run("another host's run")
        running.join(120)
        assert not running.is_alive()
        assert project.models.calls() > 0


class Host:
    """A GPU host: a code server with a home folder, transfers and a pool of its own."""

    def __init__(self, root: Path, name: str, environment: dict[str, str]) -> None:
        self.name, self.port = name, free_port()
        self.transfer = f"on_{name.replace('-', '_')}"
        self.folder = make_transfer_folder(root / name, self.transfer)
        self.database = root / name / "home" / "tuneshift.duckdb"
        own = {
            "TUNESHIFT_HOME": str(self.database.parent),
            "TUNESHIFT_TRANSFERS": str(self.folder.parent),
            "TUNESHIFT_MODEL_POOL": f"models_{name}",
        }
        command = [sys.executable, "-m", "dagster", "code-server", "start", "-h", "127.0.0.1", "-p", str(self.port)]
        self.log = root / name / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "-m", "tests.servers.location"],
                cwd=ROOT,
                env={**os.environ, **environment, **own, "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def is_up(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-2000:]
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def stop(self) -> None:
        end_group(self.process)


@contextlib.contextmanager
def cluster(instance: dg.DagsterInstance, root: Path, **environment: str) -> Iterator[tuple[list[Host], Server]]:
    """A code server for each entry of deploy/workspace.yaml, and one webserver and daemon."""
    home = {"DAGSTER_HOME": instance.root_directory}
    places = yaml.safe_load((DEPLOY / "workspace.yaml").read_text())["load_from"]
    hosts: list[Host] = []
    with contextlib.ExitStack() as started:
        for place in places:
            hosts.append(Host(root, place["grpc_server"]["location_name"], home | environment))
            started.callback(hosts[-1].stop)
            place["grpc_server"] |= {"host": "127.0.0.1", "port": hosts[-1].port}
        workspace = root / "workspace.yaml"
        workspace.write_text(yaml.safe_dump({"load_from": places}))
        for host in hosts:
            wait_for(host.is_up, 60, f"{host.name} doesn't answer; see {host.log}")
        central = Server(root / "central", DEPLOY / "dagster.yaml", workspace)
        central.environment |= home
        central.start()
        started.callback(central.stop)
        yield hosts, central


class TestTwoHosts:
    def test_each_runs_its_transfers_and_writes_its_own_database(
        self, shared: Callable[[], dg.DagsterInstance], tmp_path: Path
    ) -> None:
        instance = shared()
        with cluster(instance, tmp_path) as (hosts, central):
            for assets, round_ in ((["seed_set"], None), (ROUND_ASSETS, "round_01")):
                runs = [central.materialize(h.transfer, *assets, round_=round_, location=h.name) for h in hosts]
                for run_id in runs:
                    assert ended(instance, run_id).status == dg.DagsterRunStatus.SUCCESS

        for host in hosts:
            for asset in ("seed_set", *ROUND_ASSETS):
                key = dg.AssetKey([host.transfer, asset])
                assert instance.get_latest_materialization_event(key) is not None
            schemas = Store(host.database).read("SELECT DISTINCT schema_name FROM duckdb_schemas() WHERE NOT internal")
            assert {other.transfer for other in hosts} & set(schemas["schema_name"]) == {host.transfer}
            kept = Store(host.database).read("SELECT count(*) FROM filtered_dataset", schema=host.transfer).item()
            assert kept > 0
            claimed = instance.event_log_storage.get_concurrency_info(f"models_{host.name}")
            assert (claimed.slot_count, claimed.active_slot_count) == (1, 0)

    def test_a_run_whose_process_was_killed_is_run_again(
        self, shared: Callable[[], dg.DagsterInstance], tmp_path: Path
    ) -> None:
        instance, pid_file = shared(), tmp_path / "pid"
        with cluster(instance, tmp_path, TUNESHIFT_TEST_KILL_ME=str(pid_file)) as (hosts, central):
            killed = central.materialize(hosts[0].transfer, "seed_set", location=hosts[0].name)
            pid = wait_for(lambda: pid_file.exists() and pid_file.read_text(), 60, "the run doesn't start")
            os.kill(int(pid), signal.SIGKILL)
            assert ended(instance, killed).status == dg.DagsterRunStatus.FAILURE
            filters = dg.RunsFilter(tags={"dagster/parent_run_id": killed})
            (again,) = wait_for(lambda: instance.get_runs(filters), 90, "it isn't run again")
            assert ended(instance, again.run_id).status == dg.DagsterRunStatus.SUCCESS


def ended(instance: dg.DagsterInstance, run_id: str) -> dg.DagsterRun:
    """The run, once it has ended."""

    def found() -> dg.DagsterRun | None:
        run = instance.get_run_by_id(run_id)
        return run if run and run.is_finished else None

    run: dg.DagsterRun = wait_for(found, 180, f"run {run_id} doesn't end")
    return run


class TestSettings:
    def test_are_those_of_one_host_but_for_storage_retries_and_the_number_of_runs(self) -> None:
        shared, local = (
            yaml.safe_load(file.read_text())
            for file in (DEPLOY / "dagster.yaml", ROOT / "tuneshift_dag" / "dagster_template.yaml")
        )
        assert shared.pop("storage") and shared.pop("run_retries")
        for settings in (shared, local):
            settings["concurrency"]["runs"].pop("max_concurrent_runs")
        assert shared == local

    def test_a_crashed_run_is_retried_and_a_failed_step_is_not(self, shared: Callable[[], dg.DagsterInstance]) -> None:
        instance = shared()
        assert (instance.run_retries_enabled, instance.run_retries_max_retries) == (True, 2)
        assert not instance.run_retries_retry_on_asset_or_op_failure


class TestKubernetes:
    """Only what would be sent: no cluster was there to run it."""

    @pytest.fixture
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = yaml.safe_load((DEPLOY / "k8s_run_launcher.yaml").read_text())["run_launcher"][
            "config"
        ]
        return config

    def test_the_settings_are_what_dagster_k8s_takes(self, config: dict[str, Any]) -> None:
        launcher = pytest.importorskip("dagster_k8s").K8sRunLauncher
        checked = process_config(launcher.config_type(), config)
        assert checked.success, checked.errors
        assert not process_config(launcher.config_type(), {**config, "image": "x"}).success

    def test_a_run_is_a_job_with_a_gpu_and_the_volume(self, config: dict[str, Any]) -> None:
        job = pytest.importorskip("dagster_k8s.job")
        names = ("job_image", "dagster_home", "instance_config_map", "postgres_password_secret", "env_vars")
        made = job.construct_dagster_k8s_job(
            job.DagsterK8sJobConfig(**{name: config[name] for name in names}),
            args=["dagster", "api", "execute_run"],
            job_name="run",
            user_defined_k8s_config=job.UserDefinedDagsterK8sConfig.from_dict(config["run_k8s_config"]),
        )
        pod = made.spec.template.spec
        (container,) = pod.containers
        assert container.resources.limits == {"nvidia.com/gpu": "1"}
        claims = [volume.persistent_volume_claim for volume in pod.volumes]
        assert "tuneshift-data" in [claim.claim_name for claim in claims if claim]
        assert "/data" in [mount.mount_path for mount in container.volume_mounts]
        # Every variable that deploy/dagster.yaml reads is there.
        settings = yaml.safe_load((DEPLOY / "dagster.yaml").read_text())["storage"]["postgres"]["postgres_db"]
        wanted = {value["env"] for value in settings.values() if isinstance(value, dict)}
        assert wanted <= {variable.name for variable in container.env}
