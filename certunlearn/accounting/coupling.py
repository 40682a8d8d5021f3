"""The accountant `"coupling"`: reflection coupling, for memoryless updates.

Far tighter than interpolation, which charges every step as if the runs could always be told apart.
`_reflection.solution` says what the recursion relies on, and docs/theory/coupling.md proves it. It
is capped by interpolation.

It holds for any contraction, 0 and above 1 too, as the proof only asks that points at distance r be
at most c r + s apart after the update. Growth beyond float64 is refused. The recursion leaves noise
on the starts and a diameter out: a projection after the noise moves no two points apart. Where the
separations are bounded, as by a diameter, the product of contraction coefficients is proved for the
same runs, and every number is the less of the two.
"""

import numpy as np

from certunlearn._numerics import checks
from certunlearn._numerics.checks import PerStep, ScalarOrSchedule
from certunlearn.accounting import accountant_base, interpolation
from certunlearn.accounting._reflection import solution
from certunlearn.accounting.product import Product
from certunlearn.mechanisms import Mechanism
from certunlearn.mechanisms.plain_separations import with_noise

# Most mu, by interpolation, at which coupling is tried unasked, or certified. Beyond it epsilon is
# in the hundreds: worth nothing to anyone, and e^epsilon nears the end of float64.
COUPLED_MU = 20.0
# Most growth of a distance in all, so that blocks of steps stay within float64.
_MOST_GROWTH = 1e100


class Coupling(accountant_base.Accountant):
    """See the module."""

    name = "coupling"

    def unsupported_reason(self, mechanism: Mechanism) -> str | None:
        """Mechanisms without separations, with memory, or whose distances grow beyond float64."""
        stated = mechanism.separations()
        if stated is None:
            return accountant_base.no_separations_reason(self.name, mechanism)
        if not stated.memoryless:
            return (
                "accountant='coupling' needs a memoryless mechanism: with optimizer state, runs "
                "whose parameters meet need not stay together; use accountant='interpolation'"
            )
        steps = stated.steps if np.ndim(stated.contraction) == 0 else 1
        growth = steps * np.sum(np.log(np.maximum(stated.contraction, 1.0)))
        if growth > np.log(_MOST_GROWTH):
            return (
                "accountant='coupling' needs steps that together let a distance grow by a factor "
                f"of at most {_MOST_GROWTH:g}; use accountant='interpolation'"
            )
        return None

    def epsilon(self, mechanism: Mechanism, noise_scale: PerStep, delta: float) -> float:
        """See `Accountant.epsilon`."""
        found = solution.epsilon(steps_of(mechanism, noise_scale), delta)
        return min(
            [found, *(p.epsilon(mechanism, noise_scale, delta) for p in _bounded(mechanism))]
        )

    def delta(self, mechanism: Mechanism, noise_scale: PerStep, epsilon: float) -> float:
        """See `Accountant.delta`."""
        found = solution.delta(steps_of(mechanism, noise_scale), epsilon)
        return min(
            [found, *(p.delta(mechanism, noise_scale, epsilon) for p in _bounded(mechanism))]
        )

    def noise_scale(
        self, mechanism: Mechanism, epsilon: float, delta: float, progress: bool = False
    ) -> float:
        """See `Accountant.noise_scale`."""
        found = solution.noise_scale(steps_of(mechanism, 1.0), epsilon, delta, progress)
        return min(
            [found, *(p.noise_scale(mechanism, epsilon, delta) for p in _bounded(mechanism))]
        )

    def epsilon_curve(self, mechanism: Mechanism, noise_scale: PerStep, delta: float) -> np.ndarray:
        """See `Accountant.epsilon_curve`."""
        found = solution.epsilon_curve(steps_of(mechanism, noise_scale), delta)
        for product in _bounded(mechanism):
            found = np.minimum(found, product.epsilon_curve(mechanism, noise_scale, delta))
        return found

    def total_variation(self, mechanism: Mechanism, noise_scale: PerStep, delta: float) -> float:
        """See `Accountant.total_variation`; by the tables that are made for `delta`."""
        found = solution.delta(steps_of(mechanism, noise_scale), 0.0, delta)
        return min([found, *(p.delta(mechanism, noise_scale, 0.0) for p in _bounded(mechanism))])

    def unaffordable_reason(self, mechanism: Mechanism, noise_scale: PerStep) -> str | None:
        """Runs whose epsilon is in the hundreds anyway."""
        stated = mechanism.separations()
        mu = None if stated is None else float(interpolation.mu_curve(stated, noise_scale)[-1])
        if mu is not None and mu <= COUPLED_MU:
            return None
        return (
            "accountant must be another than coupling where interpolation gives mu above "
            f"{COUPLED_MU:g}, got mu = {mu!r}"
        )


def _bounded(mechanism: Mechanism) -> tuple[Product, ...]:
    """The product, if it is for such a mechanism."""
    product = Product()
    return () if product.unsupported_reason(mechanism) is not None else (product,)


def steps_of(mechanism: Mechanism, noise_scale: PerStep) -> solution.Steps:
    """The run. A projection after the noise, which moves nothing apart, is left out."""
    return solution.Steps(*with_noise(accountant_base.separations(mechanism), noise_scale))


def epsilon_bracket(
    mechanism: Mechanism, *, noise_scale: ScalarOrSchedule, delta: float, tolerance: float = 0.02
) -> tuple[float, float]:
    """Coupling's epsilon with every rounding of its tables to one side, and to the other.

    What finer tables could still gain: the discretisation error of the recursion. Not to be
    confused with `epsilon_lower_bound`, below which no accountant can go.

    Arguments, errors and guarantee (of the second number) as for `epsilon` with
    `accountant="coupling"`, and

    Args:
      tolerance: how far apart the two may be, as a share of the second. Tables are refined until
        they are as near, three times at most: each takes about five times as long as the one
        before.

    Returns:
      (optimistic, pessimistic): the second is certified, and at most what `epsilon` gives. The
      first is no certificate of anything: see docs/theory/coupling.md.

    >>> from certunlearn.mechanisms import GradientClipping
    >>> m = GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.25, steps=2)
    >>> low, high = epsilon_bracket(m, noise_scale=5.0, delta=1e-5)
    >>> 0.98 * high <= low <= high
    True
    """
    delta, tolerance = checks.open_unit("delta", delta), checks.positive("tolerance", tolerance)
    scale = accountant_base.checked_noise(mechanism, noise_scale)
    reason = Coupling().unsupported_reason(mechanism)
    if reason is not None:
        raise ValueError(reason)
    low, high = solution.bracket(steps_of(mechanism, scale), delta, tolerance)
    most = min([high, *(p.epsilon(mechanism, scale, delta) for p in _bounded(mechanism))])
    return min(low, most), most
