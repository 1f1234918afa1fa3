"""A round is scored in chunks: what it gives is the same, and memory holds one chunk."""

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.assets.test_graph import add_prompts, failure, materializations
from tests.conftest import Project
from tests.fake_engine import FakeEngine
from tuneshift_dag.method import Decoding, Pair, Response, Side
from tuneshift_dag.method.scoring import Cost

CHUNK = 8


class Ids(list[int]):
    """A list that can be watched."""


class WatchedEngine(FakeEngine):
    """Records how many of the prompts and pairs that it ever gave are in memory at a time."""

    def __init__(self) -> None:
        super().__init__("watched")
        self.chunk_size = CHUNK
        self.given: list[weakref.ref[Any]] = []
        self.most_alive = 0

    def encode(self, text: str, templated: bool = False) -> list[int]:
        return self._watch(Ids(super().encode(text)))

    def pairs(
        self, prompts: Sequence[list[int]], known: Sequence[dict[Side, Response]], decoding: Decoding
    ) -> Iterator[list[tuple[int, Pair]]]:
        for batch in super().pairs(prompts, known, decoding):
            for _, pair in batch:
                for part in (pair, pair.base, pair.fine_tuned):
                    self._watch(part)
            yield batch

    def _watch(self, item: Any) -> Any:
        self.given.append(weakref.ref(item))
        self.most_alive = max(self.most_alive, sum(given() is not None for given in self.given))
        return item


def test_memory_holds_a_chunk_however_many_prompts_there_are(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[int] = []
    timed = Cost.timed
    monkeypatch.setattr(Cost, "timed", lambda self, batches: keys.append(len(self.keys)) or timed(self, batches))
    most = []
    for round_, count in (("round_01", 2 * CHUNK), ("round_02", 10 * CHUNK)):
        project.models.source = engine = WatchedEngine()
        add_prompts(project, round_, *(f"{round_}, number {i}" for i in range(count)))
        assert project.materialize("scored_pairs", round=round_).success
        assert len(engine.given) == 6 * count, "the fake encodes its responses too"
        most.append(engine.most_alive)
    assert most[0] == most[1] <= 5 * CHUNK
    assert keys == [CHUNK] * 12, "a chunk has its own cache keys, and none of the one before"


def test_chunks_give_what_the_whole_round_gives(project: Project) -> None:
    add_prompts(project, "round_01", *(f"number {i}" for i in range(3 * CHUNK + 1)))
    found = []
    for chunk_size in (1000, CHUNK, CHUNK + 5):
        project.models.source = FakeEngine(f"source of {chunk_size}")
        project.models.source.chunk_size = chunk_size
        assert project.materialize("scored_pairs", round="round_01").success
        event = materializations(project, "scored_pairs", "round_01")[0].asset_materialization
        changing = ("seconds", "peak_memory_mb")
        metadata = {key: value for key, value in event.metadata.items() if key not in changing}
        used = project.rows("SELECT count(*), count(DISTINCT key) FROM cache_references WHERE asset = 'scored_pairs'")
        found.append(
            (
                project.rows("SELECT * FROM scored_pairs ORDER BY prompt_id"),
                event.tags["dagster/data_version"],
                metadata,
                used,
            )
        )
    assert found[0] == found[1] == found[2]
    assert len(found[0][0]) == 3 * CHUNK + 1 and found[0][3] == [(4 * (3 * CHUNK + 1),) * 2]


def test_a_step_records_what_ran_and_how_many_tokens_it_made(project: Project) -> None:
    """`tuneshift plan` takes its speeds from there."""
    add_prompts(project, "round_01", "one", "two")
    assert project.materialize("scored_pairs", round="round_01").success
    tokens = project.rows("SELECT sum(base_tokens + fine_tuned_tokens) FROM scored_pairs")
    [(models, engine, generated)] = project.rows("SELECT models, engine, tokens_generated FROM steps")
    assert (models, engine) == (project.transfer.config.source.base, "local")
    assert [(generated,)] == tokens


def test_a_step_that_fails_in_a_later_chunk_leaves_the_table_and_keeps_what_was_computed(project: Project) -> None:
    add_prompts(project, "round_01", *(f"number {i}" for i in range(2 * CHUNK)))
    assert project.materialize("scored_pairs", round="round_01").success
    before = project.rows("SELECT * FROM scored_pairs ORDER BY prompt_id")

    class Killed(FakeEngine):
        chunk_size = CHUNK

        def pairs(self, *arguments: Any) -> Any:
            if self.answered:
                self.fail_after = 1
            return super().pairs(*arguments)

    add_prompts(project, "round_01", *(f"another {i}" for i in range(CHUNK)))
    project.models.source = killed = Killed("other")
    assert failure(project.materialize("scored_pairs", round="round_01")) == "the engine was killed"
    assert project.rows("SELECT * FROM scored_pairs ORDER BY prompt_id") == before
    done = {prompt for _, prompt in killed.answered}
    assert len(done) == CHUNK + killed.batch_size
    project.models.source = again = FakeEngine("other")
    assert project.materialize("scored_pairs", round="round_01").success
    assert done.isdisjoint(prompt for _, prompt in again.answered)
    assert project.rows("SELECT count(*) FROM scored_pairs") == [(3 * CHUNK,)]
