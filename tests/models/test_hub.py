"""References to a hub, asked over HTTP: one commit until a refresh, and what a push does."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from tests.models.fake_hub import FakeHub, fake_hub

Ask = Callable[..., list[Any]]
FIRST = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": save({"first": np.zeros(1)}),
    "README.md": b"#",
}
SECOND = {**FIRST, "model.safetensors": save({"second": np.zeros(1)})}
ADAPTER = {
    "adapter_config.json": b'{"peft_type": "LORA"}',
    "adapter_model.safetensors": save({"adapter": np.zeros(1)}),
    "x.bin": b"x",
}


NUMBERS = itertools.count()
PROCESS = """
import json, pathlib, sys
from safetensors.numpy import load_file
from huggingface_hub import hf_hub_download
from tuneshift_dag.config import files, versions
from tuneshift_dag.config.files import load_transfer
from tuneshift_dag.models.references import Reference, resolve_model
here = pathlib.Path(sys.argv[1])
known = lambda name, kind='model': Reference(name, here, 'source.base', kind).fingerprint()
renew = lambda name, kind='model': Reference(name, here, 'source.base', kind).refresh()
model = lambda name: resolve_model(name, here, 'source.base')
weights = lambda name: next(iter(load_file(model(name).path / 'model.safetensors')))
def push(*given):  # takes seconds to import
    from tuneshift_dag.reports.export import push
    return push(*given)
names = lambda files: sorted(file.name for file in files.path.iterdir())
for line in sys.stdin:
    try:
        print(json.dumps(eval(line)), flush=True)
    except Exception as error:
        print(json.dumps(str(error)), flush=True)
