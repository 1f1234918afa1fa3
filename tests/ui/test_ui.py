"""The loop in Dagster's UI: real packaged models under a real webserver and daemon.

One story, told in order: every test goes on where the one before it stopped. Clicks need Chromium; where it isn't
installed the same is asked over GraphQL, as the UI does.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from playwright.sync_api import Page, sync_playwright

from tests.conftest import edit
from tests.ui import browser
from tests.ui.server import Server, wait_for
from tests.ui.transfers import make_transfer
from tuneshift_dag.store import Store
from tuneshift_dag.store.records import ROUND_ASSETS

pytestmark = pytest.mark.ui

ROUNDS = ["round_01", "round_02"]
WHOLE_ASSETS = ["seed_set", "threshold_report", "distilled_model", "evaluation"]
THRESHOLD = 1.3
CALLS = 24
Place = tuple[str, str | None]


class Deployment:
    """A running `dagster dev` with two transfers: ``moved`` for clicks, ``driven`` for the automation."""

    first_versions: dict[str, Any]
    first_seeds: dict[str, Any]

    def __init__(self, root: Path) -> None:
        self.folder = make_transfer(root, "moved", **{"filter.threshold": THRESHOLD})
        # Another seed samples other prompts, so it finds nothing of ``moved`` in the cache; small batches can be
        # interrupted between.
        make_transfer(root, "driven", seed=1, **{"models.batch_size": 2, "generator.calls_per_round": CALLS})
        self.server = Server(root)
        self.server.start()
        self.instance = dg.DagsterInstance.from_config(self.server.environment["DAGSTER_HOME"])
        self.store = Store(root / "home" / "tuneshift.duckdb")

    def stop(self) -> None:
        self.server.stop()
        self.instance.dispose()

    def rows(self, query: str, *parameters: Any, transfer: str = "moved") -> list[tuple[Any, ...]]:
        return self.store.read(query, list(parameters), transfer).rows()

    def materialization(self, asset: str, round_: str | None = None, transfer: str = "moved") -> Any:
        """The latest one's event record, or None."""
        where = dg.AssetRecordsFilter(dg.AssetKey([transfer, asset]), asset_partitions=[round_] if round_ else None)
        return next(iter(self.instance.fetch_materializations(where, limit=1).records), None)

    def step_started(self, run_id: str, asset: str) -> float:
        logs = self.instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_START)
        return next(log.timestamp for log in logs if log.step_key == f"moved__{asset}")

    def finished_backfill(self, number: int) -> str:
        """The id of the ``number``th backfill, once it and all its runs have succeeded."""
        latest = wait_for(
            lambda: next(
                (b for b in self._backfills(number) if b.status.value.startswith(("COMPLETED", "FAIL"))), None
            ),
            600,
            f"backfill {number} doesn't end",
        )
        filters = dg.RunsFilter(tags={"dagster/backfill": latest.backfill_id})
        runs = [(run.run_id, run.status.value) for run in self.instance.get_runs(filters)]
        assert {status for _, status in runs} == {"SUCCESS"}, runs
        return str(latest.backfill_id)

    def _backfills(self, number: int) -> list[Any]:
        backfills = self.instance.get_backfills()
        assert len(backfills) <= number
        return [max(backfills, key=lambda b: b.backfill_timestamp)] if len(backfills) == number else []

    def finished_run(self, run_id: str) -> str:
        """The status that a run ends with."""
        return str(wait_for(lambda: self._ended(run_id), 90, f"run {run_id} doesn't end"))

    def _ended(self, run_id: str) -> str | None:
        run = self.instance.get_run_by_id(run_id)
        return run.status.value if run and run.is_finished else None

    def unsynced(self) -> dict[Place, set[str]]:
        """Everything that the UI marks so, with the reasons that it shows."""
        found = {}
        rounds = self.server.assets("moved", ROUND_ASSETS, by_round=True)
        for asset, node in rounds.items():
            statuses, causes = node["staleStatusByPartition"], node["staleCausesByPartition"]
            found |= {(asset, r): (s, c) for r, s, c in zip(ROUNDS, statuses, causes, strict=True)}
        for asset, node in self.server.assets("moved", WHOLE_ASSETS, by_round=False).items():
            found[asset, None] = node["staleStatus"], node["staleCauses"]
        assert {status for status, _ in found.values()} <= {"FRESH", "STALE"}
        return {
            place: {f"{cause['key']['path'][-1]} {cause['reason']}" for cause in causes}
            for place, (status, causes) in found.items()
            if status == "STALE"
        }

    def versions(self) -> dict[str, Any]:
        """The data versions of the dataset's rounds, and of the model."""
        dataset = self.server.assets("moved", ["filtered_dataset"], by_round=True)["filtered_dataset"]
        model = self.server.assets("moved", ["distilled_model"], by_round=False)["distilled_model"]
        return {"dataset": dataset["dataVersionByPartition"], "model": model["dataVersion"]}

    def seeds(self) -> dict[str, Any]:
        """The prompts that seed the calls of each round."""
        query = "SELECT call, slot, prompt_id FROM round_seeds WHERE round = ? ORDER BY ALL"
        return {round_: self.rows(query, round_) for round_ in ROUNDS}

    def cost(self, batch: str) -> dict[str, tuple[int, int, int, float]]:
        """By asset: steps, model calls, answers from the cache and seconds of model time of a run or backfill."""
        query = """
            SELECT asset, count(*), sum(model_calls), sum(cache_hits), sum(model_seconds) FROM steps
            WHERE batch_id = ? GROUP BY asset"""
        schema = "moved" if self.rows(query, batch) else "driven"
        return {asset: (steps, *rest) for asset, steps, *rest in self.rows(query, batch, transfer=schema)}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    deployment = Deployment(tmp_path_factory.mktemp("ui"))
    yield deployment
    deployment.stop()


