"""Training on tiny random models: what the loss counts, and that silent failures are loud."""

import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import bitsandbytes
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from tuneshift_dag.training import checkpoint as training_checkpoint
from tuneshift_dag.training import loop as distillation
from tuneshift_dag.training.checkpoint import TrainingCheckpoint
from tuneshift_dag.training.loop import (
    LoraTraining,
    TokenizedExample,
    add_lora,
    balanced_epochs,
    collate,
    length_bucketed_batches,
    response_loss,
    train,
)

SETTINGS = LoraTraining(rank=4, alpha=8, epochs=2, batch_size=4, learning_rate=1e-2, validation_fraction=0.25)
TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY)).requires_grad_(False).train()


def tiny_soft_capped_model() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    config = Gemma2Config(
        **TINY,
        head_dim=16,
        final_logit_softcapping=0.5,
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(config).requires_grad_(False).train()


def tiny_gemma() -> Gemma3ForCausalLM:
    """Two layers of which one attends to a sliding window, as in Gemma 3."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        **TINY,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    return Gemma3ForCausalLM(config).requires_grad_(False).train()


def with_lora(model, settings: LoraTraining):
    """A LoRA whose B isn't zero, as it is at the start: that would leave no gradient for A."""
    adapted = add_lora(model, settings)
    for number, (name, parameter) in enumerate(adapted.named_parameters()):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    return adapted


def examples(count: int) -> list[TokenizedExample]:
    rng = random.Random(1)
    return [
        TokenizedExample(
            [rng.randrange(3, 128) for _ in range(rng.randint(2, 12))],
            [*(rng.randrange(3, 128) for _ in range(rng.randint(1, 5))), 2],
        )
        for _ in range(count)
    ]


def reference_loss(model, chosen: list[TokenizedExample]) -> torch.Tensor:
    """One unpadded example at a time: cross entropy of the response tokens and nothing else."""
    total, tokens = torch.zeros(()), 0
    for e in chosen:
        logits = model(input_ids=torch.tensor([e.prompt_ids + e.response_ids]), use_cache=False).logits[0]
        predicted = logits[len(e.prompt_ids) - 1 : -1]
        total = total + cross_entropy(predicted, torch.tensor(e.response_ids), reduction="sum")
        tokens += len(e.response_ids)
    return total / tokens


def test_loss_counts_response_tokens_only() -> None:
    model, chosen = tiny_model(), examples(6)
    torch.testing.assert_close(response_loss(model, collate(chosen)), reference_loss(model, chosen))


def test_a_mask_of_all_tokens_changes_nothing() -> None:
    model, chosen = tiny_model(), examples(6)
    whole = [replace(e, mask=[True] * len(e.response_ids)) for e in chosen]
    assert torch.equal(response_loss(model, collate(whole)), response_loss(model, collate(chosen)))


def test_only_selected_tokens_are_in_the_loss_and_have_a_gradient() -> None:
    """The gradient of each position's logits, and the loss of a plain cross entropy over the selected ones."""
    model, dice = tiny_model(), random.Random(3)
    chosen = [replace(e, mask=[*(dice.random() < 0.5 for _ in e.response_ids[1:]), True]) for e in examples(6)]
    assert any(not all(e.mask) for e in chosen)
    hidden: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        hidden.append(inputs[0].detach().requires_grad_())
        return (hidden[0],)

    # Before the hook that lets the head see some positions only.
    handle = model.lm_head.register_forward_pre_hook(keep)
    response_loss(model, collate(chosen)).backward()
    handle.remove()
    assert hidden[0].grad is not None
    counts = torch.zeros(hidden[0].shape[:2], dtype=torch.bool)
    losses = []
    for row, e in enumerate(chosen):
        logits = model(input_ids=torch.tensor([e.prompt_ids + e.response_ids]), use_cache=False).logits[0]
        for place, is_selected in enumerate(e.mask):
            position = len(e.prompt_ids) - 1 + place
            counts[row, position] = is_selected
            if is_selected:
                losses.append(cross_entropy(logits[position], torch.tensor(e.response_ids[place])))
    assert torch.equal(hidden[0].grad.abs().sum(2) > 0, counts)
    torch.testing.assert_close(response_loss(model, collate(chosen)), torch.stack(losses).mean())


def test_the_curve_says_which_share_of_the_tokens_counted() -> None:
    half = [replace(e, mask=[False] * (len(e.response_ids) - 1) + [True]) for e in examples(8)]
    curve = train(add_lora(tiny_model(), SETTINGS), half, SETTINGS)
    assert curve.token_share == 8 / sum(len(e.response_ids) for e in half)
    assert curve.response_tokens == 6 * SETTINGS.epochs


def test_end_token_is_part_of_the_loss() -> None:
    batch = collate(examples(3))
    assert batch.targets.tolist().count(2) == 3


@pytest.mark.parametrize("build", [lambda: tiny_model(), lambda: tiny_soft_capped_model()], ids=["plain", "soft cap"])
def test_gradients_equal_those_of_unpadded_examples(build) -> None:
    chosen = examples(6)
    gradients = []
    for loss_of in (lambda m: response_loss(m, collate(chosen)), lambda m: reference_loss(m, chosen)):
        model = with_lora(build(), SETTINGS)
        loss_of(model).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


ONE_STEP = replace(SETTINGS, epochs=1, batch_size=16, validation_fraction=0.0, max_grad_norm=1e9)


def one_step(settings: LoraTraining, build=tiny_model) -> tuple[float, torch.Tensor]:
    """The loss and the gradients of the one step of a training on 16 examples."""
    model = with_lora(build(), settings)
    seen: list[torch.Tensor] = []

    def keep(optimizer, args, kwargs) -> None:
        seen.append(torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]))

    handle = register_optimizer_step_pre_hook(keep)
    try:
        curve = train(model, examples(16), settings)
    finally:
        handle.remove()
    [gradients], [step] = seen, curve.steps
    return step["loss"], gradients


