"""The published formulas, as a baseline: checked by interpolation, refused where they do not hold.

Koloskova et al. (ICML 2025), Theorems 1 and 2, constants as published:

    weight_decay = 0:  sigma^2 = 9 log(1/delta) (C0 + C1 gamma T)^2 / (eps^2 T)
    weight_decay > 0:  sigma^2 = 72 gamma lambda log(1/delta)
                                 (C0 (1 - gamma lambda)^T + C1 / lambda)^2 / eps^2

They are not sound everywhere: the first fails for large epsilon (above 10.9 at delta = 1e-5), the
second for few steps too. So nothing leaves this module that exact shifted interpolation does not
confirm for the very same noise. Where they hold they ask for 1.4 to 5 times the noise that is
needed. They take no account of the reference: for `reference="center"` they are merely looser.
"""

import math
from typing import Any

import numpy as np

from certunlearn.accounting import gaussian, interpolation

# Confirmed up to the rounding of two independent evaluations.
_TOLERANCE = 1e-9


def noise_scale(mechanism: Any, epsilon: float, delta: float) -> float:
    """The published standard deviation (parameter units), if it holds at (epsilon, delta).

    Raises:
      ValueError: if interpolation does not confirm it, or the mechanism has schedules.
    """
    sigma = _unit_noise(mechanism, mechanism.steps) * math.sqrt(math.log(1 / delta)) / epsilon
    _confirm(mechanism, sigma, epsilon, delta)
    return sigma


def epsilon(mechanism: Any, noise_scale: Any, delta: float) -> float:
    """The epsilon at which the formula asks for this noise, if it holds there.

    Raises:
      ValueError: if interpolation does not confirm it, or there are schedules.
    """
    sigma = _constant("noise_scale", noise_scale)
    claimed = _unit_noise(mechanism, mechanism.steps) * math.sqrt(math.log(1 / delta)) / sigma
    _confirm(mechanism, sigma, claimed, delta)
    return claimed


def delta(mechanism: Any, noise_scale: Any, epsilon: float) -> float:
    """The delta at which the formula asks for this noise, if it holds there.

    Raises:
      ValueError: if interpolation does not confirm it, or there are schedules.
    """
    sigma = _constant("noise_scale", noise_scale)
    claimed = math.exp(-((epsilon * sigma / _unit_noise(mechanism, mechanism.steps)) ** 2))
    _confirm(mechanism, sigma, epsilon, claimed)
    return claimed


def epsilon_curve(mechanism: Any, noise_scale: Any, delta: float) -> np.ndarray:
    """float64 `[steps + 1]`: epsilon of each number of steps; infinity where it does not hold."""
    sigma = _constant("noise_scale", noise_scale)
    unit = np.array([_unit_noise(mechanism, t) for t in range(1, mechanism.steps + 1)])
    claimed = unit * math.sqrt(math.log(1 / delta)) / sigma
    holds = gaussian.delta(claimed, _mu_curve(mechanism, sigma)) <= delta * (1 + _TOLERANCE)
    return np.concatenate([[np.inf], np.where(holds, claimed, np.inf)])


def _unit_noise(mechanism: Any, steps: int) -> float:
    """The formula's sigma at epsilon = 1 and log(1/delta) = 1."""
    c0 = mechanism.init_radius
    c1 = _constant("clip_norm", mechanism.clip_norm)
    gamma = _constant("learning_rate", mechanism.learning_rate)
    lambda_ = _constant("weight_decay", mechanism.weight_decay)
    if lambda_ == 0:
        return 3 * (c0 + c1 * gamma * steps) / math.sqrt(steps)
    decayed = c0 * (1 - gamma * lambda_) ** steps + c1 / lambda_
    return math.sqrt(72 * gamma * lambda_) * decayed


def _constant(name: str, value: Any) -> float:
    values = np.unique(np.asarray(value, float))
    if len(values) > 1:
        raise ValueError(
            f"{name} must be one number for accountant='closed-form', got a schedule from "
            f"{values[0]:g} to {values[-1]:g}; use accountant='interpolation'"
        )
    return float(values[0])


def _mu_curve(mechanism: Any, sigma: float) -> np.ndarray:
    return interpolation.gdp_mu_curve(
        mechanism.initial_distance,
        mechanism.contraction,
        mechanism.shift,
        sigma,
        mechanism.memoryless,
    )


def _confirm(mechanism: Any, sigma: float, epsilon: float, delta: float) -> None:
    mu = _mu_curve(mechanism, sigma)[-1]
    if not gaussian.delta(epsilon, mu) <= delta * (1 + _TOLERANCE):
        held = f"gives {float(gaussian.epsilon(mu, delta)):.6g}" if 0 < delta < 1 else "gives more"
        raise ValueError(
            f"the closed form is unsound here: it claims epsilon={epsilon:.6g} at delta={delta:g} "
            f"with noise_scale={sigma:.6g}, where interpolation {held}; use "
            "accountant='interpolation'"
        )
