"""`tuneshift cache gc`: what it lists, that it removes just that, and what it never touches."""

import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import pytest

from tests.conftest import Project
from tests.scoring_process import score
from tuneshift_dag import TuneshiftError
from tuneshift_dag.home import cache_dir
from tuneshift_dag.method import Response
from tuneshift_dag.store import Store
from tuneshift_dag.store.cache import Removable, ResponseCache, collect, collect_plan, held_back, stats
from tuneshift_dag.store.tables import ATTEMPTS, CACHE, CACHE_REFERENCES, COMPARISON, DISTILLED_MODELS, SCORED_PAIRS

NAME = "banking"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return transfer_in(tmp_path / "transfers" / NAME)


@pytest.fixture
def claimed(store: Store, folder: Path) -> Store:
    """A store with one transfer, which has done nothing yet."""
    store.claim(NAME, folder)
    store.prepare(NAME)
    return store


def transfer_in(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "transfer.yaml").touch()
    return folder


def removable(store: Store, folder: Path | None, in_use: set[str] | None = None) -> dict[tuple[str, str], Removable]:
    return {(item.kind, item.name): item for item in collect_plan(store, [NAME] if folder else [], in_use)}


def computed(store: Store, *keys: str) -> None:
    """A response and a score under each key, now."""
    responses = {key: Response(f"answer {key}", [1, 2], "stop", -1.0, -0.1) for key in keys}
    ResponseCache(store).put(responses, dict.fromkeys(keys, -2.0))


def used(store: Store, *keys: str, asset: str = "scored_pairs", schema: str = NAME) -> None:
    rows = [{"asset": asset, "round": "round_01", "key": key} for key in keys]
    store.append_all(schema, [(CACHE_REFERENCES, CACHE_REFERENCES.frame(rows))])


def begun(store: Store, schema: str = NAME, ago: float = 0) -> None:
    """A step that runs, or has failed: it began so many seconds ago."""
    started = datetime.now(UTC).replace(tzinfo=None) - timedelta(seconds=ago)
    row = {"asset": "scored_pairs", "round": "round_02", "run_id": "run", "started_at": started}
    store.append_all(schema, [(ATTEMPTS, ATTEMPTS.frame([row]))])


def cached(store: Store) -> list[str]:
    scores, responses = (set(store.read(f"SELECT key FROM cache.{table}")["key"]) for table in ("scores", "responses"))
    assert scores == responses
    return sorted(scores)


def adapters(store: Store, *ids: str, current: str = "") -> Path:
    """Trained adapters; the folder that they are in."""
    models = store.home / "output" / NAME / "models"
    rows = []
    for model_id in ids:
        (models / model_id).mkdir(parents=True)
        (models / model_id / "adapter_model.safetensors").write_bytes(b"12345")
        path = store.relative(models / model_id)
        rows.append({"model_id": model_id, "path": path, "current": model_id == current})
    frame = DISTILLED_MODELS.frame([{**dict.fromkeys(DISTILLED_MODELS.empty().columns), **row} for row in rows])
    store.append_all(NAME, [(DISTILLED_MODELS, frame)])
    return models


def compared(store: Store) -> None:
    row = {**dict.fromkeys(COMPARISON.empty().columns), "arm": "random"}
    store.append_all(NAME, [(COMPARISON, COMPARISON.frame([row]))])


def test_nothing_is_removable_of_a_transfer_that_has_done_nothing(claimed: Store, folder: Path) -> None:
    assert removable(claimed, folder) == {}
    collect(claimed, [])
    assert all(row["entries"] == 0 for row in stats(claimed))


# --- cached results ---