def test_a_step_in_several_passes_is_that_of_all_its_examples_at_once() -> None:
    whole_loss, whole = one_step(ONE_STEP)
    loss, gradients = one_step(replace(ONE_STEP, batch_size=4, gradient_accumulation=4))
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    torch.testing.assert_close(gradients, whole, rtol=1e-4, atol=1e-6)
    # The mean of the passes' means would be another: they have unequal numbers of tokens.
    order = sorted(examples(16), key=lambda e: len(e.prompt_ids) + len(e.response_ids))
    passes = [collate(order[start : start + 4]) for start in range(0, 16, 4)]
    assert len({len(batch.targets) for batch in passes}) > 1
    means = [float(response_loss(tiny_model(), batch)) for batch in passes]
    assert abs(sum(means) / 4 - float(response_loss(tiny_model(), collate(order)))) > 1e-4


def test_tokens_of_prompts_count_with_their_weight() -> None:
    """The step's gradients against the objective written out, one unpadded example at a time."""
    settings = replace(ONE_STEP, prompt_weight=0.3, shuffle=False)
    loss, gradients = one_step(settings)
    rng = random.Random(settings.seed)
    drawn = [distillation._with_prompt_places(e, rng) for e in examples(16)]
    assert all(0 < len(e.prompt_places) <= distillation.PROMPT_TOKENS and 0 not in e.prompt_places for e in drawn)

    model = with_lora(tiny_model(), settings)
    of_prompts = []
    for e in drawn:
        logits = model(input_ids=torch.tensor([e.prompt_ids]), use_cache=False).logits[0]
        of_prompts += [cross_entropy(logits[p - 1], torch.tensor(e.prompt_ids[p])) for p in e.prompt_places]
    responses = reference_loss(model, drawn)
    assert loss == pytest.approx(responses.item(), rel=1e-5), "what is reported is the responses' loss"
    (responses + 0.3 * torch.stack(of_prompts).mean()).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-6)


