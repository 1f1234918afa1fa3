"""Loading models: one load, one role.

A model is quantized once, and its 4-bit weights are kept: quantizing at every load takes seconds and reads the 16-bit
weights into memory, which would be the peak of a whole scoring step.

On CPUs with AVX512_BF16, bitsandbytes repacks every 4-bit weight in place at the first forward in eval mode. Then it
silently has no gradients, and merging and saving give garbage. So a model is loaded for inference or for training."""

import contextlib
import json
import logging
import math
import shutil
import tempfile
import types
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import bitsandbytes
import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.bnb import Linear4bit
from transformers import AutoTokenizer, BitsAndBytesConfig, GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from tuneshift_dag import TuneshiftError
from tuneshift_dag.models import memory
from tuneshift_dag.models.adapter_checks import adapter_config, chat_template_of, has_tokenizer
from tuneshift_dag.models.capabilities import attention_of, experts_bytes, read_whole, settings_end_ids
from tuneshift_dag.models.checks import embedding_rows
from tuneshift_dag.models.references import ModelFiles, quantized_copy

Quantization = Literal["nf4", "fp4", "none"]
DeviceMap = Literal["auto", "single"]
Placement = str | dict[str, int] | None
ADAPTER = "fine_tuned"
# Of the free memory of a machine without a GPU, what unpacked 4-bit weights may take.
_UNPACKED_SHARE = 0.25
_LOG = logging.getLogger("tuneshift_dag")


@lru_cache(maxsize=4)
def load_tokenizer(files: ModelFiles, base: ModelFiles | None = None) -> Tokenizer:
    """The model's tokenizer, with a padding token (its own, or the end-of-sequence token). What ``files`` of a
    fine-tune, such as an adapter's, lack is its ``base``'s. One object for everyone in the process: reading a large
    vocabulary takes seconds."""
    if base is not None and not has_tokenizer(files.path):
        if (template := chat_template_of(files.path, files.reference)) is None:
            return load_tokenizer(base)
        completed: Tokenizer = load_tokenizer.__wrapped__(base)
        completed.chat_template = template
        return completed
    try:
        tokenizer = AutoTokenizer.from_pretrained(files.path, trust_remote_code=False)
        if isinstance(tokenizer.chat_template, str):  # an editor's byte-order mark isn't part of it
            tokenizer.chat_template = tokenizer.chat_template.removeprefix("\ufeff")
        rows = embedding_rows(files.path, files.reference) or math.inf
        if beyond := [token for token, number in tokenizer.get_added_vocab().items() if number >= rows]:
            tokenizer = _without(tokenizer, beyond, files.path)
    except Exception as error:  # a tokenizer's files, or code of its own that isn't run, may raise anything
        told = " ".join(str(error).split())[:300]
        raise TuneshiftError(
            f"{files.reference}: its tokenizer can't be loaded ({type(error).__name__}: {told}). Save that of its base"
            f" model to {files.path}."
        ) from error
    if len(tokenizer) > rows:
        raise TuneshiftError(
            f"{files.reference}: its tokenizer has {len(tokenizer)} tokens and its embeddings have {rows} rows, so it"
            f" is another model's. Save its own to {files.path}."
        )
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = _end_of_model(tokenizer, files, base)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _without(tokenizer: Tokenizer, tokens: list[str], folder: Path) -> Tokenizer:
    """The tokenizer without some added tokens, whose text is then text like any other: a prompt that holds one would
    end in an index error where the model looks up its embedding."""
    with tempfile.TemporaryDirectory() as edited:
        tokenizer.save_pretrained(edited)
        shutil.copy(folder / "config.json", edited)  # says which class of tokenizer it is
        file, settings = Path(edited) / "tokenizer.json", Path(edited) / "tokenizer_config.json"
        saved = json.loads(file.read_text("utf-8"))
        saved["added_tokens"] = [token for token in saved["added_tokens"] if token["content"] not in tokens]
        file.write_text(json.dumps(saved, ensure_ascii=False), "utf-8")
        named = {k: v for k, v in json.loads(settings.read_text("utf-8")).items() if v not in tokens}
        named = {k: [x for x in v if x not in tokens] if isinstance(v, list) else v for k, v in named.items()}
        settings.write_text(json.dumps(named), "utf-8")
        return AutoTokenizer.from_pretrained(edited, trust_remote_code=False)


def _end_of_model(tokenizer: Tokenizer, files: ModelFiles, base: ModelFiles | None) -> str:
    of_base = [load_tokenizer(base).eos_token_id] if base is not None else []
    for number in [*settings_end_ids(files.path), *of_base]:
        if (token := tokenizer.convert_ids_to_tokens(number)) is not None:
            return str(token)
    raise TuneshiftError(
        f"{files.reference}: neither its tokenizer nor generation_config.json says which token ends a text. Set"
        f" eos_token in {files.path / 'tokenizer_config.json'}."
    )


