import multiprocessing
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import duckdb
import polars as pl
import pytest

from tuneshift_dag import TuneshiftError
from tuneshift_dag.store import Store, insert
from tuneshift_dag.store.tables import (
    CACHE,
    CACHED_RESPONSES,
    CACHED_SCORES,
    FILTERED_DATASET,
    PROPOSALS,
    REJECTED_PAIRS,
    SCHEMA_VERSION,
    SEED_SET,
    TRANSFER_TABLES,
)


def seeds(*prompts: str) -> pl.DataFrame:
    return SEED_SET.frame([{"prompt_id": p, "prompt": f"text of {p}", "response": f"answer to {p}"} for p in prompts])


def seed_ids(store: Store) -> list[str]:
    return store.read("SELECT prompt_id FROM seed_set ORDER BY 1", schema="transfer")["prompt_id"].to_list()


def test_every_table_is_there_and_empty_before_anything_is_written(store):
    for table in TRANSFER_TABLES:
        rows = store.read(f"SELECT * FROM {table.name}", schema="transfer")
        assert rows.is_empty()
        assert rows.schema == table.empty().schema


def test_a_column_that_an_older_file_lacks_is_added_empty(store, monkeypatch):
    store.replace("transfer", SEED_SET, seeds("old"))
    with store.transaction("transfer") as connection:
        connection.execute("ALTER TABLE seed_set DROP COLUMN response")
    monkeypatch.setattr("tuneshift_dag.store.file._READY", {})  # as in another process
    again = Store(store.path)
    assert again.read("SELECT prompt_id, response FROM seed_set", schema="transfer").rows() == [("old", None)]
    again.append_all("transfer", [(SEED_SET, seeds("new"))])
    assert again.read("SELECT response FROM seed_set WHERE prompt_id = 'new'", schema="transfer").item()


def test_replacing_twice_leaves_the_last_rows(store):
    store.replace("transfer", SEED_SET, seeds("a", "b"))
    store.replace("transfer", SEED_SET, seeds("b", "c"))
    assert seed_ids(store) == ["b", "c"]


def test_replacing_one_round_keeps_the_others(store):
    def rejected(round_: str, reason: str) -> pl.DataFrame:
        return REJECTED_PAIRS.frame([{"round": round_, "prompt_id": "a", "reason": reason}])

    for round_, reason in (("round_01", "x"), ("round_02", "x"), ("round_01", "y")):
        store.replace("transfer", REJECTED_PAIRS, rejected(round_, reason), round=round_)
    rows = store.read("SELECT round, reason FROM rejected_pairs ORDER BY round", schema="transfer")
    assert rows.rows() == [("round_01", "y"), ("round_02", "x")]


def test_a_failing_insert_keeps_the_old_rows_of_every_table(store):
    store.replace("transfer", SEED_SET, seeds("old"))
    call = {"round": "round_01", "proposal_id": "a", "call": 0, "seed_ids": [], "text": "x"}
    twice = PROPOSALS.frame([call] * 2)

    def statements(connection: duckdb.DuckDBPyConnection) -> None:
        connection.execute("DELETE FROM seed_set")
        insert(connection, SEED_SET, seeds("new"))
        insert(connection, PROPOSALS, twice)

    with pytest.raises(duckdb.ConstraintException):
        store.write("transfer", statements)
    assert seed_ids(store) == ["old"]


@pytest.mark.parametrize(
    "wrong", [seeds("new").drop("prompt"), seeds("new").with_columns(pl.lit(1).alias("extra"))], ids=["fewer", "more"]
)
def test_undeclared_columns_are_refused_and_the_old_rows_kept(store, wrong):
    store.replace("transfer", SEED_SET, seeds("old"))
    with pytest.raises(ValueError, match="seed_set: columns differ"):
        store.replace("transfer", SEED_SET, wrong)
    assert seed_ids(store) == ["old"]


def test_replacing_with_no_rows_empties_the_table(store):
    store.replace("transfer", SEED_SET, seeds("a"))
    store.replace("transfer", SEED_SET, SEED_SET.empty())
    assert seed_ids(store) == []


