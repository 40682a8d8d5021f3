"""The accountant `"dp-accounting"`: group privacy of differentially private training.

A sample that is too large for its room is cut, with a chance of `batches.OVERFLOW` = o in each of T
steps, with the forget set as without. Either run's law is then T o away, in total variation, from
that of a training without the cut, which adds (1 + e^epsilon) T o to delta.
"""

import math
from typing import Any

import numpy as np

from certunlearn import batches, checks
from certunlearn.accounting import dp_sgd
from certunlearn.mechanisms import DPSGD

_ROOM = 1e-6  # share of delta that is kept for it
_POINTS = 12  # of a curve that are worked out


def refusal(mechanism: Any) -> str | None:
    """Why this accountant cannot be used, or None."""
    if isinstance(mechanism, DPSGD):
        return None
    return "accountant='dp-accounting' is for DPSGD; leave accountant=None"


def epsilon(mechanism: DPSGD, scale: checks.PerStep, delta: float) -> float:
    """See `certunlearn.epsilon`."""
    found = dp_sgd.epsilon(*_run(mechanism, scale), delta * (1 - _ROOM))
    return found if _cut(mechanism, found) <= _ROOM * delta else math.inf


def delta(mechanism: DPSGD, scale: checks.PerStep, epsilon: float) -> float:
    """See `certunlearn.delta`."""
    return min(1.0, dp_sgd.delta(*_run(mechanism, scale), epsilon) + _cut(mechanism, epsilon))


def noise_scale(mechanism: DPSGD, epsilon: float, delta: float, progress: bool) -> float:
    """See `certunlearn.noise_scale`."""
    del progress
    multiplier = dp_sgd.noise_multiplier(
        mechanism.sampling_rate,
        mechanism.steps,
        mechanism.deletions,
        epsilon,
        delta * (1 - _ROOM),
    )
    if _cut(mechanism, epsilon) > _ROOM * delta:
        raise ValueError(f"epsilon={epsilon!r} is too large for DPSGD at delta={delta!r}")
    # A hair of room for the way back to a multiplier.
    return mechanism.noise_scale(multiplier) * (1 + 1e-12)


def epsilon_curve(mechanism: DPSGD, scale: checks.PerStep, delta: float) -> np.ndarray:
    """See `certunlearn.epsilon_curve`: training only loses with every step.

    Numbers of steps that are not worked out get the epsilon of the next that is.
    """
    curve = np.zeros(mechanism.steps + 1)
    done = 0
    for stop in np.unique(np.geomspace(1, mechanism.steps, _POINTS).round().astype(int)).tolist():
        curve[done + 1 : stop + 1] = epsilon(mechanism.first(stop), scale, delta)
        done = stop
    return np.maximum.accumulate(curve)


def _cut(mechanism: DPSGD, epsilon: float) -> float:
    """What cut samples add to delta."""
    if mechanism.sampling_rate == 1:
        return 0.0
    return (1 + math.exp(min(epsilon, 700.0))) * mechanism.steps * batches.OVERFLOW


def _run(mechanism: DPSGD, scale: checks.PerStep) -> tuple[float, float, int, int]:
    values = np.unique(np.asarray(scale, float))
    if len(values) > 1:
        raise ValueError(
            "noise_scale must be one number for DPSGD, got a schedule from "
            f"{values[0]:g} to {values[-1]:g}"
        )
    multiplier = mechanism.noise_multiplier(float(values[0]))
    return multiplier, mechanism.sampling_rate, mechanism.steps, mechanism.deletions