@pytest.fixture
def page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser.CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(15_000)
        yield page
        chromium.close()


@browser.needs_chromium
def test_materialize_all_can_be_clicked(here: Deployment, page: Page) -> None:
    browser.materialize_all(page, here.server.url, "asset-groups/moved/lineage")
    assert len(here.instance.get_backfills()) == 1


def test_one_backfill_runs_the_rounds_in_order_then_trains_and_evaluates(here: Deployment) -> None:
    if not here.instance.get_backfills():
        here.server.launch_backfill("moved", [*WHOLE_ASSETS, *ROUND_ASSETS], ROUNDS)
    here.finished_backfill(1)
    first, second = (here.materialization("filtered_dataset", round_) for round_ in ROUNDS)
    assert here.step_started(second.run_id, "synthetic_prompts") > first.timestamp
    model, evaluation = here.materialization("distilled_model"), here.materialization("evaluation")
    assert second.timestamp < here.step_started(model.run_id, "distilled_model")
    assert model.timestamp < evaluation.timestamp
    assert here.unsynced() == {}
    assert min(n for (n,) in here.rows("SELECT count(*) FROM filtered_dataset GROUP BY round")) > 1
    here.first_versions, here.first_seeds = here.versions(), here.seeds()


@pytest.fixture(scope="module")
def lower(here: Deployment) -> float:
    """A threshold that drops a pair that seeded round_02, and as few others as possible."""
    query = """
        SELECT max(ppl_fine_tuned) FROM filtered_dataset WHERE round = 'round_01' AND prompt_id IN (
            SELECT prompt_id FROM round_seeds WHERE round = 'round_02')"""
    return float(here.rows(query)[0][0])


@browser.needs_chromium
def test_definitions_can_be_reloaded_by_a_click(here: Deployment, page: Page, lower: float) -> None:
    edit(here.folder, {"filter.threshold": lower})
    browser.reload_definitions(page, here.server.url, "moved")
    wait_for(here.unsynced, 30, "the new definitions don't show")


def test_a_threshold_makes_the_dataset_stale_in_every_round(here: Deployment, lower: float) -> None:
    edit(here.folder, {"filter.threshold": lower})
    here.server.reload()
    assert here.unsynced() == {
        ("filtered_dataset", "round_01"): {"filtered_dataset has a new code version"},
        ("filtered_dataset", "round_02"): {"filtered_dataset has a new code version"},
        ("threshold_report", None): {"threshold_report has a new code version"},
    }


