"""Gradients of frozen weights, one layer at a time, out of one ordinary backward pass.

A frozen linear layer y = x Wᵀ gets no gradient from autograd, but hooks see all it takes: a forward hook the
input x, a hook on y its gradient δ. G = δᵀ x is formed when δ arrives, handed over, and freed before the
pass reaches the next layer. Experts in one parameter have theirs from autograd, freed in the same way.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.linalg import vector_norm

from autopeft.sensitivity.scored_matrices import MatrixSite, forward_hooks

_Product = tuple[Tensor, Tensor]

_WORTH_DROPPING = 0.8


@dataclass(frozen=True, eq=False)
class LayerGradient:
    """The gradient of a loss with respect to one site's weight."""

    site: MatrixSite
    # Gradient of the output (..., out) and input (..., in) of each call of the module in the forward pass:
    # one, or more where blocks share their weights.
    products: Sequence[_Product]
    # What is multiplied, less precise than single precision or not; None for single precision or what is
    # better.
    dtype: torch.dtype | None = None
    of_experts: Tensor | None = None  # the gradient of a parameter that has a matrix for each of them

    @cached_property
    def gradient(self) -> Tensor:
        """G, (out, in), in single precision or what is better."""
        if self.of_experts is not None:
            return self.of_experts.flatten(0, 1).to(torch.promote_types(self.of_experts.dtype, torch.float32))
        first, *others = [_outer(*product, self.dtype) for product in self.products]
        for other in others:
            first += other
        return first

    @cached_property
    def norm(self) -> Tensor:
        """‖G‖_F, a scalar."""
        norm: Tensor = vector_norm(self.gradient)
        return norm

    @cached_property
    def weighted_norms(self) -> tuple[Tensor, Tensor]:
        """Σ |W ⊙ G| and Σ (W ⊙ G)², scalars."""
        weighted = (self.gradient * self.site.weight).abs_()  # in place: one matrix of this size at a time
        return weighted.sum(), weighted.square_().sum()


def _outer(output_gradient: Tensor, given: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return δᵀ x, without the tokens whose δ is 0: padding, and in a last block all that is not pooled."""
    precise = torch.promote_types(given.dtype, torch.float32)
    left = output_gradient.reshape(-1, output_gradient.shape[-1])
    right = given.reshape(-1, given.shape[-1])
    if left.device.type == "cpu":  # elsewhere, to look at the numbers is to wait for them
        used = left.any(dim=1)
        if int(used.sum()) < _WORTH_DROPPING * len(left):
            left, right = left[used], right[used]
    return (left.to(dtype or precise).mT @ right.to(dtype or precise)).to(precise)


@contextmanager
def layer_gradients(
    sites: Sequence[MatrixSite], receive: Callable[[LayerGradient], None], dtype: torch.dtype | None = None
) -> Iterator[Callable[[Tensor], None]]:
    """Hand over each site's gradient while a backward pass runs; yields what runs it.

    Inside the `with` block, compute a scalar with the model and call what was yielded with it: one
    backward pass. A site without influence on the scalar is not handed over. No parameter needs to require
    gradients, and none gets a `.grad`. What `receive` keeps of a gradient stays alive.
    """
    calls: Counter[MatrixSite] = Counter()
    products: dict[MatrixSite, list[_Product]] = defaultdict(list)

    def hand_over(matrix: MatrixSite) -> None:
        receive(LayerGradient(matrix, products.pop(matrix), dtype))

    def watch(matrix: MatrixSite, given: Tensor, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output  # of a reference that the loss compares with, which has no gradient
        if not output.requires_grad:
            # The same numbers as the beginning of a graph: backpropagation has to come down to here. Not
            # `requires_grad_`: an in-place operation on a leaf, as some models have, would raise.
            output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        # In a list, so that the input can be let go of while the graph still holds the hook.
        held = [given.detach()]
        calls[matrix] += 1

        def arrived(output_gradient: Tensor) -> None:
            products[matrix].append((output_gradient.detach(), held.pop()))
            if len(products[matrix]) == calls[matrix]:
                hand_over(matrix)

        output.register_hook(arrived)
        return output

    def run_backward(value: Tensor) -> None:
        value.backward()
        for matrix in list(products):  # a module with a call that had no influence
            hand_over(matrix)

    with forward_hooks(sites, watch), ExitStack() as experts:
        for matrix in (matrix for matrix in sites if matrix.is_fused):
            experts.enter_context(_parameter_gradient(matrix, receive))
        yield run_backward


@contextmanager
def _parameter_gradient(matrix: MatrixSite, receive: Callable[[LayerGradient], None]) -> Iterator[None]:
    """Hand over the gradient of a parameter when it is whole; what it has as `.grad` comes back."""
    before, was_trained = matrix.stored.grad, matrix.stored.requires_grad

    def hand_over(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        receive(LayerGradient(matrix, (), of_experts=gradient))

    matrix.stored.grad = None
    handle = matrix.stored.requires_grad_().register_post_accumulate_grad_hook(hand_over)
    try:
        yield
    finally:
        handle.remove()
        matrix.stored.requires_grad_(was_trained).grad = before
