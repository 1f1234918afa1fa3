"""The divergence from the model without its adapter, and a training that is held to what it predicted before."""

from dataclasses import replace

import pytest
import torch

from tests.training.tiny import (
    ONE_STEP,
    SETTINGS,
    TEXTS,
    examples,
    one_step,
    reference_loss,
    tiny_gemma,
    tiny_model,
    tiny_soft_capped_model,
    with_lora,
)
from tuneshift_dag.training import rehearsal
from tuneshift_dag.training.loop import _autocast, train
from tuneshift_dag.training.lora import add_lora
from tuneshift_dag.training.rehearsal import Rehearsal, divergence
from tuneshift_dag.training.whitening import whiten


def whole_divergence(model, text: list[int], most: int | None = None) -> torch.Tensor:
    """Sum of KL(without adapter || with it) over the whole vocabulary, of one unpadded text: at the positions where the
    last hidden states are furthest apart, or at all but the last."""
    with torch.no_grad(), model.disable_adapter():
        before = model(input_ids=torch.tensor([text]), use_cache=False, output_hidden_states=True)
    after = model(input_ids=torch.tensor([text]), use_cache=False, output_hidden_states=True)
    old, new = before.logits[0].log_softmax(1), after.logits[0].log_softmax(1)
    changed = (after.hidden_states[-1] - before.hidden_states[-1])[0, :-1].norm(dim=1)
    positions = changed.argsort(descending=True)[:most]
    return (old.exp() * (old - new)).sum(1)[positions].sum()


def compared(text: list[int]) -> int:
    return min(rehearsal.POSITIONS, len(text) - 1)


def remembered(model, texts: list[list[int]], steps: int = 1) -> Rehearsal:
    found = Rehearsal(texts, steps, seed=0)
    found.remember(model, 0, lambda: _autocast(model))
    return found


@pytest.mark.parametrize("build", [tiny_model, tiny_gemma, tiny_soft_capped_model])
def test_the_divergence_is_that_of_the_whole_vocabulary(build) -> None:
    model = with_lora(build(), SETTINGS)
    own = remembered(model, TEXTS).of_step(0, 1.0).texts
    assert len({len(text.ids) for text in own}) > 1, "some are padded"
    assert any(compared(text.ids) < len(text.ids) - 1 for text in own), "some are compared in part"
    whole = sum(whole_divergence(model, text.ids, rehearsal.POSITIONS) for text in own)
    found = divergence(model, own)
    assert float(found) > 1e-3
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-6)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(whole, parameters)
    torch.testing.assert_close(torch.autograd.grad(found, parameters), expected, rtol=1e-3, atol=1e-6)


def test_an_adapter_that_changes_nothing_is_nowhere_apart() -> None:
    model = add_lora(tiny_model(), SETTINGS)
    assert float(divergence(model, remembered(model, TEXTS).of_step(0, 1.0).texts)) == pytest.approx(0, abs=1e-6)


def test_each_step_draws_other_texts_and_the_same_ones_from_the_same_seed() -> None:
    first, again = Rehearsal(TEXTS, 20, seed=3), Rehearsal(TEXTS, 20, seed=3)
    assert first.steps == again.steps and len({tuple(step) for step in first.steps}) > 5
    rehearsed = [bool(step) for step in first.steps]
    assert rehearsed == [number % rehearsal.EVERY == 0 for number in range(20)]
    assert all(len(set(step)) == rehearsal.TEXTS for step in first.steps if step)
    assert sorted(Rehearsal(TEXTS[:2], 1, seed=3).steps[0]) == [0, 1], "of fewer texts all"


def test_a_step_is_on_the_responses_and_on_what_was_predicted_before() -> None:
    """The step's gradients against the objective written out, in one pass and in several."""
    settings = replace(ONE_STEP, retain=0.7)
    model = with_lora(tiny_model(), settings)
    whiten(model, TEXTS, lambda: _autocast(model))
    known = remembered(model, TEXTS).of_step(0, 1.0).texts
    apart = sum(whole_divergence(model, text.ids, rehearsal.POSITIONS) for text in known)
    weight = 0.7 * rehearsal.EVERY  # for the steps that don't rehearse, too
    (reference_loss(model, examples(16)) + weight * apart / sum(compared(text.ids) for text in known)).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    for changes in ({}, {"batch_size": 2, "gradient_accumulation": 8}):
        gradients = one_step(replace(settings, **changes), texts=TEXTS)[1]
        torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-6)
    without = one_step(replace(settings, retain=0.0), texts=TEXTS)[1]
    assert float((without - expected).abs().max()) > 1e-3


def test_a_training_that_is_held_to_its_texts_stays_nearer_to_what_it_was() -> None:
    def apart(retain: float) -> float:
        model = add_lora(tiny_model(), SETTINGS)
        train(model, examples(16), replace(SETTINGS, epochs=8, retain=retain), texts=TEXTS)
        return float(sum(whole_divergence(model, text) for text in TEXTS))

    assert apart(3.0) < 0.6 * apart(0.0)