def test_tokens_of_prompts_count_alike_in_one_pass_and_in_several() -> None:
    whole_loss, whole = one_step(replace(ONE_STEP, prompt_weight=0.3))
    loss, gradients = one_step(replace(ONE_STEP, prompt_weight=0.3, batch_size=4, gradient_accumulation=4))
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    torch.testing.assert_close(gradients, whole, rtol=1e-4, atol=1e-6)
    without = one_step(ONE_STEP)[1]
    assert float((whole - without).abs().max()) > 1e-3


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
    with pytest.raises(RuntimeError, match=r"overflows in torch\.float16\. Set models\.compute_dtype: float32"):
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
    monkeypatch.setattr(training_checkpoint, "_SHARE", math.inf)
    return TrainingCheckpoint(tmp_path / "checkpoint", every=0)


def trained(settings: LoraTraining, checkpoint: TrainingCheckpoint | None, end_after: int | None = None, dtype=None):
    """Curve, adapter weights and step numbers of a training that may be ended after a step."""
    model = add_lora(tiny_model().to(dtype), settings)
    steps = []

    def on_step(step: int, total: int, loss: float) -> None:
        steps.append(step)
        if end_after is not None and step > end_after:
            raise Killed

    curve = train(model, examples(16), settings, on_step, checkpoint)
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    return curve, weights, steps


@pytest.mark.parametrize("end_after", [1, 3, 4])
@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, None),
        ({"balance": "response", "prompt_weight": 0.1, "batch_size": 2, "gradient_accumulation": 2}, None),
        ({"shuffle": False}, None),
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
    assert (resumed.response_tokens, resumed.token_share) == (whole.response_tokens, whole.token_share)


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
    every_step.remove()
    assert list(tmp_path.iterdir()) == []


def test_parameter_without_gradient_fails_the_run() -> None:
    model = add_lora(tiny_model(), SETTINGS)
    model.unused = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"1 of \d+ adapter tensors got no gradient"):
        train(model, examples(4), SETTINGS)


def test_no_examples_is_an_error() -> None:
    with pytest.raises(ValueError, match="no training examples"):
        train(add_lora(tiny_model(), SETTINGS), [], SETTINGS)


def test_batches_hold_every_example_once_and_similar_lengths_together() -> None:
    chosen = examples(20)
    batches = list(length_bucketed_batches(chosen, 4, random.Random(0)))
    assert sorted(map(id, (e for batch in batches for e in batch))) == sorted(map(id, chosen))
    assert [len(b) for b in batches] == [4] * 5


def test_without_shuffling_every_step_has_the_examples_given_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[list[TokenizedExample]] = []

    def backward(model, chosen, settings, optimizer, first):
        steps.append(chosen)
        return 1.0

    monkeypatch.setattr(distillation, "_backward", backward)
    given = [TokenizedExample([1] * (1 + i * 5 % 7), [2]) for i in range(8)]
    settings = replace(SETTINGS, shuffle=False, validation_fraction=0.0)
    train(add_lora(tiny_model(), SETTINGS), given, settings)
    assert steps == [given[:4], given[4:]] * SETTINGS.epochs


def test_balanced_epochs_draw_each_response_by_the_root_of_its_examples_but_the_rarest_less() -> None:
    common, rare, once = (TokenizedExample([n], [n, 2]) for n in (3, 4, 5))
    pool = [common] * 400 + [rare] * 199 + [once]
    # A quarter of the mean of 200 is 50: weights 400 ** 0.5, 199 / 199 ** 0.5 and 1 / 50 ** 0.5.
    total = 20 + 199**0.5 + 50**-0.5
    for drawn in balanced_epochs(pool, 3, random.Random(0)):
        assert len(drawn) == len(pool)
        assert abs(drawn.count(common) - 600 * 20 / total) < 2
        assert abs(drawn.count(rare) - 600 * 199**0.5 / total) < 2
        assert 1 <= drawn.count(once) <= 3


def test_balanced_epochs_together_repeat_an_example_only_when_its_share_is_larger() -> None:
    pool = [TokenizedExample([n], [n % 4 // 3]) for n in range(400)]  # 300 and 100 of a response
    times = Counter(e.prompt_ids[0] for epoch in balanced_epochs(pool, 2, random.Random(0)) for e in epoch)
    # Of 800 draws 800 / (1 + 3 ** 0.5) = 293 are for the rarer response.
    assert {times[n] for n in range(3, 400, 4)} == {2, 3}
    assert {times[n] for n in range(400) if n % 4 != 3} == {1, 2}
