"""Dagster's resources: settings plus lazy construction of plain objects. No model is loaded here."""

import importlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import dagster as dg

from tuneshift_dag import TuneshiftError, training
from tuneshift_dag.config import Transfer
from tuneshift_dag.config.schema_models import Vllm
from tuneshift_dag.config.versions import chain_version
from tuneshift_dag.engines.server_process import stop_all
from tuneshift_dag.home import cache_dir, output_dir
from tuneshift_dag.method import Engine, PromptWriter, Scorer, Target, TextModel
from tuneshift_dag.models.memory import release_unused
from tuneshift_dag.models.references import Kind, ModelFiles, resolve_adapter
from tuneshift_dag.store import Store

if TYPE_CHECKING:
    from tuneshift_dag.engines.harness import Harness
    from tuneshift_dag.training.loop import TrainingCurve

BATCH_TAG = "tuneshift/batch"
"""`tuneshift run` puts this tag on its runs, so that their cost can be added up."""
# Engines live as long as the process: the steps of a run share loaded models.
_ENGINES: dict[str, Any] = {}
# The package that a module of `tuneshift_dag.engines` needs, the extra that installs it, and what asks for it.
_OPTIONAL = {
    "openai_client": ("openai", "servers", "transfer.yaml names a server"),
    "openai_source": ("openai", "servers", "transfer.yaml names a server"),
    "vllm": ("openai", "servers", "transfer.yaml has a server of type vllm"),
    "ray": ("ray", "ray", "engine.type in transfer.yaml is ray"),
}


class StoreResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The DuckDB file that holds every table and the response cache."""

    path: str

    def store(self) -> Store:
        return Store(Path(self.path))


class EngineResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Models for generation and scoring: the source pair, the generator and the target."""

    def source(self, transfer: Transfer) -> Scorer:
        """The source base and fine-tuned models, in this process, on a cluster or on a server."""
        settings, dtype = transfer.config.engine, transfer.config.models.compute_dtype
        kind: Kind = "tokenizer" if settings.server else "model"
        is_whole, tuned = transfer.config.source.adapter is None, transfer.tuned(kind).files()
        if settings.type not in ("vllm", "openai"):
            return self._engine(transfer, "source.base", tuned, whole=is_whole)
        base = transfer.named("source.base", kind).files()
        name = f"{base.fingerprint}|{tuned.fingerprint}|{settings.model_dump_json()}|{dtype}"
        if name not in _ENGINES and settings.type == "vllm":
            how = (dtype, output_dir(transfer.name), _make_room)
            _ENGINES[name] = _optional("vllm").served_source(settings, base, tuned, is_whole, *how)
        elif name not in _ENGINES:
            server = _optional("openai_client").OpenAIServer(settings.server, "engine.server")
            _ENGINES[name] = _optional("openai_source").ServedSource(
                server, settings.base, settings.fine_tuned, base, tuned, settings.cross_scores
            )
        served: Scorer = _ENGINES[name]
        return served

    def generator(self, transfer: Transfer) -> PromptWriter:
        """The model that writes prompts, in this process, on a cluster or on a server."""
        settings = transfer.config.generator
        if settings.server is None:
            return self._engine(transfer, "generator.model", quantization=transfer.config.generator_quantization)
        is_chat = settings.mode == "chat"
        if isinstance(settings.server, Vllm):
            files = transfer.named("generator.model").files()
            how = (transfer.config.models.compute_dtype, output_dir(transfer.name), _make_room)
            started: PromptWriter = _optional("vllm").served_generator(settings.server, files, is_chat, *how)
            return started
        client = _optional("openai_client")
        server = client.OpenAIServer(settings.server, "generator.server")
        served: PromptWriter = client.ServedGenerator(server, settings.model, is_chat)
        return served

    def target(self, transfer: Transfer, adapter: Path | None = None) -> Target:
        """The target base model, with a distilled adapter when a folder is given."""
        files = resolve_adapter(str(adapter), transfer.folder, "distilled adapter") if adapter else None
        return cast("Target", self._engine(transfer, "target.base", files))

    def check_chain(self, transfer: Transfer, pairs: Sequence[tuple[str, str]]) -> None:
        """Run generator and target on a few (prompt, response) pairs as the rounds and the training will: answer, one
        training step, save, load, answer again. What was once right with the same files, settings and packages isn't
        run again. `TuneshiftError` names the model that can't be used, and why."""
        note = cache_dir() / "preflight" / chain_version(transfer)
        if note.is_file():
            return
        prompts, generator = [prompt for prompt, _ in pairs], transfer.config.generator
        if generator.server is None:
            writer = self.generator(transfer)
            asked = list(map(writer.chat_ids if generator.mode == "chat" else writer.encode, prompts))
            if generator.model != transfer.config.target.base:  # which is tried below
                _check_answers(writer, asked, "generator.model")
        with tempfile.TemporaryDirectory() as home:
            folder = Path(home) / "adapter"
            self.distill(transfer.with_one_step(), list(pairs), None, folder, lambda step, total, loss: None)
            target, format = self.target(transfer, folder), transfer.config.target_format
            _check_answers(target, [target.prompt_ids(prompt, format) for prompt in prompts], "target.base")
        self.release()
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()

    def target_weights(self, transfer: Transfer) -> str:
        return transfer.named("target.base").files().fingerprint

    def harness(self, transfer: Transfer) -> "Harness":
        from tuneshift_dag.engines.harness import Harness

        return Harness(transfer)

    def distill(
        self,
        transfer: Transfer,
        pairs: list[tuple[str, str]],
        texts: list[list[int]] | None,
        folder: Path,
        on_step: Callable[[int, int, float], None],
    ) -> "TrainingCurve":
        """Train the target on (prompt, response) pairs and save the adapter to ``folder``; see `training.distill`."""
        self.release()
        return training.distill(transfer, pairs, texts, folder, on_step)

    def release(self) -> None:
        """Stop every server and forget every loaded model, for example before a training needs the memory."""
        stop_all()
        _ENGINES.clear()

    def _engine(
        self,
        transfer: Transfer,
        key: str,
        tuned: ModelFiles | None = None,
        quantization: str | None = None,
        whole: bool = False,
    ) -> Engine:
        """The model at a key of ``transfer.yaml``. ``tuned`` is an adapter for it, or a ``whole`` fine-tuned model."""
        from tuneshift_dag.engines.local import LocalEngine

        models, settings = transfer.config.models, transfer.config.engine
        if quantization is not None:
            models = models.model_copy(update={"quantization": quantization})
        # The target stays in this process, where it is trained. Ray is looked for before a model is fetched.
        ray = _optional("ray") if settings.type == "ray" and key != "target.base" else None
        files = transfer.named(key).files()
        name = f"{files.fingerprint}|{tuned.fingerprint if tuned else ''}|{models.model_dump_json()}"
        if ray:
            name += f"|{settings.ray.model_dump_json()}"
        if name not in _ENGINES:
            how = (models.quantization, models.compute_dtype, models.batch_size, models.device_map)
            adapter, model = (None, tuned) if whole else (tuned, None)
            local = LocalEngine(files, adapter, *how, models.kv_cache_dtype, 1 if ray else models.workers, model)
            needed = [files.path, *([tuned.path] if tuned else [])]
            _ENGINES[name] = ray.RayEngine(local, models.batch_size, settings.ray, needed) if ray else local
        engine: Engine = _ENGINES[name]
        return engine


def _make_room() -> None:
    """Free the memory of the models that are loaded in this process, for a server of its own."""
    _ENGINES.clear()
    release_unused()


def _check_answers(engine: TextModel, prompts: Sequence[list[int]], key: str) -> None:
    if problems := engine.check_answers(prompts):
        raise TuneshiftError(f"{key}: {'; '.join(problems)}.")


def _optional(module: str) -> Any:
    package, extra, why = _OPTIONAL[module]
    try:
        return importlib.import_module(f"tuneshift_dag.engines.{module}")
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        install = f"run `pip install 'tuneshift-dag[{extra}]'`"
        raise TuneshiftError(f"{why}, which needs the extra `{extra}`: {install}.") from error
