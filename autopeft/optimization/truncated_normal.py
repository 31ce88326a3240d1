"""Draws from truncated normal distributions: Optuna's numbers, computed with its care only where it shows.

Optuna inverts the distribution function by Newton's method in Python, value by value. A draw that is rounded
to a grid afterwards needs no such care, unless it lies between two points of it. One that is not rounded is
computed as Optuna does, to the last bit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from optuna.samplers._tpe import _truncnorm
from scipy import special

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

_DOUBTFUL = 1e-6
"""Distance, in steps, to the middle between two points below which the quick way is not trusted."""
_MOST_ITERATIONS = 10
_OTHER_ERROR_FUNCTION = 2000
"""Optuna takes another error function for arrays of at least this size."""


def random_variates(
    generator: np.random.RandomState,
    a: Floats,
    b: Floats,
    loc: Floats,
    scale: Floats,
    *,
    first: Floats,
    step: Floats,
) -> Floats:
    """Return what Optuna's `_truncnorm.rvs` returns; rows to be rounded are right after rounding alone.

    Args:
        generator: Gives one uniform number a draw.
        a: Lower ends in standard deviations from the mean, of shape (rows, draws); so are b, loc and scale.
        b: Upper ends.
        loc: Means before truncation.
        scale: Standard deviations before truncation.
        first: A point of each row's grid, of shape (rows,).
        step: Distance of the points of each row's grid; 0 for a row that is not rounded.
    """
    quantiles = generator.uniform(low=0, high=1, size=a.shape)
    careful = np.broadcast_to((step == 0)[:, None], a.shape)
    points = _quick_points(quantiles, a, b, careful)
    if points is not None:
        drawn = points * scale + loc
        rounded = step != 0
        place = (drawn[rounded] - first[rounded, None]) / step[rounded, None]
        # Also false where something is not finite.
        if np.all(np.abs(place - np.floor(place) - 0.5) > _DOUBTFUL):
            return drawn
    exact: Floats = _truncnorm.ppf(quantiles, a, b) * scale + loc
    return exact


def _quick_points(quantiles: Floats, a: Floats, b: Floats, careful: Mask) -> Floats | None:
    """Return the quantiles' points; None where Newton's method takes long, and how long would matter."""
    points = np.empty_like(quantiles)
    left = a < 0
    with np.errstate(all="ignore"):  # what comes of it is checked
        log_mass = _log_mass(a, b)
    log_mass[careful] = _careful_log_mass(a, b, careful)
    for side, sign in ((left, 1.0), (~left, -1.0)):
        if not side.any():
            continue
        q, mass, care = quantiles[side], log_mass[side], careful[side]
        # In the right half everything is mirrored, where Optuna's functions are more precise.
        end, share = (a[side], np.log(q)) if sign > 0 else (-b[side], np.log1p(-q))
        found = _newton(np.logaddexp(_log_ndtr(end, care), share + mass), care)
        if found is None:
            return None
        points[side] = sign * found
    # As Optuna has it, though no uniform number is 1.
    points[quantiles == 0] = a[quantiles == 0]
    return points


def _log_ndtr(values: Floats, careful: Mask) -> Floats:
    found: Floats = special.log_ndtr(values)
    found[careful] = _truncnorm._log_ndtr(values[careful])
    return found


def _log_mass(a: Floats, b: Floats) -> Floats:
    """Return the log of the probability between a and b."""
    mirrored = a > 0
    low, high = np.where(mirrored, -b, a), np.where(mirrored, -a, b)
    tail = special.log_ndtr(high) + np.log1p(-np.exp(special.log_ndtr(low) - special.log_ndtr(high)))
    mass: Floats = np.where(high <= 0, tail, np.log1p(-special.ndtr(low) - special.ndtr(-high)))
    return mass


def _careful_log_mass(a: Floats, b: Floats, careful: Mask) -> Floats:
    """Return Optuna's figures for some of the entries, as it would compute them among all."""
    low, high = a[careful], b[careful]
    if np.count_nonzero((a <= 0) & (b > 0)) >= _OTHER_ERROR_FUNCTION:
        low = np.concatenate([low, np.full(_OTHER_ERROR_FUNCTION, -1.0)])
        high = np.concatenate([high, np.full(_OTHER_ERROR_FUNCTION, 1.0)])
    mass: Floats = _truncnorm._log_gauss_mass(low, high)[: np.count_nonzero(careful)]
    return mass


def _newton(y: Floats, careful: Mask) -> Floats | None:
    """Solve log_ndtr(x) = y in as many iterations as Optuna's `_ndtri_exp`."""
    flipped = y > -1e-2
    z = y.copy()
    z[flipped] = np.log(-np.expm1(y[flipped]))
    x = np.empty_like(y)
    small = z < -5
    x[small] = -np.sqrt(-2.0 * (z[small] + _truncnorm._norm_pdf_logC))
    x[~small] = -_truncnorm._ndtri_exp_approx_C * np.log(np.expm1(-z[~small]))
    for _ in range(_MOST_ITERATIONS):
        log_ndtr = _log_ndtr(x, careful)
        log_density = -0.5 * x**2 - _truncnorm._norm_pdf_logC
        dx = (log_ndtr - z) * np.exp(log_ndtr - log_density)
        x -= dx
        if np.all(np.abs(dx) < 1e-8 * np.abs(x)):
            x[flipped] *= -1
            return x
    return None
