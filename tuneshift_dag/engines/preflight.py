"""Is the adapter really applied? A silently unapplied adapter makes both perplexities equal.

Adapters have been dropped without a word by several libraries when their keys didn't match the model,
so this runs on the seeds before any work.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AdapterCheck:
    """``problems`` must stop the run, ``warnings`` must not.

    ``largest_logit_difference`` and ``delta_norm`` are None for models on a server, which shows neither.
    """

    problems: list[str]
    warnings: list[str]
    largest_logit_difference: float | None
    delta_norm: float | None


def check_adapter_keys(model: Any, saved_keys: Sequence[str], adapter_name: str) -> list[str]:
    """Problems with an adapter's saved tensor names: each must have a place in the loaded model."""
    places = {name.replace(f".{adapter_name}.", ".") for name, _ in model.named_parameters() if "lora_" in name}
    unknown = sorted(set(saved_keys) - places)
    unfilled = sorted(places - set(saved_keys))
    problems = []
    if unknown:
        problems.append(f"{len(unknown)} adapter tensors have no place in the base model, first {unknown[0]!r}")
    if unfilled:
        problems.append(f"{len(unfilled)} LoRA layers got no weights from the adapter, first {unfilled[0]!r}")
    return problems


def adapter_delta_norm(model: Any) -> float:
    """Frobenius norm of the low-rank updates, summed over layers (a product B·A of zero adds nothing)."""
    total = 0.0
    for module in model.modules():
        for name in getattr(module, "lora_A", {}):
            a, b = (part[name].weight.detach().float() for part in (module.lora_A, module.lora_B))
            total += float((b @ a).norm()) * abs(module.scaling[name])
    return total


def check_outputs(base_logits: "torch.Tensor", fine_tuned_logits: "torch.Tensor", delta_norm: float) -> AdapterCheck:
    """Compare both models' next-token logits on the seeds. Shapes: (seeds, vocabulary).

    A fine-tuned model that is not more confident than its base is worth a warning: the method looks
    for prompts where it is.
    """
    problems, warnings = [], []
    difference = float((base_logits - fine_tuned_logits).abs().max())
    if delta_norm == 0:
        problems.append("the adapter's weights are zero: it changes nothing")
    if difference == 0:
        problems.append("the base and the fine-tuned model give equal logits on every seed")
    base_top = float(base_logits.log_softmax(1).max(1).values.mean())
    fine_tuned_top = float(fine_tuned_logits.log_softmax(1).max(1).values.mean())
    if fine_tuned_top <= base_top:
        warnings.append(
            "the fine-tuned model isn't more confident than the base on the seeds"
            f" (mean log-probability of the first token {fine_tuned_top:.2f} against {base_top:.2f}):"
            " are these seeds of the task it was tuned for?"
        )
    return AdapterCheck(problems, warnings, difference, delta_norm)
