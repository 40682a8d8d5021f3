"""A mechanism and its noise as the arrays that accountants read."""

import math
from typing import Any

import numpy as np

from certunlearn import checks
from certunlearn.accounting import interpolation


def noise(mechanism: Any, scale: checks.PerStep) -> np.ndarray:
    """float64 `[steps]`: standard deviation of each step's noise, 0 where there is none."""
    return np.where(mechanism.noisy, np.asarray(scale, np.float64), 0.0)


def mu_curve(mechanism: Any, scale: checks.PerStep) -> np.ndarray:
    """float64 `[steps]`: mu of shifted interpolation for the run stopped after each step."""
    return interpolation.gdp_mu_curve(
        mechanism.start_distance,
        mechanism.contraction,
        mechanism.shift,
        noise(mechanism, scale),
        mechanism.memoryless,
        mechanism.diameter,
    )


def largest_separations(mechanism: Any) -> np.ndarray:
    """float64 `[steps]`: the most that two points can be apart after each update, maybe infinity.

    Whatever came before: after a noise anything within the diameter is possible, and without one
    what the update before led to.
    """
    found, distance = [], mechanism.start_distance
    if mechanism.init_noise_scale > 0:
        distance = math.inf
    parts = (mechanism.contraction, mechanism.shift, mechanism.noisy)
    for c, s, noisy in zip(*(part.tolist() for part in parts), strict=True):
        found.append(s if c == 0 else c * distance + s)
        # Starts need not be within the diameter: what a step ends at is.
        distance = min(mechanism.diameter, math.inf if noisy else found[-1])
    return np.array(found)


def has_separations(mechanism: Any) -> bool:
    """Whether a mechanism is a pair of runs with separations: DP-SGD, for one, is not."""
    return hasattr(mechanism, "contraction")
