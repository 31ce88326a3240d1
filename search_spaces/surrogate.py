"""A Gaussian process for the few trials of a search, averaged over its hyper-parameters."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri
from scipy.stats import qmc

Array = NDArray[np.float64]

_DRAWS = 256  # of the hyper-parameters, from their prior
_KEPT = 16  # of those, the likeliest
_LENGTH = (0.5, 0.7)  # median and spread of the logarithm: of the unit cube that features lie in
_LINEAR = (0.3, 1.0)
_NOISE = (0.1, 1.2)
_JITTER = 1e-8


class GaussianProcess:
    """Regression with a Matérn-5/2 kernel, a linear one beside it, and noise.

    The hyper-parameters (a length a feature, the shares of the linear part and of the noise) are not
    fitted but averaged over: draws from a prior, weighted by the likelihood of the data. With ten trials
    the likeliest single setting is often a wrong one. Rasmussen and Williams, "Gaussian Processes for
    Machine Learning" (2006), chapters 2 and 5.

    Args:
        features: (trials, features) numbers in [0, 1].
        values: (trials,) what was measured.
        exact: Whether the values are without noise.
    """

    def __init__(self, features: Array, values: Array, *, exact: bool = False) -> None:
        self._features = features
        self._mean = float(values.mean())
        self._scale = float(values.std()) or 1.0
        standard = (values - self._mean) / self._scale
        self._lengths, self._linear, noise = _hyper_parameters(features.shape[1])
        noise = np.full_like(noise, 1e-4) if exact else noise
        covariance = self._covariance(features, features)
        covariance += (noise[:, None, None] + _JITTER) * np.eye(len(features))
        root = np.linalg.cholesky(covariance)
        white = np.linalg.solve(root, np.broadcast_to(standard[:, None], (len(root), len(standard), 1)))
        diagonal = np.diagonal(root, axis1=1, axis2=2)
        likelihood = -0.5 * (white**2).sum(axis=(1, 2)) - np.log(diagonal).sum(axis=1)
        best = np.argsort(-likelihood, kind="stable")[:_KEPT]
        weights = np.exp(likelihood[best] - likelihood[best[0]])
        self._weights = weights / weights.sum()
        self._lengths, self._linear = self._lengths[best], self._linear[best]
        self._root, self._white = root[best], white[best]

    def _covariance(self, first: Array, second: Array) -> Array:
        """Return (draws, first, second) covariances."""
        squares = (first[:, None, :] - second[None, :, :]) ** 2
        distance = np.sqrt(5 * np.einsum("abf,hf->hab", squares, self._lengths**-2.0, optimize=True))
        smooth = (1 + distance + distance**2 / 3) * np.exp(-distance)
        linear: Array = (first - 0.5) @ (second - 0.5).T
        covariance: Array = smooth + self._linear[:, None, None] * linear
        return covariance

    def predict(self, features: Array) -> tuple[Array, Array]:
        """Return the mean and the standard deviation (noise left out) at (points, features)."""
        across = np.linalg.solve(self._root, self._covariance(self._features, features))
        means = (across * self._white).sum(axis=1)
        own = 1 + self._linear[:, None] * ((features - 0.5) ** 2).sum(axis=1)
        variances = np.maximum(own - (across**2).sum(axis=1), 0.0)
        mean = self._weights @ means
        variance = self._weights @ (variances + means**2) - mean**2
        return self._mean + self._scale * mean, self._scale * np.sqrt(np.maximum(variance, 0.0))


@cache
def _hyper_parameters(count: int) -> tuple[Array, Array, Array]:
    """Return draws of (lengths, weight of the linear part, noise) from the prior; always the same ones."""
    uniform = qmc.Sobol(count + 2, scramble=True, rng=np.random.default_rng(0)).random(_DRAWS)
    normal = ndtri(np.clip(uniform, 1e-6, 1 - 1e-6))
    lengths = _LENGTH[0] * np.exp(_LENGTH[1] * normal[:, :count])
    linear = _LINEAR[0] * np.exp(_LINEAR[1] * normal[:, count])
    noise = _NOISE[0] * np.exp(_NOISE[1] * normal[:, count + 1])
    return lengths, linear, noise
