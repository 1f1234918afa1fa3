"""The two baselines of the scoring benchmarks, written as their users would write them.

Both load two 4-bit models (the base, and the base with the adapter) and compute for every prompt both
greedy responses and all four perplexities with a forward pass each.
"""

from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from benchmarks.common import RESPONSE_TOKENS, source_files


class TwoModels:
    """Base and fine-tuned model, each loaded in 4-bit."""

    def __init__(self, contiguous_head: bool) -> None:
        base, adapter = source_files()
        self.tokenizer = AutoTokenizer.from_pretrained(base.path, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.eos_token
        self.base = self._load(base.path)
        self.fine_tuned = PeftModel.from_pretrained(self._load(base.path), adapter.path).eval()
        if contiguous_head:
            # The known trap: a frozen head copies itself once per row of non-contiguous input.
            for model in (self.base, self.fine_tuned):
                model.get_output_embeddings().register_forward_pre_hook(lambda m, inputs: inputs[0].contiguous())

    def _load(self, path: Any) -> Any:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
        )
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=config)

    @torch.inference_mode()
    def naive(self, prompts: list[str]) -> list[tuple[float, ...]]:
        """One prompt at a time."""
        results = []
        for prompt in prompts:
            inputs = self.tokenizer(prompt, return_tensors="pt")
            n = inputs.input_ids.shape[1]
            whole = [
                model.generate(**inputs, max_new_tokens=RESPONSE_TOKENS, do_sample=False)
                for model in (self.base, self.fine_tuned)
            ]
            results.append(
                tuple(self._perplexity(model, ids, n) for model in (self.base, self.fine_tuned) for ids in whole)
            )
        return results

    def _perplexity(self, model: Any, ids: torch.Tensor, prompt_length: int) -> float:
        labels = ids.clone()
        labels[:, :prompt_length] = -100
        return float(model(input_ids=ids, labels=labels).loss.exp())

    @torch.inference_mode()
    def batched(self, prompts: list[str], batch_size: int = 32) -> list[tuple[float, ...]]:
        """Static batches with left padding, and a second forward pass for each perplexity."""
        results = []
        for start in range(0, len(prompts), batch_size):
            inputs = self.tokenizer(prompts[start : start + batch_size], return_tensors="pt", padding=True)
            n = inputs.input_ids.shape[1]
            whole = [
                model.generate(**inputs, max_new_tokens=RESPONSE_TOKENS, do_sample=False)
                for model in (self.base, self.fine_tuned)
            ]
            columns = [
                self._perplexities(model, ids, inputs.attention_mask, n)
                for model in (self.base, self.fine_tuned)
                for ids in whole
            ]
            results += list(zip(*columns, strict=True))
        return results

    def _perplexities(self, model: Any, ids: torch.Tensor, prompt_mask: torch.Tensor, n: int) -> list[float]:
        response = ids[:, n:]
        is_end = response == self.tokenizer.eos_token_id
        real = (is_end.cumsum(1) - is_end.long()) == 0  # up to and including the first end token
        mask = torch.cat([prompt_mask, real.long()], 1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        keep = response.shape[1] + 1
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep).logits[:, :-1]
        logprobs = logits.float().log_softmax(-1).gather(2, response[..., None])[..., 0] * real
        return list((-logprobs.sum(1) / real.sum(1)).exp().tolist())
