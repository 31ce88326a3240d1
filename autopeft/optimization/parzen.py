"""The Parzen estimators of TPE, over all parameters at once: Optuna's numbers bit for bit, sooner.

Optuna builds and evaluates a mixture of products of kernels one parameter at a time. Most parameters of a
search have a handful of values: all that a kernel can say of them fits a small table, which parameters of
one kind share, and which is kept from one ask to the next. What remains a parameter is two array operations.

Sums are taken in Optuna's order, and what decides the last bit of a value that is not rounded (a learning
rate) is computed with Optuna's own functions. `tests/optimization/test_parzen.py` compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers._tpe import _truncnorm
from optuna.samplers._tpe.probability_distributions import _log_gauss_mass_unique, _unique_inverse_2d

from autopeft.optimization.truncated_normal import random_variates

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
_MOST_VALUES = 9
"""Optuna computes tables of more entries than those of nine values with another error function."""


class _GridTable:
    """What kernels on a grid of a few whole numbers give each of its points, computed when first met.

    A kernel is known by its class: the point it sits on, and its distance to the next observation in
    half steps. The last class is the prior.

    Args:
        points: The grid, rising.
        step: Distance of its points.
        narrowest: Least standard deviation of a kernel.
    """

    def __init__(self, points: Floats, step: float, narrowest: float) -> None:
        self._points = points
        self._low, self._high = points[0] - step / 2, points[-1] + step / 2
        self._step = step
        self._distances = 2 * len(points) + 1
        self._narrowest = narrowest
        self.prior = len(points) * self._distances
        self.log_mass = np.empty((self.prior + 1, len(points)))
        self.log_norm = np.empty(self.prior + 1)
        self._known = np.zeros(self.prior + 1, dtype=bool)

    def classes(self, observations: Floats, distances: Floats) -> Indices:
        """Return the kernels' classes, and fill the table for those that are new."""
        points = np.rint((observations - self._points[0]) / self._step)
        found: Indices = (points * self._distances + np.rint(2 * distances / self._step)).astype(np.intp)
        met = np.zeros(self.prior + 1, dtype=bool)
        met[found] = True
        met[self.prior] = True
        new = np.flatnonzero(met & ~self._known)
        if new.size:
            self._fill(new)
        return found

    def _fill(self, classes: Indices) -> None:
        point, distance = np.divmod(classes, self._distances)
        widest = self._high - self._low
        is_prior = classes == self.prior
        mu = np.where(is_prior, 0.5 * (self._low + self._high), self._points[np.where(is_prior, 0, point)])
        sigma = np.clip(distance * self._step / 2, self._narrowest, widest)
        sigma[is_prior] = widest
        left, right = self._points - self._step / 2, self._points + self._step / 2
        self.log_mass[classes] = _truncnorm._log_gauss_mass(
            (left - mu[:, None]) / sigma[:, None], (right - mu[:, None]) / sigma[:, None]
        )
        self.log_norm[classes] = _truncnorm._log_gauss_mass(
            (self._low - mu) / sigma, (self._high - mu) / sigma
        )
        self._known[classes] = True


@dataclass(frozen=True)
class _Numerical:
    """The numerical parameters of a space; bounds are those of the kernels (half a step wider, in logs)."""

    indices: Indices
    low: Floats
    high: Floats
    step: Floats
    is_log: NDArray[np.bool_]
    first: Floats
    last: Floats

    @classmethod
    def of(cls, distributions: list[BaseDistribution]) -> _Numerical:
        """Return those among a space's distributions."""
        found = [
            (index, one)
            for index, one in enumerate(distributions)
            if isinstance(one, FloatDistribution | IntDistribution)
        ]
        step = np.array([one.step or 0.0 for _, one in found], dtype=float)
        first = np.array([one.low for _, one in found], dtype=float)
        last = np.array([one.high for _, one in found], dtype=float)
        is_log = np.array([one.log for _, one in found], dtype=bool)
        low, high = first - step / 2, last + step / 2
        low[is_log], high[is_log] = np.log(low[is_log]), np.log(high[is_log])
        indices = np.array([index for index, _ in found], dtype=np.intp)
        return cls(indices, low, high, step, is_log, first, last)


