"""The SQL that assets and reports share. The views themselves: tests/reports/test_lineage.py."""

import polars as pl
import pytest

from tests.conftest import Project
from tuneshift_dag.store import Store
from tuneshift_dag.store.queries import COLUMN_SOURCES, TRANSFER_VIEWS, of_its_rounds, verdicts
from tuneshift_dag.store.tables import SCORED_PAIRS, TRANSFER_TABLES


@pytest.fixture
def scored(project: Project) -> Project:
    """A transfer of two rounds, with pairs in three: one is left over from when there were more."""
    scored = {"fine_tuned_response": " a", "fine_tuned_tokens": 2, "fine_tuned_finish": "stop"}
    rows = [
        {"round": round_, "prompt_id": prompt, "prompt": prompt, "ppl_fine_tuned": mine, "ppl_base": base, **scored}
        for round_, prompt, mine, base in (
            ("round_01", "sure", 1.1, 2.0),
            ("round_02", "unsure", 1.6, 2.5),
            ("round_03", "left_over", 1.1, 2.0),
        )
    ]
    frame = pl.concat([SCORED_PAIRS.empty(), SCORED_PAIRS.frame(rows)])
    project.store.replace(project.folder.name, SCORED_PAIRS, frame)
    return project


def reasons(project: Project, query: str) -> list[tuple[str, str | None]]:
    return project.store.read(f"SELECT prompt_id, reason FROM ({query}) ORDER BY 1", schema=project.folder.name).rows()


def test_verdicts_are_by_the_rule_and_threshold_of_the_transfer(scored: Project) -> None:
    assert reasons(scored, verdicts(scored.transfer)) == [("sure", None), ("unsure", "fine_tuned_not_confident")]


def test_verdicts_by_another_rule_or_threshold(scored: Project) -> None:
    assert reasons(scored, verdicts(scored.transfer, threshold=1.7)) == [("sure", None), ("unsure", None)]
    by_ratio = [("sure", None), ("unsure", "below_threshold")]
    assert reasons(scored, verdicts(scored.transfer, "ratio", 1.6)) == by_ratio
    assert reasons(scored, verdicts(scored.transfer, "ratio", "1.6::DOUBLE")) == by_ratio


def test_rounds_that_the_transfer_no_longer_has_are_left_out(scored: Project) -> None:
    left = scored.store.read(f"SELECT round FROM {of_its_rounds(scored.transfer, 'scored_pairs')}", (), "banking")
    assert sorted(left["round"]) == ["round_01", "round_02"]


def test_every_view_can_be_read_and_is_that_of_a_transfer(store: Store) -> None:
    for view in TRANSFER_VIEWS:
        assert store.read(f"FROM {view.name}", (), "transfer").is_empty()
    assert set(store.read("SELECT schema_name FROM duckdb_views() WHERE NOT internal")["schema_name"]) == {"transfer"}


def test_every_column_with_a_source_and_every_source_is_declared() -> None:
    known = {table.name: {column.name for column in table.columns} for table in TRANSFER_TABLES}
    for table, columns in COLUMN_SOURCES.items():
        assert set(columns) == known[table]
        assert all(column in known[source] for sources in columns.values() for source, column in sources)
