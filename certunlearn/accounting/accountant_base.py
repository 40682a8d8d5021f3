"""`Accountant`, the base of everything that turns a mechanism and its noise into (epsilon, delta).

An accountant reads what a mechanism says of itself, `separations()` or `poisson_sampling()`, and
never its type. It keeps nothing between calls.
"""

import abc
import math

import numpy as np

from certunlearn import mechanisms
from certunlearn._numerics import checks
from certunlearn._numerics.checks import PerStep, ScalarOrSchedule
from certunlearn.mechanisms import Mechanism, Separations

# A noise scale (parameter units) for runs that need none: what is asked for must be positive.
LEAST_NOISE_SCALE = 1e-30

# Where the search for a noise scale ends: no noise so large is of use to anyone.
_LARGEST_NOISE_SCALE = 1e100
_FIRST_FACTOR = 2.0
_CLOSE = 1 + 1e-9  # ratio of the noise scale found and one that is too small
# Steps of a curve that are worked out: all of so many, else so many.
_ALL_STEPS, _POINTS = 64, 24


class Accountant(abc.ABC):
    """Turns what the steps of a mechanism may do, and their noise, into (epsilon, delta).

    Subclass it for an accountant of your own: `name`, `unsupported_reason`, `epsilon` and `delta`
    are all it needs. Then pass an object of the class as `accountant=` to `certunlearn.epsilon`,
    `delta`, `noise_scale`, `epsilon_curve` and `accounting.total_variation`. That is all: nothing
    is registered, and nobody else uses it. `certunlearn.verify` trusts the accountants of this
    package only, so nothing that another derives can be certified.

    Mechanisms that reach a method have been checked, and are such as `unsupported_reason` allows.
    `noise_scale` is the standard deviation of the noise in each coordinate of a step, in parameter
    units: one number, or a tuple with one for each step (`mechanisms.plain_separations.with_noise`
    makes arrays of it). `delta` is strictly between 0 and 1.

    Guarantee:
      What a subclass must see to. Whenever a mechanism's assumptions hold, its last parameters and
      those of its reference process are (epsilon(..., delta), delta)-indistinguishable, in both
      directions, and likewise (epsilon, delta(..., epsilon)). Numbers are rounded up. What its
      proof does not cover it must refuse, by `unsupported_reason`. Separations may have a
      contraction of 0 or above 1, steps without noise (`noisy`), no shift, an initial distance of
      0, noise on the starts (`init_noise_scale`, which may be ignored), a `diameter` (likewise),
      and `memoryless=False`: then runs whose parameters meet need not stay together, and what
      follows a step is no post-processing of its parameters.

    >>> import certunlearn as cu
    >>> class LastNoise(Accountant):  # the last noise alone, and all that it must hide
    ...     name = "last-noise"
    ...
    ...     def unsupported_reason(self, mechanism):
    ...         stated = mechanism.separations()
    ...         if stated is not None and stated.memoryless and stated.noisy is None:
    ...             return None
    ...         return "accountant='last-noise' needs memoryless steps with noise at each"
    ...
    ...     def epsilon(self, mechanism, noise_scale, delta):
    ...         one, sigma = self._one_gaussian(mechanism.separations(), noise_scale)
    ...         return cu.epsilon(one, noise_scale=sigma, delta=delta)
    ...
    ...     def delta(self, mechanism, noise_scale, epsilon):
    ...         one, sigma = self._one_gaussian(mechanism.separations(), noise_scale)
    ...         return cu.delta(one, noise_scale=sigma, epsilon=epsilon)
    ...
    ...     def _one_gaussian(self, stated, noise_scale):
    ...         distance = stated.initial_distance  # until then both runs get the same noise
    ...         for step in range(stated.steps):
    ...             distance = stated.separation(step, distance)
    ...         sigma = noise_scale[-1] if isinstance(noise_scale, tuple) else noise_scale
    ...         return cu.Separations(initial_distance=distance, contraction=[1], shift=[0]), sigma
    >>> m = cu.Separations(initial_distance=2.0, contraction=[0.5, 0.5], shift=[0.1, 0.1])
    >>> round(cu.noise_scale(m, epsilon=1.0, delta=1e-5, accountant=LastNoise()), 3)
    2.425
    """

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """What it is called in errors and results; a class attribute will do."""

    @abc.abstractmethod
    def unsupported_reason(self, mechanism: Mechanism) -> str | None:
        """Why the accountant does not apply to such a mechanism, or None where it does."""

    @abc.abstractmethod
    def epsilon(self, mechanism: Mechanism, noise_scale: PerStep, delta: float) -> float:
        """An epsilon >= 0 that holds at `delta`; infinity where none does."""

    @abc.abstractmethod
    def delta(self, mechanism: Mechanism, noise_scale: PerStep, epsilon: float) -> float:
        """A delta from 0 to 1 that holds at `epsilon`, which is finite and at least 0."""

    def noise_scale(
        self, mechanism: Mechanism, epsilon: float, delta: float, progress: bool = False
    ) -> float:
        """A noise scale, the same at every step, for which `self.epsilon` is at most `epsilon`.

        By default a search: doublings, then bisection to a share of 1e-9. `self.epsilon` has
        confirmed the number that is returned, whether it falls with the noise or not.

        Args:
          mechanism: what the steps do.
          epsilon: positive and finite.
          delta: strictly between 0 and 1.
          progress: whether to show a bar while a long search runs.

        Raises:
          ValueError: if no noise scale up to 1e100 will do.
        """
        del progress

        def holds(scale: float) -> bool:
            return self.epsilon(mechanism, scale, delta) <= epsilon

        low = high = 1.0
        factor = _FIRST_FACTOR
        if holds(high):
            while holds(low):
                if low < LEAST_NOISE_SCALE:
                    return low
                low, high, factor = low / factor, low, factor * factor
        else:
            while not holds(high):
                if high > _LARGEST_NOISE_SCALE:
                    raise ValueError(
                        f"accountant {self.name!r} finds no noise_scale up to "
                        f"{_LARGEST_NOISE_SCALE:g} for epsilon={epsilon!r}, delta={delta!r}"
                    )
                low, high, factor = high, high * factor, factor * factor
        while high > low * _CLOSE:
            middle = math.sqrt(low) * math.sqrt(high)
            low, high = (low, middle) if holds(middle) else (middle, high)
        return high

    def epsilon_curve(self, mechanism: Mechanism, noise_scale: PerStep, delta: float) -> np.ndarray:
        """float64 `[steps + 1]`: epsilon of the run stopped after 0, 1, ..., steps noisy steps.

        By default `self.epsilon` of `mechanism.first(t)`, at every t of up to 64 steps and at 24 of
        longer runs. Without memory, later steps are post-processing of the parameters after an
        earlier one: so numbers of steps that are not worked out get the least epsilon before them,
        and none gets more than one before. With memory, or where steps draw from data that differ,
        more steps may cost more and hide less: there infinity is left, which is always true.
        """
        steps = mechanism.steps
        stops = np.arange(1, steps + 1)
        if steps > _ALL_STEPS:
            stops = np.unique(np.geomspace(1, steps, _POINTS).round().astype(int))
        curve = np.full(steps + 1, np.inf)
        for stop in stops.tolist():
            if not mechanism.can_stop(stop):
                continue
            run = mechanism.first(stop)
            if self.unsupported_reason(run) is None:
                curve[stop] = self.epsilon(run, first_steps(noise_scale, stop), delta)
        stated = mechanism.separations()
        if stated is not None and stated.memoryless:
            return np.minimum.accumulate(curve)
        return curve

    def total_variation(self, mechanism: Mechanism, noise_scale: PerStep, delta: float) -> float:
        """The most by which any event can be more likely than under the reference.

        By default delta at epsilon 0. `delta` is that of the claim, which may save work.
        """
        del delta
        return self.delta(mechanism, noise_scale, 0.0)

    def unaffordable_reason(self, mechanism: Mechanism, noise_scale: PerStep) -> str | None:
        """Why certificates of such a run would take whoever verifies too long; None by default."""
        del mechanism, noise_scale
        return None


