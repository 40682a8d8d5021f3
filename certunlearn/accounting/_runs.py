"""A mechanism and its noise as the arrays that accountants read."""

import math

import numpy as np

from certunlearn._numerics.checks import PerStep
from certunlearn.accounting import _taut_string
from certunlearn.mechanisms import Mechanism, Separations
from certunlearn.mechanisms.separations import with_noise


def separations(mechanism: Mechanism) -> Separations:
    """The mechanism's separations; ValueError if it has none."""
    found = mechanism.separations()
    if found is None:
        raise ValueError(f"{type(mechanism).__name__} has no separations; use 'dp-accounting'")
    return found


def mu_curve(stated: Separations, scale: PerStep) -> np.ndarray:
    """float64 `[steps]`: mu of shifted interpolation for the run stopped after each step."""
    run = with_noise(stated, scale)
    return _taut_string.gdp_mu_curve(*run, stated.memoryless, stated.diameter)


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
