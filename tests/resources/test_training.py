"""Training on selected tokens, with the packaged models: SmolLM2 says which, Gemma learns them."""

import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tuneshift_dag.errors import TuneshiftError
from tuneshift_dag.method.engine import Decoding
from tuneshift_dag.method.scoring import Cost, token_excess
from tuneshift_dag.method.token_selection import ScoredTokens
from tuneshift_dag.resources.dagster_resources import EngineResource
from tuneshift_dag.resources.model_loading import load_tokenizer
from tuneshift_dag.resources.model_ref import resolve_model
from tuneshift_dag.resources.response_cache import ResponseCache
from tuneshift_dag.resources.store import Store
from tuneshift_dag.resources.training import distill
from tuneshift_dag.transfer import Transfer, load_transfer

SHARE = 0.5


@pytest.fixture
def transfer() -> Transfer:
    packaged = load_transfer(Path(__file__).parents[2] / "transfers" / "banking_intents")
    settings = {"epochs": 1, "batch_size": 4, "balance": "none", "token_mask": SHARE}
    small = packaged.config.distill.model_copy(update=settings)
    config = packaged.config.model_copy(update={"distill": small})
    return Transfer(packaged.folder, config, packaged.seeds, packaged.heldout)


@pytest.fixture
def pairs(transfer: Transfer) -> list[tuple[str, str]]:
    return [(prompt, f" {response}") for prompt, response in transfer.heldout[:8]]


def test_a_small_training_counts_the_selected_tokens_only(
    transfer: Transfer, pairs: list[tuple[str, str]], store: Store, tmp_path: Path
) -> None:
    models = EngineResource()
    source, template = models.source(transfer), transfer.config.prompt_template
    prompts = [source.encode(template.replace("{prompt}", prompt)) for prompt, _ in pairs]
    texts = [response for _, response in pairs]
    excess = token_excess(source, ResponseCache(store), prompts, texts, Decoding(16), Cost())
    assert all(len(scored.ids) == len(scored.excess) > 1 for scored in excess)
    assert sum(sum(scored.excess) for scored in excess) > 0, "the fine-tuned model knows these answers better"

    losses: list[float] = []

    def on_step(step: int, total: int, loss: float) -> None:
        losses.append(loss)

    curve = models.distill(transfer, pairs, tmp_path / "adapter", on_step, excess)
    tokenizer: Any = load_tokenizer(resolve_model(transfer.config.target.base, transfer.folder, "target.base"))
    lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    counted = sum(max(1, round(SHARE * n)) + 1 for n in lengths)
    assert curve.token_share == counted / sum(n + 1 for n in lengths) < 1
    assert curve.response_tokens == counted
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    trained = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(weight.abs().max() > 0 for name, weight in trained.items() if "lora_B" in name)


def test_tokens_that_spell_another_text_stop_it_before_a_model_is_loaded(
    transfer: Transfer, pairs: list[tuple[str, str]], tmp_path: Path
) -> None:
    excess = [ScoredTokens([5, 6], [1.0, 2.0]) for _ in pairs]
    with pytest.raises(TuneshiftError, match=r"transfer\.yaml: distill\.token_mask 0\.5: .*Remove token_mask"):
        distill(transfer, pairs, tmp_path / "adapter", lambda *step: None, excess)
    assert not (tmp_path / "adapter").exists()
