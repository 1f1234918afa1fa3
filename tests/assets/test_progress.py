"""What a step tells while it works."""

import logging
from types import SimpleNamespace
from typing import Any

from tuneshift_dag.assets import common
from tuneshift_dag.assets.common import Step
from tuneshift_dag.method.scoring import Cost


def test_the_time_left_is_that_of_what_comes_after_the_first_results(monkeypatch: Any, caplog: Any) -> None:
    """Minutes of loading aren't a part of every result's time."""
    clock = [100.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: clock[0])
    caplog.set_level(logging.INFO, "tuneshift_dag")
    step: Any = SimpleNamespace(cost=Cost(), round=None, asset="distilled_model", _last_line=0.0)
    report = Step.progress(step, "training steps")
    for done, seconds in [(1, 80), (2, 4), (6, 16), (10, 16)]:
        clock[0] += seconds
        report(done, 10)
    assert [record.getMessage() for record in caplog.records] == [
        "training steps: 1/10, 0 from the cache",
        "training steps: 6/10, 0.1/s, 16 s left, 0 from the cache",
        "training steps: 10/10, 0.1/s, 0 s left, 0 from the cache",
    ]