def test_columns_are_inserted_by_name(store):
    row = {"round": "round_01", "prompt_id": "a", "prompt": "the prompt", "response": "the response"}
    store.replace("transfer", FILTERED_DATASET, FILTERED_DATASET.frame([row])[:, ::-1])
    rows = store.read("SELECT prompt, response, round FROM filtered_dataset", schema="transfer")
    assert rows.rows() == [("the prompt", "the response", "round_01")]


def test_appending_leaves_the_first_row_of_a_key(store):
    for value in (-1.0, -2.0):
        store.append_all(CACHE, [(CACHED_SCORES, CACHED_SCORES.frame([{"key": "k", "sum_logprob": value}]))])
    assert store.read("SELECT key, sum_logprob FROM cache.scores").rows() == [("k", -1.0)]


def test_transfers_have_tables_of_their_own(store):
    store.replace("transfer", SEED_SET, seeds("a"))
    store.replace("other", SEED_SET, seeds("b"))
    assert seed_ids(store) == ["a"]


def test_a_file_of_a_newer_schema_is_refused(store, monkeypatch):
    store.prepare("transfer")
    with duckdb.connect(str(store.path)) as connection:
        connection.execute("UPDATE main.tuneshift_schema SET version = ?", [SCHEMA_VERSION + 1])
    monkeypatch.setattr("tuneshift_dag.store.file._READY", {})  # as in another process
    with pytest.raises(TuneshiftError, match=rf"schema version {SCHEMA_VERSION + 1}.*Upgrade") as error:
        Store(store.path).read("SELECT * FROM seed_set", schema="transfer")
    assert str(store.path) in str(error.value)


@pytest.mark.parametrize("folder", ["data", "clockwork"])
def test_a_file_that_is_not_duckdb_is_refused_at_once(tmp_path, folder):
    file = tmp_path / folder / "notes.duckdb"
    file.parent.mkdir()
    file.write_text("not a database")
    with pytest.raises(TuneshiftError, match=r"notes\.duckdb can't be opened as a DuckDB file"):
        Store(file).read("SELECT 1")
    assert file.read_text() == "not a database"


def test_a_damaged_file_is_refused(store):
    store.prepare("transfer")
    content = bytearray(store.path.read_bytes())
    content[20:28] = b"\xff" * 8
    store.path.write_bytes(content)
    with pytest.raises(TuneshiftError, match=store.path.name):
        Store(store.path).read("SELECT 1")


def zeroed(content: bytes) -> bytes:
    return content[:-300_000] + bytes(4096) + content[-300_000 + 4096 :]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content[: len(content) // 2], "can't be read or written: .*Could not read"),
        (lambda content: content[:100], "can't be opened as a DuckDB file: .*Could not read"),
        (zeroed, "can't be read or written: Corrupt database file: .*put a copy of it and its .wal back"),
    ],
    ids=["half", "head", "zeroed page"],
)
def test_a_damaged_file_is_named_and_left_as_it_is(store, damage, words):
    for start in range(0, 1_800, 600):
        append_responses(store, start)
    content = damage(store.path.read_bytes())
    store.path.write_bytes(content)
    with pytest.raises(TuneshiftError, match=rf"{store.path.name} {words}"):
        Store(store.path).read("SELECT sum(length(text)) FROM cache.responses")
    assert store.path.read_bytes() == content


