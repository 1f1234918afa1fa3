"""`python -m tests.killed_run FOLDER PROGRESS`: a run with fake models that says how far scoring is.

A process of its own, so that a test can kill it. It appends a line to the file PROGRESS before each batch
of pairs and computes slowly enough to be killed there.
"""

import sys
import time
from pathlib import Path

import dagster as dg

from tests.fake_engine import FakeEngine
from tests.fakes import FakeModels
from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.home import use_dagster_home
from tuneshift_dag.runner import Runner


def main(folder: Path, progress: Path) -> None:
    def on_batch(number: int) -> None:
        with progress.open("a") as file:
            file.write("batch\n")
        time.sleep(0.1)

    use_dagster_home()
    models = FakeModels(source=FakeEngine("source", batch_size=2, on_batch=on_batch))
    Runner(load_transfer(folder), dg.DagsterInstance.get(), models.resource()).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
