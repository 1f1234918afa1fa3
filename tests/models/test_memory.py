"""Batches: similar lengths together, fewer rows when memory is short, halved when it runs out."""

import multiprocessing
import os
import random
import threading
import time

import psutil
import pytest
import torch

from tuneshift_dag.models import memory
from tuneshift_dag.models.memory import in_batches

LENGTHS = [3, 9, 1, 7, 5, 8, 2, 6, 4, 10]


def run(limit: int, most_rows: int = 8, error: Exception | None = None) -> tuple[list[list[int]], list[int]]:
    """Batches done, and the sizes tried, of a machine that takes ``limit`` rows at once."""
    tried = []

    def work(batch: list[int]) -> list[int]:
        tried.append(len(batch))
        if len(batch) > limit:
            raise error or torch.OutOfMemoryError("CUDA out of memory")
        return [LENGTHS[i] for i in batch]

    done = list(in_batches(LENGTHS, most_rows, lambda length: 1, work))
    assert all(result == [LENGTHS[i] for i in batch] for batch, result in done)
    return [batch for batch, _ in done], tried


def test_every_row_once_and_longest_first() -> None:
    batches, tried = run(limit=8)
    assert tried == [8, 2]
    assert [LENGTHS[i] for batch in batches for i in batch] == sorted(LENGTHS, reverse=True)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_a_batch_that_runs_out_of_memory_is_halved_and_nothing_is_lost(error: Exception) -> None:
    batches, tried = run(limit=3, error=error)
    assert tried == [8, 4, 2, 2, 2, 2, 2]
    assert sorted(i for batch in batches for i in batch) == list(range(len(LENGTHS)))


def test_a_row_that_does_not_fit_alone_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        run(limit=0)


def test_other_errors_are_not_taken_for_memory() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        run(limit=3, error=RuntimeError("shape mismatch"))


def test_rows_are_as_many_as_half_of_the_free_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 1000)
    sizes = [len(b) for b, _ in in_batches(LENGTHS, 8, lambda length: 20 * length, lambda batch: None)]
    # 500 bytes: two rows of 10 tokens; shorter rows later, so more of them.
    assert sizes[0] == 2
    assert sizes == sorted(sizes)


def test_an_allocation_that_fails_on_this_cpu_is_recognized() -> None:
    with pytest.raises(RuntimeError) as failed:
        torch.empty(1 << 55, dtype=torch.uint8)
    assert memory.is_out_of_memory(failed.value)


class TestWorkers:
    LENGTHS = (3, 9, 1, 4, 7, 2, 8)

    def test_do_what_one_process_does(self) -> None:
        done = {
            workers: sorted(
                (batch, result)
                for batch, (result, _) in in_batches(self.LENGTHS, 2, lambda n: 1, with_process, workers)
            )
            for workers in (1, 2)
        }
        assert done[1] == done[2]
        processes = {process for _, (_, process) in in_batches(self.LENGTHS, 2, lambda n: 1, with_process, 2)}
        assert os.getpid() not in processes and len(processes) == 2

    @pytest.mark.parametrize(
        ("rows", "sizes"), [(231, [116, 115]), (40, [20, 20]), (640, [160] * 4), (330, [83, 83, 83, 81]), (31, [31])]
    )
    def test_have_as_many_rows_each(self, rows: int, sizes: list[int]) -> None:
        found = in_batches([1] * rows, 160, lambda n: 1, lambda batch: None, 2)
        assert sorted((len(batch) for batch, _ in found), reverse=True) == sizes

    def test_one_that_dies_costs_its_batch_which_is_done_here(self) -> None:
        here = os.getpid()

        def dies_elsewhere(batch: list[int]) -> int:
            if 1 in batch and os.getpid() != here:
                os._exit(1)
            return os.getpid()

        done = list(in_batches(self.LENGTHS, 2, lambda n: 1, dies_elsewhere, 2))
        assert sorted(row for batch, _ in done for row in batch) == list(range(len(self.LENGTHS)))
        assert [process for batch, process in done if 1 in batch] == [here]

    def test_those_that_are_killed_at_any_moment_cost_nothing(self) -> None:
        dice, over = random.Random(0), threading.Event()

        def kill() -> None:
            while not over.wait(dice.uniform(0, 0.02)):
                for process in psutil.Process().children()[:1]:
                    process.kill()

        def large(batch: list[int]) -> bytes:
            time.sleep(0.002)
            return bytes(500_000)  # more than a pipe holds, so that some are killed in the middle of it

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            for _ in range(20):
                done = [row for batch, _ in in_batches([1] * 60, 2, lambda n: 1, large, 2) for row in batch]
                assert sorted(done) == list(range(60))
        finally:
            over.set()
            killer.join()

    def test_none_stays_when_this_process_is_killed(self) -> None:
        here = multiprocessing.get_context("fork").Process(target=hold)
        here.start()
        process = psutil.Process(here.pid)
        while len(workers := process.children()) < 2:
            time.sleep(0.01)
        here.kill()
        here.join()
        assert psutil.wait_procs(workers, timeout=20)[1] == []

    def test_an_error_is_raised_here(self) -> None:
        def fails(batch: list[int]) -> None:
            raise ValueError("not a number")

        with pytest.raises(ValueError, match="not a number"):
            list(in_batches(self.LENGTHS, 2, lambda n: 1, fails, 2))


def hold() -> None:
    for _ in in_batches([1] * 1_000, 2, lambda n: 1, lambda batch: time.sleep(0.1), 2):
        pass


def with_process(batch: list[int]) -> tuple[list[int], int]:
    time.sleep(0.05)  # so that both have some to do
    return [row * 10 for row in batch], os.getpid()