def separations(mechanism: Mechanism) -> Separations:
    """The mechanism's separations; ValueError if it has none."""
    found = mechanism.separations()
    if found is None:
        raise ValueError(f"{type(mechanism).__name__} has no separations; use 'dp-accounting'")
    return found


def first_steps(noise_scale: PerStep, steps: int) -> PerStep:
    """The noise scale of the first `steps` steps."""
    return noise_scale[:steps] if isinstance(noise_scale, tuple) else noise_scale


def no_separations_reason(name: str, mechanism: Mechanism) -> str:
    """Why accountant `name` does not apply to a mechanism without separations."""
    if mechanism.exact:
        return (
            f"accountant={name!r} needs noise, and {type(mechanism).__name__} is exact without "
            "any; use 'exact'"
        )
    return f"accountant={name!r} needs a mechanism with separations; use 'dp-accounting'"


def checked_noise(mechanism: Mechanism, noise_scale: ScalarOrSchedule | None) -> PerStep:
    """The noise scale as one number or `[steps]` numbers, once the mechanism has been checked.

    Of an exact mechanism it is 0.0, whatever is given: more noise leaves it exact.

    Raises:
      TypeError: if `mechanism` is none, or `noise_scale` is missing or not numbers.
      ValueError: if noise is not positive and finite, or has another length; for an exact
        mechanism, if it is negative.
    """
    mechanisms.check(mechanism)
    if not mechanism.exact:
        return mechanisms.checked_noise(mechanism, noise_scale)
    if noise_scale is not None and not checks.real("noise_scale", noise_scale) >= 0:
        raise ValueError(f"noise_scale must be at least 0, got {noise_scale!r:.80}")
    return 0.0


def checked_delta(mechanism: Mechanism, delta: float | None) -> float:
    """Delta strictly between 0 and 1; for an exact mechanism 0 and None, which is 0, as well.

    Raises:
      TypeError: if it is missing, or no number.
      ValueError: if it is out of range.
    """
    if mechanism.exact and (delta is None or checks.real("delta", delta) == 0):
        return 0.0
    if delta is None:
        raise TypeError(f"delta must be one real number for {type(mechanism).__name__}, got None")
    return checks.open_unit("delta", delta)
