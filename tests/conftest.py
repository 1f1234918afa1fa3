"""Shared fixtures. Nothing here loads a model or reaches for the network."""

import os

# Read when huggingface_hub is imported, so it has to be set before anything imports it.
os.environ["HF_HUB_OFFLINE"] = "1"
# Read when torch is: the suite runs a worker on each core, and two threads on one small model wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray's workers have a low priority, and would wait for the tests beside them.
os.environ.setdefault("RAY_worker_niceness", "0")

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import dagster as dg
import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from matplotlib.image import imsave
from safetensors.numpy import save_file

from tests.fakes import FakeModels
from tuneshift_dag import cli, definitions, runner
from tuneshift_dag.config import Transfer
from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.home import database_file
from tuneshift_dag.method.evaluation import general_texts
from tuneshift_dag.models import encoder
from tuneshift_dag.runner import Runner, RunResult
from tuneshift_dag.store import Store
from tuneshift_dag.store.file import _WRITER

Run = Callable[..., tuple[int, str, str]]
# Tests that take a minute and more, and servers and clusters that are started.
SLOWEST = ("test_end_to_end.py", "test_ui_agreement.py", "test_ray.py", "test_graph.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest first: at the end one worker would be left alone with them."""
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read from or written to the user's transfers, outputs or Dagster instance."""
    monkeypatch.setenv("TUNESHIFT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TUNESHIFT_TRANSFERS", str(tmp_path / "transfers"))
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home" / "dagster"))


@pytest.fixture(autouse=True)
def short_wal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with fakes leaves hundreds of tiny commits in the ``.wal``, and every connection reads them again: half of
    such a test's time. (A real run has few and large ones.) The store's own tests have it as it is."""
    if request.path.parent.name != "store":
        keep_wal_short(monkeypatch)


def keep_wal_short(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("tuneshift_dag.store.file._WRITER", _WRITER.replace("4 MB", "64 kB"))


@pytest.fixture(autouse=True)
def little_general_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """One text of each kind: fakes score characters, and tiny models would take seconds for all of it."""
    little = {kind: texts[:1] for kind, texts in general_texts().items()}
    monkeypatch.setattr("tuneshift_dag.assets.retention.general_texts", lambda: little)
    monkeypatch.setattr("tuneshift_dag.assets.retention.sampled_texts", lambda: little["prose"])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store" / "test.duckdb")


@pytest.fixture
def transfer_folder(tmp_path: Path) -> Path:
    return make_transfer_folder(tmp_path)


def make_transfer_folder(root: Path, name: str = "banking") -> Path:
    """A minimal valid transfer folder. Its models have the right files and meaningless weights."""
    folder = root / "transfers" / name
    _write_weights(folder / "models" / "tiny-base" / "model.safetensors", "config.json", {"model_type": "llama"})
    (folder / "models" / "tiny-base" / "tokenizer.json").write_text("{}")
    _write_weights(
        folder / "adapter" / "adapter_model.safetensors",
        "adapter_config.json",
        {"peft_type": "LORA", "base_model_name_or_path": "someone/tiny-base"},
    )
    (folder / "transfer.yaml").write_text(
        yaml.safe_dump(
            {
                "source": {"base": "models/tiny-base", "adapter": "adapter"},
                "target": {"base": "models/tiny-base"},
                "generator": {"model": "models/tiny-base", "calls_per_round": 3, "seeds_per_call": 2},
                "prompt_template": "Query: {prompt}\nIntent:",
                "rounds": 2,
                "distill": {"retain": {"texts": 6}},
                # It would load a sentence encoder; tests/resources/test_encoder.py does.
                "diversity_map": False,
            }
        )
    )
    write_jsonl(folder / "seeds.jsonl", [{"prompt": "Where is my card?"}, {"prompt": "Why was I charged twice?"}])
    write_jsonl(folder / "heldout.jsonl", [{"prompt": "Is my transfer late?", "response": "intent_1"}])
    return folder


def edit(folder: Path, settings: Mapping[str, Any]) -> None:
    """Set keys of a folder's ``transfer.yaml``, written with dots: ``edit(folder, {"filter.threshold": 1.2})``."""
    file = folder / "transfer.yaml"
    config = yaml.safe_load(file.read_text())
    for key, value in settings.items():
        section = config
        *path, last = key.split(".")
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    file.write_text(yaml.safe_dump(config))


@pytest.fixture
def edit_config(transfer_folder: Path) -> Callable[[str, Any], None]:
    """Set one dotted key of the transfer folder's ``transfer.yaml``."""
    return lambda key, value: edit(transfer_folder, {key: value})


class Project:
    """A transfer folder with a Dagster instance and fake models: what `tuneshift run` works on."""

    result: RunResult
    """What the whole run of a shared project did."""

    def __init__(self, folder: Path, instance: dg.DagsterInstance) -> None:
        self.folder = folder
        self.instance = instance
        self.models = FakeModels()
        self.store = Store(database_file())

    @property
    def transfer(self) -> Transfer:
        """The folder as it is now."""
        return load_transfer(self.folder)

    def runner(self) -> Runner:
        return Runner(self.transfer, self.instance, self.models.resource())

    def run(self, regrow: bool = False) -> RunResult:
        return self.runner().run(regrow)

    def materialize(self, *assets: str, round: str | None = None) -> dg.ExecuteInProcessResult:
        """Materialize assets as the UI does, in one run; a failure is in the result."""
        return self.runner().job.execute_in_process(
            instance=self.instance,
            asset_selection=[self.key(asset) for asset in assets],
            partition_key=round,
            raise_on_error=False,
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )

    def key(self, asset: str) -> dg.AssetKey:
        return dg.AssetKey([self.folder.name, asset])

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        return self.store.read(query, schema=self.folder.name).rows()


@pytest.fixture
def quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are a dot: to draw them is half the time of a run with fake models. `finished` draws them all."""
    draw_quickly(monkeypatch)


def draw_quickly(patch: pytest.MonkeyPatch) -> None:
    def save(figure: Figure, file: Any, **how: Any) -> None:
        imsave(file, np.zeros((1, 1, 4)), format="png")

    patch.setattr(Figure, "savefig", save)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch, quick_pictures: None) -> FakeModels:
    """The models of every run that the command line starts."""
    models = FakeModels()

    def build(transfers: Any, database: Path, engines: Any = None) -> Any:
        return definitions.build_definitions(transfers, database, models.resource())

    monkeypatch.setattr(runner, "build_definitions", build)
    return models


@pytest.fixture
def quick_encoder(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stands in for the sentence encoder; the texts of every call."""
    calls: list[list[str]] = []

    def embed(texts: list[str]) -> np.ndarray:
        calls.append(list(texts))
        vectors = np.array([[len(text), i] for i, text in enumerate(texts)], np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    monkeypatch.setattr(encoder, "missing_packages", lambda: None)
    monkeypatch.setattr(encoder, "embed", embed)
    monkeypatch.setattr(encoder, "project", lambda vectors: vectors.astype(float))
    return calls


@pytest.fixture
def asked(project: Project, edit_config: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A project with two standard tasks; (task, engine, side) of every run of the fake harness."""
    installed = ModuleType("lm_eval")
    installed.__spec__ = ModuleSpec("lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval", installed)
    edit_config("evaluation", {"tasks": ["sums", "words"], "task_limit": 3})
    return project.models.task_runs


@pytest.fixture
def tuneshift(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`tuneshift …`: exit status, standard output, standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tuneshift", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out, err = capfd.readouterr()
        return int(exit_.value.code or 0), out, err

    return call


@pytest.fixture
def project(transfer_folder: Path, quick_pictures: None) -> Iterator[Project]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield Project(transfer_folder, instance)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project whose graph was run once. Tests only look at it."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch, dg.DagsterInstance.ephemeral() as instance:
        patch.setenv("TUNESHIFT_HOME", str(root / "home"))
        project = Project(make_transfer_folder(root), instance)
        with pytest.MonkeyPatch.context() as short:
            keep_wal_short(short)
            project.result = project.run()
        yield project


@pytest.fixture
def ran(finished: Project, project: Project) -> Project:
    """`finished` once more, to be changed: a copy of its home, with models that have done nothing yet."""
    shutil.copytree(finished.store.home, project.store.home, dirs_exist_ok=True)
    return project


def write_jsonl(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_weights(file: Path, config_name: str, config: dict[str, str]) -> None:
    file.parent.mkdir(parents=True)
    save_file({"weight": np.zeros(1, np.float32)}, file)
    (file.parent / config_name).write_text(json.dumps(config))
