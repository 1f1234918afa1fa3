"""Files of older versions: they open, keep their rows, and lose what nothing reads any more."""

from pathlib import Path

import duckdb
import pytest

from tuneshift_dag import TuneshiftError
from tuneshift_dag.method import Response
from tuneshift_dag.store import Store
from tuneshift_dag.store.cache import ResponseCache, collect_plan
from tuneshift_dag.store.tables import CACHE, CACHE_TABLES, CACHED_SCORES, SCHEMA_VERSION, SCORED_PAIRS, TRANSFER_TABLES

TO_VERSION = {
    4: """
        UPDATE main.tuneshift_schema SET version = 4;
        ALTER TABLE banking.scored_pairs DROP COLUMN base_alone_logprob;
        ALTER TABLE banking.scored_pairs DROP COLUMN ppl_base_alone;
        ALTER TABLE banking.scored_pairs DROP COLUMN ppl_target;
        ALTER TABLE banking.scored_pairs DROP COLUMN discriminator_score;
        DROP TABLE cache.token_scores;
    """,
    3: "",
    2: """
        UPDATE main.tuneshift_schema SET version = 2;
        ALTER TABLE banking.scored_pairs ADD PRIMARY KEY (round, prompt_id);
        ALTER TABLE cache.responses ADD PRIMARY KEY (key);
        ALTER TABLE cache.scores ADD PRIMARY KEY (key);
        ALTER TABLE cache.token_scores ADD PRIMARY KEY (key);
    """,
    1: """
        UPDATE main.tuneshift_schema SET version = 1;
        ALTER TABLE banking.filtered_dataset ADD PRIMARY KEY (round, prompt_id);
        ALTER TABLE banking.rejected_pairs ADD PRIMARY KEY (round, prompt_id);
        ALTER TABLE banking.steps DROP COLUMN peak_bytes;
        ALTER TABLE banking.scored_pairs DROP COLUMN ppl_target;
        DROP TABLE cache.token_scores;
    """,
}


