"""The vLLM that a step starts: how it is started, asked and ended. In its place runs tests/fake_vllm.py;
tests/servers has the same with vLLM itself."""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import dagster as dg
import psutil
import pytest

from tests.conftest import Project
from tests.engines.test_openai import ServedModels
from tests.fake_engine import FakeEngine
from tests.fake_server import FakeServer, save_tokenizer
from tuneshift_dag import TuneshiftError
from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.config.schema_models import Vllm
from tuneshift_dag.engines.server_process import ServerProcess, stop_all
from tuneshift_dag.engines.vllm import find_command
from tuneshift_dag.home import output_dir
from tuneshift_dag.method import SIDES, Decoding, Scorer
from tuneshift_dag.method.scoring import Cost, generate, score_pairs
from tuneshift_dag.resources import EngineResource
from tuneshift_dag.store import Store
from tuneshift_dag.store.cache import ResponseCache

ROOT = Path(__file__).parents[2]
FAKE = [sys.executable, str(ROOT / "tests" / "fake_vllm.py"), "serve"]
GREEDY = Decoding(64)
TEXTS = [f"Query: {'x' * (i * 7 % 5)} {i}\nIntent:" for i in range(10)]
Edit = Callable[[str, Any], None]


@pytest.fixture
def engines(transfer_folder: Path, edit_config: Edit, monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineResource]:
    """The engines of a transfer whose source and generator are on a vLLM of its own."""
    base = transfer_folder / "models" / "tiny-base"
    save_tokenizer(base)
    monkeypatch.setenv("FAKE_VLLM_NOTES", str(transfer_folder / "notes"))
    # A proxy of this name is nowhere: whoever asked it for this machine would get no answer.
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.invalid:1")
    monkeypatch.setenv("ALL_PROXY", "http://proxy.invalid:1")
    edit_config("engine", {"type": "vllm", "vllm": {"command": FAKE}})
    edit_config("generator.server", {"type": "vllm", "command": FAKE})
    edit_config("generator.mode", "continuation")
    resource, sides = EngineResource(), {"base": "base", "fine_tuned": "fine_tuned", "generator": "base"}
    with FakeServer(base, sides=sides) as server:
        monkeypatch.setenv("FAKE_VLLM_SERVER", str(urlsplit(server.url).port))
        yield resource
        resource.release()


def notes(folder: Path) -> list[dict[str, Any]]:
    """What every server that was started has noted about itself."""
    file = folder / "notes"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def alive(note: dict[str, Any]) -> list[int]:
    return [pid for pid in note["pids"] if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]


def answers(engine: Scorer, side: Any, texts: list[str] = TEXTS) -> list[str]:
    found = dict(item for batch in engine.generate([engine.encode(t) for t in texts], side, GREEDY) for item in batch)
    return [found[i].text for i in range(len(texts))]


def expected(side: Any) -> list[str]:
    fake = FakeEngine()
    return [fake._answer(fake.encode(text), side, GREEDY).text for text in TEXTS]


