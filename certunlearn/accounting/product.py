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

import math
from collections.abc import Iterator

import numpy as np

from certunlearn._numerics.checks import PerStep
from certunlearn.accounting import _gaussian, accountant_base
from certunlearn.mechanisms import Mechanism, Separations
from certunlearn.mechanisms.plain_separations import with_noise

_HALVINGS = 60
# The same by many numbers at a time, as steps are what takes long: 32^12 = 2^60. A curve has up to
# 256 stops, at each of which so many: fewer are quickest, 16^15 = 2^60.
_AT_ONCE, _SEARCHES = 33, 12
_AT_ONCE_PER_STOP, _SEARCHES_PER_STOP = 17, 15
# Of longer runs the last so many steps count only: no step raises delta.
_MOST_STEPS = 10_000
# Steps of a curve that are worked out: all of so many, else so many.
_ALL_STEPS, _POINTS = 256, 24
_LARGEST = 1000.0  # epsilon; beyond it there is no guarantee to speak of
_APART = 1000.0  # separations, in standard deviations, beyond which theta counts as 1
# More than `_gaussian.delta` is too small by (3e-13, measured); errors of T steps would multiply.
_ROUNDED_UP = 1 + 1e-12
_MOST_LESS = 50.0  # logarithm of the factor by which less noise is sought than one step needs


class Product(accountant_base.Accountant):
    """See the module."""

    name = "product"

    def unsupported_reason(self, mechanism: Mechanism) -> str | None:
        """Mechanisms whose separations are not bounded, or that have memory."""
        stated = mechanism.separations()
        if stated is None:
            return accountant_base.no_separations_reason(self.name, mechanism)
        if not np.all(np.isfinite(largest_separations(stated))):
            return (
                "accountant='product' needs models that are projected at every step, as in "
                "ModelClipping: without, two models may be any distance apart"
            )
        if not stated.memoryless:
            return "accountant='product' needs a memoryless mechanism"
        return None

    def epsilon(self, mechanism: Mechanism, noise_scale: PerStep, delta: float) -> float:
        """See `Accountant.epsilon`; infinity beyond 1000."""
        apart = _apart(accountant_base.separations(mechanism), noise_scale)
        if _last(apart, np.array([_LARGEST]))[0] > delta:
            return math.inf
        low, high = 0.0, _LARGEST
        for _ in range(_SEARCHES):
            grid = np.linspace(low, high, _AT_ONCE)
            holds = np.flatnonzero(_last(apart, grid) <= delta)
            first = int(holds[0]) if len(holds) else len(grid) - 1  # `high` holds
            if first == 0:
                return float(grid[0])
            low, high = float(grid[first - 1]), float(grid[first])
        return high

    def delta(self, mechanism: Mechanism, noise_scale: PerStep, epsilon: float) -> float:
        """See `Accountant.delta`."""
        apart = _apart(accountant_base.separations(mechanism), noise_scale)
        return float(_last(apart, np.array([epsilon]))[0])

    def noise_scale(
        self, mechanism: Mechanism, epsilon: float, delta: float, progress: bool = False
    ) -> float:
        """See `Accountant.noise_scale`: by bisection, rounded up."""
        del progress
        stated = accountant_base.separations(mechanism)

        def holds(log_scale: float) -> bool:
            apart = _apart(stated, math.exp(log_scale))
            return float(_last(apart, np.array([epsilon]))[0]) <= delta

        # One Gaussian for the last separation alone is enough.
        last = largest_separations(stated)[stated.noisy_steps][-1]
        if last == 0:  # nothing is left to hide
            return accountant_base.LEAST_NOISE_SCALE
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

    def epsilon_curve(self, mechanism: Mechanism, noise_scale: PerStep, delta: float) -> np.ndarray:
        """See `Accountant.epsilon_curve`; between steps worked out it has the last one's number.

        That is an upper bound, as no step raises delta. Of at most `_ALL_STEPS` steps all are
        worked out.
        """
        stated = accountant_base.separations(mechanism)
        stops = np.arange(1, min(mechanism.steps, _MOST_STEPS) + 1)
        if mechanism.steps > _ALL_STEPS:
            stops = np.unique(np.geomspace(1, len(stops), _POINTS).astype(int))
        curve = np.full(mechanism.steps + 1, np.inf)
        curve[stops] = _epsilons(_apart(stated, noise_scale), delta, stops)
        if mechanism.steps > stops[-1]:
            curve[-1] = self.epsilon(mechanism, noise_scale, delta)
        return np.minimum.accumulate(curve)


