"""An adapter merged into its base: a model folder that plain transformers loads, and what converts it goes on from."""

from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from tuneshift_dag import TuneshiftError
from tuneshift_dag.models.capabilities import end_ids
from tuneshift_dag.models.loading import is_quantized, load_tokenizer
from tuneshift_dag.models.references import ModelFiles

# Of a LoRA's two matrices the second one, to which its update is proportional.
_UP = ".lora_B."


def merge(files: ModelFiles, adapter: Path, to: Path) -> None:
    """Write ``to``: safetensors in the base's dtype, config, tokenizer with its chat template, and a generation config
    with every token that ends a response. The sum is taken in float32, and so needs four bytes for each weight.

    Raises:
        TuneshiftError: the base's weights are in 4 bits, which a merge would have to round again.
    """
    if is_quantized(files.path):
        raise TuneshiftError(
            f"{files.reference}: its weights are in 4 bits, into which an adapter can't be merged without loss. Name"
            " the 16-bit model in target.base, or serve the adapter beside this one."
        )
    tokenizer = load_tokenizer(files)
    model = AutoModelForCausalLM.from_pretrained(files.path, dtype="auto")
    dtype = model.dtype
    merged = PeftModel.from_pretrained(model.float(), adapter, autocast_adapter_dtype=False).merge_and_unload()
    merged.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(end_ids(tokenizer, files.path)),
        pad_token_id=tokenizer.pad_token_id,
    )
    merged.to(dtype).save_pretrained(to)
    tokenizer.save_pretrained(to)
    del merged
    torch.cuda.empty_cache()


def scale_adapter(folder: Path, scale: float) -> None:
    """Multiply the update of the LoRA adapter in ``folder`` (rank, alpha and all else stay) by ``scale``."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: t * scale if _UP in name else t for name, t in tensors.items()}, file, {"format": "pt"})
