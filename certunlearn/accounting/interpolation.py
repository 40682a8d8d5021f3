"""The accountant `"interpolation"`: exact shifted interpolation, for any separations.

It turns a run into one pair of Gaussians, N(0, 1) and N(mu, 1), whose trade-off is exact
(`_gaussian`); `_taut_string` finds the least mu that shifted interpolation proves. So the exact
Gaussian mechanism is this accountant, too: with one noise, or without shifts, mu is the distance
that the noise hides, and no accountant can be below it.

It holds for all separations, whatever their contraction, with noise missing at some steps, and with
memory. Noise on the starts is left out, and a diameter counts for memoryless runs only: both are on
the safe side.
"""

import math

import numpy as np

from certunlearn._numerics.checks import PerStep, ScalarOrSchedule
from certunlearn.accounting import _gaussian, _taut_string, accountant_base
from certunlearn.mechanisms import Mechanism, Separations
from certunlearn.mechanisms.plain_separations import with_noise

# Most steps that `best_steps` looks at.
_MOST_STEPS = 200_000


class Interpolation(accountant_base.Accountant):
    """See the module."""

    name = "interpolation"

    def unsupported_reason(self, mechanism: Mechanism) -> str | None:
        """Mechanisms without separations."""
        if mechanism.separations() is not None:
            return None
        return accountant_base.no_separations_reason(self.name, mechanism)

    def epsilon(self, mechanism: Mechanism, noise_scale: PerStep, delta: float) -> float:
        """See `Accountant.epsilon`."""
        return float(_gaussian.epsilon(_last_mu(mechanism, noise_scale), delta))

    def delta(self, mechanism: Mechanism, noise_scale: PerStep, epsilon: float) -> float:
        """See `Accountant.delta`."""
        return float(_gaussian.delta(epsilon, _last_mu(mechanism, noise_scale)))

    def noise_scale(
        self, mechanism: Mechanism, epsilon: float, delta: float, progress: bool = False
    ) -> float:
        """See `Accountant.noise_scale`: mu is proportional to 1 / sigma.

        Raises:
          ValueError: if no noise is enough, as distances grow beyond float64.
        """
        del progress
        unit = _last_mu(mechanism, 1.0)
        if math.isinf(unit):
            raise ValueError(
                f"no noise_scale is enough for this {type(mechanism).__name__}: no noise follows "
                "its last shift, or distances grow beyond float64"
            )
        # Positive even where nothing is left to hide.
        sigma = max(unit / _gaussian.mu(epsilon, delta), accountant_base.LEAST_NOISE_SCALE)
        while _gaussian.epsilon(unit / sigma, delta) > epsilon:  # the last digits' rounding, if any
            sigma *= 1 + 1e-12
        return float(sigma)

    def epsilon_curve(self, mechanism: Mechanism, noise_scale: PerStep, delta: float) -> np.ndarray:
        """See `Accountant.epsilon_curve`: exact at every step."""
        found = mu_curve(accountant_base.separations(mechanism), noise_scale)
        return np.concatenate([[np.inf], _gaussian.epsilon(found, delta)])


def mu_curve(stated: Separations, noise_scale: PerStep) -> np.ndarray:
    """float64 `[steps]`: mu of shifted interpolation for the run stopped after each step."""
    run = with_noise(stated, noise_scale)
    return _taut_string.gdp_mu_curve(*run, stated.memoryless, stated.diameter)


def mu(mechanism: Mechanism, *, noise_scale: ScalarOrSchedule) -> float | None:
    """The run's Gaussian-DP mu by exact shifted interpolation; None for `DPSGD`, which has none.

    Of an exact mechanism it is 0.

    Arguments as for `epsilon`.
    """
    scale = accountant_base.checked_noise(mechanism, noise_scale)
    if mechanism.separations() is None:
        return 0.0 if mechanism.exact else None
    return _last_mu(mechanism, scale)


def best_steps(mechanism: Mechanism) -> int:
    """The fewest steps at which interpolation asks for the least noise, all else as it is.

    Args:
      mechanism: with constant parameters; its number of steps only widens the search, which goes to
        ten times the larger of it and of initial_distance / shift, or as far as weight decay
        forgets, but not beyond 200,000.

    Raises:
      ValueError: if the mechanism has schedules, or steps without shift, of which each lowers the
        noise, or with a contraction of 0: what came before is forgotten then, so that more steps
        neither help nor hurt by interpolation.

    >>> from certunlearn.mechanisms import GradientClipping
    >>> m = GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=1)
    >>> best_steps(m)  # init_radius / (learning_rate * clip_norm)
    10
    """
    accountant_base.checked_noise(mechanism, 1.0)
    stated = mechanism.separations()
    name = type(mechanism).__name__
    if stated is None or not np.all(stated.shift):
        raise ValueError(
            f"best_steps needs steps that drive runs apart, got {name}: "
            "without them every step more lowers the noise"
        )
    if not np.all(stated.contraction):
        raise ValueError(
            f"best_steps needs a contraction above 0, got 0 in {name}: every step forgets what "
            "came before, so by interpolation more steps neither help nor hurt, while "
            "accountant='product' gains with each"
        )
    contraction, shift = np.unique(stated.contraction), np.unique(stated.shift)
    if len(contraction) > 1 or len(shift) > 1:
        raise ValueError("best_steps needs constant parameters, got a mechanism with schedules")
    c, s = float(contraction[0]), float(shift[0])
    horizon = 10 * max(mechanism.steps, math.ceil(stated.initial_distance / s) + 1)
    if 0 < c < 1:
        horizon = max(horizon, math.ceil(60 / -math.log(c)))
    count = min(horizon, _MOST_STEPS)
    curve = _taut_string.gdp_mu_curve(
        stated.initial_distance, np.full(count, c), s, 1.0, stated.memoryless, stated.diameter
    )
    return int(np.argmax(curve <= curve.min() * (1 + 1e-9))) + 1


def _last_mu(mechanism: Mechanism, noise_scale: PerStep) -> float:
    return float(mu_curve(accountant_base.separations(mechanism), noise_scale)[-1])