def test_what_no_materialization_uses_is_removed_and_counted(claimed: Store, folder: Path) -> None:
    computed(claimed, "used", "unused")
    used(claimed, "used")
    plan = removable(claimed, folder)
    assert set(plan) == {("responses", "cache.responses"), ("scores", "cache.scores")}
    responses, scores = stats(claimed)
    assert responses["entries"] == 2 and responses["unreferenced"] == scores["unreferenced"] == 1
    assert plan["responses", "cache.responses"].bytes == responses["unreferenced_bytes"] > 0
    assert plan["responses", "cache.responses"].reason.startswith("1 of 2")
    collect(claimed, list(plan.values()))
    assert cached(claimed) == ["used"]
    assert removable(claimed, folder) == {}


def test_only_what_was_listed_is_removed(claimed: Store, folder: Path) -> None:
    computed(claimed, "unused", "used_since")
    plan = removable(claimed, folder)
    computed(claimed, "added_since")
    used(claimed, "used_since")
    collect(claimed, [plan["scores", "cache.scores"]])
    assert sorted(claimed.read("SELECT key FROM cache.scores")["key"]) == ["added_since", "used_since"]
    assert claimed.read("SELECT count(*) FROM cache.responses").item() == 3


def test_what_a_failed_or_running_step_has_computed_is_kept(claimed: Store, folder: Path) -> None:
    computed(claimed, "before")
    time.sleep(0.01)
    begun(claimed)
    computed(claimed, "since")
    collect(claimed, list(removable(claimed, folder).values()))
    assert cached(claimed) == ["since"]
    with claimed.transaction(NAME) as connection:
        connection.execute("DELETE FROM attempts")  # as when it succeeds
    used(claimed, "since")
    collect(claimed, list(removable(claimed, folder).values()))
    assert cached(claimed) == ["since"]


def test_a_step_of_one_transfer_protects_results_from_another_and_from_a_plan_made_before(
    claimed: Store, folder: Path
) -> None:
    plan = list(removable(claimed, folder).values())
    computed(claimed, "unused")
    plan = [*plan, *removable(claimed, folder).values()]
    begun(claimed, "other", ago=60)
    assert removable(claimed, folder) == {}
    collect(claimed, plan)
    assert cached(claimed) == ["unused"]


def test_entries_of_older_versions_count_as_old(claimed: Store, folder: Path) -> None:
    computed(claimed, "old")
    with claimed.transaction(CACHE) as connection:
        connection.execute("UPDATE responses SET added_at = NULL; UPDATE scores SET added_at = NULL")
    begun(claimed, ago=60)
    collect(claimed, list(removable(claimed, folder).values()))
    assert cached(claimed) == []


def test_every_step_that_holds_something_back_is_told(claimed: Store) -> None:
    claimed.prepare(f"{NAME}__both_0")  # rounds of an arm of a comparison
    begun(claimed, f"{NAME}__both_0")
    assert [step.partition(",")[0] for step in held_back(claimed, [NAME])] == [
        "banking__both_0: scored_pairs of round_02"
    ]


def test_gc_refuses_when_it_does_not_know_what_is_used(claimed: Store, folder: Path) -> None:
    computed(claimed, "perhaps")
    for round_ in ("round_01", "round_02"):
        row = {**dict.fromkeys(SCORED_PAIRS.empty().columns), "round": round_, "prompt_id": "a"}
        claimed.append_all(NAME, [(SCORED_PAIRS, SCORED_PAIRS.frame([row]))])
    used(claimed, "of_round_01")
    with pytest.raises(TuneshiftError, match=rf"^{NAME}: .*Materialize"):
        removable(claimed, folder)
    assert cached(claimed) == ["perhaps"]


def test_after_gc_every_step_still_finds_what_it_used(project: Project) -> None:
    rounds = ("synthetic_prompts", "scored_pairs", "filtered_dataset")
    assert project.materialize("seed_set").success and project.materialize(*rounds, round="round_01").success
    calls = project.models.calls()
    assert all(row["unreferenced"] == 0 for row in stats(project.store))
    score(project.store.path, 0, 6, 0)
    assert [row["unreferenced"] for row in stats(project.store)] == [12, 12]
    collect(project.store, collect_plan(project.store, [project.folder.name]))
    assert all(row["unreferenced"] == 0 for row in stats(project.store))
    assert project.materialize(*rounds, round="round_01").success
    assert project.models.calls() == calls, "something that is still used was removed"