def test_what_a_loss_of_power_left_half_written_is_named_with_its_repair(store):
    store.replace("transfer", SEED_SET, seeds("a"))
    whole = store.file.wal.stat().st_size
    append_responses(store, 0)
    content = bytearray(store.file.wal.read_bytes())
    middle = (whole + len(content)) // 2
    content[middle : middle + 512] = bytes(512)
    store.file.wal.write_bytes(content)
    with pytest.raises(
        TuneshiftError,
        match=r"can't be opened .* a loss of power .*: truncate -s \d+ '.*\.wal' && rm -f '.*\.wal-is-due'$",
    ) as error:
        seed_ids(store)
    assert store.file.wal.read_bytes() == content
    subprocess.run(str(error.value).rpartition(": ")[2], shell=True, check=True)
    assert seed_ids(store) == ["a"]
    append_responses(store, 0)
    assert store.read("SELECT count(*) FROM cache.responses").item() == 600


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_missing_wal_is_named_and_what_is_there_is_not_begun_anew(store, checkpoint):
    for start in range(0, 1_800 if checkpoint else 0, 600):
        append_responses(store, start)
    store.replace("transfer", SEED_SET, seeds("a"))
    wal = store.file.wal.read_bytes()
    store.file.wal.unlink()
    for again in (store, Store(store.path)):
        with pytest.raises(TuneshiftError, match=r"\.wal is missing.*delete .*wal-is-due"):
            again.replace("transfer", SEED_SET, seeds("b"))
    store.file.wal.write_bytes(wal)
    assert seed_ids(store) == ["a"]
    store.file.wal.unlink()
    with pytest.raises(TuneshiftError, match=r"\.wal is missing"):
        seed_ids(store)
    store.path.with_name(f"{store.path.name}.wal-is-due").unlink()
    assert seed_ids(store) == []


@pytest.mark.parametrize("damage", ["empty", "cut", "an older copy"])
def test_a_wal_that_isn_t_whole_is_named(store, damage):
    store.replace("transfer", SEED_SET, seeds("a"))
    older = store.file.wal.read_bytes()
    store.replace("transfer", SEED_SET, seeds("a", "b", "c"))
    whole = store.file.wal.read_bytes()
    store.file.wal.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "an older copy": older}[damage])
    for again in (store, Store(store.path)):
        with pytest.raises(TuneshiftError, match=rf"\.wal has \d+ of {len(whole)} bytes.*Put it back.*wal-is-due"):
            seed_ids(again)
    store.file.wal.write_bytes(whole)
    assert seed_ids(store) == ["a", "b", "c"]


def test_a_wal_lies_beside_the_file_that_a_link_leads_to(store, tmp_path):
    store.replace("transfer", SEED_SET, seeds("a"))
    link = tmp_path / "links" / "tuneshift.duckdb"
    link.parent.mkdir()
    link.symlink_to(store.path)
    linked = Store(link)
    linked.replace("transfer", SEED_SET, seeds("a", "b"))
    assert list(link.parent.iterdir()) == [link] and linked.file.wal == store.file.wal
    store.file.wal.unlink()
    with pytest.raises(TuneshiftError, match=r"\.wal is missing"):
        seed_ids(Store(link))


@pytest.mark.parametrize("made", ["CREATE TABLE transfers (x INT)", "CREATE VIEW transfers AS SELECT 1"])
def test_another_programs_database_is_left_alone(tmp_path, made):
    path = tmp_path / "tuneshift.duckdb"
    with duckdb.connect(str(path)) as connection:
        connection.execute(made)
    before = path.read_bytes()
    with pytest.raises(TuneshiftError, match=r"another program's database: it holds 'transfers'.*TUNESHIFT_HOME"):
        Store(path).replace("transfer", SEED_SET, seeds("a"))
    assert path.read_bytes() == before


def test_a_wal_that_another_program_took_in_is_not_missed(store, tmp_path):
    store.replace("transfer", SEED_SET, seeds("a"))
    with duckdb.connect(str(store.path)):
        pass  # it makes a checkpoint when it closes
    assert not store.file.wal.exists()
    (tmp_path / "copy").mkdir()
    for file in store.path.parent.iterdir():
        shutil.copyfile(file, tmp_path / "copy" / file.name)
    assert seed_ids(Store(tmp_path / "copy" / store.path.name)) == seed_ids(store) == ["a"]


