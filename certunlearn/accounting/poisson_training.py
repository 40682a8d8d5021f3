"""The accountant `"dp-accounting"`: differentially private training, with samples that are cut.

A step has room for so many examples, and cuts a sample that is larger (`batches.poisson_sample`).
That adds T o to delta at every epsilon, o = `batches.OVERFLOW_CHANCE`, for any n:

Compare n examples with the n - j that are left without j <= k of them, and call S the sample of
those that both have: a Binomial(n - j, q) number of them, with the same law in both runs, whatever
the past. With room(n) for n examples, and room(n - j) for n - j, neither run cuts while
|S| <= min(room(n) - k, room(n - j)). `batches.poisson_capacity` sees to it that room(m) is m, where
nothing is ever cut, or has P(Binomial(m, q) > room(m) - k) <= o. So |S| is beyond with a chance of
o at most (the larger of two such chances, as both are of the kind "|S| is large").

Given S, a step that does not cut is dominated by the pair of `dp_sgd`, and one that cuts by the
pair of all or nothing. Divergences are jointly convex, so a step is dominated by the pair that is
all or nothing with chance o, and that of `dp_sgd` otherwise; T steps by the T-fold products (Zhu,
Dong & Wang 2022, Theorem 10), which are at most 1 - (1 - o)^T <= T o further apart than without.
"""

import math
from typing import Any

import numpy as np

from certunlearn._numerics import batches, checks
from certunlearn._numerics.batches import PoissonSampling
from certunlearn.accounting._subsampled import profile
from certunlearn.mechanisms import Mechanism

_POINTS = 12  # of a curve that are worked out


def refusal(mechanism: Any) -> str | None:
    """Why this accountant cannot be used, or None."""
    if mechanism.poisson_sampling() is not None:
        return None
    return "accountant='dp-accounting' is for DPSGD; leave accountant=None"


def epsilon(mechanism: Mechanism, scale: checks.PerStep, delta: float) -> float:
    """See `certunlearn.epsilon`; infinity where delta is all for samples that are cut."""
    left = delta - _cut(mechanism)
    return profile.epsilon(*_run(mechanism, scale), left) if left > 0 else math.inf


def delta(mechanism: Mechanism, scale: checks.PerStep, epsilon: float) -> float:
    """See `certunlearn.delta`."""
    return min(1.0, profile.delta(*_run(mechanism, scale), epsilon) + _cut(mechanism))


def noise_scale(mechanism: Mechanism, epsilon: float, delta: float, progress: bool) -> float:
    """See `certunlearn.noise_scale`."""
    del progress
    left = delta - _cut(mechanism)
    if left <= 0:
        raise ValueError(
            f"delta must be above {_cut(mechanism):g} for DPSGD with {mechanism.steps} steps, "
            f"which is what samples that are too large for their room may cost, got {delta!r}"
        )
    multiplier = profile.noise_multiplier(
        _sampling(mechanism).rate, mechanism.steps, _sampling(mechanism).deletions, epsilon, left
    )
    # Rounded up, as the way back to a multiplier rounds.
    return multiplier * _sampling(mechanism).sensitivity * (1 + 1e-12)


def epsilon_curve(mechanism: Mechanism, scale: checks.PerStep, delta: float) -> np.ndarray:
    """See `certunlearn.epsilon_curve`: training only loses with every step.

    Numbers of steps that are not worked out get the epsilon of the next that is.
    """
    curve = np.zeros(mechanism.steps + 1)
    done = 0
    for stop in np.unique(np.geomspace(1, mechanism.steps, _POINTS).round().astype(int)).tolist():
        curve[done + 1 : stop + 1] = epsilon(mechanism.first(stop), scale, delta)
        done = stop
    return np.maximum.accumulate(curve)


def _cut(mechanism: Mechanism) -> float:
    """What samples that are cut add to delta."""
    return 0.0 if _sampling(mechanism).rate == 1 else mechanism.steps * batches.OVERFLOW_CHANCE


def _run(mechanism: Mechanism, scale: checks.PerStep) -> tuple[float, float, int, int]:
    values = np.unique(np.asarray(scale, float))
    if len(values) > 1:
        raise ValueError(
            "noise_scale must be one number for DPSGD, got a schedule from "
            f"{values[0]:g} to {values[-1]:g}"
        )
    multiplier = float(values[0]) / _sampling(mechanism).sensitivity
    return multiplier, _sampling(mechanism).rate, mechanism.steps, _sampling(mechanism).deletions


def _sampling(mechanism: Mechanism) -> PoissonSampling:
    found = mechanism.poisson_sampling()
    assert found is not None
    return found
