"""Renyi divergences of the pair of `profile`: a bound at any delta, however small.

docs/theory/subsampled.md proves it. What the code relies on, for a = 2, 3, ... and f = dP / dQ:

- A = E_Q[f^a] and B = E_Q[f^(1-a)] are both directions. T steps multiply them, and with M = max(A,
  B): log delta <= T log M - (a - 1) epsilon + (a - 1) log(a - 1) - a log a.
- A is a positive sum of Gaussians, which a grid of step s / 2 adds up to within 1e-33.
- For k = 1, B <= A. For more, B - 1 = E_Q[g(f)], g(f) = f^(1-a) - 1 - (1 - a) (f - 1): on a cell of
  a grid at most the larger value at its ends, and beyond the grid bounded by `_left` and by (a - 1)
  P(right of it).
- Exponents of A are raised by more than their rounding, and B - 1 by 1e-9 of itself.
"""

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import scipy  # its parts load when they are first used

_LARGEST = 100_000
_MOST_VALUES = 2**24  # points times terms of one table; orders that need more are not used
_SIDES = 12.0  # in standard deviations: beyond lies 2e-33
_CELLS = 4096  # of the bound of B, on either side of 0
_SMALLEST_NOISE = 1e-3  # below it epsilon is in the millions


def delta(sigma: float, rate: float, steps: int, deletions: int, epsilon: float) -> float:
    """Delta at `epsilon` by Renyi divergences; arguments as for `profile.delta`, unchecked.

    >>> print(f"{delta(4.0, 0.00033, 10_000, 1, epsilon=0.1):.2g}")
    1.3e-13
    """
    best = 0.0
    for order, moments in _moments(sigma, rate, steps, deletions):
        best = min(best, moments - (order - 1) * epsilon + _log_constant(order))
        if moments >= (order - 1) * epsilon:
            break  # so it stays at all larger orders, which prove next to nothing
    return math.exp(best)


def epsilon(sigma: float, rate: float, steps: int, deletions: int, delta: float) -> float:
    """Epsilon at `delta` by Renyi divergences; infinity where no order is worked out."""
    best = math.inf
    for order, moments in _moments(sigma, rate, steps, deletions):
        found = (moments + _log_constant(order) - math.log(delta)) / (order - 1)
        best = min(best, max(found, 0.0))
        # Divergences grow with the order, and delta is below 1: no larger order is below this.
        if (moments + _log_constant(order)) / (order - 1) >= best:
            break
    return best * (1 + 1e-12)


def _moments(sigma: float, rate: float, steps: int, deletions: int) -> Iterator[tuple[int, float]]:
    """Orders with `steps` times their log-moments, as long as they are affordable."""
    for order in _orders():
        moment = log_moment(sigma, rate, deletions, order)
        if math.isinf(moment):
            return
        yield order, steps * moment


@lru_cache(maxsize=1)
def _orders() -> tuple[int, ...]:
    """Every whole number up to 64, then in steps of 6 percent."""
    above = np.geomspace(64, _LARGEST, 1 + math.ceil(math.log(_LARGEST / 64) / math.log(1.06)))
    return (*range(2, 64), *np.unique(above.astype(int)).tolist())


def _log_constant(order: int) -> float:
    return (order - 1) * math.log(order - 1) - order * math.log(order)


@lru_cache(maxsize=4096)
def log_moment(sigma: float, rate: float, deletions: int, order: int) -> float:
    """log max(A, B) of one step, rounded up; infinity where that would take long.

    >>> round(log_moment(1.0, 0.01, 1, 2), 6)  # log(1 + q^2 (e - 1))
    0.000172
    """
    if sigma < _SMALLEST_NOISE:
        return math.inf
    step = sigma / 2
    points = math.ceil(order * deletions / step + 4 * _SIDES) + 2
    if max(points, _CELLS) * deletions > _MOST_VALUES:
        return math.inf
    x, log_ratio = (
        values[:points] for values in _table(sigma, rate, deletions, 2 ** points.bit_length())
    )
    exponent = order * log_ratio - x**2 / (2 * sigma**2)
    size = deletions * ((np.abs(x) + deletions) / sigma**2 - math.log(rate) - math.log1p(-rate) + 2)
    exponent += 1e-15 * (order * size + x**2 / sigma**2)
    forward = float(scipy.special.logsumexp(exponent))
    forward += math.log(step / sigma / math.sqrt(2 * math.pi))
    forward += 1e-14
    if deletions == 1:
        return forward
    return max(forward, math.log1p(_backward(sigma, rate, deletions, order)))


