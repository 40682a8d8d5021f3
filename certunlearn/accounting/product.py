"""The accountant `"product"`: a product of contraction coefficients, where separations are bounded.

Let two updated models never be more than s_t apart, whatever came before (a projection sees to
that), and sigma_t be the noise. If delta_t is the hockey-stick divergence of the two runs at
e^epsilon after t steps, then

    delta_{t+1} <= delta_t * theta_{e'}(s_t / sigma_t),    e' = log(1 + (e^epsilon - 1) / delta_t),

where theta_e(r) is the divergence at e^e of two Gaussians r standard deviations apart.

Proof. Write P - e^epsilon Q = delta p - (delta + e^epsilon - 1) q with distributions p and q (the
normalised positive and negative parts). After the step's kernel K the positive part is at most
delta times the divergence of pK and qK at e^e' = (delta + e^epsilon - 1) / delta, which is convex
in each, hence at most that of two points' Gaussians, which grows with their distance. What is
multiplied out, the supremum over events A of delta (pK(A) - qK(A)) - (e^epsilon - 1) qK(A), grows
with delta, so an upper bound may stand for delta. The other direction is the same with P and Q
exchanged. This pairs all positive mass with all negative mass at one ratio, which is the best
pairing where separations do not depend on the distance.

Source: Koloskova et al. (ICML 2025), Theorem on model clipping, after Asoodeh & Diaz (2020) and
Balle et al. (2019); the proof above is the whole of it.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from certunlearn._numerics import checks
from certunlearn.accounting import _gaussian, _runs
from certunlearn.mechanisms.separations import with_noise

_HALVINGS = 60
# The same by many numbers at a time, as steps are what takes long: 32^12 = 2^60.
_AT_ONCE, _SEARCHES = 33, 12
# Of longer runs the last so many steps count only: no step raises delta.
_MOST_STEPS = 10_000
# Steps of a curve that are worked out: all of so many, else so many.
_ALL_STEPS, _POINTS = 256, 24
_LARGEST = 1000.0  # epsilon; beyond it there is no guarantee to speak of
_APART = 1000.0  # separations, in standard deviations, beyond which theta counts as 1
# More than `_gaussian.delta` is too small by (3e-13, measured); errors of T steps would multiply.
_ROUNDED_UP = 1 + 1e-12
_MOST_LESS = 50.0  # logarithm of the factor by which less noise is sought than one step needs


def refusal(mechanism: Any) -> str | None:
    """Why this accountant cannot be used, or None."""
    if mechanism.separations() is None:
        return "accountant='product' needs a mechanism with separations; use 'dp-accounting'"
    if not np.all(np.isfinite(_runs.largest_separations(_runs.separations(mechanism)))):
        return (
            "accountant='product' needs models that are projected at every step, as in "
            "ModelClipping: without, two models may be any distance apart"
        )
    if not _runs.separations(mechanism).memoryless:
        return "accountant='product' needs a memoryless mechanism"
    return None


def epsilon(mechanism: Any, scale: checks.PerStep, delta: float) -> float:
    """See `certunlearn.epsilon`; infinity beyond 1000."""

    if _last(mechanism, scale, np.array([_LARGEST]))[0] > delta:
        return math.inf
    low, high = 0.0, _LARGEST
    for _ in range(_SEARCHES):
        grid = np.linspace(low, high, _AT_ONCE)
        holds = np.flatnonzero(_last(mechanism, scale, grid) <= delta)
        first = int(holds[0]) if len(holds) else len(grid) - 1  # `high` holds
        if first == 0:
            return float(grid[0])
        low, high = float(grid[first - 1]), float(grid[first])
    return high


def delta(mechanism: Any, scale: checks.PerStep, epsilon: float) -> float:
    """See `certunlearn.delta`."""
    return float(_last(mechanism, scale, np.array([epsilon]))[0])


def noise_scale(mechanism: Any, epsilon: float, delta: float, progress: bool) -> float:
    """See `certunlearn.noise_scale`: by bisection, rounded up."""
    del progress

    def holds(log_scale: float) -> bool:
        return float(_last(mechanism, math.exp(log_scale), np.array([epsilon]))[0]) <= delta

    # One Gaussian for the last separation alone is enough.
    last = _runs.largest_separations(_runs.separations(mechanism))[
        _runs.separations(mechanism).noisy_steps
    ][-1]
    high = math.log(last / _gaussian.mu(epsilon, delta)) + 1e-9
    low, least = high - 1.0, high - _MOST_LESS
    while holds(low):
        if low < least:  # noise on the start is enough by itself
            return math.exp(low)
        low, high = low - 1.0, low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return math.exp(high) * (1 + 1e-12)


def epsilon_curve(mechanism: Any, scale: checks.PerStep, delta: float) -> np.ndarray:
    """See `certunlearn.epsilon_curve`; between the steps worked out it has the last one's number.

    That is an upper bound, as no step raises delta. Of at most `_ALL_STEPS` steps all are worked
    out.
    """
    stops = np.arange(1, min(mechanism.steps, _MOST_STEPS) + 1)
    if mechanism.steps > _ALL_STEPS:
        stops = np.unique(np.geomspace(1, len(stops), _POINTS).astype(int))
    curve = np.full(mechanism.steps + 1, np.inf)
    curve[stops] = _epsilons(mechanism, scale, delta, stops)
    if mechanism.steps > stops[-1]:
        curve[-1] = epsilon(mechanism, scale, delta)
    return np.minimum.accumulate(curve)


def _epsilons(mechanism: Any, scale: checks.PerStep, delta: float, stops: np.ndarray) -> np.ndarray:
    """float64 `[stops]`: epsilon of the run stopped after so many steps, rounded up."""
    low, high = np.zeros(len(stops)), np.full(len(stops), _LARGEST)
    none = _at(mechanism, scale, low, stops) <= delta
    never = _at(mechanism, scale, high, stops) > delta
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        holds = _at(mechanism, scale, middle, stops) <= delta
        low, high = np.where(holds, low, middle), np.where(holds, middle, high)
    return np.where(none, 0.0, np.where(never, np.inf, high))


def _at(
    mechanism: Any, scale: checks.PerStep, epsilons: np.ndarray, stops: np.ndarray
) -> np.ndarray:
    """float64 `[stops]`: delta after `stops[i]` steps at `epsilons[i]`."""
    found = np.empty(len(stops))
    each = itertools.islice(_steps(mechanism, scale, epsilons), int(stops[-1]))
    for step, deltas in enumerate(each, 1):
        now = stops == step
        found[now] = deltas[now]
    return found


def _last(mechanism: Any, scale: checks.PerStep, epsilons: np.ndarray) -> np.ndarray:
    """float64 `[epsilons]`: delta after the last step, for each epsilon."""
    found = np.ones(len(epsilons))
    for each in _steps(mechanism, scale, epsilons, max(0, mechanism.steps - _MOST_STEPS)):
        found = each
    return found


def _steps(
    mechanism: Any, scale: checks.PerStep, epsilons: np.ndarray, skipped: int = 0
) -> Iterator[np.ndarray]:
    """float64 `[epsilons]` for each step from `skipped` on: delta after it."""
    with np.errstate(divide="ignore"):  # log(e^0 - 1)
        log_extra = epsilons + np.log(-np.expm1(-epsilons))
    found = np.ones(len(epsilons))
    stated = _runs.separations(mechanism)
    if stated.init_noise_scale > 0:
        start = stated.initial_distance / stated.init_noise_scale
        found = np.asarray(_gaussian.delta(epsilons, start))
    noise = with_noise(stated, scale).noise[skipped:]
    for separation, sigma in zip(
        _runs.largest_separations(_runs.separations(mechanism))[skipped:], noise, strict=True
    ):
        if sigma > 0:
            ratio = np.logaddexp(0.0, log_extra - np.log(np.maximum(found, 1e-300)))
            apart = separation / sigma
            theta = 1.0 if apart > _APART else _gaussian.delta(ratio, apart) * _ROUNDED_UP
            found = np.minimum(found * theta, found)
        yield found
