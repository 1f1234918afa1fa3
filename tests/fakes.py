"""The resource that gives fake engines to the asset graph, and a pair that every rule keeps."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.fake_engine import FakeEngine
from tuneshift_dag.config import Transfer
from tuneshift_dag.method import Side
from tuneshift_dag.resources import EngineResource

# Columns of a row of `scored_pairs` where the fine-tuned model is sure and the base is not.
CONFIDENT_PAIR = {
    "round": "round_01",
    "prompt": "?",
    "fine_tuned_response": " yes",
    "base_response": " maybe",
    "fine_tuned_finish": "stop",
    "base_finish": "stop",
    "ppl_fine_tuned": 1.1,
    "ppl_base": 4.0,
    "ppl_base_cross": 8.0,
    "ppl_fine_tuned_cross": 16.0,
    "seed_similarity": 0.5,
}


class FakeModels:
    """The engines of one transfer, without models, and a record of what was trained.

    `resource` is what the asset graph takes; it stands for the same engines however often Dagster copies it.
    """

    def __init__(self, source: FakeEngine | None = None, generator: FakeEngine | None = None) -> None:
        self.source = source or FakeEngine("source")
        self.generator = generator or FakeEngine("generator")
        self.targets: dict[str, FakeEngine] = {}
        self.trained: list[list[tuple[str, str]]] = []
        self.texts: list[list[list[int]]] = []
        """What each training was held to."""
        self.target_kind = FakeEngine
        self.memory: list[str] = []
        """What came into memory and was released, as far as the engines were told to note it."""
        self.task_runs: list[tuple[str, str, Side]] = []
        self.failing_task = ""

    def calls(self) -> int:
        """Responses generated and scored, by all engines."""
        engines = [self.source, self.generator, *self.targets.values()]
        return sum(len(engine.answered) + len(engine.scored) for engine in engines)

    def resource(self) -> EngineResource:
        models = self

        class FakeEngines(EngineResource):
            def source(self, transfer: Transfer) -> FakeEngine:
                return models.source

            def generator(self, transfer: Transfer) -> FakeEngine:
                return models.generator

            def release(self) -> None:
                models.memory.append("released")
                super().release()

            def target(self, transfer: Transfer, adapter: Path | None = None) -> FakeEngine:
                name = f"target|{adapter.name if adapter else ''}"
                return models.targets.setdefault(name, models.target_kind(name, base="target|"))

            def check_chain(self, transfer: Transfer, pairs: Any) -> None:
                """They are right."""

            def harness(self, transfer: Transfer) -> Any:
                return FakeHarness(transfer, models)

            def distill(
                self, transfer: Transfer, pairs: list[tuple[str, str]], texts: Any, folder: Path, on_step: Any
            ) -> Any:
                models.trained.append(pairs)
                models.texts.append(texts)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "adapter_model.safetensors").write_bytes(b"weights")
                (folder / "adapter_config.json").write_text("{}")
                on_step(1, 1, 0.5)
                return SimpleNamespace(
                    steps=[{"step": 1, "loss": 0.5, "learning_rate": 5e-4}],
                    epochs=[{"epoch": 1, "train_loss": 0.5, "validation_loss": 0.4}],
                    kept_epoch=1,
                    cut=0,
                    left_out=0,
                    seconds=0.1,
                )

        return FakeEngines()


class FakeHarness:
    """Stands for `tuneshift_dag.engines.harness.Harness`: every task gives one score."""

    def __init__(self, transfer: Transfer, models: FakeModels) -> None:
        self.names = transfer.config.evaluation.tasks
        self.limit = transfer.config.evaluation.task_limit
        self.models = models

    def version(self, name: str) -> str:
        return f"{name}|{self.limit}"

    def run(self, name: str, engine: FakeEngine, side: Side) -> list[dict[str, Any]]:
        if name == self.models.failing_task:
            raise RuntimeError("the harness was killed")
        self.models.task_runs.append((name, engine.name, side))
        scores = {"value": 0.5, "stderr": None, "n": self.limit}
        return [{"task": name, "task_version": "1", "metric": "acc", "filter": "none", **scores}]
