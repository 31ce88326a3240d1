"""Scores from the Hessian: GraSP and the Hessian's diagonal.

Both are a linear function of a Hessian-vector product, Σ A ⊙ (H v) a site, and that is a second derivative
of the loss: with W + t·v + ε·A in the place of W at every site (one t for all, an ε a site),

    Σ A ⊙ (H v) = ∂/∂ε ∂/∂t loss   at t = ε = 0.

So two backward passes give it for all sites, the weights stay frozen and no matrix H v is ever formed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from autopeft.core.adapter import Site
from autopeft.sensitivity.mean_gradients import MeanGradients
from autopeft.sensitivity.scored_matrices import MatrixSite, Subject, forward_hooks, times
from autopeft.sensitivity.site_scores import SiteScores

_MakeMatrix = Callable[[MatrixSite], Tensor]


def grasp_scores(subject: Subject, store: MeanGradients) -> SiteScores:
    """Return Σ W ⊙ (H Ḡ): how much the squared gradient norm would fall if the weight vanished.

    In the paper −W ⊙ H g is high for weights whose removal does the gradient flow good; as in SPEFT the sign
    is turned, so that higher is more important. H is the Hessian with respect to all scored weights, averaged
    over the batches as Ḡ is, which the store has of the same batches.
    """
    batches = range(len(subject.batches))
    return _mean("grasp", [curvature(subject, batch, store.mean, attrgetter("weight")) for batch in batches])


def hessian_scores(subject: Subject, probes: int) -> SiteScores:
    """Return ½ Σ h_ii w_ii², h the diagonal of the Hessian of the loss averaged over the batches.

    h is Hutchinson's estimate E[v ⊙ H v] with Rademacher vectors v over all scored weights, drawn anew for
    every batch, so many as there are probes: it is unbiased, and its variance falls with batches × probes.
    """

    def signs(matrix: MatrixSite, draw: int) -> Tensor:
        return _rademacher(matrix, f"{subject.seed}.{draw}.{matrix.site}")

    def weighted(matrix: MatrixSite, draw: int) -> Tensor:
        return matrix.weight.square() * signs(matrix, draw) / 2

    return _mean(
        "hessian",
        [
            curvature(subject, draw // probes, partial(signs, draw=draw), partial(weighted, draw=draw))
            for draw in range(len(subject.batches) * probes)
        ],
    )


def _mean(name: str, draws: Sequence[Mapping[Site, float]]) -> SiteScores:
    return SiteScores(
        name=name, values={site: sum(draw[site] / len(draws) for draw in draws) for site in draws[0]}
    )


def curvature(
    subject: Subject, batch: int, direction: _MakeMatrix, functional: _MakeMatrix
) -> dict[Site, float]:
    """Return Σ A ⊙ (H v) for every site but experts', H the Hessian of a batch's loss in all scored weights.

    `direction` makes v of a site, (out, in), and `functional` A; called again, they have to make the same.
    """
    device = subject.device
    dtype = next(subject.model.parameters()).dtype
    step = torch.zeros((), device=device, dtype=dtype, requires_grad=True)
    scored = [matrix.site for matrix in subject.sites if not matrix.is_fused]
    offsets = {site: torch.zeros_like(step, requires_grad=True) for site in scored}

    def perturb(matrix: MatrixSite, given: Tensor, output: Tensor) -> Tensor:
        moved = output + step.to(output.device) * times(given, partial(direction, matrix))
        return moved + offsets[matrix.site].to(output.device) * times(given, partial(functional, matrix))

    # Of the attention kernels only the plain one can be differentiated twice.
    with sdpa_kernel(SDPBackend.MATH), forward_hooks(subject.sites, perturb):
        value = subject.forward_loss(batch)
    (slope,) = torch.autograd.grad(value, step, create_graph=True)
    results = torch.autograd.grad(slope, list(offsets.values()), materialize_grads=True)
    return {site: result.item() for site, result in zip(offsets, results, strict=True)}


def _rademacher(matrix: MatrixSite, name: str) -> Tensor:
    """Return −1 and 1 with equal probability, (out, in), the same for the same name and device type."""
    device = matrix.stored.device
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
    generator = torch.Generator(device).manual_seed(seed)
    return 2 * torch.randint(0, 2, matrix.size, generator=generator, device=device, dtype=torch.int8) - 1
