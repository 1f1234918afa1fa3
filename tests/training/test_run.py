"""Small trainings of the packaged models: on selected tokens, and so long that the target forgets the rest."""

import math
import random
import weakref
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tuneshift_dag.method.token_selection import ScoredTokens

from tuneshift_dag.config.transfer import Transfer, load_transfer
from tuneshift_dag.engines.local import LocalEngine
from tuneshift_dag.errors import TuneshiftError
from tuneshift_dag.method import discriminator
from tuneshift_dag.method.engine import Decoding, Engine, Side
from tuneshift_dag.method.retention import Retention, general_texts, retention
from tuneshift_dag.method.scoring import Cost, score_alone, token_excess
from tuneshift_dag.models.loading import load_tokenizer
from tuneshift_dag.models.references import resolve_model
from tuneshift_dag.resources.dagster_resources import EngineResource
from tuneshift_dag.store.cache import ResponseCache
from tuneshift_dag.store.database import Store
from tuneshift_dag.training.run import distill

SHARE = 0.5


@pytest.fixture
def transfer() -> Transfer:
    packaged = load_transfer(Path(__file__).parents[2] / "transfers" / "banking_intents")
    return with_distill(packaged, epochs=1, batch_size=4, balance="none", token_mask=SHARE)


def with_distill(transfer: Transfer, **settings: Any) -> Transfer:
    distill = transfer.config.distill.model_copy(update=settings)
    config = transfer.config.model_copy(update={"distill": distill})
    return Transfer(transfer.folder, config, transfer.seeds, transfer.heldout)


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


def test_a_discriminator_takes_its_seeds_for_real_and_random_text_not(
    transfer: Transfer, store: Store, tmp_path: Path
) -> None:
    draw = random.Random(0)

    def babble() -> str:
        return " ".join("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(8))

    models, taught, other = EngineResource(), [babble() for _ in range(24)], [babble() for _ in range(5)]
    before = models.source(transfer)
    losses: list[float] = []
    batches = discriminator.training_batches(transfer.seeds, taught, steps=6)
    models.train_discriminator(transfer, batches, tmp_path / "adapter", lambda step, total, loss: losses.append(loss))
    assert len(losses) == 6 and all(map(math.isfinite, losses))
    assert models.source(transfer) is not before, "released before the training loads the same base"
    judge, cache = models.discriminator(transfer, tmp_path / "adapter"), ResponseCache(store)
    assert judge.fingerprint("base") == before.fingerprint("base")
    scores = discriminator.scores(judge, cache, [*transfer.seeds, *other], Cost())
    assert all(0 <= score <= 1 for score in scores)
    assert min(scores[:5]) > max(scores[5:]), "also text that it wasn't taught"
    assert isinstance(judge, LocalEngine)
    model = weakref.ref(judge.model)
    del judge
    models.release()
    assert model() is None, "the source models have the memory"


def test_an_overtrained_target_is_worse_at_general_text_and_its_base_is_not(
    transfer: Transfer, pairs: list[tuple[str, str]], store: Store, tmp_path: Path
) -> None:
    models, texts = EngineResource(), general_texts()
    greedy = with_distill(transfer, epochs=10, learning_rate=3e-3, token_mask=None)
    models.distill(greedy, pairs[:4], tmp_path / "adapter", lambda *step: None)
    cost = Cost()

    def measured(engine: Engine, side: Side) -> Retention:
        tokens = [engine.encode(text, templated=True) for text in texts]
        # No adapter, another key: the base of the distilled engine is measured and not looked up.
        cache = ResponseCache(Store(tmp_path / f"{len(caches)}.duckdb"))
        caches.append(cache)
        return retention(texts, tokens, score_alone(engine, cache, tokens, side, cost))

    caches: list[ResponseCache] = []
    before = measured(models.target(transfer), "base")
    distilled = models.target(transfer, tmp_path / "adapter")
    assert measured(distilled, "base").perplexity == pytest.approx(before.perplexity, rel=1e-3)
    after = measured(distilled, "fine_tuned")
    assert (after.tokens, after.bytes) == (before.tokens, before.bytes)
    assert 1 < before.perplexity < 100
    assert after.perplexity > 1.5 * before.perplexity