def older(path: Path, version: int) -> Store:
    """A store whose file was written by an older version."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with duckdb.connect(str(path)) as connection:
        connection.execute(Path(__file__).with_name("version_3.sql").read_text())
        connection.execute(TO_VERSION[version])
    return Store(path)


@pytest.fixture(params=sorted(TO_VERSION))
def migrated(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    older(tmp_path / "old" / "tuneshift.duckdb", request.param).prepare("banking")
    # What the migration committed is in the .wal still: this reads it as another process would.
    return Store(tmp_path / "old" / "tuneshift.duckdb")


def test_an_older_file_becomes_one_of_this_version(migrated: Store) -> None:
    assert migrated.read("SELECT max(version) FROM main.tuneshift_schema").item() == SCHEMA_VERSION
    for schema, tables in (("banking", TRANSFER_TABLES), (CACHE, CACHE_TABLES)):
        for table in tables:
            found = migrated.read(f'SELECT * FROM "{schema}".{table.name}')
            assert dict(found.schema) == dict(table.empty().schema)
    found = migrated.read("SELECT schema_name || '.' || table_name AS name FROM duckdb_tables()")["name"]
    names = {f"banking.{table.name}" for table in TRANSFER_TABLES} | {f"cache.{table.name}" for table in CACHE_TABLES}
    assert set(found) == names | {"main.tuneshift_schema", "main.transfers"}
    assert collect_plan(migrated, []) == []


def test_the_rows_of_an_older_file_are_kept(migrated: Store) -> None:
    pairs = migrated.read("SELECT prompt_id, ppl_fine_tuned, ppl_base FROM scored_pairs", (), "banking")
    assert pairs.rows() == [("a1", 1.1, 2.5)]
    assert migrated.read("SELECT prompt FROM seed_set", (), "banking").rows() == [("Where is my card?",)]
    rejections = migrated.read("SELECT prompt_id, reason FROM rejections", (), "banking").rows()
    assert rejections == [("b2", "below_threshold")]


def test_cached_results_of_an_older_file_are_still_valid(migrated: Store) -> None:
    cache = ResponseCache(migrated)
    assert cache.responses(["kept", "other"]) == {"kept": Response("late_transfer", [1, 2], "stop", -0.5, -0.1)}
    assert cache.scores(["kept score"]) == {"kept score": -1.5}
    assert migrated.read("SELECT added_at FROM cache.responses").rows() == [(None,)]
    migrated.append_all(CACHE, [(CACHED_SCORES, CACHED_SCORES.frame([{"key": "kept score", "sum_logprob": -9.0}]))])
    assert cache.scores(["kept score"]) == {"kept score": -1.5}


def test_tables_without_an_index_lose_that_of_an_older_file(migrated: Store) -> None:
    constraints = "SELECT table_name FROM duckdb_constraints() WHERE constraint_type = 'PRIMARY KEY'"
    keys = set(migrated.read(constraints)["table_name"])
    assert {"scored_pairs", "filtered_dataset", "rejected_pairs", "responses", "scores"}.isdisjoint(keys)
    assert {"seed_set", "distilled_models", "attempts"} <= keys


def test_paths_of_adapters_become_relative_to_the_file(migrated: Store) -> None:
    paths = dict(migrated.read("SELECT model_id, path FROM distilled_models", (), "banking").iter_rows())
    assert paths == {"m1": "output/banking/models/m1", "m2": "/elsewhere/m2"}
    assert migrated.absolute(paths["m1"]) == migrated.path.parent.resolve() / "output" / "banking" / "models" / "m1"
    assert migrated.absolute(paths["m2"]) == Path("/elsewhere/m2")


def test_every_transfer_of_an_older_file_is_migrated_though_one_is_opened(tmp_path: Path) -> None:
    store = older(tmp_path / "old.duckdb", 3)
    with duckdb.connect(str(store.path)) as connection:
        connection.execute("CREATE SCHEMA other")
        connection.execute("CREATE TABLE other.steps AS FROM banking.steps")
        connection.execute("CREATE TABLE other.scored_pairs AS FROM banking.scored_pairs")
        connection.execute("CREATE TABLE other.distilled_models (model_id VARCHAR PRIMARY KEY, path VARCHAR)")
        connection.execute(
            "INSERT INTO other.distilled_models VALUES ('m', '/a/output/banking/b/output/other/models/m')"
        )
    store.prepare("banking")
    again = Store(store.path)
    assert again.read("SELECT path FROM distilled_models", (), "other").item() == "output/other/models/m"
    assert set(again.read("FROM scored_pairs", (), "other").columns) == {c.name for c in SCORED_PAIRS.columns}


def test_a_failing_migration_leaves_the_old_file_usable(tmp_path: Path) -> None:
    store = older(tmp_path / "old.duckdb", 3)
    with duckdb.connect(str(store.path)) as connection:
        # DuckDB drops no column that an index is over.
        connection.execute("CREATE INDEX of_a_user ON banking.scored_pairs (discriminator_score)")
    with pytest.raises(
        TuneshiftError, match=r"old\.duckdb can't be brought from schema version 3 to \d+, and stays as"
    ):
        store.read("FROM scored_pairs", schema="banking")
    with duckdb.connect(str(store.path)) as connection:
        assert connection.execute("SELECT version FROM main.tuneshift_schema").fetchall() == [(3,)]
        row = "SELECT ppl_base_alone, discriminator_score FROM banking.scored_pairs"
        assert connection.execute(row).fetchall() == [(3.5, 0.7)]
        assert connection.execute("SELECT key FROM cache.token_scores").fetchall() == [("masked",)]
        path = connection.execute("SELECT path FROM banking.distilled_models WHERE current").fetchone()
        assert path == ("/somewhere/.tuneshift/output/banking/models/m1",)
        connection.execute("DROP INDEX banking.of_a_user")
    assert Store(store.path).read("SELECT prompt_id FROM scored_pairs", schema="banking").rows() == [("a1",)]