@dataclass
class Space:
    """The parameters of a search space by kind, and the tables that their kernels share.

    Args:
        distributions: One a parameter.
    """

    distributions: list[BaseDistribution]
    tables: dict[tuple[float, ...], _GridTable] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.numerical = _Numerical.of(self.distributions)
        by_count: dict[int, list[int]] = {}
        for index, one in enumerate(self.distributions):
            if isinstance(one, CategoricalDistribution):
                by_count.setdefault(len(one.choices), []).append(index)
        self.categorical = {count: np.array(those, dtype=np.intp) for count, those in by_count.items()}
        by_grid: dict[tuple[float, float, float], list[int]] = {}
        for row, index in enumerate(self.numerical.indices):
            one = self.distributions[index]
            if not isinstance(one, IntDistribution) or one.log:
                continue
            if (one.high - one.low) // one.step < _MOST_VALUES:
                by_grid.setdefault((one.low, one.high, one.step), []).append(row)
        self.grids = {key: np.array(rows, dtype=np.intp) for key, rows in by_grid.items()}
        on_grid = {row for rows in by_grid.values() for row in rows}
        self.off_grid = [row for row in range(len(self.numerical.indices)) if row not in on_grid]

    def table(self, grid: tuple[float, float, float], narrowest: float) -> _GridTable:
        """Return the table of a grid for kernels that are at least so wide."""
        key = (*grid, narrowest)
        if key not in self.tables:
            low, high, step = grid
            self.tables[key] = _GridTable(np.arange(low, high + step / 2, step), step, narrowest)
        return self.tables[key]


class ParzenEstimator:
    """A mixture of products of kernels: one kernel an observation, and one for the prior.

    It has the defaults of Optuna's `TPESampler`: a prior of weight 1, magic clip, no endpoints.

    Args:
        space: The search space.
        observations: As TPE takes them (categories by their index), of shape (parameters, observations).
        weights: Of the observations, of shape (observations,).
    """

    def __init__(self, space: Space, observations: Floats, weights: Floats) -> None:
        self._space = space
        self._count = observations.shape[1]
        weights = np.append(weights, [1.0]) if self._count else np.array([1.0])
        self._weights = weights / weights.sum()
        self._classes = np.empty((len(space.distributions), self._count + 1), dtype=np.intp)
        self._set_categorical(observations)
        self._set_numerical(observations)

    def _set_categorical(self, observations: Floats) -> None:
        self._choices: dict[int, Floats] = {}
        for count, indices in self._space.categorical.items():
            # A row an observed choice, and one for the prior.
            table = np.full((count + 1, count), 1.0 / (self._count + 1))
            np.fill_diagonal(table, table[0, 0] + 1)
            self._choices[count] = table / table.sum(axis=1, keepdims=True)
            self._classes[indices, :-1] = observations[indices]
            self._classes[indices, -1] = count

    def _set_numerical(self, observations: Floats) -> None:
        numerical, count = self._space.numerical, self._count
        values = observations[numerical.indices]
        for row in np.flatnonzero(numerical.is_log):
            values[row] = np.log(values[row])
        low, high = numerical.low[:, None], numerical.high[:, None]
        distances = _distances(values, low, high)
        narrowest = (high - low) / min(100.0, 2.0 + count)
        self._mus = np.concatenate([values, 0.5 * (low + high)], axis=1)
        self._sigmas = np.concatenate([np.clip(distances, narrowest, high - low), high - low], axis=1)
        self._grids: dict[int, _GridTable] = {}
        for grid, rows in self._space.grids.items():
            table = self._space.table(grid, float(narrowest[rows[0], 0]))
            indices = numerical.indices[rows]
            self._classes[indices, :-1] = table.classes(values[rows], distances[rows])
            self._classes[indices, -1] = table.prior
            self._grids |= dict.fromkeys(indices.tolist(), table)

    def sample(self, generator: np.random.RandomState, size: int) -> Floats:
        """Draw samples, of shape (size, parameters)."""
        kernels = generator.choice(len(self._weights), p=self._weights, size=size)
        samples = np.empty((size, len(self._space.distributions)))
        total = sum(len(indices) for indices in self._space.categorical.values())
        quantiles = generator.rand(total, size)  # one row a categorical parameter, in their order
        categorical = np.sort(np.concatenate([*self._space.categorical.values(), np.empty(0, np.intp)]))
        for count, indices in self._space.categorical.items():
            table = np.cumsum(self._choices[count], axis=-1)
            table[:, -1] = 1  # whatever rounding made of it
            reached = table[self._classes[np.ix_(indices, kernels)]]
            drawn = quantiles[np.searchsorted(categorical, indices)]
            samples[:, indices] = np.sum(reached < drawn[..., None], axis=-1).T
        if len(self._space.numerical.indices):
            self._sample_numerical(generator, kernels, samples)
        return samples

    def _sample_numerical(self, generator: np.random.RandomState, kernels: Indices, samples: Floats) -> None:
        numerical = self._space.numerical
        mus, sigmas = self._mus[:, kernels], self._sigmas[:, kernels]
        drawn = random_variates(
            generator,
            (numerical.low[:, None] - mus) / sigmas,
            (numerical.high[:, None] - mus) / sigmas,
            mus,
            sigmas,
            first=np.where(numerical.is_log, np.nan, numerical.first),
            step=np.where(numerical.is_log, 0.0, numerical.step),
        ).T
        drawn[:, numerical.is_log] = np.exp(drawn[:, numerical.is_log])
        stepped = numerical.step != 0
        first, last, step = numerical.first[stepped], numerical.last[stepped], numerical.step[stepped]
        rounded = first + np.round((drawn[:, stepped] - first) / step) * step
        drawn[:, stepped] = np.clip(rounded, first, last)
        samples[:, numerical.indices] = drawn

    def log_pdf(self, samples: Floats) -> Floats:
        """Return the log-densities of samples of shape (size, parameters), of shape (size,)."""
        # Kernels by rows: a parameter's share is then one short copy a kernel.
        total = np.zeros((self._count + 1, len(samples)))
        share = np.empty_like(total)
        choices = {count: np.log(table) for count, table in self._choices.items()}
        off_grid = {int(self._space.numerical.indices[row]): row for row in self._space.off_grid}
        continuous: list[int] = []
        for index, one in enumerate(self._space.distributions):
            values, classes = samples[:, index], self._classes[index]
            if isinstance(one, CategoricalDistribution):
                table = choices[len(one.choices)][:, values.astype(np.intp)]
                np.take(table, classes, axis=0, out=share, mode="clip")
                total += share
            elif index in self._grids:
                assert isinstance(one, IntDistribution)
                grid = self._grids[index]
                points = np.rint((values - one.low) / one.step).astype(np.intp)
                np.take(grid.log_mass[:, points], classes, axis=0, out=share, mode="clip")
                total += share
                total -= grid.log_norm[classes][:, None]
            elif self._space.numerical.step[off_grid[index]]:
                self._add_stepped(total, values, off_grid[index])
            else:
                continuous.append(off_grid[index])
        if continuous:
            total += self._log_pdf_of_continuous(samples, continuous).T
        return _log_sum_exp(np.ascontiguousarray(total.T) + np.log(self._weights[None]))

    def _add_stepped(self, total: Floats, values: Floats, row: int) -> None:
        """Add a parameter of many whole numbers as Optuna does."""
        numerical = self._space.numerical
        step = numerical.step[row]
        points, place = np.unique(values, return_inverse=True)
        mus, sigmas, kernel = _unique_inverse_2d(self._mus[row], self._sigmas[row])
        left, right = points - step / 2, points + step / 2
        if numerical.is_log[row]:
            left, right = np.log(left), np.log(right)
        mass = _log_gauss_mass_unique((left[:, None] - mus) / sigmas, (right[:, None] - mus) / sigmas)
        norm = _truncnorm._log_gauss_mass(
            (numerical.low[row] - mus) / sigmas, (numerical.high[row] - mus) / sigmas
        )
        total += mass[np.ix_(place, kernel)].T
        total -= norm[kernel][:, None]

    def _log_pdf_of_continuous(self, samples: Floats, rows: list[int]) -> Floats:
        numerical = self._space.numerical
        values = [
            np.log(samples[:, numerical.indices[row]])
            if numerical.is_log[row]
            else samples[:, numerical.indices[row]]
            for row in rows
        ]
        mus, sigmas = self._mus[rows].T, self._sigmas[rows].T
        found: Floats = _truncnorm.logpdf(
            np.asarray(values).T[:, None, :],
            a=(numerical.low[rows] - mus) / sigmas,
            b=(numerical.high[rows] - mus) / sigmas,
            loc=mus,
            scale=sigmas,
        ).sum(axis=-1)
        return found


