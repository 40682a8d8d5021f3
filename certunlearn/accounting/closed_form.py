"""The accountant `"closed-form"`: the published formulas, as a baseline.

They are checked by interpolation, and refused where they do not hold.

Koloskova et al. (ICML 2025), Theorems 1 and 2, constants as published:

    weight_decay = 0:  sigma^2 = 9 log(1/delta) (C0 + C1 gamma T)^2 / (eps^2 T)
    weight_decay > 0:  sigma^2 = 72 gamma lambda log(1/delta)
                                 (C0 (1 - gamma lambda)^T + C1 / lambda)^2 / eps^2

They are not sound everywhere: the first fails for large epsilon (above 10.9 at delta = 1e-5), the
second for few steps too. So nothing leaves this module that exact shifted interpolation does not
confirm for the very same noise. Where they hold they ask for 1.4 to 5 times the noise that is
needed. They take no account of the reference: for `reference="center"` they are merely looser.

For `OutputPerturbation` the published formula is the classical Gaussian mechanism (Dwork & Roth
2014, Theorem A.1), sigma = D sqrt(2 log(1.25/delta)) / eps, which fails for eps above about 1.
"""

import numpy as np

from certunlearn._numerics.checks import PerStep
from certunlearn.accounting import _gaussian, accountant_base, interpolation
from certunlearn.mechanisms import Mechanism, PublishedNoise
from certunlearn.mechanisms.published import constant

# Confirmed up to the rounding of two independent evaluations.
_TOLERANCE = 1e-9


class ClosedForm(accountant_base.Accountant):
    """See the module."""

    name = "closed-form"

    def unsupported_reason(self, mechanism: Mechanism) -> str | None:
        """Mechanisms for which no formula was published."""
        if mechanism.published_noise() is not None:
            return None
        if mechanism.exact:
            return accountant_base.no_separations_reason(self.name, mechanism)
        return (
            f"accountant='closed-form' knows no published formula for {type(mechanism).__name__}; "
            "leave accountant=None"
        )

    def noise_scale(
        self, mechanism: Mechanism, epsilon: float, delta: float, progress: bool = False
    ) -> float:
        """The published standard deviation (parameter units), if it holds at (epsilon, delta).

        Raises:
          ValueError: if interpolation does not confirm it, or the mechanism has schedules.
        """
        del progress
        formula = _formula(mechanism)
        sigma = formula.unit(mechanism.steps) * formula.spread(delta) / epsilon
        _confirm(mechanism, sigma, epsilon, delta)
        return sigma

    def epsilon(self, mechanism: Mechanism, noise_scale: PerStep, delta: float) -> float:
        """The epsilon at which the formula asks for this noise, if it holds there.

        Raises:
          ValueError: if interpolation does not confirm it, or there are schedules.
        """
        sigma, formula = constant("noise_scale", noise_scale), _formula(mechanism)
        claimed = formula.unit(mechanism.steps) * formula.spread(delta) / sigma
        _confirm(mechanism, sigma, claimed, delta)
        return claimed

    def delta(self, mechanism: Mechanism, noise_scale: PerStep, epsilon: float) -> float:
        """The delta at which the formula asks for this noise, if it holds there.

        Raises:
          ValueError: if interpolation does not confirm it, or there are schedules.
        """
        sigma, formula = constant("noise_scale", noise_scale), _formula(mechanism)
        claimed = formula.delta(epsilon * sigma / formula.unit(mechanism.steps))
        _confirm(mechanism, sigma, epsilon, claimed)
        return claimed

    def epsilon_curve(self, mechanism: Mechanism, noise_scale: PerStep, delta: float) -> np.ndarray:
        """See `Accountant.epsilon_curve`; infinity where the formula does not hold."""
        sigma, formula = constant("noise_scale", noise_scale), _formula(mechanism)
        unit = np.array([formula.unit(t) for t in range(1, mechanism.steps + 1)])
        claimed = unit * formula.spread(delta) / sigma
        mu = interpolation.mu_curve(accountant_base.separations(mechanism), sigma)
        holds = _gaussian.delta(claimed, mu) <= delta * (1 + _TOLERANCE)
        return np.concatenate([[np.inf], np.where(holds, claimed, np.inf)])

    def total_variation(self, mechanism: Mechanism, noise_scale: PerStep, delta: float) -> float:
        """Interpolation's, which has confirmed the formulas: they say nothing of it themselves."""
        return interpolation.Interpolation().total_variation(mechanism, noise_scale, delta)


def _formula(mechanism: Mechanism) -> PublishedNoise:
    found = mechanism.published_noise()
    assert found is not None
    return found


def _confirm(mechanism: Mechanism, sigma: float, epsilon: float, delta: float) -> None:
    mu = interpolation.mu_curve(accountant_base.separations(mechanism), sigma)[-1]
    if not _gaussian.delta(epsilon, mu) <= delta * (1 + _TOLERANCE):
        held = f"gives {float(_gaussian.epsilon(mu, delta)):.6g}" if 0 < delta < 1 else "gives more"
        raise ValueError(
            f"the closed form is unsound here: it claims epsilon={epsilon:.6g} at delta={delta:g} "
            f"with noise_scale={sigma:.6g}, where interpolation {held}; use "
            "accountant='interpolation'"
        )
