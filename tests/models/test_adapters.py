"""What the checks of adapters take for granted of PEFT."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tests.training.tiny import TINY
from tuneshift_dag import TuneshiftError
from tuneshift_dag.models.adapter_checks import check_adapter_folder
from tuneshift_dag.models.loading import ADAPTER, load_for_inference
from tuneshift_dag.models.references import ModelFiles


class OneLayer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(8, 8)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("start", "harmless"),
    [
        *((start, True) for start in (True, False, "gaussian", "eva", "orthogonal", "mica")),
        *((start, False) for start in ("pissa", "pissa_niter_2", "olora")),
    ],
)
def test_a_start_is_refused_if_it_changes_the_base(start: str | bool, harmless: bool, tmp_path: Path) -> None:
    before = OneLayer().layer.weight
    model = get_peft_model(OneLayer(), LoraConfig(r=2, target_modules=["layer"], init_lora_weights=start))
    assert torch.equal(model.base_model.model.layer.base_layer.weight, before) == harmless
    model.save_pretrained(tmp_path)
    if harmless:
        assert check_adapter_folder(tmp_path, "key")["init_lora_weights"] == start
    else:
        with pytest.raises(TuneshiftError, match=f"says init_lora_weights '{start}'"):
            check_adapter_folder(tmp_path, "key")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_an_adapter_is_loaded_whatever_the_encoding_of_its_settings(tmp_path: Path, encoding: str) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    model.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(file.read_text(), encoding)
    files, adapter = (ModelFiles(name, tmp_path / name, name) for name in ("base", "adapter"))
    loaded = load_for_inference(files, adapter, "none", torch.float32)
    saved = {name: tensor for name, tensor in model.named_parameters() if "lora_" in name}
    assert len(saved) == 4
    for name, tensor in saved.items():
        found = loaded.get_parameter(f"base_model.model.{name}".replace(".default.", f".{ADAPTER}."))
        assert torch.equal(found, tensor)
