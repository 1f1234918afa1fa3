"""Dagster's resources: settings plus lazy construction of plain objects. No model is loaded here."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from tuneshift_dag import TuneshiftError
from tuneshift_dag.config import Transfer
from tuneshift_dag.method import PromptWriter, Scorer
from tuneshift_dag.store import Store
from tuneshift_dag.store.cache import ResponseCache

if TYPE_CHECKING:
    from tuneshift_dag.engines.harness import Harness
    from tuneshift_dag.models.references import ModelFiles
    from tuneshift_dag.training.loop import TrainingCurve

BATCH_TAG = "tuneshift/batch"
"""`tuneshift run` puts this tag on its runs, so that their cost can be added up."""
# Engines live as long as the process: the steps of a run share loaded models.
_ENGINES: dict[str, Any] = {}


class StoreResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The DuckDB file that holds every table and the response cache."""

    path: str

    def store(self) -> Store:
        return Store(Path(self.path))

    def cache(self) -> ResponseCache:
        return ResponseCache(self.store())


class EngineResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Models for generation and scoring: the source pair, the generator and the target."""

    def source(self, transfer: Transfer) -> Scorer:
        """The source base model with the source adapter, in this process, on a cluster or on a server."""
        from tuneshift_dag.models.references import resolve_adapter, resolve_tokenizer

        settings = transfer.config.engine
        adapter = resolve_adapter(transfer.reference("source.adapter"), transfer.folder, "source.adapter")
        if settings.server is None:
            local: Scorer = self._engine(transfer, "source.base", adapter, on_ray=settings.type == "ray")
            return local
        assert settings.base is not None and settings.fine_tuned is not None
        tokenizer = resolve_tokenizer(transfer.reference("source.base"), transfer.folder, "source.base")
        name = f"{tokenizer.fingerprint}|{adapter.fingerprint}|{settings.model_dump_json()}"
        if name not in _ENGINES:
            _optional("openai_client", "openai", "servers", "transfer.yaml names a server")
            from tuneshift_dag.engines.openai_client import OpenAIServer
            from tuneshift_dag.engines.openai_source import ServedSource

            _ENGINES[name] = ServedSource(
                OpenAIServer(settings.server, "engine.server"),
                settings.base,
                settings.fine_tuned,
                tokenizer,
                adapter,
                settings.cross_scores,
            )
        source_models: Scorer = _ENGINES[name]
        return source_models

    def generator(self, transfer: Transfer) -> PromptWriter:
        """The model that writes prompts, in this process, on a cluster or on a server."""
        settings = transfer.config.generator
        if settings.server is not None:
            client = _optional("openai_client", "openai", "servers", "transfer.yaml names a server")
            server = client.OpenAIServer(settings.server, "generator.server")
            generator: PromptWriter = client.ServedGenerator(server, settings.model, chat=settings.mode == "chat")
            return generator
        on_ray = transfer.config.engine.type == "ray"
        quantization = transfer.config.generator_quantization
        local: PromptWriter = self._engine(transfer, "generator.model", on_ray=on_ray, quantization=quantization)
        return local

    def target(self, transfer: Transfer, adapter: Path | None = None) -> Scorer:
        """The target base model, with a distilled adapter when a folder is given."""
        from tuneshift_dag.models.references import resolve_adapter

        files = resolve_adapter(str(adapter), transfer.folder, "distilled adapter") if adapter else None
        engine: Scorer = self._engine(transfer, "target.base", files)
        return engine

    def target_weights(self, transfer: Transfer) -> str:
        """The fingerprint of the target base model's files; nothing is loaded."""
        from tuneshift_dag.models.references import resolve_model

        return resolve_model(transfer.reference("target.base"), transfer.folder, "target.base").fingerprint

    def harness(self, transfer: Transfer) -> "Harness":
        """The tasks of ``evaluation.tasks``, with their data; no model is loaded."""
        from tuneshift_dag.engines.harness import Harness

        return Harness(transfer)

    def distill(
        self,
        transfer: Transfer,
        pairs: list[tuple[str, str]],
        folder: Path,
        on_step: Callable[[int, int, float], None],
    ) -> "TrainingCurve":
        """Train the target on (prompt, response) pairs and save the adapter to ``folder``."""
        from tuneshift_dag.training import distill

        self.release()
        return distill(transfer, pairs, folder, on_step)

    def release(self) -> None:
        """Forget every loaded model, for example before a training needs the memory."""
        _ENGINES.clear()

    def _engine(
        self,
        transfer: Transfer,
        key: str,
        adapter: "ModelFiles | None" = None,
        on_ray: bool = False,
        quantization: str | None = None,
    ) -> Any:
        from tuneshift_dag.engines.local import LocalEngine
        from tuneshift_dag.models.references import resolve_model

        models, cluster = transfer.config.models, transfer.config.engine.ray
        if quantization is not None:
            models = models.model_copy(update={"quantization": quantization})
        if on_ray:
            # Before a model is fetched.
            ray_engine = _optional("ray", "ray", "ray", "engine.type in transfer.yaml is ray")
        files = resolve_model(transfer.reference(key), transfer.folder, key)
        name = f"{files.fingerprint}|{adapter.fingerprint if adapter else ''}|{models.model_dump_json()}"
        if on_ray:
            name += f"|{cluster.model_dump_json()}"
        if name not in _ENGINES:
            engine: Any = LocalEngine(
                files,
                adapter,
                models.quantization,
                models.compute_dtype,
                models.batch_size,
                models.device_map,
                models.kv_cache_dtype,
                1 if on_ray else models.workers,
            )
            if on_ray:
                needed = [files.path, *([adapter.path] if adapter else [])]
                engine = ray_engine.RayEngine(engine, models.batch_size, cluster, needed)
            _ENGINES[name] = engine
        return _ENGINES[name]


def _optional(module: str, package: str, extra: str, why: str) -> Any:
    """A module of `tuneshift_dag.engines` that needs a package which only an extra installs."""
    try:
        return importlib.import_module(f"tuneshift_dag.engines.{module}")
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise TuneshiftError(
            f"{why}, which needs the extra `{extra}`: run `pip install 'tuneshift-dag[{extra}]'`."
        ) from error