def test_a_file_that_is_deleted_while_it_is_in_use_is_not_begun_anew(store):
    store.replace("transfer", SEED_SET, seeds("a"))
    moved = store.path.rename(store.path.with_name("moved"))
    with pytest.raises(TuneshiftError, match="was deleted or replaced while it was in use"):
        store.replace("transfer", SEED_SET, seeds("b"))
    with pytest.raises(TuneshiftError, match=r"is missing, and .*\.wal beside it is there"):
        Store(store.path).replace("transfer", SEED_SET, seeds("b"))
    moved.rename(store.path)
    assert seed_ids(store) == ["a"]
    for file in list(store.path.parent.iterdir()):
        file.unlink()
    assert seed_ids(Store(store.path)) == []


def test_a_process_that_holds_the_file_is_named(store, monkeypatch):
    monkeypatch.setattr("tuneshift_dag.store.file._LOCK_WAIT_SECONDS", 0.2)
    store.replace("transfer", SEED_SET, seeds("a"))
    hold = "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(store.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as browser:
        assert browser.stdout is not None and browser.stdout.readline() == "held\n"
        with pytest.raises(TuneshiftError, match=rf"in use by another process.*PID {browser.pid}"):
            store.replace("transfer", SEED_SET, seeds("b"))
        assert browser.stdin is not None
        browser.stdin.close()
    store.replace("transfer", SEED_SET, seeds("a", "b"))
    assert seed_ids(store) == ["a", "b"]


@pytest.mark.parametrize("size", [1_000_000, 6_000_000])
def test_what_was_committed_before_the_disk_was_full_is_there(store, size):
    store.prepare("transfer")
    written = 0
    with largest_file(size), pytest.raises(TuneshiftError, match=r"Could not write .*make room on") as error:
        for start in range(0, 6_000, 600):
            append_responses(store, start)
            written += 600
    # A commit whose checkpoint failed is in the `.wal`.
    written += 600 * ("COMMIT succeeded" in str(error.value))
    assert store.read("SELECT count(*) FROM cache.responses").item() == written
    append_responses(store, 6_000)
    assert store.read("SELECT count(*), sum(length(text)) FROM cache.responses").row(0)[0] == written + 600


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A write beyond ``size`` fails, as one does on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def test_a_commit_leaves_the_database_file_as_it_was(store):
    """What a killed process can't leave half written. The rows are in the ``.wal`` beside it."""
    store.replace("transfer", SEED_SET, seeds("a"))
    before = store.path.read_bytes()
    store.replace("transfer", SEED_SET, seeds("a", "b"))
    assert store.path.read_bytes() == before
    assert seed_ids(store) == ["a", "b"]


