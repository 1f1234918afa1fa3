"""What is out of date: the command line goes by the record in the database, Dagster's UI by its event log.

A webserver is asked over GraphQL, as the UI asks it, after every change that a user makes. Where the two differ the
table below says so, and docs/concepts.md says why.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from tests.conftest import Project, draw_quickly, edit, make_transfer_folder, write_jsonl
from tests.ui.server import Server
from tuneshift_dag.home import use_dagster_home
from tuneshift_dag.store import Store
from tuneshift_dag.store.records import ROUND_ASSETS, Records, place

WHOLE = ["seed_set", "threshold_report", "rehearsal_set", "distilled_model", "evaluation"]
FILTERS = {"filtered_dataset/round_01", "filtered_dataset/round_02"}
SCORES = {"scored_pairs/round_01", "scored_pairs/round_02"}
PROMPTS = {"synthetic_prompts/round_01", "synthetic_prompts/round_02"}
REPORTS = {"threshold_report", "distilled_model"}


@pytest.fixture(scope="module")
def ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Project, Server]]:
    """A finished project of two rounds with fake models, and a webserver that shows it."""
    root = tmp_path_factory.mktemp("agreement")
    server = Server(root, program="dagster_webserver")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        use_dagster_home()
        draw_quickly(patch)
        with dg.DagsterInstance.get() as instance:
            project = Project(make_transfer_folder(root), instance)
            edit(project.folder, {"seed": 2})  # few seeds change with the threshold; with this one round_02's do
            project.run()
            server.start()
            yield project, server
            server.stop()


@pytest.fixture(autouse=True)
def own_folders(ui: tuple[Project, Server], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test goes on with the one project."""
    for name, value in ui[1].environment.items():
        monkeypatch.setenv(name, value)


def by_command_line(project: Project) -> set[str]:
    records = Records(project.store, project.transfer)
    places: list[tuple[str, str | None]] = [(a, r) for a in ROUND_ASSETS for r in project.transfer.round_keys]
    return {place(*one) for one in [*places, *((asset, None) for asset in WHOLE)] if records.causes(*one)}


def by_ui(project: Project, server: Server, edited: bool = False) -> set[str]:
    if edited:  # until then the definitions are those of the old files
        server.reload()
    rounds = project.transfer.round_keys
    found = set()
    for asset, node in server.assets(project.folder.name, ROUND_ASSETS, by_round=True).items():
        statuses = zip(rounds, node["staleStatusByPartition"], strict=True)
        found |= {place(asset, round_) for round_, status in statuses if status != "FRESH"}
    for asset, node in server.assets(project.folder.name, WHOLE, by_round=False).items():
        found |= {asset} if node["staleStatus"] != "FRESH" else set()
    return found


Change = Callable[[Project], None]


def setting(key: str, value: Any) -> Change:
    return lambda project: edit(project.folder, {key: value})


def another_template(project: Project) -> None:
    edit(project.folder, {"prompt_template": "Q: {prompt}\nA:"})


def another_adapter(project: Project) -> None:
    config = project.folder / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": 4}))


def other_weights(project: Project) -> None:
    """Of the folder that is source base, generator and target here."""
    weights = project.folder / "models" / "tiny-base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")


# What is changed, what is then out of date beside what was already, and whether the UI is asked and a run follows: it
# takes seconds to load the definitions. Changes before one run make different things out of date, so that none of them
# can hide what the UI doesn't see of another.
CHANGES: list[tuple[str, Change, set[str], bool]] = [
    ("threshold, the same pairs", setting("filter.threshold", 1.6), {*FILTERS, "threshold_report"}, False),
    ("training", setting("distill.rank", 8), {"distilled_model"}, True),
    ("threshold, other pairs", setting("filter.threshold", 1.08), {*FILTERS, "threshold_report"}, False),
    (
        "held-out file",
        lambda p: write_jsonl(p.folder / "heldout.jsonl", [{"prompt": "Is it late?", "response": "intent_2"}]),
        {*PROMPTS, "evaluation"},
        True,
    ),
    ("adapter", another_adapter, {"seed_set", *SCORES, "evaluation"}, False),
    ("template", another_template, {"distilled_model"}, True),
    ("weights", other_weights, {"seed_set", *PROMPTS, *SCORES, "rehearsal_set", "distilled_model", "evaluation"}, True),
    (
        "seeds",
        lambda p: write_jsonl(p.folder / "seeds.jsonl", [{"prompt": "Where is it?"}, {"prompt": "Why twice?"}]),
        {"seed_set"},
        False,
    ),
    (
        "a round more",
        setting("rounds", 3),
        {"synthetic_prompts/round_03", "scored_pairs/round_03", "filtered_dataset/round_03", *REPORTS},
        True,
    ),
    ("a round less", setting("rounds", 2), REPORTS, True),
]


def test_after_each_change_both_call_the_same_out_of_date_and_after_a_run_nothing(ui: tuple[Project, Server]) -> None:
    project, server = ui
    expected: set[str] = set()
    for name, change, more, run in CHANGES:
        change(project)
        assert not expected & more, name
        expected |= more
        assert by_command_line(project) == expected, name
        if run:
            assert by_ui(project, server, edited=True) == expected, name
            project.run(regrow=True)
            expected = set()
            assert by_command_line(project) == by_ui(project, server) == expected, name


def test_where_they_differ_the_command_line_goes_by_the_database(ui: tuple[Project, Server], tmp_path: Path) -> None:
    project, server = ui
    database = project.store.path
    earlier = tmp_path / "earlier.duckdb"
    shutil.copy(database, earlier)
    wal = database.with_name(f"{database.name}.wal")
    if wal.exists():
        shutil.copy(wal, tmp_path / "earlier.duckdb.wal")

    # A step whose last attempt failed is taken up again, also when its data is fresh.
    edit(project.folder, {"filter.threshold": 1.01})
    with pytest.raises(Exception, match=r"filter\.threshold"):
        project.run()
    edit(project.folder, {"filter.threshold": 1.08})
    assert by_command_line(project) == {"filtered_dataset/round_01"}
    assert by_ui(project, server) == set()
    assert project.run().materialized == [(asset, "round_01") for asset in ROUND_ASSETS[2:]]

    # A deleted database is made again from nothing; the event log knows nothing of it.
    database.unlink()
    wal.unlink(missing_ok=True)
    project.store = Store(database)  # as another process: in the one that has it open that is an error
    assert by_command_line(project) == {*WHOLE, *PROMPTS, *SCORES, *FILTERS}
    assert by_ui(project, server) == set()
    project.run()
    assert by_command_line(project) == set()

    # A restored one is as good as it was: its record came with it.
    edit(project.folder, {"filter.threshold": 1.5})
    project.run(regrow=True)
    shutil.copy(earlier, database)
    if (tmp_path / "earlier.duckdb.wal").exists():
        shutil.copy(tmp_path / "earlier.duckdb.wal", wal)
    assert by_command_line(project) >= {*FILTERS, "threshold_report"}
    assert by_ui(project, server, edited=True) == set()
    project.run(regrow=True)
    assert by_command_line(project) == set()