def dtype_name(setting: str) -> str:
    """What ``models.compute_dtype`` means on this machine."""
    if setting != "auto":
        return setting
    # What has no bfloat16 emulates it: a GPU in float32's time, a CPU in seven times that.
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    known = _cpu_capabilities()
    return "bfloat16" if not known or any(has for name, has in known.items() if "bf16" in name) else "float32"


def load_for_inference(
    files: ModelFiles,
    adapter: ModelFiles | None,
    quantization: Quantization,
    dtype: torch.dtype,
    device_map: DeviceMap = "auto",
    least_tokens: int = 0,
) -> PreTrainedModel | PeftModel:
    """A model in eval mode, with the adapter (if any) attached, unmerged, under the name `ADAPTER`. One whose
    vocabulary is smaller than ``least_tokens`` gets rows for the added tokens, each the mean of its own rows.
    `TuneshiftError` when the GPUs haven't the memory, or PEFT can't put the adapter on this model."""
    model: Any = _unpacked(_load(files, quantization, dtype, device_map))
    if model.get_input_embeddings().weight.shape[0] < least_tokens:
        _add_tokens(model, least_tokens)
    if dtype != torch.bfloat16 or not _repacking_pays():
        # The repacked layout's kernel computes in bfloat16 whatever the dtype asked for.
        _keep_layout(model)
    if adapter is not None:
        model = _attached(model, files, adapter)
        # An adapter in float32 would pull its matrix products, and so half the step, to float32.
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
        for module in model.modules():
            if isinstance(module, Linear | Linear4bit) and is_plain(module):
                module.forward = types.MethodType(_lora_forward, module)
    return model.eval().requires_grad_(False)


