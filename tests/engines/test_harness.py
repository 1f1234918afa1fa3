"""lm-evaluation-harness on the packaged model: tasks and data of this machine, and no network."""

import functools
import json
from pathlib import Path

import pytest
import yaml

from tests.conftest import write_jsonl
from tuneshift_dag import TuneshiftError
from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.config.versions import tasks_hash
from tuneshift_dag.engines.local import LocalEngine
from tuneshift_dag.models.references import resolve_adapter, resolve_model

pytest.importorskip("lm_eval", reason="the extra lm-eval isn't installed")

PACKAGED = Path(__file__).parents[2] / "transfers" / "banking_intents"
TEMPLATE = load_transfer(PACKAGED).config.prompt_template
EXAMPLES = [json.loads(line) for line in (PACKAGED / "heldout.jsonl").read_text().splitlines()[::40]]


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    base = resolve_model(load_transfer(PACKAGED).config.source.base, PACKAGED, "test")
    return LocalEngine(base, resolve_adapter("adapter", PACKAGED, "test"))


@pytest.fixture
def tasks(transfer_folder: Path, edit_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tasks over the same file: write the intent, and choose it among four."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = transfer_folder / "tasks"
    folder.mkdir()
    write_jsonl(folder / "intents.jsonl", EXAMPLES)
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "intents.jsonl"}},
        "test_split": "test",
        "doc_to_text": TEMPLATE.replace("{prompt}", "{{prompt}}"),
        "metadata": {"version": 1.0},
    }
    writing = {
        "task": "write_intent",
        "output_type": "generate_until",
        "doc_to_target": "{{response}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12},
        "filter_list": [
            {"name": "stripped", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    choosing = {
        "task": "choose_intent",
        "output_type": "multiple_choice",
        "doc_to_choice": [example["response"] for example in EXAMPLES[:4]],
        "doc_to_target": "{{response}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (writing, choosing):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task))
    edit_config("evaluation", {"tasks": ["write_intent", "choose_intent"], "task_folder": "tasks", "task_limit": 4})
    return folder


def test_a_model_is_measured_with_its_adapter_on_and_off(tasks: Path, engine: LocalEngine) -> None:
    from tuneshift_dag.engines.harness import Harness

    harness = Harness(load_transfer(tasks.parent))
    found = {
        (side, row["task"]): row
        for side in ("base", "fine_tuned")
        for name in harness.names
        for row in harness.run(name, engine, side)
    }
    written, chosen = found["fine_tuned", "write_intent"], found["fine_tuned", "choose_intent"]
    assert (written["metric"], written["filter"], written["n"]) == ("exact_match", "stripped", 4)
    assert (chosen["metric"], chosen["task_version"]) == ("acc", "1.0")
    assert written["stderr"] is not None
    # The same greedy answers and the same choices, by the engine's own decode loop and scores.
    assert written["value"] == sum(own_answer(engine, e["prompt"]) == e["response"] for e in EXAMPLES[:4]) / 4
    assert chosen["value"] == sum(own_choice(engine, e["prompt"]) == e["response"] for e in EXAMPLES[:4]) / 4
    assert written["value"] >= 0.5 > found["base", "write_intent"]["value"] == 0


def test_the_version_follows_settings_and_data(tasks: Path, edit_config) -> None:
    from tuneshift_dag.engines.harness import Harness

    def version() -> str:
        return Harness(load_transfer(tasks.parent)).version("write_intent")

    before, code = version(), tasks_hash(load_transfer(tasks.parent))
    assert version() == before
    (tasks / "__pycache__").mkdir(exist_ok=True)
    for left_behind in ("__pycache__/metric.cpython-311.pyc", ".DS_Store"):
        (tasks / left_behind).write_bytes(b"written by Python or an editor")
    assert tasks_hash(load_transfer(tasks.parent)) == code
    write_jsonl(tasks / "intents.jsonl", [*EXAMPLES[:3], {"prompt": "Another?", "response": "other"}])
    assert version() != before
    assert tasks_hash(load_transfer(tasks.parent)) != code
    write_jsonl(tasks / "intents.jsonl", EXAMPLES)
    edit_config("evaluation.task_limit", 3)
    assert version() != before


def test_an_unknown_task_is_named_with_its_neighbours(
    tasks: Path, edit_config, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuneshift_dag.cli.doctor import examine
    from tuneshift_dag.engines import harness
    from tuneshift_dag.engines.harness import Harness

    # It reads the harness's thousands of task files, which takes seconds.
    monkeypatch.setattr(harness, "_manager", functools.cache(harness._manager))
    edit_config("evaluation.tasks", ["write_intents"])
    with pytest.raises(TuneshiftError) as error:
        Harness(load_transfer(tasks.parent))
    for word in [str(tasks.parent / "transfer.yaml"), "evaluation.tasks", "'write_intents'", "near: write_intent"]:
        assert word in str(error.value)
    assert str(error.value) in [f.detail for f in examine("banking", with_models=False) if f.ok is False]


def test_a_task_whose_data_cannot_be_had_says_so(tasks: Path) -> None:
    from tuneshift_dag.engines.harness import Harness

    (tasks / "intents.jsonl").unlink()
    with pytest.raises(
        TuneshiftError, match=r"evaluation\.tasks: the task 'write_intent' can't be loaded .*task_folder"
    ):
        Harness(load_transfer(tasks.parent))


def test_model_written_code_is_run_only_when_that_is_allowed(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tuneshift_dag.engines.harness import Harness

    file = tasks / "write_intent.yaml"
    file.write_text(file.read_text() + "unsafe_code: true\n")
    with pytest.raises(TuneshiftError, match=r"'write_intent' runs code .*HF_ALLOW_CODE_EVAL=1"):
        Harness(load_transfer(tasks.parent))
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    assert Harness(load_transfer(tasks.parent)).names == ("write_intent", "choose_intent")


REACHES_OUT = "{{ cycler.__init__.__globals__.os.mkdir('ran') or '' }}{{prompt}}"


@pytest.mark.parametrize(
    ("place", "lines", "words"),
    [
        ("tasks/other.yaml", "task: other\nprocess_docs: !function evil.run\n", "names the function evil.run"),
        ("tasks/deep/other.yaml", "task: other\nclass: !<!function> evil.run\n", "names the function evil.run"),
        ("tasks/other.yaml", "group: g\ntask: [{task: x, doc_to_text: !function evil.run}]\n", "line 2: it names"),
        ("outside", "doc_to_text: !function evil.run\n", "outside, line 1: it names the function"),
        ("tasks/other.yaml", "metric_list: [{metric: ./evil}]\n", r"metric: \./evil isn't the harness's own"),
        ("tasks/other.yaml", "metric_list: [{metric: acc, hf_evaluate: true}]\n", "hf_evaluate: true isn't"),
        ("tasks/other.yaml", "metric_list: [{<<: {metric: ./evil}, aggregation: mean}]\n", r"metric: \./evil isn't"),
        ("tasks/other.yaml", "metric_list: [{<<: [{metric: acc}, {hf_evaluate: true}]}]\n", "hf_evaluate: true isn't"),
    ],
)
def test_files_that_bring_code_are_refused_unless_that_is_allowed(
    tasks: Path, edit_config, place: str, lines: str, words: str
) -> None:
    from tuneshift_dag.engines.harness import Harness, check_names

    (tasks / "evil.py").write_text("import os\nos.mkdir('ran')\ndef run(docs):\n    return docs\n")
    (tasks.parent / place).parent.mkdir(exist_ok=True)
    (tasks.parent / place).write_text(lines)
    file = tasks / "write_intent.yaml"
    file.write_text(file.read_text() + ("include: ../outside\n" if place == "outside" else ""))
    for read in (Harness, check_names):
        with pytest.raises(TuneshiftError, match=rf"task_folder: .*{words}.*allow_code: true"):
            read(load_transfer(tasks.parent))
    assert not (tasks / "ran").exists()
    edit_config("evaluation.allow_code", True)
    check_names(load_transfer(tasks.parent))


@pytest.mark.parametrize(
    "change", [{"doc_to_text": REACHES_OUT}, {"process_docs": "FUNCTION"}], ids=["template", "function"]
)
def test_code_of_a_task_runs_only_when_that_is_allowed(tasks: Path, edit_config, change: dict[str, str]) -> None:
    from tuneshift_dag.engines.harness import Harness

    (tasks / "evil.py").write_text("import os\nos.mkdir('ran')\ndef run(docs):\n    return docs\n")
    file = tasks / "write_intent.yaml"
    text = yaml.safe_dump({**yaml.safe_load(file.read_text()), **change})
    file.write_text(text.replace("FUNCTION", "!function evil.run"))
    with pytest.raises(TuneshiftError):
        Harness(load_transfer(tasks.parent))
    assert not (tasks / "ran").exists()
    edit_config("evaluation.allow_code", True)
    Harness(load_transfer(tasks.parent))
    assert (tasks / "ran").exists()


def own_answer(engine: LocalEngine, prompt: str) -> str:
    from tuneshift_dag.method import Decoding

    ids = engine.encode(TEMPLATE.replace("{prompt}", prompt))
    ((_, response),) = next(iter(engine.generate([ids], "fine_tuned", Decoding(12, stops=("\n",)))))
    return response.text.strip()


def own_choice(engine: LocalEngine, prompt: str) -> str:
    ids = engine.encode(TEMPLATE.replace("{prompt}", prompt))
    choices = [example["response"] for example in EXAMPLES[:4]]
    responses = [engine.encode(f" {choice}") for choice in choices]
    scores = dict(pair for batch in engine.score([ids] * 4, responses, "fine_tuned") for pair in batch)
    return choices[max(scores, key=scores.__getitem__)]
