"""The Gaussian process: it interpolates, knows what it does not know, and sees through noise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import qmc

from autopeft.optimization.gaussian_process import (
    Array,
    GaussianProcess,
    Inputs,
    _hyper_parameters,
    _squared_distances,
)


def points(count: int, seed: int) -> Array:
    sampled: Array = qmc.Sobol(3, rng=np.random.default_rng(seed)).random(count)
    return sampled


def alike(features: Array) -> Inputs:
    """Return inputs whose adapters sit at the same sites."""
    return Inputs(features, np.zeros((len(features), 2)))


def smooth(features: Array) -> Array:
    """A function of the first two of three features."""
    values: Array = np.sin(3 * features[:, 0]) + features[:, 0] * features[:, 1]
    return values


def test_exact_values_are_interpolated_and_the_deviation_is_honest() -> None:
    known, others = points(32, 0), points(128, 1)
    model = GaussianProcess(alike(known), smooth(known), linear=True, exact=True)
    mean, deviation = model.predict(alike(known))
    assert np.abs(mean - smooth(known)).max() < 0.03
    assert deviation.max() < 0.03
    mean, deviation = model.predict(alike(others))
    error = np.abs(mean - smooth(others))
    assert error.mean() < 0.1 * smooth(others).std()
    assert (error < 3 * deviation).mean() > 0.9
    far, near = model.predict(alike(np.array([[3.0, 3.0, 3.0], [0.5, 0.5, 0.5]])))[1]
    assert far > 5 * near


def test_noise_is_seen_through() -> None:
    known, others = points(64, 0), points(128, 1)
    noise = np.random.default_rng(0).normal(0, 0.3, len(known))
    mean, deviation = GaussianProcess(alike(known), smooth(known) + noise).predict(alike(others))
    error = np.sqrt(((mean - smooth(others)) ** 2).mean())
    assert error < 0.5 * 0.3
    assert 0.5 * error < deviation.mean() < 2 * error


def test_the_mean_of_several_measurements_is_believed_more() -> None:
    known = points(32, 0)
    values = smooth(known) + np.random.default_rng(0).normal(0, 0.3, len(known))
    values[5] += 1.0
    errors = []
    for count in (1.0, 8.0, 64.0):
        repeats = np.where(np.arange(32) == 5, count, 1.0)
        mean, _ = GaussianProcess(alike(known), values, repeats).predict(alike(known[5:6]))
        errors.append(abs(mean[0] - values[5]))
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2]


def test_a_linear_trend_goes_on() -> None:
    known, far = points(16, 0) / 2, alike(np.array([[0.9, 0.2, 0.2]]))
    values = 5 - 2 * known[:, 0]
    mean, _ = GaussianProcess(alike(known), values, linear=True, exact=True).predict(far)
    assert mean[0] < values.min() - 0.2


@pytest.mark.parametrize("count", [1, 2])
def test_few_or_equal_values_are_no_trouble(count: int) -> None:
    model = GaussianProcess(alike(points(2, 0)[:count]), np.full(count, 0.25))
    mean, deviation = model.predict(alike(points(4, 1)))
    assert mean == pytest.approx(np.full(4, 0.25))
    assert np.isfinite(deviation).all()


@pytest.mark.parametrize("sites", [12, 72])
def test_what_a_site_gives_is_learned(sites: int) -> None:
    generator = np.random.default_rng(0)
    placements = (generator.random((64, sites)) < 4 / sites).astype(float)
    placements[::2, 0] = 1.0
    features = np.full((64, 2), 0.5)  # which tell nothing
    values = placements[:, 0] + 0.1 * placements[:, 1]
    known, others = slice(0, 48), slice(48, 64)
    model = GaussianProcess(Inputs(features[known], placements[known]), values[known])
    mean, _ = model.predict(Inputs(features[others], placements[others]))
    with_site = placements[others][:, 0] == 1
    assert mean[with_site].mean() > mean[~with_site].mean() + 0.4


def test_hyper_parameters_are_drawn_independently() -> None:
    drawn = _hyper_parameters(4)
    columns = np.log([*drawn.lengths.T, *drawn[1:]])
    correlations = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlations).max() < 0.2


def test_a_metric_does_not_follow_a_trend_beyond_what_was_measured() -> None:
    known = points(16, 0) / 2
    values = 5 - 2 * known[:, 0]
    far = alike(np.array([[3.0, 0.2, 0.2]]))
    models = [GaussianProcess(alike(known), values, linear=linear) for linear in (True, False)]
    trend, none = (model.predict(far)[0][0] for model in models)
    assert trend < values.min() - 0.3
    assert values.min() < none < values.max()


def test_placements_are_apart_by_the_share_of_sites_they_have_in_common() -> None:
    placements = np.zeros((5, 40))
    placements[1, 0] = placements[2, 1] = 1.0
    placements[3, :30] = 1.0
    placements[4, 1:31] = 1.0
    squared = _squared_distances(placements, placements)
    assert np.diagonal(squared) == pytest.approx(np.zeros(5))
    assert squared[0, 1:] == pytest.approx(np.ones(4)), "no adapters, and some"
    assert squared[1, 2] == pytest.approx(1.0)
    assert squared[3, 4] == pytest.approx(1 / 30)
    many = np.random.default_rng(0).random((60, 8)) * (np.random.default_rng(1).random((60, 8)) < 0.4)
    many[:10] = 0.0
    kernel = np.exp(-5 * _squared_distances(many, many))
    assert np.linalg.eigvalsh(kernel).min() > -1e-10
