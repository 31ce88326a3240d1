"""A Gaussian process for the few trials of a search, averaged over its hyper-parameters."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.special import ndtri
from scipy.stats import qmc

Array = NDArray[np.float64]
Indices = NDArray[np.intp]

_DRAWN_HYPER_PARAMETERS = 256  # from their prior; a power of two, for which Sobol sequences are even
_ALL_DRAWS_UP_TO = 64  # trials; with twice as many a quarter of the draws, as each takes eight times as long
_KEPT_HYPER_PARAMETERS = 16  # the likeliest of those, as prediction takes time for each
_LEAST_WEIGHT = 1e-3  # of the likeliest's: all that weigh less have 1.5 % of it together at most
# Priors of the hyper-parameters: median, and spread of the logarithm. They were chosen on the scores of
# earlier searches of MiniLM alone, questions and spam (`python -m benchmarks.surrogate`); inputs are in
# [0, 1], values are standardised.
_LENGTH = (0.5, 0.7)
_LINEAR_WEIGHT = (0.3, 1.0)
_NOISE_VARIANCE = (0.1, 1.2)
_PLACEMENT_ODDS = (3.0, 1.0)  # of the share of the Matérn kernel that placements modulate
_PLACEMENT_LENGTH = (0.3, 0.7)  # of which 1 is the distance of placements that share no site
_EXACT_NOISE = 1e-4  # 1 % of the values' deviation, squared: costs follow from the features only nearly
_JITTER = 1e-8  # keeps the Cholesky factor of equal configurations finite


class Inputs(NamedTuple):
    """What is known of configurations before they are trained."""

    features: Array  # (configurations, features) numbers of which 1 is a large difference
    placements: Array  # (configurations, sites) 0 where a site carries nothing, else in [0.5, 1] by the size


class _HyperParameters(NamedTuple):
    """Draws of the hyper-parameters, of shape (draws,) or (draws, features)."""

    lengths: Array
    linear_weight: Array
    noise: Array
    placement_share: Array
    placement_length: Array

    def select(self, draws: Indices) -> _HyperParameters:
        """Return some of the draws."""
        return _HyperParameters(*(numbers[draws] for numbers in self))


class GaussianProcess:
    """Regression with a Matérn-5/2 kernel, a linear one beside it where asked for, and noise.

    A share of the Matérn kernel is multiplied by a Gaussian one of how much placements differ: features do
    not tell which sites carry adapters. The hyper-parameters are not fitted but averaged over: draws from a
    prior, weighted by the likelihood of the data. With ten trials the likeliest single setting is often a
    wrong one. Rasmussen and Williams, "Gaussian Processes for Machine Learning" (2006), chapters 2, 4 and 5.

    Args:
        inputs: Of the trials.
        values: (trials,) what was measured.
        repeats: (trials,) how many measurements each value is the mean of; its noise is so much less.
        linear: Whether trends go on where nothing was measured: costs nearly follow them, metrics rise and
            come to an end.
        exact: Whether the values are without noise.
    """

    def __init__(
        self,
        inputs: Inputs,
        values: Array,
        repeats: Array | None = None,
        *,
        linear: bool = False,
        exact: bool = False,
    ) -> None:
        self._inputs = inputs
        self._mean = float(values.mean())
        self._scale = float(values.std()) or 1.0
        standard = (values - self._mean) / self._scale
        self._drawn = _hyper_parameters(inputs.features.shape[1]).select(_draws(len(values)))
        if exact:
            self._drawn = self._drawn._replace(noise=np.full_like(self._drawn.noise, _EXACT_NOISE))
        if not linear:
            self._drawn = self._drawn._replace(linear_weight=np.zeros_like(self._drawn.linear_weight))
        share = np.ones(len(values)) if repeats is None else 1 / repeats
        covariance = self._own_covariance(inputs)
        each = np.arange(len(values))
        covariance[:, each, each] += self._drawn.noise[:, None] * share + _JITTER
        root = np.linalg.cholesky(covariance)
        white = _solved(root, np.broadcast_to(standard[:, None], (len(root), len(values), 1)))
        diagonal = np.diagonal(root, axis1=1, axis2=2)
        likelihood = -0.5 * (white**2).sum(axis=(1, 2)) - np.log(diagonal).sum(axis=1)
        best = np.argsort(-likelihood, kind="stable")[:_KEPT_HYPER_PARAMETERS]
        weights = np.exp(likelihood[best] - likelihood[best[0]])
        best, weights = best[weights > _LEAST_WEIGHT], weights[weights > _LEAST_WEIGHT]
        self._weights = weights / weights.sum()
        self._drawn = self._drawn.select(best)
        self._root, self._white = root[best], white[best]

    def _covariance(self, first: Inputs, second: Inputs) -> Array:
        """Return (draws, first, second) covariances."""
        pairs = np.indices((len(first.features), len(second.features))).reshape(2, -1)
        return self._of_pairs(first, second, *pairs).reshape(-1, len(first.features), len(second.features))

    def _own_covariance(self, inputs: Inputs) -> Array:
        """Return (draws, inputs, inputs) covariances, zeros above the diagonal, where no factor looks."""
        count = len(inputs.features)
        rows, columns = np.tril_indices(count)
        covariance = np.zeros((len(self._drawn.noise), count, count))
        covariance[:, rows, columns] = self._of_pairs(inputs, inputs, rows, columns)
        return covariance

    def _of_pairs(self, first: Inputs, second: Inputs, rows: Indices, columns: Indices) -> Array:
        """Return (draws, pairs) covariances of rows of the first with rows of the second."""
        drawn = self._drawn
        scaled = drawn.lengths**-2.0 @ ((first.features[rows] - second.features[columns]) ** 2).T
        scaled *= 5  # in place from here on: fresh memory for millions of numbers takes longer than they do
        distance = np.sqrt(scaled, out=scaled)
        covariance: Array = np.negative(distance)
        np.exp(covariance, out=covariance)
        polynomial = distance / 3
        polynomial += 1
        polynomial *= distance
        polynomial += 1
        covariance *= polynomial
        if first.placements.size:
            apart = _squared_distances(first.placements, second.placements)[rows, columns]
            alike = -0.5 * drawn.placement_length[:, None] ** -2.0 * apart
            np.exp(alike, out=alike)
            alike -= 1
            alike *= drawn.placement_share[:, None]
            alike += 1
            covariance *= alike
        if drawn.linear_weight.any():
            products = (first.features - 0.5) @ (second.features - 0.5).T
            covariance += drawn.linear_weight[:, None] * products[rows, columns]
        return covariance

    def predict(self, inputs: Inputs) -> tuple[Array, Array]:
        """Return the mean and the standard deviation (noise left out) at some points."""
        across = _solved(self._root, self._covariance(self._inputs, inputs))
        means = (across * self._white).sum(axis=1)
        linear = ((inputs.features - 0.5) ** 2).sum(axis=1)
        own = 1 + self._drawn.linear_weight[:, None] * linear
        variances = np.maximum(own - (across**2).sum(axis=1), 0.0)
        mean = self._weights @ means
        variance = self._weights @ (variances + means**2) - mean**2
        return self._mean + self._scale * mean, self._scale * np.sqrt(np.maximum(variance, 0.0))


def _solved(roots: NDArray[Any], sides: Array) -> Array:
    """Solve one lower triangular system a draw."""
    systems = zip(roots, sides, strict=True)
    return np.stack([solve_triangular(root, side, lower=True, check_finite=False) for root, side in systems])


def _squared_distances(first: Array, second: Array) -> Array:
    """Return (first, second) squared distances of placements, in [0, 1]: 1 for those that share no site.

    It is the squared difference divided by the sum of both squares; empty placements are the same, and share
    nothing with others. A Gaussian of it is a kernel: the exponential of a product of two kernels, the scalar
    product and the reciprocal of a sum (a Cauchy matrix).
    """
    both = (first**2).sum(axis=1)[:, None] + (second**2).sum(axis=1)
    alike = np.divide(2 * first @ second.T, both, out=np.ones_like(both), where=both > 0)
    distances: Array = np.maximum(1 - alike, 0.0)
    return distances


def _draws(trials: int) -> Indices:
    """Return which draws are compared: fewer, and still a power of two, where many trials tell them apart."""
    halvings = max(0, math.ceil(2 * math.log2(max(1, trials) / _ALL_DRAWS_UP_TO)))
    return np.arange(max(_KEPT_HYPER_PARAMETERS, _DRAWN_HYPER_PARAMETERS >> halvings))


@cache
def _hyper_parameters(count: int) -> _HyperParameters:
    """Return draws from the prior, for so many features; always the same ones."""
    normal = _normal(count + 2, seed=0)
    # Shuffled, as two Sobol sequences go up and down together.
    others = np.random.default_rng(1).permutation(_normal(2, seed=1), axis=1)
    odds = _lognormal(_PLACEMENT_ODDS, others[0])
    return _HyperParameters(
        lengths=_lognormal(_LENGTH, normal[:count]).T,
        linear_weight=_lognormal(_LINEAR_WEIGHT, normal[count]),
        noise=_lognormal(_NOISE_VARIANCE, normal[count + 1]),
        placement_share=odds / (1 + odds),
        placement_length=_lognormal(_PLACEMENT_LENGTH, others[1]),
    )


def _normal(count: int, seed: int) -> Array:
    """Return (count, draws) standard normal numbers that fill the space evenly."""
    uniform = qmc.Sobol(count, scramble=True, rng=np.random.default_rng(seed)).random(_DRAWN_HYPER_PARAMETERS)
    normal: Array = ndtri(np.clip(uniform, 1e-6, 1 - 1e-6))  # 4.8 deviations: 0 and 1 would be infinite
    return normal.T


def _lognormal(prior: tuple[float, float], normal: Array) -> Array:
    """Turn standard normal numbers into draws, by the median and the spread of their logarithm."""
    median, spread = prior
    drawn: Array = median * np.exp(spread * normal)
    return drawn
