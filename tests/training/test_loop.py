"""The loop on tiny random models: what a step is, that silent failures are loud, and that a training goes on."""

import math
from dataclasses import replace
from pathlib import Path

import bitsandbytes
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.training.tiny import (
    ONE_STEP,
    SETTINGS,
    TEXTS,
    examples,
    one_step,
    tiny_gemma,
    tiny_model,
)
from tuneshift_dag import TuneshiftError
from tuneshift_dag.training import loop
from tuneshift_dag.training.batches import (
    collate,
    mean_loss,
)
from tuneshift_dag.training.loop import LoraTraining, TrainingCheckpoint, train
from tuneshift_dag.training.lora import add_lora


def test_a_step_in_several_passes_is_that_of_all_its_examples_at_once() -> None:
    whole_loss, whole = one_step(ONE_STEP)
    loss, gradients = one_step(replace(ONE_STEP, batch_size=4, gradient_accumulation=4))
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    torch.testing.assert_close(gradients, whole, rtol=1e-4, atol=1e-6)
    # The mean of the passes' means would be another: they have unequal numbers of tokens.
    order = sorted(examples(16), key=lambda e: len(e.prompt_ids) + len(e.response_ids))
    passes = [collate(order[start : start + 4]) for start in range(0, 16, 4)]
    assert len({len(batch.targets) for batch in passes}) > 1
    means = [float(mean_loss(tiny_model(), batch)) for batch in passes]
    assert abs(sum(means) / 4 - float(mean_loss(tiny_model(), collate(order)))) > 1e-4


def test_steps_are_those_of_the_optimizer() -> None:
    settings = replace(SETTINGS, batch_size=2, gradient_accumulation=4, validation_fraction=0.0)
    steps = []
    curve = train(add_lora(tiny_model(), settings), examples(20), settings, lambda *step: steps.append(step[:2]))
    assert steps == [(i, 6) for i in range(1, 7)]  # two passes over 8, 8 and 4 examples
    assert [row["step"] for row in curve.steps] == [1, 2, 3, 4, 5, 6]
    assert curve.steps[-1]["learning_rate"] == 0
    assert curve.response_tokens == 2 * sum(len(e.response_ids) for e in examples(20))


@pytest.mark.parametrize("build", [tiny_model, tiny_gemma])
def test_checkpointing_keeps_less_and_changes_no_gradient(build) -> None:
    kept: list[int] = []

    def measured(settings: LoraTraining) -> tuple[float, torch.Tensor]:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found = one_step(settings, build)
        kept.append(sum(sizes.values()))
        return found

    loss, gradients = measured(ONE_STEP)
    checkpointed_loss, checkpointed = measured(replace(ONE_STEP, gradient_checkpointing=True))
    assert checkpointed_loss == loss
    torch.testing.assert_close(checkpointed, gradients, rtol=1e-5, atol=1e-7)
    assert kept[1] < 0.6 * kept[0]


