"""The accountant `"interpolation"`: exact shifted interpolation, for any separations."""

from typing import Any

import numpy as np

from certunlearn._numerics import checks
from certunlearn.accounting import _gaussian, _runs

_LEAST = 1e-30


def refusal(mechanism: Any) -> str | None:
    """Why this accountant cannot be used, or None."""
    if mechanism.separations() is not None:
        return None
    return "accountant='interpolation' needs a mechanism with separations; use 'dp-accounting'"


def epsilon(mechanism: Any, scale: checks.PerStep, delta: float) -> float:
    """See `certunlearn.epsilon`."""
    return float(_gaussian.epsilon(_runs.mu_curve(_runs.separations(mechanism), scale)[-1], delta))


def delta(mechanism: Any, scale: checks.PerStep, epsilon: float) -> float:
    """See `certunlearn.delta`."""
    return float(_gaussian.delta(epsilon, _runs.mu_curve(_runs.separations(mechanism), scale)[-1]))


def noise_scale(mechanism: Any, epsilon: float, delta: float, progress: bool) -> float:
    """See `certunlearn.noise_scale`: mu is proportional to 1 / sigma."""
    del progress
    unit = _runs.mu_curve(_runs.separations(mechanism), 1.0)[-1]
    # Positive even where nothing is left to hide.
    sigma = max(unit / _gaussian.mu(epsilon, delta), _LEAST)
    while _gaussian.epsilon(unit / sigma, delta) > epsilon:  # the last digits' rounding, if any
        sigma *= 1 + 1e-12
    return float(sigma)


def epsilon_curve(mechanism: Any, scale: checks.PerStep, delta: float) -> np.ndarray:
    """See `certunlearn.epsilon_curve`."""
    mu = _runs.mu_curve(_runs.separations(mechanism), scale)
    return np.concatenate([[np.inf], _gaussian.epsilon(mu, delta)])
