"""The accountant `"coupling"`: reflection coupling, for memoryless updates."""

from typing import Any

import numpy as np

from certunlearn._numerics import checks
from certunlearn.accounting import _runs
from certunlearn.accounting._reflection import solution
from certunlearn.mechanisms.separations import with_noise


def refusal(mechanism: Any) -> str | None:
    """Why this accountant cannot be used, or None."""
    if mechanism.separations() is None:
        return "accountant='coupling' needs a mechanism with separations; use 'dp-accounting'"
    if not _runs.separations(mechanism).memoryless:
        return (
            "accountant='coupling' needs a memoryless mechanism: with optimizer state, runs whose "
            "parameters meet need not stay together; use accountant='interpolation'"
        )
    return None


def steps(mechanism: Any, scale: checks.PerStep) -> solution.Steps:
    """The run. A projection after the noise, which moves nothing apart, is left out."""
    return solution.Steps(*with_noise(_runs.separations(mechanism), scale))


def epsilon(mechanism: Any, scale: checks.PerStep, delta: float) -> float:
    """See `certunlearn.epsilon`."""
    return solution.epsilon(steps(mechanism, scale), delta)


def delta(
    mechanism: Any, scale: checks.PerStep, epsilon: float, delta_scale: float = 1e-5
) -> float:
    """See `certunlearn.delta`, and `solution.delta` for `delta_scale`."""
    return solution.delta(steps(mechanism, scale), epsilon, delta_scale)


def noise_scale(mechanism: Any, epsilon: float, delta: float, progress: bool) -> float:
    """See `certunlearn.noise_scale`."""
    return solution.noise_scale(steps(mechanism, 1.0), epsilon, delta, progress)


def epsilon_curve(mechanism: Any, scale: checks.PerStep, delta: float) -> np.ndarray:
    """See `certunlearn.epsilon_curve`."""
    return solution.epsilon_curve(steps(mechanism, scale), delta)
