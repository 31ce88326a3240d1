"""Scores from the gradient of the loss with respect to frozen weights; `SCORES` has their sources.

`BATCH_SCORES` look at one batch's gradient of one layer, and are averaged over the batches; `gora` and
`gradient_spectrum` look at the gradient averaged over the batches, which a `MeanGradients` keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.linalg import vector_norm

from autopeft.core.adapter import Site
from autopeft.sensitivity.layer_gradients import LayerGradient
from autopeft.sensitivity.mean_gradients import MeanGradients
from autopeft.sensitivity.site_scores import SiteScores
from autopeft.sensitivity.weight_scores import singular_values

BatchFormula = Callable[[LayerGradient], Tensor]
"""Maps the gradient of one layer on one batch to a scalar."""


BATCH_SCORES: Mapping[str, BatchFormula] = {
    "gradient_norm": lambda layer: layer.norm,
    "fisher": lambda layer: layer.norm.square() / layer.gradient.numel(),
    "snip": lambda layer: layer.weighted_norms[0],
    "taylor2": lambda layer: layer.weighted_norms[1],
}


@dataclass(frozen=True)
class BatchScore:
    """The mean over so many batches of a formula of a layer's gradient."""

    name: str
    formula: BatchFormula
    count: int
    sums: dict[Site, Tensor] = field(default_factory=dict)

    def add(self, layer: LayerGradient) -> None:
        """Add the gradient of one layer on one batch."""
        site = layer.site.site
        self.sums[site] = self.formula(layer).double() + self.sums.get(site, 0.0)

    def scores(self, sites: Iterable[Site]) -> SiteScores:
        """Return the scores; 0 for sites without influence on the loss."""
        values = {site: float(self.sums.get(site, 0.0)) / self.count for site in sites}
        return SiteScores(name=self.name, values=values)


def gora_scores(store: MeanGradients) -> SiteScores:
    """Return the mean over the entries of |W ⊙ Ḡ| of every site."""
    values = {
        matrix.site: float(vector_norm(gradient * matrix.weight, ord=1)) / gradient.numel()
        for matrix, gradient in store.means()
    }
    return SiteScores(name="gora", values=values)


def gradient_spectrum_scores(store: MeanGradients, *, rank: int, components: int) -> SiteScores:
    """Return sqrt(Σ_{i≤r} σ_i(Ḡ)²): how much of the mean gradient an update of rank r can follow.

    Costs one singular value decomposition a site, of which so many components are kept as its spectrum.
    """
    values: dict[Site, float] = {}
    spectra: dict[Site, tuple[float, ...]] = {}
    for matrix, gradient in store.means():
        spectrum = singular_values(gradient)
        values[matrix.site] = float(vector_norm(spectrum[:rank]))
        spectra[matrix.site] = tuple(spectrum[:components].tolist())
    return SiteScores(name="gradient_spectrum", values=values, spectra=spectra)
