"""What a step's examples are, what their loss counts, and that it is PyTorch's cross entropy."""

import random
from collections import Counter

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.training.tiny import SETTINGS, examples, reference_loss, tiny_model, tiny_soft_capped_model, with_lora
from tuneshift_dag.training.batches import (
    TokenizedExample,
    balanced_epochs,
    collate,
    cut_to,
    length_bucketed_batches,
    mean_cross_entropy,
    mean_loss,
)


def test_loss_counts_response_tokens_only() -> None:
    model, chosen = tiny_model(), examples(6)
    torch.testing.assert_close(mean_loss(model, collate(chosen)), reference_loss(model, chosen))


def test_end_token_is_part_of_the_loss() -> None:
    batch = collate(examples(3))
    assert batch.targets.tolist().count(2) == 3


@pytest.mark.parametrize("build", [tiny_model, tiny_soft_capped_model], ids=["plain", "soft cap"])
def test_gradients_equal_those_of_unpadded_examples(build) -> None:
    chosen = examples(6)
    gradients = []
    for loss_of in (lambda m: mean_loss(m, collate(chosen)), lambda m: reference_loss(m, chosen)):
        model = with_lora(build(), SETTINGS)
        loss_of(model).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_batches_hold_every_example_once_and_similar_lengths_together() -> None:
    chosen = examples(20)
    batches = length_bucketed_batches(chosen, 4, random.Random(0))
    assert sorted(map(id, (e for batch in batches for e in batch))) == sorted(map(id, chosen))
    assert [len(b) for b in batches] == [4] * 5


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


# More rows than are turned into float32 at once.
ROWS, VOCABULARY = 7, 200_000


def loss_and_gradient(loss_of, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(ROWS, VOCABULARY, generator=generator) * 4).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    # Not the last operation: the gradient that arrives isn't 1.
    loss = loss_of(logits, targets)
    (loss * 3).backward()
    return loss.detach(), logits.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradient_are_those_of_the_float32_cross_entropy(dtype: torch.dtype) -> None:
    loss, gradient = loss_and_gradient(mean_cross_entropy, dtype)
    expected_loss, expected = loss_and_gradient(lambda logits, targets: cross_entropy(logits.float(), targets), dtype)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, expected)


def test_logits_stay_as_they_are() -> None:
    logits = torch.randn(3, 8, requires_grad=True)
    before = logits.detach().clone()
    mean_cross_entropy(logits, torch.tensor([0, 3, 7])).backward()
    assert torch.equal(logits.detach(), before)


def test_logits_far_apart_overflow_nowhere() -> None:
    logits = torch.tensor([[1e30, -1e30], [-1e30, 1e30]], requires_grad=True)
    mean_cross_entropy(logits, torch.tensor([0, 1])).backward()
    assert torch.equal(logits.grad, torch.zeros(2, 2))


def test_a_response_is_cut_to_what_has_room_and_a_prompt_without_room_is_left_out() -> None:
    example = TokenizedExample([1, 2, 3], [4, 5, 6])
    assert cut_to(example, 6) is example
    assert cut_to(example, 5) == TokenizedExample([1, 2, 3], [4, 5])
    assert cut_to(example, 3) is None and cut_to(example, 2) is None
