"""Scores from the weights alone: condition number and synaptic flow."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.linalg import svdvals

from autopeft.core.adapter import Site
from autopeft.models.quantized_layers import full_weight, is_quantized
from autopeft.sensitivity.layer_gradients import LayerGradient, layer_gradients
from autopeft.sensitivity.scored_matrices import MatrixSite, Subject, times
from autopeft.sensitivity.site_scores import SiteScores


def singular_values(matrix: Tensor) -> Tensor:
    """Return all singular values of a matrix in descending order, computed in single precision at least."""
    values: Tensor = svdvals(matrix.to(torch.promote_types(matrix.dtype, torch.float32)))
    return values


def condition_number_scores(sites: Sequence[MatrixSite]) -> SiteScores:
    """Return 1 / κ(W) = σ_min(W) / σ_1(W): KappaTune adapts the best conditioned weights first.

    About 0 for a singular weight. Costs one spectrum a site.
    """
    values: dict[Site, float] = {}
    for matrix in sites:
        spectrum = singular_values(matrix.weight)
        largest = spectrum[0].item()
        values[matrix.site] = spectrum[-1].item() / largest if largest else 0.0
    return SiteScores(name="condition_number", values=values)


def synflow_scores(subject: Subject) -> SiteScores:
    """Return Σ |W ⊙ ∂R/∂W|: how much of the synaptic flow R goes through a weight.

    R is the sum of the logits of the model with every parameter replaced by its absolute value and every
    token's embedding by ones; norms are kept, as in SPEFT, and so are activation functions. Of the batches
    only the first row's shape and mask are used. Attention over tokens that are alike does not depend on the
    queries and keys: they score next to nothing.
    """
    values = dict.fromkeys((matrix.site for matrix in subject.sites), 0.0)

    def add(layer: LayerGradient) -> None:
        values[layer.site.site] = layer.weighted_norms[0].item()

    def absolute(layer: nn.Module, given: tuple[Tensor, ...], _: Tensor) -> Tensor:
        found = times(given[0], lambda: full_weight(layer).abs())
        return found if layer.bias is None else found + layer.get_parameter("bias").to(found.dtype)

    embeddings: nn.Module = subject.model.get_input_embeddings()  # type: ignore[operator]
    quantized = [layer for layer in subject.model.modules() if is_quantized(layer)]
    kept = [*_only_in(embeddings, subject.model), *(layer.get_parameter("weight") for layer in quantized)]
    row = {name: tensor[:1] for name, tensor in subject.batch(0).items()}
    with (
        ExitStack() as hooks,
        absolute_parameters(subject.model, except_for=kept),
        embeddings.register_forward_hook(lambda *given: torch.ones_like(given[-1])),
    ):
        for layer in quantized:
            hooks.enter_context(layer.register_forward_hook(absolute))
        run_backward = hooks.enter_context(layer_gradients(subject.sites, add))  # sees what they give
        run_backward(subject.task.predicted(subject.output(row)).sum())
    return SiteScores(name="synflow", values=values)


@contextmanager
def absolute_parameters(model: nn.Module, except_for: Collection[nn.Parameter] = ()) -> Iterator[None]:
    """Replace every parameter by its absolute value in place; put the signs back afterwards, bit for bit.

    The signs are kept in main memory, one byte an entry. Parameters that are not used need not be paid for.
    """
    left_out = set(map(id, except_for))
    signs: list[tuple[Tensor, Tensor]] = []
    try:
        for parameter in model.parameters():
            if id(parameter) not in left_out:
                values = parameter.detach()
                signs.append((values, (1 - 2 * values.signbit().to(torch.int8)).cpu()))
                values.abs_()
        yield
    finally:
        for values, sign in reversed(signs):  # of two on the same memory, the first one's are the true ones
            values.copysign_(sign.to(values.device))


def _only_in(part: nn.Module, model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters whose memory nothing but a part uses; embeddings are often half of a model."""
    elsewhere = {
        parameter.data_ptr()
        for module in set(model.modules()) - set(part.modules())
        for parameter in module.parameters(recurse=False)
    }
    return [parameter for parameter in part.parameters() if parameter.data_ptr() not in elsewhere]
