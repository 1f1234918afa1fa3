"""Standard tasks through lm-evaluation-harness (the extra ``lm-eval``), on the very model that answers the held-out
file: 4-bit, its adapter on or off. What can be wrong with a task is found in `Harness`, before a model is loaded."""

import contextlib
import difflib
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval
import lm_eval.api.metrics
import lm_eval.utils
import yaml
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.api.registry import metric_registry
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from tuneshift_dag import TuneshiftError
from tuneshift_dag.config import Transfer
from tuneshift_dag.method import Side
from tuneshift_dag.models import memory

if TYPE_CHECKING:
    from tuneshift_dag.engines.local import LocalEngine

# The harness's own way to ask; others of its tasks that run code read it too.
_CODE_ALLOWED = "HF_ALLOW_CODE_EVAL"
_TEMPLATES = lm_eval.utils.env
# What the harness reads task files with.
_YAML: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# For an estimate of the memory of a row: few prompts of the usual tasks are longer.
_CONTEXT = 1024


class Harness:
    """The tasks of one transfer's ``evaluation.tasks``, with their data. Raises `TuneshiftError` when a name is
    unknown, its data can't be had, or it runs code that nobody has allowed."""

    def __init__(self, transfer: Transfer) -> None:
        settings = transfer.config.evaluation
        self.limit = settings.task_limit
        self.names = settings.tasks
        self._most_rows = transfer.config.models.batch_size
        self._sandboxed = _is_sandboxed(transfer)
        key, folder = _key(transfer), _task_folder(transfer)
        # Data files of a local task are named from its folder, and the harness looks in the working folder.
        _refuse_code(transfer)
        with _quiet(), _templates(self._sandboxed), contextlib.chdir(folder or "."):
            manager = _manager(folder, self.names)
            _check_names(manager, self.names, key)
            self._loaded = {name: _load(manager, name, key) for name in self.names}
        self._manager = manager

    def version(self, name: str) -> str:
        """Changes with what is asked: the task's settings, its examples, the limit, the harness."""
        digest = hashlib.sha256(f"{lm_eval.__version__}|{self.limit}".encode())
        for task in _leaves(self._loaded[name]):
            examples = itertools.islice(task.eval_docs, self.limit)
            shots = task.fewshot_docs() if task.config.num_fewshot else []
            for part in ([task.task_name, task.VERSION, task.dump_config()], *examples, *(shots or [])):
                digest.update(json.dumps(part, sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()[:16]

    def run(self, name: str, engine: "LocalEngine", side: Side) -> list[dict[str, Any]]:
        """Scores of a task, or of a group and each of its tasks: task, version, metric, filter, value, stderr, n."""
        from lm_eval.models.huggingface import HFLM

        from tuneshift_dag.engines.decoding import bytes_per_row

        # The harness keeps logits at every position, and their log-softmax in float32.
        row = bytes_per_row(engine.model, _CONTEXT, logits=3 * _CONTEXT)
        rows = max(1, min(self._most_rows, int(memory.free_bytes() * memory.BATCH_SHARE / row)))
        while True:
            try:
                with _quiet(), _templates(self._sandboxed), engine.side(side) as model:
                    found: Any = lm_eval.simple_evaluate(
                        HFLM(model, tokenizer=engine.tokenizer, batch_size=rows),
                        tasks=self._loaded[name],
                        task_manager=self._manager,
                        limit=self.limit,
                        log_samples=False,
                        confirm_run_unsafe_code=os.environ.get(_CODE_ALLOWED) == "1",
                    )
                return list(_rows(found))
            except Exception as error:
                if rows == 1 or not memory.is_out_of_memory(error):
                    raise
            rows //= 2


def _key(transfer: Transfer) -> str:
    return f"{transfer.folder / 'transfer.yaml'}: evaluation.tasks"


def _task_folder(transfer: Transfer) -> Path | None:
    named = transfer.config.evaluation.task_folder
    return (transfer.folder / named).expanduser() if named else None


def check_names(transfer: Transfer) -> None:
    """Raise `TuneshiftError` for a task that there isn't. Fetches nothing."""
    names = transfer.config.evaluation.tasks
    _refuse_code(transfer)
    with _quiet():
        _check_names(_manager(_task_folder(transfer), names), names, _key(transfer))


class _Code(Exception):
    """A task file names something to run."""


class _TaskFile(_YAML):  # type: ignore[misc]
    """Reads a task file up to what the harness would run of it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        self.flatten_mapping(node)  # `<<` brings keys of another mapping
        for key, value in node.value:
            # Those that the harness hasn't are scripts, of a folder or of the hub.
            unknown = key.value == "metric" and str(value.value) not in metric_registry
            if unknown or key.value == "hf_evaluate":
                raise _Code(
                    f"line {key.start_mark.line + 1}: {key.value}: {value.value} isn't the harness's own metric"
                )
        return super().construct_mapping(node, deep)

    def construct_function(self, node: yaml.Node) -> None:
        raise _Code(f"line {node.start_mark.line + 1}: it names the function {node.value}")


_TaskFile.add_constructor("!function", _TaskFile.construct_function)


def _is_sandboxed(transfer: Transfer) -> bool:
    return _task_folder(transfer) is not None and not transfer.config.evaluation.allow_code


@contextlib.contextmanager
def _templates(sandboxed: bool) -> Iterator[None]:
    """The harness's templates, which could reach into Python, or the same in a sandbox."""
    if sandboxed:
        lm_eval.utils.env = SandboxedEnvironment(undefined=_TEMPLATES.undefined, keep_trailing_newline=True)
        lm_eval.utils.env.filters.update(_TEMPLATES.filters)
    try:
        yield
    finally:
        lm_eval.utils.env = _TEMPLATES


def _refuse_code(transfer: Transfer) -> None:
    """Raise `TuneshiftError` for a file in the task folder, or one that it includes, that brings code, unless that is
    allowed."""
    folder = _task_folder(transfer)
    files, seen = list(folder.resolve().rglob("*.yaml")) if folder and _is_sandboxed(transfer) else [], set[Path]()
    while files:
        file = files.pop().resolve()
        if file in seen:
            continue
        seen.add(file)
        try:
            found = yaml.load(file.read_bytes(), _TaskFile)
        except _Code as error:
            raise TuneshiftError(
                f"{transfer.folder / 'transfer.yaml'}: evaluation.task_folder: {file}, {error}, which would run code on"
                " this machine: read it, and set evaluation.allow_code: true, or remove it."
            ) from None
        except (OSError, ValueError, yaml.YAMLError):
            continue  # the harness can't read it either
        included = found.get("include", []) if isinstance(found, dict) else []
        files += [file.parent / str(name) for name in (included if isinstance(included, list) else [included])]


def _manager(folder: Path | None, names: tuple[str, ...]) -> TaskManager:
    """Knows the tasks of the folder and, where they don't do, the harness's own: reading those takes seconds."""
    if folder is None:
        return TaskManager()
    own = TaskManager(include_path=folder.resolve(), include_defaults=False)
    return own if set(names) <= set(own.all_subtasks) else TaskManager(include_path=folder.resolve())


def _check_names(manager: TaskManager, names: tuple[str, ...], key: str) -> None:
    for name in names:
        if name not in manager.task_index:
            near = ", ".join(difflib.get_close_matches(name, manager.all_tasks, 5)) or "`lm-eval ls tasks` lists all"
            raise TuneshiftError(
                f"{key}: there is no task {name!r} in lm-evaluation-harness {lm_eval.__version__} (near: {near})."
                " Correct it, or put a task file of that name into evaluation.task_folder."
            )


def _load(manager: TaskManager, name: str, key: str) -> list[Any]:
    try:
        loaded = manager.load([name])
    except Exception as error:
        raise TuneshiftError(
            f"{key}: the task {name!r} can't be loaded ({type(error).__name__}: {error}). Its data is fetched from the"
            " hub; without a network, put a task file whose data is on this machine into evaluation.task_folder."
        ) from error
    unsafe = [task for task, built in loaded["tasks"].items() if getattr(built, "UNSAFE_CODE", False)]
    if unsafe and os.environ.get(_CODE_ALLOWED) != "1":
        raise TuneshiftError(
            f"{key}: {unsafe[0]!r} runs code on this machine that the model has written. Remove it, or run in a"
            f" container and set the environment variable {_CODE_ALLOWED}=1."
        )
    group = loaded["groups"].get(name)
    return [group] if group else list(loaded["tasks"].values())


def _leaves(loaded: list[Any]) -> list[Task]:
    tasks = [task for each in loaded for task in ([each] if isinstance(each, Task) else each.get_all_tasks())]
    return sorted(tasks, key=lambda task: str(task.task_name))


def _rows(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for task, figures in found["results"].items():
        for label, value in figures.items():
            metric, comma, filter_ = label.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{filter_}")
            yield {
                "task": task,
                "task_version": str(found["versions"].get(task)),
                "metric": metric,
                "filter": filter_,
                "value": float(value),
                "stderr": float(error) if isinstance(error, int | float) else None,
                "n": figures.get("sample_len"),
            }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