"""


@contextmanager
def process(home: Path, endpoint: str, offline: bool = False) -> Iterator[Ask]:
    """The values that expressions have in a process whose hub is at ``endpoint``; the text of what they raise."""
    environment = {
        **{"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))},
        **{"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", "HF_TOKEN": "hf_a_secret"},
    }
    with subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(home)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    ) as running:
        assert running.stdin and running.stdout

        def ask(*expressions: str) -> list[Any]:
            assert running.stdin and running.stdout
            answers = []
            for expression in expressions:
                running.stdin.write(f"{expression}\n")
                running.stdin.flush()
                answers.append(json.loads(running.stdout.readline()))
            return answers

        yield ask
        running.stdin.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakeHub, Path, Ask]]:
    home = tmp_path_factory.mktemp("hub")
    with fake_hub() as hub, process(home, hub.endpoint) as ask:
        yield hub, home, ask


@pytest.fixture
def hub(running: tuple[FakeHub, Path, Ask]) -> FakeHub:
    """With a repository that nobody has asked for; in expressions it is ``org/name``."""
    running[0].start(f"org/{next(NUMBERS)}")
    return running[0]


@pytest.fixture
def ask(hub: FakeHub, running: tuple[FakeHub, Path, Ask]) -> Ask:
    return lambda *expressions: running[2](*(text.replace("org/name", hub.name) for text in expressions))


def test_nothing_is_known_of_a_model_that_was_never_fetched_and_the_hub_is_not_asked(hub: FakeHub, ask: Ask) -> None:
    hub.push(FIRST)
    pinned = "0123456789" * 4
    assert ask("known('org/name')", f"known('org/name@{pinned}')", f"renew('org/name@{pinned}')") == [
        ["", None],
        [f"{hub.name}@{pinned}", pinned],
        "",
    ]
    assert hub.requests == []


def test_a_model_is_fetched_once_and_stays_at_its_commit_until_a_refresh(hub: FakeHub, ask: Ask) -> None:
    commit = hub.push(FIRST)
    assert ask("weights('org/name')", "known('org/name')") == ["first", [f"{hub.name}@{commit}", commit]]
    asked = len(hub.requests)
    later = hub.push(SECOND)
    assert ask("model('org/name').fingerprint", "weights('org/name')") == [f"{hub.name}@{commit}", "first"]
    assert hub.requests[asked:] == [], "the hub isn't asked again"
    refreshed = ask("renew('org/name')", "model('org/name').fingerprint", "weights('org/name')", "known('org/name')[1]")
    assert refreshed == ["", f"{hub.name}@{later}", "second", later]
    asked = len(hub.requests)
    assert ask("renew('org/name')") == [""]
    assert len(hub.requests) == asked + 1, "what hasn't moved isn't fetched again"


def test_what_is_missing_of_a_commit_is_fetched_of_that_commit(hub: FakeHub, ask: Ask) -> None:
    commit = hub.push(FIRST)
    ask("hf_hub_download('org/name', 'config.json')")
    hub.push(SECOND)
    found = ask("known('org/name')[1]", "weights('org/name')", "model('org/name').fingerprint")
    assert found == [commit, "first", f"{hub.name}@{commit}"]


def test_an_interrupted_refresh_leaves_the_commit_that_was_here(hub: FakeHub, ask: Ask) -> None:
    commit = hub.push(FIRST)
    ask("renew('org/name')")
    hub.push(SECOND)
    hub.refused.add("model.safetensors")
    problem, now, weights = ask("renew('org/name')", "known('org/name')[1]", "weights('org/name')")
    assert f"source.base: can't ask the hub whether '{hub.name}' has changed" in problem
    assert (now, weights) == (commit, "first")


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_what_is_here_stays(
    hub: FakeHub, ask: Ask, running: tuple[FakeHub, Path, Ask], offline: bool
) -> None:
    commit = hub.push(FIRST)
    ask("renew('org/name')")
    with process(running[1], "http://127.0.0.1:9", offline) as ask_alone:
        problem, now, weights = ask_alone(*(f"{what}('{hub.name}')" for what in ("renew", "known", "weights")))
    assert problem == "" if offline else "can't ask the hub" in problem
    assert (now, weights) == ([f"{hub.name}@{commit}", commit], "first")


def test_what_cannot_be_used_is_refused_when_it_is_fetched(hub: FakeHub, ask: Ask) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    hub.push({**FIRST, "model.safetensors": pointer})
    refreshed, resolved = ask("renew('org/name')", "model('org/name')")
    for told in (refreshed, resolved):
        assert told.startswith("source.base: ") and "model.safetensors is a git-lfs pointer" in told


def test_the_settings_of_a_model_that_is_here_are_looked_at_before_it_is_fetched_whole(hub: FakeHub, ask: Ask) -> None:
    hub.push({**FIRST, "config.json": b'{"model_type": "t5", "is_encoder_decoder": true}'})
    ask("hf_hub_download('org/name', 'config.json')")
    asked = len(hub.requests)
    (told,) = ask("Reference('org/name', here, 'source.base').check()")
    assert "t5 is an encoder-decoder" in told
    assert hub.requests[asked:] == []


def test_a_tag_a_tokenizer_and_an_adapter(hub: FakeHub, ask: Ask) -> None:
    commit = hub.push(FIRST, "v1")
    other = hub.push(ADAPTER, "main")
    assert ask(
        "Reference('org/name@v1', here, 'source.base', 'tokenizer').files().fingerprint",
        "names(Reference('org/name@v1', here, '', 'tokenizer').files())",
        "Reference('org/name', here, 'source.adapter', 'adapter').files().fingerprint",
        "names(Reference('org/name', here, '', 'adapter').files())",
        "known('org/name', 'adapter')",
        "[Reference(name, here, '').is_here for name in ('org/name', 'org/name@v2')]",
    ) == [
        f"{hub.name}@{commit}",
        ["config.json", "tokenizer.json"],
        f"{hub.name}@{other}",
        ["adapter_config.json", "adapter_model.safetensors"],
        [f"{hub.name}@{other}", other],
        [True, False],
    ]


def test_a_model_that_is_not_there_says_what_to_check(hub: FakeHub, ask: Ask) -> None:
    refreshed, fetched = ask("renew('org/other')", "model('org/other').fingerprint")
    assert "source.base: can't ask the hub whether 'org/other' has changed (RepositoryNotFoundError" in refreshed
    assert "source.base: the hub model 'org/other' could not be fetched" in fetched
    assert "Check the name and the network" in fetched


def test_a_push_makes_what_uses_the_model_out_of_date(
    hub: FakeHub, ask: Ask, transfer_folder: Path, edit_config: Callable[[str, Any], None]
) -> None:
    edit_config("target.base", hub.name)
    transfer = f"load_transfer(pathlib.Path({str(transfer_folder)!r}))"
    now = [
        f"files.refresh({transfer}, print).reference('target.base')",
        f"{{name: versions.code_version({transfer}, name) for name in versions.INPUTS}}",
        f"versions.training_version({transfer})",
    ]
    commit = hub.push(FIRST)
    reference, before, training = ask(*now)
    assert reference == f"{hub.name}@{commit}"
    assert ask(*now) == [reference, before, training]
    hub.push(SECOND)
    assert ask(*now[1:]) == [before, training], "nothing has changed on this machine"
    _, after, later = ask(*now)
    assert later == training, "a trained adapter is still found by its settings"
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"rehearsal_set", "distilled_model", "evaluation", "comparison"}


def test_an_exported_folder_is_pushed_to_a_private_repository(hub: FakeHub, ask: Ask, running: Any) -> None:
    folder = running[1] / "exported"
    (folder / "sub").mkdir(parents=True)
    (folder / "README.md").write_text("# A card: é")
    (folder / "sub" / "adapter_model.safetensors").write_bytes(b"\x00weights")
    (address,) = ask("str(push(here / 'exported', 'org/name'))")
    assert list(hub.commits) == [address.rpartition("/")[2]], address
    (commit,) = hub.commits
    assert hub.private is True
    assert hub.commits[commit] == {
        "README.md": "# A card: é".encode(),
        "sub/adapter_model.safetensors": b"\x00weights",
    }


def test_a_push_that_fails_says_what_to_do_and_no_token(hub: FakeHub, ask: Ask) -> None:
    (problem,) = ask("push(here / 'nothing here', 'org/name')")
    assert "--push" in problem and "hf auth login" in problem and "hf_a_secret" not in problem