def test_base_and_adapter_are_on_one_server_that_only_this_machine_can_ask(
    engines: EngineResource, transfer_folder: Path, edit_config: Edit, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = transfer_folder / "adapter" / "adapter_config.json"
    adapter.write_text(json.dumps({"peft_type": "LORA", "r": 20}))
    more = {"gpu_memory_utilization": 0.4, "tensor_parallel_size": 2, "max_model_len": 512}
    edit_config("engine.vllm", {"command": FAKE, "extra_args": ["--enforce-eager"], **more})
    source = engines.source(load_transfer(transfer_folder))
    assert notes(transfer_folder) == [], "nothing was asked yet"
    with caplog.at_level(logging.INFO):
        assert [answers(source, side) for side in SIDES] == [expected(side) for side in SIDES]
    assert source.check_adapter([source.encode(text) for text in TEXTS]).problems == []
    [note] = notes(transfer_folder)
    told = note["arguments"]
    given = {word: told[i + 1] for i, word in enumerate(told[:-1]) if word.startswith("--")}
    base = transfer_folder / "models" / "tiny-base"
    assert told[:2] == ["serve", str(base)]
    assert "--enforce-eager" in told
    assert given["--host"] == "127.0.0.1" and int(given["--port"]) > 1023
    assert given["--served-model-name"] == "base"
    adapter_there = {"name": "fine_tuned", "path": str(transfer_folder / "adapter"), "base_model_name": "base"}
    assert json.loads(given["--lora-modules"]) == adapter_there
    assert (given["--max-lora-rank"], given["--max-loras"]) == ("32", "2")
    assert (given["--gpu-memory-utilization"], given["--tensor-parallel-size"]) == ("0.4", "2")
    assert (given["--max-model-len"], given["--dtype"]) == ("512", "auto")
    assert len(note["key"]) > 30 and note["key"] not in " ".join(told)
    assert note["key"] not in caplog.text
    log = output_dir("banking") / "vllm-base.log"
    assert "vLLM says hello" in log.read_text() and str(log) in caplog.text
    assert alive(note) == note["pids"]
    engines.release()
    assert alive(note) == [], "the server, and what it has started"
    assert "vLLM says hello" in log.read_text(), "its log is kept"


def test_a_whole_fine_tuned_model_and_its_base_take_turns(
    engines: EngineResource, transfer_folder: Path, edit_config: Edit, store: Store
) -> None:
    tuned = transfer_folder / "models" / "tuned"
    tuned.mkdir()
    for file in (transfer_folder / "models" / "tiny-base").iterdir():
        (tuned / file.name).write_bytes(file.read_bytes())
    (tuned / "generation_config.json").write_text("{}")
    edit_config("source", {"base": "models/tiny-base", "fine_tuned": "models/tuned"})
    source, fake = engines.source(load_transfer(transfer_folder)), FakeEngine()
    assert source.one_at_a_time and source.fingerprint("base") != source.fingerprint("fine_tuned")
    ids = [source.encode(text) for text in TEXTS]
    pairs = score_pairs(source, ResponseCache(store), ids, GREEDY, Cost())
    for text, pair in zip(TEXTS, pairs, strict=True):
        wanted = fake._pair(fake.encode(text), {}, GREEDY)
        assert (pair.base.text, pair.fine_tuned.text) == (wanted.base.text, wanted.fine_tuned.text)
        assert pair.base_on_fine_tuned == pytest.approx(wanted.base_on_fine_tuned)
        assert pair.fine_tuned_on_base == pytest.approx(wanted.fine_tuned_on_base)
    started = notes(transfer_folder)
    names = [note["arguments"][note["arguments"].index("--served-model-name") + 1] for note in started]
    assert names == ["base", "fine_tuned", "base"]
    assert [bool(alive(note)) for note in started] == [False, False, True], "one at a time"
    assert source.check_adapter(ids).problems == []


def test_what_is_cached_starts_no_server_and_where_it_runs_makes_nothing_anew(
    engines: EngineResource, transfer_folder: Path, edit_config: Edit, store: Store
) -> None:
    def responses() -> list[str]:
        source = engines.source(load_transfer(transfer_folder))
        ids = [source.encode(text) for text in TEXTS]
        return [r.text for r in generate(source, ResponseCache(store), ids, "base", GREEDY, Cost())]

    assert responses() == expected("base")
    engines.release()
    edit_config("engine.vllm", {"command": ["nowhere"], "gpu_memory_utilization": 0.5, "tensor_parallel_size": 4})
    assert responses() == expected("base")
    assert len(notes(transfer_folder)) == 1
    edit_config("engine.vllm", {"command": ["nowhere"], "extra_args": ["--quantization", "bitsandbytes"]})
    with pytest.raises(TuneshiftError, match=r"engine.vllm: there is no command 'nowhere'.*pip install vllm"):
        responses()


def test_the_memory_is_a_servers_or_that_of_models_in_this_process(
    engines: EngineResource, transfer_folder: Path
) -> None:
    transfer = load_transfer(transfer_folder)
    target, source = engines.target(transfer), engines.source(transfer)
    assert engines.target(transfer) is target
    answers(source, "base")
    assert engines.target(transfer) is not target, "dropped before the server was started"
    [note] = notes(transfer_folder)
    assert alive(note)
    (transfer_folder / "models" / "tiny-base" / "config.json").write_text('{"model_type": "of_no_kind"}')
    with pytest.raises(Exception, match="of_no_kind"):
        answers(target, "base")
    assert alive(note) == [], "ended before a model is loaded"


def test_a_server_that_dies_is_named_with_its_log_and_what_had_finished_is_kept(
    engines: EngineResource, transfer_folder: Path, edit_config: Edit, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_config("engine.vllm", {"command": FAKE, "concurrency": 1})
    monkeypatch.setenv("FAKE_VLLM_FAILS", "5")
    source = engines.source(load_transfer(transfer_folder))
    ids, cache = [source.encode(text) for text in TEXTS], ResponseCache(store)
    with pytest.raises(TuneshiftError, match="ended with status 1, and what had finished is kept") as error:
        generate(source, cache, ids, "base", GREEDY, Cost())
    for word in ("engine.vllm (vLLM with models/tiny-base", "vllm-base.log", "RuntimeError: the engine core is dead"):
        assert word in str(error.value)
    [dead] = notes(transfer_folder)
    assert dead["key"] not in str(error.value)
    assert "dead (key ***)" in str(error.value)
    assert alive(dead) == [], "what it had started is ended too"
    monkeypatch.delenv("FAKE_VLLM_FAILS")
    cost = Cost()
    again = generate(source, cache, ids, "base", GREEDY, cost)
    assert [response.text for response in again] == expected("base")
    assert (cost.cache_hits, cost.model_calls) == (4, 6), "started again, for the rest"


def test_a_server_that_cannot_start_shows_what_it_said(
    engines: EngineResource, transfer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM_FAILS", "start")
    source = engines.source(load_transfer(transfer_folder))
    with pytest.raises(TuneshiftError, match=r"ended with status 1 before it was ready") as error:
        answers(source, "base")
    assert "ValueError: no memory for the KV cache" in str(error.value)
    assert str(output_dir("banking") / "vllm-base.log") in str(error.value)


def test_a_server_that_never_answers_is_stopped_after_the_limit(
    engines: EngineResource, transfer_folder: Path, edit_config: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_config("engine.vllm.start_timeout_s", 4)
    monkeypatch.setenv("FAKE_VLLM_FAILS", "never")
    source = engines.source(load_transfer(transfer_folder))
    with pytest.raises(TuneshiftError, match=r"wasn't ready within 4 s \(engine.vllm.start_timeout_s\), and was st"):
        answers(source, "base")
    [note] = notes(transfer_folder)
    assert alive(note) == []


def test_without_vllm_the_message_has_the_command_that_installs_it(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(
        TuneshiftError, match=r"generator.server: there is no command 'vllm'.*pip install vllm"
    ) as error:
        find_command(Vllm(), "generator.server")
    assert "generator.server.command: [~/vllm/bin/vllm, serve]" in str(error.value)
    (tmp_path / "vllm").write_text("#!/bin/sh\n")
    (tmp_path / "vllm").chmod(0o755)
    assert find_command(Vllm(), "generator.server") == [str(tmp_path / "vllm"), "serve"]


def test_a_module_in_the_place_of_the_command_gets_the_model_as_an_option(
    engines: EngineResource, transfer_folder: Path, edit_config: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM_FAILS", "start")
    edit_config("engine.vllm.command", FAKE[:-1])
    with pytest.raises(TuneshiftError):
        answers(engines.source(load_transfer(transfer_folder)), "base")
    base = str(transfer_folder / "models" / "tiny-base")
    assert notes(transfer_folder)[0]["arguments"][:2] == ["--model", base]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "use_dora is set"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern is set"),
        ({"peft_type": "LOHA"}, "peft_type is LOHA"),
        ({"r": 1024}, "r is 1024, and its limit is 512"),
    ],
)
def test_an_adapter_that_vllm_would_not_apply_as_peft_does_is_refused(
    engines: EngineResource, transfer_folder: Path, settings: dict[str, Any], words: str
) -> None:
    file = transfer_folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "LORA", **settings}))
    with pytest.raises(TuneshiftError, match="vLLM can't serve this adapter") as error:
        engines.source(load_transfer(transfer_folder))
    for word in (str(file), words, "engine.type: local"):
        assert word in str(error.value)


def test_a_server_ends_with_a_process_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VLLM_NOTES", str(tmp_path / "notes"))
    monkeypatch.setenv("FAKE_VLLM_FAILS", "never")
    code = f"""
import os, time
from pathlib import Path
from tuneshift_dag.engines.server_process import ServerProcess
ServerProcess({FAKE!r}, {{**os.environ, "VLLM_API_KEY": "k"}}, Path({str(tmp_path / "log")!r}))
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        wait_until(lambda: notes(tmp_path) != [])
        [note] = notes(tmp_path)
        assert alive(note) == note["pids"]
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: alive(note) == [])


def test_a_server_whose_keeper_is_killed_ends_when_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM_NOTES", str(tmp_path / "notes"))
    monkeypatch.setenv("FAKE_VLLM_FAILS", "never")
    ServerProcess(FAKE, {**os.environ, "VLLM_API_KEY": "k"}, tmp_path / "log")
    wait_until(lambda: notes(tmp_path) != [])
    [note] = notes(tmp_path)
    psutil.Process(note["pids"][0]).parent().kill()
    stop_all()
    assert alive(note) == []


# The first process of a container, which waits for no process but its own child.
CONTAINER = """
import ctypes, subprocess, sys
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
sys.exit(subprocess.run([sys.executable, "-c", sys.argv[1]], timeout=20).returncode)
"""
KILLED_KEEPER = f"""
import os, psutil, time
from pathlib import Path
from tuneshift_dag.engines.server_process import ServerProcess, stop_all
notes = Path(os.environ["FAKE_VLLM_NOTES"])
ServerProcess({FAKE!r}, {{**os.environ, "VLLM_API_KEY": "k"}}, notes.with_name("log"))
while not notes.exists():
    time.sleep(0.05)
psutil.Process().children()[0].kill()
stop_all()
"""


def test_a_killed_keepers_server_is_not_waited_for_in_a_container_that_clears_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM_NOTES", str(tmp_path / "notes"))
    monkeypatch.setenv("FAKE_VLLM_FAILS", "never")
    subprocess.run([sys.executable, "-c", CONTAINER, KILLED_KEEPER], cwd=ROOT, check=True)


def test_a_server_that_does_not_end_by_itself_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(99)"
    )
    server = ServerProcess([sys.executable, "-c", deaf], os.environ, tmp_path / "log", grace=0.3)
    wait_until(lambda: "deaf" in server.last_lines())
    stop_all()
    assert server.ended() == 137


@pytest.mark.parametrize("before", ["", "(EngineCore pid=7) ERROR 11-29 12:00:00 [core.py:708] "])
def test_of_a_traceback_the_error_is_quoted(tmp_path: Path, before: str) -> None:
    """Also where the server was killed in the middle of a second one."""
    told = ["Traceback (most recent call last):", '  File "core.py", line 7, in run', "    load()", "OSError: no room"]
    lines = ["INFO hello", *(before + line for line in [*told, *told[:2]])]
    server = ServerProcess(
        [sys.executable, "-c", f"print({chr(10).join(lines)!r}, end='')"], os.environ, tmp_path / "log"
    )
    assert server.ended(20) == 0
    assert server.last_lines() == f"INFO hello\n{before}OSError: no room"


def test_the_server_of_a_step_ends_with_it_also_when_it_fails(
    engines: EngineResource, transfer_folder: Path, edit_config: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_config("engine.vllm.concurrency", 1)

    def run(asset: str, round: str | None = None) -> bool:
        succeeded = project.materialize(asset, round=round).success
        assert not any(map(alive, notes(transfer_folder)))
        return succeeded

    with dg.DagsterInstance.ephemeral() as instance:
        project = Project(transfer_folder, instance)
        project.models = ServedModels()
        assert run("seed_set") and run("synthetic_prompts", "round_01")
        monkeypatch.setenv("FAKE_VLLM_FAILS", "9")
        assert not run("scored_pairs", "round_01")
        monkeypatch.delenv("FAKE_VLLM_FAILS")
        assert run("scored_pairs", "round_01")
        asked = "SELECT engine, cache_hits > 0, model_calls > 0 FROM steps WHERE asset = 'scored_pairs'"
        assert project.rows(asked) == [("vllm, 1 requests at once", True, True)]
    told = [note["arguments"] for note in notes(transfer_folder)]
    names = [arguments[arguments.index("--served-model-name") + 1] for arguments in told]
    assert names == ["base", "generator", "base", "base"]


def wait_until(is_so: Callable[[], bool], seconds: float = 60) -> None:
    give_up = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < give_up
        time.sleep(0.05)
