"""The accountant `"coupling"`: reflection coupling, for memoryless updates."""

from typing import Any

import numpy as np

from certunlearn import checks
from certunlearn.accounting import coupling, runs


def refusal(mechanism: Any) -> str | None:
    """Why this accountant cannot be used, or None."""
    if not runs.has_separations(mechanism):
        return "accountant='coupling' needs a mechanism with separations; use 'dp-accounting'"
    if not mechanism.memoryless:
        return (
            "accountant='coupling' needs a memoryless mechanism: with optimizer state, runs whose "
            "parameters meet need not stay together; use accountant='interpolation'"
        )
    return None


def steps(mechanism: Any, scale: checks.PerStep) -> coupling.Steps:
    """The run. A projection after the noise, which moves nothing apart, is left out."""
    return coupling.Steps(
        mechanism.start_distance,
        mechanism.contraction,
        mechanism.shift,
        runs.noise(mechanism, scale),
    )


def epsilon(mechanism: Any, scale: checks.PerStep, delta: float) -> float:
    """See `certunlearn.epsilon`."""
    return coupling.epsilon(steps(mechanism, scale), delta)


def delta(
    mechanism: Any, scale: checks.PerStep, epsilon: float, delta_scale: float = 1e-5
) -> float:
    """See `certunlearn.delta`, and `coupling.delta` for `delta_scale`."""
    return coupling.delta(steps(mechanism, scale), epsilon, delta_scale)


def noise_scale(mechanism: Any, epsilon: float, delta: float, progress: bool) -> float:
    """See `certunlearn.noise_scale`."""
    return coupling.noise_scale(steps(mechanism, 1.0), epsilon, delta, progress)


def epsilon_curve(mechanism: Any, scale: checks.PerStep, delta: float) -> np.ndarray:
    """See `certunlearn.epsilon_curve`."""
    return coupling.epsilon_curve(steps(mechanism, scale), delta)
