"""The cross entropy that is taken a few tokens at a time is torch's."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from autopeft.tasks.batch import IGNORED
from autopeft.tasks.token_loss import summed_cross_entropy

GENERATOR = torch.Generator().manual_seed(0)


def tokens(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    logits = 3 * torch.randn(count, 50, generator=GENERATOR)
    labels = torch.randint(50, (count,), generator=GENERATOR)
    labels[::3] = IGNORED
    return logits.to(dtype).requires_grad_(), labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 128, 300])
def test_sum_and_gradient_are_those_of_torch(count: int, dtype: torch.dtype) -> None:
    logits, labels = tokens(count, dtype)
    found = summed_cross_entropy(logits, labels)
    (gradient,) = torch.autograd.grad(found * 0.5, logits)
    expected = functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    (reference,) = torch.autograd.grad(expected * 0.5, logits)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, reference)
    assert gradient.dtype == dtype


def test_it_can_be_differentiated_twice() -> None:
    logits, labels = tokens(5)
    curvatures: list[Tensor] = []
    for function in (summed_cross_entropy, partial(functional.cross_entropy, reduction="sum")):
        (gradient,) = torch.autograd.grad(function(logits, labels), logits, create_graph=True)
        curvatures += torch.autograd.grad(gradient.square().sum(), logits)
    torch.testing.assert_close(*curvatures)