def test_the_paged_optimizer_keeps_8_bit_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes leaves the paging out on a CPU, and smaller tensors than 4,096 numbers in 32 bits."""
    made = []

    class Recorded(bitsandbytes.optim.PagedAdamW8bit):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(bitsandbytes.optim, "PagedAdamW8bit", Recorded)
    settings = replace(SETTINGS, rank=64, optimizer="paged_adamw_8bit", weight_decay=0.01)
    curve = train(add_lora(tiny_model(), settings), examples(16), settings)
    assert curve.epochs[1]["train_loss"] < curve.epochs[0]["train_loss"]
    [optimizer] = made
    assert optimizer.is_paged and optimizer.defaults["weight_decay"] == 0.01
    assert optimizer.defaults["lr"] == settings.learning_rate
    large = [state for parameter, state in optimizer.state.items() if parameter.numel() >= 4096]
    assert {state["state1"].dtype for state in large} == {torch.uint8}


def test_float16_is_trained_with_a_scaled_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    scalers, scaler = [], torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scalers.append(scaler(*a, **k)) or scalers[-1])
    curves = [
        train(add_lora(tiny_model().to(dtype), SETTINGS), examples(16), SETTINGS)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ]
    assert [one.is_enabled() for one in scalers] == [False, False, True]
    whole, _, half = [[row["loss"] for row in curve.steps] for curve in curves]
    assert whole[-1] < whole[0] - 0.1
    assert half == pytest.approx(whole, rel=0.01)


def test_a_base_that_overflows_is_named() -> None:
    model = add_lora(tiny_model().half(), SETTINGS)
    model.get_input_embeddings().weight.data.fill_(6e4)
    model.get_base_model().lm_head.weight.data.fill_(6e4)
    with pytest.raises(TuneshiftError, match=r"step 1 the loss is .*overflows in torch\.float16: set models\.comp"):
        train(model, examples(8), SETTINGS)


def test_training_lowers_the_loss_and_reports_every_epoch() -> None:
    model = add_lora(tiny_model(), SETTINGS)
    steps = []
    curve = train(model, examples(16), SETTINGS, lambda step, total, loss: steps.append((step, total)))
    assert steps == [(i, 6) for i in range(1, 7)]
    assert [e["epoch"] for e in curve.epochs] == [1, 2]
    assert curve.epochs[1]["train_loss"] < curve.epochs[0]["train_loss"]
    assert curve.response_tokens > 0


def test_same_seed_gives_the_same_adapter() -> None:
    weights = []
    for _ in range(2):
        model = add_lora(tiny_model(), SETTINGS)
        train(model, examples(8), SETTINGS)
        weights.append(torch.cat([p.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(*weights)


class Killed(BaseException):
    pass


@pytest.fixture
def every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainingCheckpoint:
    """A checkpoint after every step, however long it takes to write."""
    monkeypatch.setattr(loop, "_SHARE", math.inf)
    return TrainingCheckpoint(tmp_path / "checkpoint", every=0)


def trained(settings: LoraTraining, checkpoint: TrainingCheckpoint | None, end_after: int | None = None, dtype=None):
    """Curve, adapter weights and step numbers of a training that may be ended after a step."""
    model = add_lora(tiny_model().to(dtype), settings)
    steps = []

    def on_step(step: int, total: int, loss: float) -> None:
        steps.append(step)
        if end_after is not None and step > end_after:
            raise Killed

    curve = train(model, examples(16), settings, on_step, checkpoint, TEXTS)
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    return curve, weights, steps


@pytest.mark.parametrize("end_after", [1, 3, 4])
@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, None),
        ({"balance": "response", "batch_size": 2, "gradient_accumulation": 2}, None),
        ({"retain": 1.0, "dropout": 0.3}, None),
        ({}, torch.float16),
        ({"rank": 64, "optimizer": "paged_adamw_8bit"}, None),
    ],
)
def test_a_training_that_was_ended_goes_on_and_gives_what_one_in_one_go_gives(
    every_step: TrainingCheckpoint, changes: dict, dtype: torch.dtype | None, end_after: int
) -> None:
    """Three steps an epoch: ended within the first, at its end, before its validation, and within the second."""
    settings = replace(SETTINGS, **changes)
    whole, weights, _ = trained(settings, None, dtype=dtype)
    with pytest.raises(Killed):
        trained(settings, every_step, end_after, dtype)
    resumed, resumed_weights, steps = trained(settings, every_step, dtype=dtype)
    assert steps == list(range(end_after + 1, 7))
    assert torch.equal(resumed_weights, weights)
    assert (resumed.steps, resumed.epochs) == (whole.steps, whole.epochs)
    assert resumed.response_tokens == whole.response_tokens


def test_the_time_of_a_training_is_that_of_all_its_parts(every_step: TrainingCheckpoint) -> None:
    with pytest.raises(Killed):
        trained(SETTINGS, every_step, end_after=4)
    state = every_step.load()
    state["curve"]["seconds"] = 1000.0
    torch.save(state, every_step.file)
    assert 1000 < trained(SETTINGS, every_step)[0].seconds < 1100


def test_a_checkpoint_that_cannot_be_read_is_named_and_the_training_starts_anew(every_step: TrainingCheckpoint) -> None:
    with pytest.raises(Killed):
        trained(SETTINGS, every_step, end_after=2)
    every_step.file.write_bytes(every_step.file.read_bytes()[:5000])
    with pytest.warns(UserWarning, match=f"{every_step.file} can't be read, so the training starts anew"):
        steps = trained(SETTINGS, every_step)[2]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_is_written_when_it_is_time(every_step: TrainingCheckpoint, tmp_path: Path) -> None:
    for checkpoint in (TrainingCheckpoint(tmp_path / "later", every=3600), every_step):
        trained(SETTINGS, checkpoint)
    assert list(tmp_path.iterdir()) == [every_step.file]


def test_a_pass_that_has_no_memory_is_halved_and_changes_no_gradient(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = replace(ONE_STEP, retain=1.0)
    whole_loss, whole = one_step(settings, texts=TEXTS)
    real = (loop.mean_loss, loop.divergence)
    sizes: list[int] = []

    def crowded(count: int) -> None:
        sizes.append(count)
        if count > 3:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )

    def few_examples(model, batch):
        crowded(len(batch.ids))
        return real[0](model, batch)

    def few_texts(model, texts):
        crowded(len(texts))
        return real[1](model, texts)

    monkeypatch.setattr(loop, "mean_loss", few_examples)
    monkeypatch.setattr(loop, "divergence", few_texts)
    loss, gradients = one_step(settings, texts=TEXTS)
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    torch.testing.assert_close(gradients, whole, rtol=1e-4, atol=1e-6)
    assert sizes == [16, 8, 4, *[2] * 8, 2, 2]
    assert "from now on at most 2 rows in each" in caplog.text


def test_one_row_without_memory_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model, batch):
        raise MemoryError("full")

    monkeypatch.setattr(loop, "mean_loss", full)
    with pytest.raises(MemoryError, match="full"):
        one_step(ONE_STEP)


@pytest.mark.parametrize(("held_back", "kept"), [([0.5, 0.7, 0.4], 3), ([0.5, 0.7, 0.6], 1), ([0.5, 0.4, 0.4], 2)])
def test_the_adapter_with_the_lowest_loss_on_the_pairs_held_back_is_kept(
    monkeypatch: pytest.MonkeyPatch, held_back: list[float], kept: int
) -> None:
    seen: list[torch.Tensor] = []

    def measured(model, *arguments) -> float:
        seen.append(torch.cat([p.detach().flatten().clone() for p in model.parameters() if p.requires_grad]))
        return held_back[len(seen) - 1]

    monkeypatch.setattr(loop, "evaluate_loss", measured)
    curve, weights, _ = trained(replace(SETTINGS, epochs=3), None)
    assert curve.kept_epoch == kept
    assert torch.equal(weights, seen[kept - 1]) and not torch.equal(weights, seen[kept % 3])


def test_without_pairs_held_back_the_last_adapter_is_kept() -> None:
    assert trained(replace(SETTINGS, validation_fraction=0.0), None)[0].kept_epoch == SETTINGS.epochs


def test_a_weight_that_is_no_number_stops_the_training_at_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def overflow(optimizer, *arguments) -> None:
        optimizer.param_groups[0]["params"][0].data[0, 0] = math.inf

    handle = register_optimizer_step_post_hook(overflow)
    try:
        with pytest.raises(TuneshiftError, match=r"at step 1 the norm of the adapter's weights is inf"):
            trained(SETTINGS, None)
    finally:
        handle.remove()


def test_a_state_of_an_older_version_starts_the_training_anew(every_step: TrainingCheckpoint) -> None:
    with pytest.raises(Killed):
        trained(SETTINGS, every_step, end_after=2)
    state = every_step.load()
    del state["draws"]
    torch.save(state, every_step.file)
    with pytest.warns(UserWarning, match="can't be read, so the training starts anew"):
        assert trained(SETTINGS, every_step)[2] == [1, 2, 3, 4, 5, 6]


def test_parameter_without_gradient_fails_the_run() -> None:
    model = add_lora(tiny_model(), SETTINGS)
    model.unused = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"1 of \d+ adapter tensors got no gradient"):
        train(model, examples(4), SETTINGS)


def test_no_examples_is_an_error() -> None:
    with pytest.raises(ValueError, match="no training examples"):
        train(add_lora(tiny_model(), SETTINGS), [], SETTINGS)