# --- adapters and trainings ---


def test_adapters_stay_that_are_current_or_of_the_comparison(claimed: Store, folder: Path) -> None:
    models = adapters(claimed, "current", "compared", "unused", current="current")
    compared(claimed)
    used(claimed, "model:compared", asset="comparison")
    plan = removable(claimed, folder)
    assert set(plan) == {("adapter", f"{NAME}/unused")}
    assert plan["adapter", f"{NAME}/unused"].bytes == 5
    collect(claimed, list(plan.values()))
    assert sorted(path.name for path in models.iterdir()) == ["compared", "current"]


def test_adapters_stay_when_an_older_version_compared_without_naming_them(claimed: Store, folder: Path) -> None:
    adapters(claimed, "current", "perhaps", current="current")
    compared(claimed)
    used(claimed, "model:current", asset="distilled_model")
    assert removable(claimed, folder) == {}


def test_what_ended_trainings_left_is_removed(claimed: Store, folder: Path) -> None:
    models = adapters(claimed, "current", current="current")
    (models / ".other-weights.checkpoint").write_bytes(b"123")
    (models / ".other-staging").mkdir()
    (models / ".other-staging" / "part").write_bytes(b"1234")
    plan = removable(claimed, folder)
    sizes = {name: item.bytes for (kind, name), item in plan.items() if kind == "training"}
    assert sizes == {f"{NAME}/.other-staging": 4, f"{NAME}/.other-weights.checkpoint": 3}
    collect(claimed, list(plan.values()))
    assert [path.name for path in models.iterdir()] == ["current"]


@pytest.mark.parametrize("opened", ["before the plan", "after the plan"])
def test_nothing_of_a_transfer_with_an_open_attempt_is_removed_that_it_may_need(
    claimed: Store, folder: Path, opened: str
) -> None:
    models = adapters(claimed, "unused")
    (models / ".other-weights.checkpoint").touch()
    (models.parent / "discriminators" / "d1").mkdir(parents=True)
    plan = removable(claimed, folder)
    begun(claimed)
    if opened == "before the plan":
        plan = removable(claimed, folder)
        assert set(plan) == {("discriminators", NAME)}
    collect(claimed, list(plan.values()))
    assert sorted(path.name for path in models.iterdir()) == [".other-weights.checkpoint", "unused"]
    assert not (models.parent / "discriminators").exists(), "no step of this version makes or reads any"


def test_an_adapter_that_became_the_current_one_since_the_plan_stays(claimed: Store, folder: Path) -> None:
    models = adapters(claimed, "first", "second", current="first")
    plan = removable(claimed, folder)
    with claimed.transaction(NAME) as connection:
        connection.execute("UPDATE distilled_models SET current = model_id = 'second'")
    collect(claimed, list(plan.values()))
    assert sorted(path.name for path in models.iterdir()) == ["first", "second"]


# --- 4-bit copies ---