def _attached(model: Any, files: ModelFiles, adapter: ModelFiles) -> PeftModel:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of is refused below
            how = {"config": _peft_config(adapter), "autocast_adapter_dtype": False}
            adapted = PeftModel.from_pretrained(model, adapter.path, ADAPTER, **how)
            # Only this says what didn't fit; the weights are the same.
            found = adapted.load_adapter(adapter.path, ADAPTER, autocast_adapter_dtype=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever settings that this model, PEFT or machine doesn't take lead to
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    else:
        # Of embeddings that grew PEFT saves a second copy, and takes the first.
        unknown = [name for name in found.unexpected_keys if ".modules_to_save." not in name]
        unfilled = found.missing_keys
        if not unknown and not unfilled:
            return adapted
        problem = "; ".join(
            f"{len(names)} {what}, first {names[0]!r}"
            for what, names in (
                ("of its tensors have no place in the base model", unknown),
                ("adapted layers of the base model get no weights from it", unfilled),
            )
            if names
        )
    raise TuneshiftError(
        f"{adapter.path}: PEFT can't put this adapter on {files.reference}: {problem}. Check that source.base is the"
        " very model that the adapter was trained on, and adapter_config.json as its training wrote it. Not every kind"
        " of adapter takes weights in 4 bits: for those, set models.quantization: none."
    )


@torch.no_grad()
def _add_tokens(model: Any, count: int) -> None:
    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(count, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight[before:] = layer.weight[:before].mean(0)


def _peft_config(adapter: ModelFiles) -> PeftConfig:
    """As PEFT reads it, but in any encoding of JSON; it opens the file as UTF-8 without a byte-order mark."""
    settings = adapter_config(adapter.path, adapter.reference)
    settings.pop("runtime_config", None)
    known = PEFT_TYPE_TO_CONFIG_MAPPING[settings["peft_type"]].__dataclass_fields__
    if unknown := sorted(name for name, value in settings.items() if value and name not in known):
        _LOG.warning(
            f"{adapter.path / 'adapter_config.json'} sets {', '.join(unknown)}, which this PEFT doesn't know: the"
            " adapter may work in another way than where it was trained. Run `pip install -U peft`."
        )
    return PeftConfig.from_peft_type(**settings)


def load_for_training(
    files: ModelFiles, quantization: Quantization, dtype: torch.dtype, device_map: DeviceMap = "auto"
) -> PreTrainedModel:
    """A base model in train mode whose 4-bit weights stay in the layout that has gradients; raises `TuneshiftError`
    when the GPUs haven't the memory."""
    model = _unpacked(_load(files, quantization, dtype, device_map))
    _keep_layout(model)
    return model.requires_grad_(False).train()


def is_plain(layer: LoraLayer) -> bool:
    """Whether a layer's update is ``scaling * (x A^T) B^T`` of one adapter and nothing else: no DoRA and the like."""
    names = list(layer.lora_A)
    return len(names) == 1 and not layer.lora_variant and not layer.merged and layer.lora_B[names[0]].bias is None


def _lora_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    """A plain LoRA layer's output, for inference only. PEFT's five operations are what gradients need; without them two
    do: one product down to the rank, and one that adds the product back up to the base layer's output."""
    result: torch.Tensor = module.base_layer(x)
    if module.disable_adapters:
        return result
    (name,) = module.active_adapters
    low = module.lora_A[name](x).flatten(0, -2)
    result.view(-1, result.shape[-1]).addmm_(low, module.lora_B[name].weight.t(), alpha=module.scaling[name])
    return result


@torch.inference_mode()
def pack(model: torch.nn.Module) -> None:
    """Have bitsandbytes repack the 4-bit weights now, if it will. It takes eight times a layer's memory meanwhile: in
    the first forward the heap would be left full of holes."""
    for module in model.modules():
        if not isinstance(module, bitsandbytes.nn.Linear4bit):
            continue
        # The flag says what the CPU can do, wherever the weight is.
        if module.support_avx512bf16_for_cpu and module.weight.device.type == "cpu":
            module(torch.zeros(1, module.in_features, dtype=module.compute_dtype))
            memory.trim()


def assert_trainable_layout(model: torch.nn.Module) -> None:
    """Raise when a 4-bit weight was repacked for inference: its gradients would be silently absent."""
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise RuntimeError(
                f"{name}: its 4-bit weight was repacked for inference, so it has no gradients and can't be"
                " merged or saved. Load the model again with `load_for_training`."
            )


def _repacking_pays() -> bool:
    """Not on CPUs that multiply in tiles (AMX), where dequantizing and one large product are faster. A layer of
    640 x 2,048 on two such cores: 0.5 against 0.3 ms for 16 rows, 0.5 against 1.1 for 64, 1.3 against 16.5 for 1024."""
    # Where they aren't known, bitsandbytes decides.
    return not _cpu_capabilities().get("amx_bf16", False)


def _cpu_capabilities() -> Mapping[str, Any]:
    """What the CPU can do, by name; empty with the oldest torch that is supported, which can't tell."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def _keep_layout(model: torch.nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _load(files: ModelFiles, quantization: Quantization, dtype: torch.dtype, device_map: DeviceMap) -> PreTrainedModel:
    placed, attention = _device_map(device_map), attention_of(files.path)
    if is_quantized(files.path):
        return _read(files.path, attention, "saved", dtype, placed)
    if quantization == "none":
        return _refuse_offloaded(files, _read(files.path, attention, quantization, dtype, placed))
    folder = quantized_copy(files.fingerprint, quantization, str(dtype))
    if not folder.is_dir():
        model = _read(files.path, attention, quantization, dtype, placed)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as staging:
            # Before any forward: that may repack the weights, and a repacked model is saved as garbage.
            model.save_pretrained(Path(staging) / "model")
            with contextlib.suppress(OSError):  # another process was first
                (Path(staging) / "model").rename(folder)
        if (experts := experts_bytes(model)) > model.get_memory_footprint() / 10:
            _LOG.warning(f"{files.reference}: its experts, {experts / 1e9:.1f} GB, stay in {dtype}, not in 4 bits.")
        del model
    return _read(folder, attention, "saved", dtype, placed)


def _unpacked(model: PreTrainedModel) -> PreTrainedModel:
    """The model with the values of its 4-bit weights in the dtype that it computes in, where it is on a CPU that has
    much more memory than these take. Else every pass unpacks them anew, or multiplies 4-bit weights at the speed of few
    rows."""
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    size = sum(layer.in_features * layer.out_features for layer in layers) * model.dtype.itemsize
    if layers and model.device.type == "cpu" and size < memory.free_bytes() * _UNPACKED_SHARE:
        model.dequantize()
    return model


def is_quantized(folder: Path) -> bool:
    """Whether a model's weights were saved in 4 bits: they are used as they are."""
    return bool(json.loads((folder / "config.json").read_text("utf-8")).get("quantization_config"))


def _device_map(setting: DeviceMap) -> Placement:
    if not torch.cuda.is_available():
        return None
    return "auto" if setting == "auto" else {"": torch.cuda.current_device()}


def _refuse_offloaded(files: ModelFiles, model: PreTrainedModel) -> PreTrainedModel:
    """The model, unless accelerate has left a part of it out of the GPUs, where it would crawl and can't be trained. Of
    a 4-bit model transformers refuses this itself."""
    outside = [name for name, device in getattr(model, "hf_device_map", {}).items() if device in ("cpu", "disk")]
    if outside and torch.cuda.is_available():
        raise TuneshiftError(
            f"{files.reference} doesn't fit in the free memory of {torch.cuda.device_count()} GPU(s): {len(outside)} of"
            f" its parts, such as {outside[0]}, would be left out. Set models.quantization: nf4 (when it is trained,"
            " distill.quantization: nf4), free the GPUs' memory or use more of them."
        )
    return model


def _read(
    folder: Path,
    attention: str | None,
    quantization: Quantization | Literal["saved"],
    dtype: torch.dtype,
    placed: Placement,
) -> PreTrainedModel:
    # No attention weights, whatever config.json asks for: the attention for CPUs has none.
    options: dict[str, Any] = {"dtype": dtype, "output_attentions": False}
    if attention is not None:
        options["attn_implementation"] = attention
    if quantization not in ("none", "saved"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
        )
    if placed is not None:
        options["device_map"] = placed
    model = read_whole(folder, **options)
    # `generate` would take from it whatever it isn't told: penalties, beams, forced tokens.
    model.generation_config = GenerationConfig()
    return model