def _terms(x: np.ndarray, sigma: float, rate: float, deletions: int) -> Iterator[np.ndarray]:
    """The logarithms of the terms of f at x, from nobody drawn to all."""
    for i in range(deletions + 1):
        weight = math.log(math.comb(deletions, i)) + i * math.log(rate)
        yield weight + (deletions - i) * math.log1p(-rate) + (i * x - i * i / 2) / sigma**2


@lru_cache(maxsize=8)
def _table(sigma: float, rate: float, deletions: int, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Points sigma / 2 apart from -12 sigma on, and log f there."""
    x = np.arange(points) * (sigma / 2) - _SIDES * sigma
    total = np.full(points, -np.inf)
    for term in _terms(x, sigma, rate, deletions):
        total = np.logaddexp(total, term)
    return x, total


@lru_cache(maxsize=2)
def _cells(sigma: float, rate: float, deletions: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ends of cells, f - 1 there (infinity where it is beyond float64), and log f."""
    x = np.concatenate(
        [
            np.linspace(-_SIDES * sigma, 0, _CELLS + 1),
            np.linspace(0, deletions + _SIDES * sigma, _CELLS + 1)[1:],
        ]
    )
    log_ratio, excess = np.full_like(x, -np.inf), np.zeros_like(x)
    for i, term in enumerate(_terms(x, sigma, rate, deletions)):
        log_ratio = np.logaddexp(log_ratio, term)
        shift = (i * x - i * i / 2) / sigma**2
        with np.errstate(over="ignore"):  # w_i (e^shift - 1): no digits are lost at a tiny rate
            excess += np.where(shift < 1, np.exp(term - shift) * np.expm1(shift), np.exp(term))
            excess -= np.where(shift < 1, 0.0, np.exp(term - shift))
    return x, excess, np.where(np.abs(excess) < 0.5, np.log1p(np.clip(excess, -0.9, 1)), log_ratio)


def _backward(sigma: float, rate: float, deletions: int, order: int) -> float:
    """B - 1 from above; infinity where it is beyond float64."""
    x, excess, log_ratio = _cells(sigma, rate, deletions)
    log_gain = _log_gain(1 - order, excess, log_ratio)
    log_density = -(x**2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi))
    parts = np.maximum(log_gain[1:], log_gain[:-1]) + np.log(np.diff(x))
    parts = parts + np.maximum(log_density[1:], log_density[:-1])
    left = _left(sigma, rate, deletions, order)
    right = math.log(order - 1) + scipy.special.log_ndtr(-_SIDES)
    with np.errstate(over="ignore"):
        return float(np.exp(scipy.special.logsumexp([*parts, left, right]))) * (1 + 1e-9)


def _left(sigma: float, rate: float, deletions: int, order: int) -> float:
    """The logarithm of what lies left of the cells, from above."""
    log_none = np.array([deletions * math.log1p(-rate)])
    nobody = _log_gain(1 - order, np.expm1(log_none), log_none)[0] + scipy.special.log_ndtr(-_SIDES)
    # f is not below its last term either, whose power makes another Gaussian of Q's.
    shift = (order - 1) * deletions / sigma
    weight = deletions * (1 - order) * math.log(rate) + shift**2 * order / (2 * (order - 1))
    return float(min(nobody, weight + scipy.special.log_ndtr(shift - _SIDES)))


def _log_gain(power: int, excess: np.ndarray, log_ratio: np.ndarray) -> np.ndarray:
    """log g(f), from above, for a negative power."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        linear, exponent = power * excess, power * log_ratio
        # By Taylor's theorem, where what follows would cancel: g'' falls as f grows.
        small = np.log(power * (power - 1) / 2 * excess**2) + np.maximum(0, (power - 2) * log_ratio)
        between = np.log(np.expm1(exponent) - linear)
        below, above = exponent, math.log(-power) + log_ratio
    found = np.where(exponent > 50, below, np.where(log_ratio > 50, above, between))
    return np.where(np.abs(linear) < 1e-4, small, found)
