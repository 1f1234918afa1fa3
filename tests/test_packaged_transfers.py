"""Every folder under transfers/ is sound; what they teach is measured in their READMEs."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from tuneshift_dag import TuneshiftError
from tuneshift_dag.cli.doctor import examine
from tuneshift_dag.config.files import find_transfers, load_transfer
from tuneshift_dag.definitions import build_definitions
from tuneshift_dag.method.prompting import prompt_id
from tuneshift_dag.resources import EngineResource

ROOT = Path(__file__).parents[1] / "transfers"
FOLDERS = find_transfers(ROOT)
HUB = "gsm8k_llama"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
class TestEveryTransfer:
    def test_the_doctor_finds_nothing_to_fix(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TUNESHIFT_TRANSFERS", str(ROOT))
        findings = list(examine(folder.name, with_models=False))
        assert [f for f in findings if f.ok is False] == []
        assert folder.name in [f.what for f in findings]


@pytest.mark.parametrize("folder", [f for f in FOLDERS if f.name != HUB], ids=lambda folder: folder.name)
class TestEveryTransferOfPackagedModels:
    def test_it_is_small_and_can_be_made_again(self, folder: Path) -> None:
        assert len(load_transfer(folder).seeds) == 5
        assert len(load_transfer(folder).heldout) >= 200
        assert {"README.md", "train_source.py"} <= {path.name for path in folder.iterdir()}
        assert (folder / "adapter" / "adapter_model.safetensors").stat().st_size < 12e6


def test_each_is_an_asset_group_of_its_own(tmp_path: Path) -> None:
    transfers = [load_transfer(folder) for folder in FOLDERS]
    assert len(transfers) >= 3
    graph = build_definitions(transfers, tmp_path / "t.duckdb").resolve_asset_graph()
    groups = {key.path[0]: graph.get(key).group_name for key in graph.get_all_asset_keys()}
    assert groups == {transfer.name: transfer.name for transfer in transfers}


class TestTransferOfHubModels:
    """One whose models aren't on this machine."""

    @pytest.fixture(autouse=True)
    def empty_hub_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TUNESHIFT_TRANSFERS", str(ROOT))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def test_the_doctor_names_what_a_run_would_fetch_and_fetches_nothing(self) -> None:
        findings = {f.what: f for f in examine(HUB, with_models=True)}
        config = load_transfer(ROOT / HUB).config
        missing = findings[f"{HUB} models"]
        assert missing.ok is None and "hf download" in missing.detail
        for model in (config.source.base, config.source.adapter, config.target.base, config.generator.model):
            assert model in missing.detail
        assert not findings.keys() & {f"{HUB} generator", f"{HUB} preflight"}

    def test_a_run_says_which_model_it_has_not_got(self) -> None:
        transfer = load_transfer(ROOT / HUB)
        with pytest.raises(
            TuneshiftError, match=r"source\.adapter: the hub model 'your-account/.* name a local folder"
        ):
            EngineResource().source(transfer)


class TestMeetingSlots:
    """The task that is written by rule."""

    @pytest.fixture
    def rules(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location("slot_requests", ROOT / "meeting_slots" / "slot_requests.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def test_the_held_out_file_is_what_the_rules_write(self, rules: ModuleType) -> None:
        lines = (ROOT / "meeting_slots" / "heldout.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert [(row["prompt"], row["response"]) for row in rows] == rules.held_out_requests()

    def test_a_request_is_read_by_rule_whoever_wrote_it(self, rules: ModuleType) -> None:
        assert [rules.read_request(prompt) for prompt, _ in rules.held_out_requests()] == [
            code for _, code in rules.held_out_requests()
        ]
        trained = rules.training_requests(1000)
        unread = [code for prompt, code in trained if rules.read_request(prompt) != code]
        assert len(unread) < 5 and {code[2:] for code in unread} == {"0X"}, "with neither day nor time"
        for other in (
            "What makes a meeting go well?",
            "Boil an egg on Monday",
            "A haircut",
            "Write a joke about lunch",
        ):
            assert rules.read_request(other) is None, other

    def test_no_held_out_request_or_seed_was_trained_on(self, rules: ModuleType) -> None:
        trained_on = {prompt_id(prompt) for prompt, _ in rules.training_requests(2000)}
        assert len(trained_on) > 1900
        assert not trained_on & {prompt_id(prompt) for prompt, _ in rules.held_out_requests()}
        assert not trained_on & {prompt_id(seed) for seed in load_transfer(ROOT / "meeting_slots").seeds}