def _distances(values: Floats, low: Floats, high: Floats) -> Floats:
    """Return each observation's larger distance to its neighbours, as Optuna's kernels have it.

    Among equal observations it depends on the order that an unstable sort leaves them in, which is why it
    is Optuna's sort.

    Args:
        values: Observations, of shape (parameters, observations).
        low: Lower ends, of shape (parameters, 1).
        high: Upper ends, of shape (parameters, 1).
    """
    order = np.argsort(values, axis=1)
    gaps = np.diff(np.concatenate([low, np.take_along_axis(values, order, axis=1), high], axis=1), axis=1)
    larger = np.maximum(gaps[:, :-1], gaps[:, 1:])
    if values.shape[1] > 1:  # the ends of the range are no neighbours
        larger[:, 0], larger[:, -1] = gaps[:, 1], gaps[:, -2]
    distances = np.empty_like(values)
    np.put_along_axis(distances, order, larger, axis=1)
    return distances


def _log_sum_exp(values: Floats) -> Floats:
    """Return log Σ exp over the second axis."""
    largest = values.max(axis=1)
    largest[np.isneginf(largest)] = 0  # no difference of infinities
    with np.errstate(divide="ignore"):
        summed: Floats = np.log(np.exp(values - largest[:, None]).sum(axis=1)) + largest
    return summed
