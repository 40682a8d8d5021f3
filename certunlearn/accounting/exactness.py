"""The accountant `"exact"`: nothing to hide, for mechanisms whose release is as if never trained.

A mechanism is exact if its release is a function of the retain data, of public things and of
randomness that is independent of the forget set. The release and its reference are then one and the
same distribution: epsilon = delta = 0, and no event is more likely by anything. There is nothing to
compute, and nothing that noise would add. That a mechanism is exact is its own word: certificates
take it of this package's mechanisms only.
"""

import numpy as np

from certunlearn._numerics.checks import PerStep
from certunlearn.accounting import accountant_base
from certunlearn.mechanisms import Mechanism


class Exact(accountant_base.Accountant):
    """See the module."""

    name = "exact"

    def unsupported_reason(self, mechanism: Mechanism) -> str | None:
        """Mechanisms that keep something of what is deleted, and hide it with noise."""
        if mechanism.exact:
            return None
        return (
            f"accountant='exact' is for mechanisms that need no noise, such as Retraining, and not "
            f"for {type(mechanism).__name__}; leave accountant=None"
        )

    def epsilon(self, mechanism: Mechanism, noise_scale: PerStep, delta: float) -> float:
        """See `Accountant.epsilon`: 0."""
        del mechanism, noise_scale, delta
        return 0.0

    def delta(self, mechanism: Mechanism, noise_scale: PerStep, epsilon: float) -> float:
        """See `Accountant.delta`: 0."""
        del mechanism, noise_scale, epsilon
        return 0.0

    def noise_scale(
        self, mechanism: Mechanism, epsilon: float, delta: float, progress: bool = False
    ) -> float:
        """See `Accountant.noise_scale`: 0."""
        del mechanism, epsilon, delta, progress
        return 0.0

    def epsilon_curve(self, mechanism: Mechanism, noise_scale: PerStep, delta: float) -> np.ndarray:
        """See `Accountant.epsilon_curve`: 0 after the 0 noisy steps that there are."""
        del noise_scale, delta
        return np.zeros(mechanism.steps + 1)
