"""Our Parzen estimators against Optuna's: the same samples and densities, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers._tpe import _truncnorm
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator, _ParzenEstimatorParameters
from optuna.samplers._tpe.sampler import default_weights

from autopeft.optimization.parzen import ParzenEstimator, Space
from autopeft.optimization.truncated_normal import random_variates

KINDS: list[BaseDistribution] = [
    CategoricalDistribution(("off", "lora", "series")),
    IntDistribution(0, 6),
    CategoricalDistribution((True, False)),
    IntDistribution(2, 18, step=4),
    IntDistribution(0, 40),
    IntDistribution(1, 64, log=True),
    FloatDistribution(1e-4, 1e-2, log=True),
    FloatDistribution(0.0, 1.0),
    FloatDistribution(0.0, 1.0, step=0.1),
    IntDistribution(0, 8),
]
SPACES = {
    "all kinds": KINDS,
    "categories alone": [KINDS[0], KINDS[2], KINDS[0]],
    "grids alone": [KINDS[1], KINDS[3], KINDS[1], KINDS[9]],
    "one float": [KINDS[6]],
    "one log grid": [KINDS[5]],
    "many": [*[KINDS[0], KINDS[1]] * 90, KINDS[6], KINDS[7]],  # another error function
}


def draw(distribution: BaseDistribution, generator: np.random.RandomState) -> float:
    if isinstance(distribution, CategoricalDistribution):
        return float(generator.randint(len(distribution.choices)))
    if isinstance(distribution, IntDistribution):
        values = range(distribution.low, distribution.high + 1, distribution.step)
        return float(generator.choice(values))
    assert isinstance(distribution, FloatDistribution)
    if distribution.step is not None:
        return float(distribution.step * generator.randint(11))
    if generator.rand() < 0.1:  # the ends have a kernel of their own shape
        return float(generator.choice([distribution.low, distribution.high]))
    return float(generator.uniform(distribution.low, distribution.high))


def optunas(
    space: list[BaseDistribution], observations: NDArray[np.float64], weights: NDArray[np.float64]
) -> _ParzenEstimator:
    names = [f"p{index}" for index in range(len(space))]
    parameters = _ParzenEstimatorParameters(
        prior_weight=1.0,
        consider_magic_clip=True,
        consider_endpoints=False,
        weights=default_weights,
        multivariate=True,
    )
    return _ParzenEstimator(
        dict(zip(names, observations, strict=True)),
        dict(zip(names, space, strict=True)),
        parameters,
        weights,
    )


@pytest.mark.parametrize("count", [0, 1, 2, 3, 27, 98, 99, 250])
@pytest.mark.parametrize("name", SPACES)
def test_samples_and_densities_are_optunas(name: str, count: int) -> None:
    distributions = SPACES[name]
    generator = np.random.RandomState(count)
    observations = np.array([[draw(one, generator) for _ in range(count)] for one in distributions])
    observations = observations.reshape(len(distributions), count)
    space = Space(distributions)
    for weights in (np.ones(count), default_weights(count)):
        ours = ParzenEstimator(space, observations, weights)
        theirs = optunas(distributions, observations, weights)
        samples = ours.sample(np.random.RandomState(7), 24)
        expected = theirs.sample(np.random.RandomState(7), 24)
        np.testing.assert_array_equal(samples, np.array(list(expected.values())).T)
        np.testing.assert_array_equal(ours.log_pdf(samples), theirs.log_pdf(expected))
        assert len(np.unique(samples, axis=0)) > 1


def optunas_draws(
    seed: int,
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    loc: NDArray[np.float64],
    scale: NDArray[np.float64],
) -> NDArray[np.float64]:
    return _truncnorm.rvs(a, b, loc, scale, np.random.RandomState(seed))


def test_draws_next_to_the_middle_of_two_points_are_rounded_as_optunas() -> None:
    """A first point is chosen such that a draw lies within rounding error of a middle."""
    shape = (2, 24)
    bounds = [np.full(shape, -2.0), np.full(shape, 3.0), np.zeros(shape), np.ones(shape)]
    exact = optunas_draws(3, *bounds)
    first = exact[:, 5] + 0.5 + np.array([1e-16, -1e-16])
    drawn = random_variates(np.random.RandomState(3), *bounds, first=first, step=np.ones(2))
    np.testing.assert_array_equal(drawn, exact)
    apart = random_variates(np.random.RandomState(3), *bounds, first=first + 0.1, step=np.ones(2))
    np.testing.assert_allclose(apart, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rows", [3, 200])
def test_rows_that_are_not_rounded_are_exact_to_the_last_bit(rows: int) -> None:
    generator = np.random.RandomState(rows)
    means = generator.uniform(-3, 4, (rows, 24))
    scales = generator.uniform(0.05, 5, (rows, 24))
    lower = np.where(generator.rand(rows, 24) < 0.1, means, -3.0)  # the right half has its own way
    bounds = [(lower - means) / scales, (4.0 - means) / scales, means, scales]
    exact = optunas_draws(1, *bounds)
    step = np.where(np.arange(rows) % 3 == 0, 0.0, 1e-3)
    drawn = random_variates(np.random.RandomState(1), *bounds, first=np.zeros(rows), step=step)
    np.testing.assert_array_equal(drawn[step == 0], exact[step == 0])
    np.testing.assert_allclose(drawn, exact, rtol=1e-9, atol=1e-12)
