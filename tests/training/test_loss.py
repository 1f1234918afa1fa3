"""The loss and its gradient are those of PyTorch's cross entropy."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from tuneshift_dag.training.loss import mean_cross_entropy

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
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
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
