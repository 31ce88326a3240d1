"""Scores from the gradient of the loss with respect to frozen weights.

`BATCH_SCORES` look at one batch's gradient of one layer, and are averaged over the batches; `gora` and
`gradient_spectrum` look at the gradient averaged over the batches, which a `MeanGradients` keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from autopeft.core.adapter import Site
from autopeft.sensitivity.layer_gradients import LayerGradient
from autopeft.sensitivity.mean_gradients import MeanGradients
from autopeft.sensitivity.scored_matrices import MatrixSite
from autopeft.sensitivity.singular_values import singular_values
from autopeft.sensitivity.site_scores import SiteScores


def _norm(tensor: Tensor, order: int = 2) -> Tensor:
    """Return the norm of all entries, a scalar, without making another tensor of that size."""
    norm: Tensor = torch.linalg.vector_norm(tensor, ord=order)
    return norm


def gradient_norm(layer: LayerGradient) -> Tensor:
    """Return ‖G‖_F, a scalar (SPEFT, Liu et al., arXiv:2412.13488)."""
    return layer.norm


def fisher(layer: LayerGradient) -> Tensor:
    """Return the mean over the entries of G², a scalar: the batch version of the Fisher information.

    Lodha et al., "On Surgical Fine-tuning for Language Encoders", EMNLP Findings 2023.
    """
    return layer.norm.square() / layer.gradient.numel()


def fisher_of_samples(layer: LayerGradient) -> Tensor:
    """Return the sum over samples of the mean over the entries of g², a scalar.

    g is the gradient of one sample's own loss, formed sample by sample as an outer product: divided by the
    number of samples this is the mean diagonal of the empirical Fisher information. The batch's loss must
    be the mean over its rows, and no layer may mix rows (as batch normalisation does).

    Raises:
        ValueError: The layer's input does not keep the rows apart.
    """
    squares = [_norm(gradient).square() for gradient in layer.sample_gradients()]
    return torch.stack(squares).sum() / layer.site.weight.numel()


def snip(layer: LayerGradient) -> Tensor:
    """Return Σ |W ⊙ G|, a scalar (SNIP, Lee et al., ICLR 2019)."""
    return layer.weighted_norms[0]


def taylor2(layer: LayerGradient) -> Tensor:
    """Return Σ (W ⊙ G)², a scalar (Taylor-FO, Molchanov et al., CVPR 2019; SPEFT)."""
    return layer.weighted_norms[1]


BATCH_SCORES: Mapping[str, Callable[[LayerGradient], Tensor]] = {
    "gradient_norm": gradient_norm,
    "fisher": fisher,
    "snip": snip,
    "taylor2": taylor2,
}


def gora(site: MatrixSite, mean_gradient: Tensor) -> float:
    """Return the mean over the entries of |W ⊙ Ḡ| (GoRA, He et al., arXiv:2502.12171).

    Args:
        site: The site with W.
        mean_gradient: Ḡ, (out, in): the gradient averaged over the batches.
    """
    return float(_norm(mean_gradient * site.weight, 1)) / mean_gradient.numel()


def gora_scores(store: MeanGradients) -> SiteScores:
    """Return `gora` of every site."""
    return SiteScores(
        name="gora", values={matrix.site: gora(matrix, gradient) for matrix, gradient in store.means()}
    )


def gradient_spectrum_scores(store: MeanGradients, *, rank: int, components: int) -> SiteScores:
    """Return sqrt(Σ_{i≤r} σ_i(Ḡ)²): how much of the mean gradient an update of rank r can follow.

    LoRA-GA (Wang et al., arXiv:2407.05000); the gradient projection score of EvoLo-MOEAD. Costs one
    singular value decomposition a site.

    Args:
        store: The mean gradients.
        rank: r.
        components: How many singular values to keep as the site's spectrum.
    """
    values: dict[Site, float] = {}
    spectra: dict[Site, tuple[float, ...]] = {}
    for matrix, gradient in store.means():
        spectrum = singular_values(gradient)
        values[matrix.site] = float(_norm(spectrum[:rank]))
        spectra[matrix.site] = tuple(spectrum[:components].tolist())
    return SiteScores(name="gradient_spectrum", values=values, spectra=spectra)
