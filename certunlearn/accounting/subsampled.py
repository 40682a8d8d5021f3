"""The accountant `"dp-accounting"`: differentially private training, with samples that are cut.

It reads `mechanism.poisson_sampling()`. `_subsampled.profile` certifies steps that use the whole
sample. A step has room for so many examples, and cuts a sample that is larger
(`PoissonSampling.sample`), with a chance of at most o = `batches.OVERFLOW_CHANCE`, whatever the
number of examples. That adds T o to delta at every epsilon, for T steps, and nothing where all
examples are in every step. docs/theory/subsampled.md proves both.
"""

import math

import numpy as np

from certunlearn._numerics import batches
from certunlearn._numerics.batches import PoissonSampling
from certunlearn._numerics.checks import PerStep
from certunlearn.accounting import accountant_base
from certunlearn.accounting._subsampled import profile
from certunlearn.mechanisms import Mechanism

# Most deletions of private training that a certificate may claim: more than any table holds.
MOST_DELETIONS = 10_000
_POINTS = 12  # of a curve that are worked out


class Subsampled(accountant_base.Accountant):
    """See the module."""

    name = "dp-accounting"

    def unsupported_reason(self, mechanism: Mechanism) -> str | None:
        """Mechanisms that draw no Poisson samples."""
        if mechanism.poisson_sampling() is not None:
            return None
        if mechanism.exact:
            return accountant_base.no_separations_reason(self.name, mechanism)
        return "accountant='dp-accounting' is for DPSGD; leave accountant=None"

    def epsilon(self, mechanism: Mechanism, noise_scale: PerStep, delta: float) -> float:
        """See `Accountant.epsilon`; infinity where delta is all for samples that are cut."""
        left = delta - _cut(mechanism)
        return profile.epsilon(*_run(mechanism, noise_scale), left) if left > 0 else math.inf

    def delta(self, mechanism: Mechanism, noise_scale: PerStep, epsilon: float) -> float:
        """See `Accountant.delta`."""
        found = profile.delta(*_run(mechanism, noise_scale), epsilon)
        return min(1.0, found + _cut(mechanism))

    def noise_scale(
        self, mechanism: Mechanism, epsilon: float, delta: float, progress: bool = False
    ) -> float:
        """See `Accountant.noise_scale`.

        Raises:
          ValueError: if delta is all for samples that are cut.
        """
        del progress
        left = delta - _cut(mechanism)
        if left <= 0:
            raise ValueError(
                f"delta must be above {_cut(mechanism):g} for DPSGD with {mechanism.steps} steps, "
                "which is what cutting samples that do not fit may cost, "
                f"got {delta!r}"
            )
        sampling = _sampling(mechanism)
        multiplier = profile.noise_multiplier(
            sampling.rate, mechanism.steps, sampling.deletions, epsilon, left
        )
        # Rounded up, as the way back to a multiplier rounds.
        return multiplier * sampling.sensitivity * (1 + 1e-12)

    def epsilon_curve(self, mechanism: Mechanism, noise_scale: PerStep, delta: float) -> np.ndarray:
        """See `Accountant.epsilon_curve`: 0 at no step, as training only loses with every step.

        The bound is on the parameters of all steps together, so numbers of steps that are not
        worked out get the epsilon of the next that is.
        """
        curve = np.zeros(mechanism.steps + 1)
        done = 0
        stops = np.unique(np.geomspace(1, mechanism.steps, _POINTS).round().astype(int))
        for stop in stops.tolist():
            curve[done + 1 : stop + 1] = self.epsilon(mechanism.first(stop), noise_scale, delta)
            done = stop
        return np.maximum.accumulate(curve)

    def unaffordable_reason(self, mechanism: Mechanism, noise_scale: PerStep) -> str | None:
        """More deletions than any table of them could hold."""
        del noise_scale
        sampling = mechanism.poisson_sampling()
        if sampling is None or sampling.deletions <= MOST_DELETIONS:
            return None
        return f"deletions must be at most {MOST_DELETIONS}, got {sampling.deletions}"


def _cut(mechanism: Mechanism) -> float:
    """What samples that are cut add to delta."""
    return 0.0 if _sampling(mechanism).rate == 1 else mechanism.steps * batches.OVERFLOW_CHANCE


def _run(mechanism: Mechanism, scale: PerStep) -> tuple[float, float, int, int]:
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