def test_quantized_copies_are_removed_that_no_transfer_uses(
    claimed: Store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESHIFT_CACHE", str(tmp_path / "models"))
    mine, unused, staging = "0" * 16, "f" * 16, "tmp123"
    for name in (mine, unused, staging):
        (cache_dir() / "quantized" / name).mkdir(parents=True)
    assert removable(claimed, folder) == {}
    assert set(removable(claimed, folder, {mine})) == {("quantized", unused)}
    collect(claimed, collect_plan(claimed, [], {mine}))
    assert sorted(path.name for path in (cache_dir() / "quantized").iterdir()) == [mine, staging]


def test_a_quantized_copy_stays_that_may_be_of_a_step_that_runs(
    claimed: Store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESHIFT_CACHE", str(tmp_path / "models"))
    (cache_dir() / "quantized" / ("f" * 16)).mkdir(parents=True)
    begun(claimed, ago=60)
    assert removable(claimed, folder, set()) == {}
    os.utime(cache_dir() / "quantized" / ("f" * 16), (time.time() - 3600,) * 2)
    assert set(removable(claimed, folder, set())) == {("quantized", "f" * 16)}


# --- transfers whose folder is gone ---


@pytest.fixture
def left(claimed: Store, folder: Path) -> Store:
    """A store with tables and outputs of a transfer whose folder was deleted, beside one that is there."""
    other = transfer_in(folder.with_name("other"))
    claimed.claim("other", other)
    claimed.prepare("other")
    computed(claimed, "of_banking", "of_other")
    used(claimed, "of_banking")
    used(claimed, "of_other", schema="other")
    adapters(claimed, "m1", current="m1")
    (folder / "transfer.yaml").unlink()
    folder.rmdir()
    return claimed


def test_tables_outputs_and_results_go_with_the_folder_of_a_transfer(left: Store, folder: Path) -> None:
    plan = removable(left, None)
    assert set(plan) == {
        ("schema", NAME),
        ("output", NAME),
        ("responses", "cache.responses"),
        ("scores", "cache.scores"),
    }
    assert str(folder) in plan["schema", NAME].reason and plan["schema", NAME].bytes > 0
    assert plan["output", NAME].bytes == 5
    collect(left, list(plan.values()))
    assert cached(left) == ["of_other"]
    assert not (left.home / "output" / NAME).exists()
    with duckdb.connect(str(left.path), read_only=True) as connection:
        schemas = connection.execute("SELECT DISTINCT schema_name FROM duckdb_tables()").fetchall()
        assert {name for (name,) in schemas} == {"main", "cache", "other"}
        assert connection.execute("SELECT name FROM main.transfers").fetchall() == [("other",)]


def test_results_stay_while_the_tables_that_name_them_stay(left: Store) -> None:
    plan = removable(left, None)
    collect(left, [item for (kind, _), item in plan.items() if kind not in ("schema", "output")])
    assert cached(left) == ["of_banking", "of_other"]


def test_a_transfer_that_was_moved_is_not_gone(left: Store, tmp_path: Path) -> None:
    moved = transfer_in(tmp_path / "moved" / NAME)
    assert removable(left, moved) == {}
    plan = list(removable(left, None).values())
    left.claim(NAME, moved)
    collect(left, plan)
    assert cached(left) == ["of_banking", "of_other"]
    assert (left.home / "output" / NAME / "models" / "m1").is_dir()


def test_a_failed_step_of_a_transfer_that_is_gone_holds_nothing_back(left: Store) -> None:
    begun(left)
    plan = collect_plan(left, [NAME])
    assert NAME not in {one.name for one in plan}, "one of which a run is going on is given as if it were here"
    collect(left, list(removable(left, None).values()))
    assert not (left.home / "output" / NAME / "models" / "m1").is_dir()


def test_a_transfer_whose_step_began_after_the_list_stays(left: Store) -> None:
    plan = list(removable(left, None).values())
    begun(left)
    collect(left, plan)
    assert cached(left) == ["of_banking", "of_other"]
    assert (left.home / "output" / NAME / "models" / "m1").is_dir()


def test_tables_that_no_folder_has_claimed_stay(store: Store) -> None:
    store.prepare(NAME)
    assert removable(store, None) == {}


def test_a_claim_whose_place_is_missing_too_is_no_proof(claimed: Store, folder: Path) -> None:
    """As after the home was moved alone, to which claims are relative."""
    folder.parent.rename(folder.parent.with_name("elsewhere"))
    assert not [item for item in collect_plan(claimed, []) if item.kind in ("schema", "output")]
