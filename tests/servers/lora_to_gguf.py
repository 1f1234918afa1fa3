"""A PEFT adapter of a Llama model as a GGUF adapter, as llama.cpp's own `convert_lora_to_gguf.py` writes it.

That script isn't on PyPI, so the few lines that a Llama needs are here.
"""

import json
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def convert(adapter: Path, base: Path, to: Path) -> None:
    """Write the adapter folder ``adapter`` of the Llama model folder ``base`` to the file ``to``."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    model = json.loads((base / "config.json").read_text())
    heads = {"attn_q": model["num_attention_heads"], "attn_k": model["num_key_value_heads"]}
    writer = gguf.GGUFWriter(to, "llama")
    writer.add_string(gguf.Keys.General.TYPE, gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        layer, _, rest = name.removeprefix("base_model.model.model.layers.").partition(".")
        module, side = rest.removesuffix(".weight").rsplit(".", 1)
        short = _NAMES[module]
        if side == "lora_B" and short in heads:
            tensor = _interleave(tensor, heads[short])
        writer.add_tensor(f"blk.{layer}.{short}.weight.{side.lower()}", tensor.to(torch.float32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring dimensions of a head, transformers the two halves."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