def append_responses(store: Store, start: int, characters: int = 8_000) -> None:
    """600 responses, 4.8 MB. Every second call makes a checkpoint: the ``.wal`` is full by then."""
    rows = [
        {
            "key": str(n),
            "text": random.Random(n).randbytes(characters // 2).hex(),
            "token_ids": [n],
            "finish_reason": "stop",
            "sum_logprob": -1.0,
            "eos_logprob": -0.1,
            "added_at": datetime(2026, 1, 1),
        }
        for n in range(start, start + 600)
    ]
    store.append_all(CACHE, [(CACHED_RESPONSES, CACHED_RESPONSES.frame(rows))])


def test_a_checkpoint_writes_what_was_added_and_not_the_table_anew(store):
    for start in range(0, 3_600, 600):
        append_responses(store, start)
    groups = store.read(
        "SELECT row_group_id, max(count) AS rows FROM pragma_storage_info('cache.responses') GROUP BY ALL ORDER BY 1"
    )
    assert groups["rows"].to_list() == [1_200] * 3
    assert store.read("SELECT count(DISTINCT key) FROM cache.responses").item() == 3_600


def test_replaced_rows_make_no_file_of_ever_larger_size(store):
    sizes = []
    for _ in range(6):
        with store.transaction(CACHE) as connection:
            connection.execute("DELETE FROM responses")
        append_responses(store, 0)
        append_responses(store, 600)
        sizes.append(
            store.read("SELECT used_blocks FROM pragma_database_size() WHERE database_name = 'tuneshift'").item()
        )
    assert max(sizes[2:]) <= max(sizes[:2])


def test_compacting_leaves_no_deleted_rows_in_the_file(store):
    for start in range(0, 2_400, 600):
        append_responses(store, start)
    before = store.read("SELECT used_blocks FROM pragma_database_size() WHERE database_name = 'tuneshift'").item()
    with store.transaction(CACHE, compact=True) as connection:
        connection.execute("DELETE FROM responses WHERE key::INTEGER % 4 > 0")
    after = store.read("SELECT used_blocks FROM pragma_database_size() WHERE database_name = 'tuneshift'").item()
    assert after < before / 2
    assert store.read("SELECT count(*) FROM cache.responses").item() == 600


def test_processes_that_append_the_same_keys_end_with_one_copy(store):
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    workers = [context.Process(target=_append_scores, args=(store.path, start)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    rows = store.read("SELECT key, sum_logprob FROM cache.scores ORDER BY sum_logprob").rows()
    assert rows == [(str(n), float(n)) for n in range(20)]


def _append_scores(path: Path, start: threading.Barrier) -> None:
    start.wait(60)
    for first in range(0, 20, 2):
        rows = [{"key": str(n), "sum_logprob": float(n)} for n in range(first, first + 2)]
        Store(path).append_all(CACHE, [(CACHED_SCORES, CACHED_SCORES.frame(rows))])


def test_a_read_waits_for_a_writer_in_another_process(store):
    store.replace("transfer", SEED_SET, seeds("a"))
    hold = (
        "import duckdb, sys, time; c = duckdb.connect(sys.argv[1]); print('held', flush=True); time.sleep(0.5);"
        "c.execute(\"INSERT INTO transfer.seed_set VALUES ('b', 'text', 'answer')\"); c.close()"
    )
    with subprocess.Popen([sys.executable, "-c", hold, str(store.path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "held\n"
        assert seed_ids(store) == ["a", "b"]


def test_a_read_waits_for_a_transaction_of_another_thread(store):
    store.replace("transfer", SEED_SET, seeds("a"))
    found: list[list[str]] = []
    reader = threading.Thread(target=lambda: found.append(seed_ids(store)))
    with store.transaction("transfer") as connection:
        reader.start()
        time.sleep(0.1)
        connection.execute("INSERT INTO seed_set VALUES ('b', 'text', 'answer')")
        assert found == []
    reader.join(10)
    assert found == [["a", "b"]]


def test_spooled_rows_replace_the_old_ones_and_leave_no_file(store):
    store.replace("transfer", SEED_SET, seeds("old"))
    with store.spool(SEED_SET) as spool:
        for prompts in (["a", "b"], [], ["c"]):
            spool.append(seeds(*prompts))
        assert len(spool) == 3
        for _ in range(2):
            assert [chunk["prompt_id"].to_list() for chunk in spool] == [["a", "b"], ["c"]]
        store.replace("transfer", SEED_SET, spool)
    assert seed_ids(store) == ["a", "b", "c"]
    assert {file.name.removeprefix(store.path.name) for file in store.path.parent.iterdir()} <= {
        "",
        ".wal",
        ".wal-is-due",
    }


def long_rows(chars: int, count: int) -> pl.DataFrame:
    return SEED_SET.frame([{"prompt_id": f"{i:05}", "prompt": f"{i:0{chars}}", "response": ""} for i in range(count)])


def test_spooled_rows_may_be_longer_than_the_memory_for_short_ones(store):
    """DuckDB holds 2,048 rows at once, here 82 MB of texts."""
    with store.spool(SEED_SET) as spool:
        for start in range(3):
            spool.append(long_rows(40_000, 1_000).with_columns(pl.col("prompt_id") + f"_{start}"))
        store.replace("transfer", SEED_SET, spool)
    found = store.read("SELECT count(*), min(length(prompt)) FROM seed_set", schema="transfer")
    assert found.row(0) == (3_000, 40_000)


def test_an_append_has_room_for_what_the_commit_before_left_to_a_checkpoint(store):
    """100 MB that wait in the ``.wal``, then rows whose commit writes them to the database file."""
    append_responses(store, 0, characters=160_000)
    assert store.path.with_name(store.path.name + ".wal").stat().st_size > 90_000_000
    for _ in range(2):  # the limit of the first look-up isn't that of the next connection
        store.read("SELECT 1 FROM cache.scores", little_memory=True)
    append_responses(store, 600)
    lengths = store.read("SELECT length(text) AS length FROM cache.responses ORDER BY 1")["length"]
    assert lengths.to_list() == [8_000] * 600 + [160_000] * 600


def test_spooled_rows_have_room_to_replace_what_waits_for_a_checkpoint(store):
    texts = [random.Random(n).randbytes(50_000).hex() for n in range(1_000)]
    rows = [{"prompt_id": str(n), "prompt": text, "response": ""} for n, text in enumerate(texts)]
    store.replace("transfer", SEED_SET, SEED_SET.frame(rows))
    assert store.path.with_name(store.path.name + ".wal").stat().st_size > 90_000_000
    with store.spool(SEED_SET) as spool:
        spool.append(seeds("a"))
        store.replace("transfer", SEED_SET, spool)
    assert seed_ids(store) == ["a"]


def test_a_transaction_that_has_too_little_memory_is_done_again_without_a_limit(store, monkeypatch):
    monkeypatch.setattr("tuneshift_dag.store._LITTLE_MEMORY", 1)
    for start in (0, 0, 600):
        append_responses(store, start, characters=8)
    assert store.read("SELECT key FROM cache.responses ORDER BY key::INTEGER")["key"].to_list() == [
        str(n) for n in range(1_200)
    ]
    store.replace("transfer", SEED_SET, seeds("a"))
    with store.spool(SEED_SET) as spool:
        spool.append(seeds("b", "c"))
        store.replace("transfer", SEED_SET, spool)
    assert seed_ids(store) == ["b", "c"]


def test_little_memory_is_no_limit_to_the_rows_of_a_result(store):
    store.replace("transfer", SEED_SET, long_rows(32_000, 2_048))
    query = "SELECT * FROM seed_set WHERE prompt_id IN (SELECT unnest(?))"
    found = store.read(query, [[f"{i:05}" for i in range(2_048)]], "transfer", little_memory=True)
    assert found.height == 2_048 and set(found["prompt"].str.len_chars()) == {32_000}


def test_spooled_rows_of_a_failing_transaction_leave_the_old_ones(store):
    store.replace("transfer", SEED_SET, seeds("old"))
    with store.spool(SEED_SET) as spool:
        for prompts in (["a"], ["a"]):
            spool.append(seeds(*prompts))
        with pytest.raises(duckdb.ConstraintException):
            store.replace("transfer", SEED_SET, spool)
    assert seed_ids(store) == ["old"]


def test_tables_and_views_can_be_copied_out_as_parquet(store: Store, tmp_path: Path) -> None:
    """The command of docs/cluster.md, and back into an empty database."""
    dropped = REJECTED_PAIRS.frame([{"round": "round_01", "prompt_id": "a", "reason": "unsure"}])
    store.replace("transfer", SEED_SET, seeds("a", "b"))
    store.replace("transfer", REJECTED_PAIRS, dropped)
    with duckdb.connect(str(store.path), read_only=True) as connection:
        connection.execute(f"EXPORT DATABASE '{tmp_path / 'export'}' (FORMAT parquet)")
    with duckdb.connect() as other:
        other.execute(f"IMPORT DATABASE '{tmp_path / 'export'}'")
        assert other.execute("SELECT prompt_id FROM transfer.seed_set ORDER BY 1").fetchall() == [("a",), ("b",)]
        assert other.execute("SELECT stage, reason FROM transfer.rejections").fetchall() == [("pair", "unsure")]


# --- paths, and whose tables they are ---


def test_paths_inside_the_folder_of_the_file_are_relative_to_it(store: Store, tmp_path: Path) -> None:
    inside = store.path.parent / "output" / "banking" / "models" / "m1"
    assert store.home == store.path.parent.resolve()
    assert store.relative(inside) == "output/banking/models/m1"
    assert store.absolute("output/banking/models/m1") == inside
    assert store.relative(tmp_path / "elsewhere") == str(tmp_path / "elsewhere")
    assert store.absolute(str(tmp_path / "elsewhere")) == tmp_path / "elsewhere"


def test_a_path_is_relative_also_by_way_of_a_link(store: Store, tmp_path: Path) -> None:
    store.prepare(None)
    (tmp_path / "large_disk").mkdir()
    (store.home / "output").symlink_to(tmp_path / "large_disk")
    (tmp_path / "link").symlink_to(store.home)
    assert store.relative(store.home / "output" / "m1") == "output/m1"
    assert store.relative(tmp_path / "link" / "m1") == "m1"


def transfer_in(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "transfer.yaml").touch()
    return folder


def claims(store: Store) -> list[tuple[str, Path]]:
    rows = store.read("SELECT name, folder FROM main.transfers ORDER BY name").rows()
    return [(name, store.absolute(folder)) for name, folder in rows]


@pytest.mark.parametrize("other", ["banking", "Banking"])
def test_two_folders_of_one_name_are_refused(store: Store, tmp_path: Path, other: str) -> None:
    first, second = transfer_in(tmp_path / "a" / "banking"), transfer_in(tmp_path / "b" / other)
    store.claim("banking", first)
    for again in (store, Store(store.path)):
        again.claim("banking", first)
        with pytest.raises(TuneshiftError, match="TUNESHIFT_HOME") as error:
            again.claim(other, second)
        assert str(first) in str(error.value) and str(second) in str(error.value)
    assert claims(store) == [("banking", first)]


def test_transfers_of_different_names_have_one_file(store: Store, tmp_path: Path) -> None:
    folders = {name: transfer_in(tmp_path / name) for name in ("banking", "slots")}
    for name, folder in folders.items():
        store.claim(name, folder)
    assert dict(claims(store)) == folders


def test_a_folder_that_was_moved_takes_over_its_tables(store: Store, tmp_path: Path) -> None:
    first = transfer_in(tmp_path / "a" / "banking")
    store.claim("banking", first)
    store.replace("banking", SEED_SET, seeds("a"))
    (tmp_path / "b").mkdir()
    moved = first.rename(tmp_path / "b" / "banking")
    store.claim("banking", moved)
    assert claims(store) == [("banking", moved)]
    assert store.read("SELECT prompt_id FROM seed_set", schema="banking").rows() == [("a",)]


def test_a_folder_without_a_transfer_in_it_holds_no_name(store: Store, tmp_path: Path) -> None:
    first, second = transfer_in(tmp_path / "a" / "banking"), transfer_in(tmp_path / "b" / "banking")
    store.claim("banking", first)
    (first / "transfer.yaml").unlink()
    store.claim("banking", second)
    assert claims(store) == [("banking", second)]


def test_a_link_to_a_folder_is_no_other_folder(store: Store, tmp_path: Path) -> None:
    folder = transfer_in(tmp_path / "a" / "banking")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    store.claim("banking", folder)
    store.claim("banking", tmp_path / "link" / "banking")
    assert claims(store) == [("banking", folder)]


def test_a_project_that_was_moved_or_copied_with_its_store_is_no_other_one(tmp_path: Path) -> None:
    folder = transfer_in(tmp_path / "project" / "transfers" / "banking")
    Store(tmp_path / "project" / "home" / "tuneshift.duckdb").claim("banking", folder)
    shutil.copytree(tmp_path / "project", tmp_path / "copy")
    copy = Store(tmp_path / "copy" / "home" / "tuneshift.duckdb")
    copy.claim("banking", tmp_path / "copy" / "transfers" / "banking")
    assert claims(copy) == [("banking", tmp_path / "copy" / "transfers" / "banking")]