def largest_separations(stated: Separations) -> np.ndarray:
    """float64 `[steps]`: the most that two points can be apart after each update, maybe infinity.

    Whatever came before: after a noise anything within the diameter is possible, and without one
    what the update before led to.
    """
    found, distance = [], stated.initial_distance
    if stated.init_noise_scale > 0:
        distance = math.inf
    run = with_noise(stated, 1.0)
    each = (run.contraction.tolist(), run.shift.tolist(), stated.noisy_steps.tolist())
    for c, s, noisy in zip(*each, strict=True):
        found.append(s if c == 0 else c * distance + s)
        # Starts need not be within the diameter: what a step ends at is.
        distance = min(stated.diameter, math.inf if noisy else found[-1])
    return np.array(found)


def _apart(stated: Separations, scale: PerStep) -> np.ndarray:
    """float64 `[1 + steps]`: how far apart the starts and each step's Gaussians are, at most.

    In standard deviations; infinity where there is no noise.
    """
    distances = [stated.initial_distance, *largest_separations(stated)]
    noise = np.array([stated.init_noise_scale, *with_noise(stated, scale).noise])
    return np.divide(distances, noise, out=np.full(len(noise), np.inf), where=noise > 0)


def _epsilons(apart: np.ndarray, delta: float, stops: np.ndarray) -> np.ndarray:
    """float64 `[stops]`: epsilon of the run stopped after so many steps, rounded up."""
    low, high = np.zeros(len(stops)), np.full(len(stops), _LARGEST)
    ends = _at(apart, np.stack([low, high], axis=1), stops) <= delta
    rows = np.arange(len(stops))
    for _ in range(_SEARCHES_PER_STOP):
        grid = np.linspace(low, high, _AT_ONCE_PER_STOP, axis=1)
        holds = _at(apart, grid, stops) <= delta
        # The first that holds; `high` does, or `ends` says that none does.
        first = np.where(holds.any(axis=1), holds.argmax(axis=1), _AT_ONCE_PER_STOP - 1)
        low, high = grid[rows, np.maximum(first - 1, 0)], grid[rows, first]
    return np.where(ends[:, 0], 0.0, np.where(ends[:, 1], high, np.inf))


def _at(apart: np.ndarray, epsilons: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """float64 `[stops, n]`: delta after `stops[i]` steps, at `epsilons[i]`."""
    found = np.empty(epsilons.shape)
    for step, deltas in enumerate(_steps(apart[: 1 + stops[-1]], epsilons), 1):
        now = stops == step
        found[now] = deltas[now]
    return found


def _last(apart: np.ndarray, epsilons: np.ndarray) -> np.ndarray:
    """float64 `[epsilons]`: delta after the last step, for each epsilon."""
    found = np.ones(len(epsilons))
    for each in _steps(apart, epsilons, max(0, len(apart) - 1 - _MOST_STEPS)):
        found = each
    return found


def _steps(apart: np.ndarray, epsilons: np.ndarray, skipped: int = 0) -> Iterator[np.ndarray]:
    """For each step from `skipped` on: delta after it, float64, of the shape of `epsilons`."""
    with np.errstate(divide="ignore"):  # log(e^0 - 1)
        log_extra = epsilons + np.log(-np.expm1(-epsilons))
    found = _gaussian.delta(epsilons, apart[0])
    for each in apart[1 + skipped :]:
        if each <= _APART:
            ratio = np.logaddexp(0.0, log_extra - np.log(np.maximum(found, 1e-300)))
            found = np.minimum(found * _gaussian.delta(ratio, each) * _ROUNDED_UP, found)
        yield found