def test_refiltering_asks_no_model_and_names_what_it_changed(here: Deployment) -> None:
    refilter(here)
    changed = [round_ for round_, seeds in here.seeds().items() if seeds != here.first_seeds[round_]]
    assert changed == ["round_02"]
    assert here.unsynced() == {
        ("synthetic_prompts", "round_02"): {"round_seeds has a new data version"},
        ("distilled_model", None): {"filtered_dataset has a new data version"},
        ("threshold_report", None): {
            "threshold_report has a new code version",
            "filtered_dataset has a new data version",
        },
    }


def refilter(here: Deployment) -> None:
    """The refilter job: one run judges every round."""
    run = here.server.launch("moved_refilter")
    assert here.finished_run(run) == "SUCCESS"
    assert here.cost(run) == {"filtered_dataset": (2, 0, 0, 0.0)}


def test_a_threshold_moved_back_trains_nothing(here: Deployment) -> None:
    run = here.server.materialize("moved", "distilled_model")
    assert here.finished_run(run) == "SUCCESS"
    assert here.cost(run)["distilled_model"][-1] > 0
    assert here.versions()["model"] != here.first_versions["model"]

    edit(here.folder, {"filter.threshold": THRESHOLD})
    here.server.reload()
    refilter(here)
    assert here.versions()["dataset"] == here.first_versions["dataset"]
    assert here.unsynced() == {
        ("distilled_model", None): {"filtered_dataset has a new data version"},
        ("evaluation", None): {"distilled_model has a new data version"},
    }
    run = here.server.materialize("moved", "distilled_model")
    assert here.finished_run(run) == "SUCCESS"
    assert here.cost(run) == {"distilled_model": (1, 0, 0, 0.0)}
    assert here.versions() == here.first_versions
    assert here.seeds() == here.first_seeds
    assert here.unsynced() == {}


def test_a_terminated_run_frees_its_slot_and_keeps_its_batches(here: Deployment) -> None:
    """The automation starts round_01 by itself; it is terminated while prompts are written."""
    count = "SELECT count(*) FROM cache.responses"
    here.server.start_sensor("driven_automation")
    assert here.finished_run(here.server.materialize("driven", "seed_set")) == "SUCCESS"
    ((before,),) = here.rows(count)
    wait_for(lambda: here.rows(count)[0][0] >= before + 2, 60, "the automation doesn't start round_01", pause=0.2)
    (run,) = here.instance.get_runs(dg.RunsFilter(tags={"dagster/sensor_name": "driven_automation"}))
    assert [slot["runId"] for slot in here.server.slots("models")] == [run.run_id]
    here.server.terminate(run.run_id)
    assert here.finished_run(run.run_id) == "CANCELED"
    wait_for(lambda: here.server.slots("models") == [], 30, "the slot stays taken")
    committed = here.rows(count)[0][0] - before
    assert here.rows("SELECT * FROM proposals", transfer="driven") == []

    again = here.server.materialize("driven", *ROUND_ASSETS, round_="round_01")
    assert here.finished_run(again) == "SUCCESS"
    _, calls, cached, _ = here.cost(again)["synthetic_prompts"]
    assert (calls, cached) == (CALLS - committed, committed)


def test_the_automation_goes_on_to_the_evaluation(here: Deployment) -> None:
    """Meanwhile another transfer runs: both want the pool and write the one DuckDB file."""
    other = here.server.materialize("moved", "seed_set")
    wait_for(lambda: here.materialization("evaluation", transfer="driven"), 300, "the automation doesn't end")
    assert here.finished_run(other) == "SUCCESS"
    runs = here.instance.get_runs(dg.RunsFilter(tags={"dagster/sensor_name": "driven_automation"}), ascending=True)
    assert [run.tags.get("dagster/partition") for run in runs] == ["round_01", "round_02", None]
    models = here.rows("SELECT model FROM accuracy", transfer="driven")
    assert len(models) == 4
