"""From a mechanism and its noise to (epsilon, delta), and back. Pure float64 functions.

Every `noise_scale` here is a standard deviation, of the noise in each coordinate of a step, in
parameter units.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from certunlearn import checks
from certunlearn.accounting import attack, closed_form, coupling, gaussian, interpolation

ACCOUNTANTS = ("interpolation", "closed-form", "coupling")

# Most steps for which plans and certificates work out `epsilon_lower_bound`: a few seconds.
MOST_ATTACKED = 2000

_MAX_HORIZON = 200_000
# Most mu, by interpolation, at which coupling is tried unasked. Beyond it epsilon is in the
# hundreds: worth nothing to anyone, and e^epsilon nears the end of float64.
_COUPLED_MU = 20.0
# Coupling is never worse than interpolation, but may reach the same number by other sums.
_TIE = 1e-9


class Mechanism(Protocol):
    """What an accountant sees of a mechanism: separations, and how far apart two starts can be."""

    @property
    def initial_distance(self) -> float:
        """Largest distance of the two starts, in parameter units."""

    @property
    def contraction(self) -> np.ndarray:
        """float64 `[steps]`."""

    @property
    def shift(self) -> np.ndarray:
        """float64 `[steps]`, in parameter units."""

    @property
    def steps(self) -> int:
        """Number of noisy steps."""

    @property
    def memoryless(self) -> bool:
        """Whether updates depend on the past through the current parameters only."""


def epsilon(
    mechanism: Mechanism, *, noise_scale: Any, delta: float, accountant: str | None = None
) -> float:
    """The epsilon that a run of the mechanism with this noise is certified for.

    Args:
      mechanism: what the steps do.
      noise_scale: standard deviation in parameter units: a number, `[steps]` numbers or an Optax
        schedule.
      delta: strictly between 0 and 1.
      accountant: None for the least epsilon that any of them certifies (see `least_epsilon`);
        `"interpolation"`, exact shifted interpolation, in no time; `"closed-form"`, the published
        formulas, refused where they are unsound; or `"coupling"`, reflection coupling, which is far
        tighter but for memoryless mechanisms only and takes seconds (see
        `certunlearn.accounting.coupling`).

    Returns:
      epsilon >= 0, rounded up; 0 if delta alone covers the total variation.

    Raises:
      TypeError: if an argument is of the wrong kind.
      ValueError: if one is out of range, the closed form does not hold, or coupling is asked for a
        mechanism with memory.

    Guarantee:
      The last parameters are (epsilon, delta)-indistinguishable from those of the mechanism's
      reference process, in both directions, if the mechanism's assumptions hold.

    Source:
      Shifted interpolation: Bok, Su & Altschuler (2024). Conversion: Balle & Wang (2018). Closed
      forms: Koloskova et al. (ICML 2025). Coupling: ours, proved in its module.

    >>> from certunlearn.mechanisms import GradientClipping
    >>> m = GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=100)
    >>> round(epsilon(m, noise_scale=5.0, delta=1e-5, accountant="interpolation"), 4)
    0.9385
    """
    delta = checks.open_unit("delta", delta)
    scale = _arguments(mechanism, noise_scale, accountant)
    if accountant is None:
        return least_epsilon(mechanism, noise_scale=scale, delta=delta)[0]
    if accountant == "closed-form":
        return closed_form.epsilon(mechanism, scale, delta)
    if accountant == "coupling":
        return coupling.epsilon(_coupled(mechanism, scale), delta)
    return float(gaussian.epsilon(_mu_curve(mechanism, scale)[-1], delta))


def least_epsilon(mechanism: Mechanism, *, noise_scale: Any, delta: float) -> tuple[float, str]:
    """The least epsilon that any accountant certifies, and the accountant that does.

    Arguments, errors and guarantee as for `epsilon`.

    >>> from certunlearn.mechanisms import GradientClipping
    >>> m = GradientClipping(
    ...     init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=100, memoryless=False
    ... )
    >>> value, accountant = least_epsilon(m, noise_scale=5.0, delta=1e-5)
    >>> round(value, 4), accountant
    (1.7285, 'interpolation')
    """
    delta = checks.open_unit("delta", delta)
    scale = _arguments(mechanism, noise_scale)
    names = _candidates(mechanism, scale)
    return _least(list(zip(_by_each(epsilon, mechanism, scale, delta=delta), names, strict=True)))


def delta(
    mechanism: Mechanism, *, noise_scale: Any, epsilon: float, accountant: str | None = None
) -> float:
    """The delta at which a run with this noise is certified for `epsilon`.

    Arguments, errors and guarantee as for `epsilon`, which must be finite and at least 0.

    >>> from certunlearn.mechanisms import GradientClipping
    >>> m = GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=100)
    >>> print(f"{delta(m, noise_scale=5.0, epsilon=1.0, accountant='interpolation'):.3g}")
    3.64e-06
    """
    epsilon = checks.real("epsilon", epsilon)
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(f"epsilon must be finite and at least 0, got {epsilon!r}")
    scale = _arguments(mechanism, noise_scale, accountant)
    if accountant is None:
        return min(_by_each(delta, mechanism, scale, epsilon=epsilon))
    if accountant == "closed-form":
        return closed_form.delta(mechanism, scale, epsilon)
    if accountant == "coupling":
        return coupling.delta(_coupled(mechanism, scale), epsilon)
    return float(gaussian.delta(epsilon, _mu_curve(mechanism, scale)[-1]))


def noise_scale(
    mechanism: Mechanism,
    *,
    epsilon: float,
    delta: float,
    accountant: str | None = None,
    progress: bool = False,
) -> float:
    """The smallest standard deviation (parameter units, the same at every step) for a guarantee.

    Args:
      mechanism: what the steps do.
      epsilon: positive and finite.
      delta: strictly between 0 and 1.
      accountant: as for `epsilon`.
      progress: whether to show a progress bar while coupling searches (needs tqdm).

    Returns:
      sigma, rounded up: by the same accountant, `epsilon(mechanism, noise_scale=sigma,
      delta=delta) <= epsilon` holds. mu is proportional to 1 / sigma, so interpolation takes one
      root-find and no search over sigma. Coupling searches, and stops somewhat above the smallest
      that it proves.

    Raises:
      TypeError: if an argument is of the wrong kind.
      ValueError: if one is out of range, or the closed form does not hold.

    Guarantee:
      That of `epsilon`.

    >>> from certunlearn.mechanisms import GradientClipping
    >>> m = GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=100)
    >>> round(noise_scale(m, epsilon=1.0, delta=1e-5, accountant="interpolation"), 4)
    4.7189
    """
    target, delta = checks.positive("epsilon", epsilon), checks.open_unit("delta", delta)
    _arguments(mechanism, 1.0, accountant)
    if accountant is None:
        largest = noise_scale(mechanism, epsilon=target, delta=delta, accountant="interpolation")
        found = [(largest, "interpolation")]
        if "coupling" in _candidates(mechanism, largest):
            least = coupling.noise_scale(_coupled(mechanism, 1.0), target, delta, progress)
            # For this noise, too, the default must be coupling.
            if "coupling" in _candidates(mechanism, least):
                found.append((least, "coupling"))
        return _least(found)[0]
    if accountant == "closed-form":
        return closed_form.noise_scale(mechanism, target, delta)
    if accountant == "coupling":
        return coupling.noise_scale(_coupled(mechanism, 1.0), target, delta, progress)
    unit = _mu_curve(mechanism, 1.0)[-1]
    sigma = unit / gaussian.mu(target, delta)
    while gaussian.epsilon(unit / sigma, delta) > target:  # the last digits' rounding, if any
        sigma *= 1 + 1e-12
    return float(sigma)


def epsilon_curve(
    mechanism: Mechanism, *, noise_scale: Any, delta: float, accountant: str | None = None
) -> np.ndarray:
    """The certified epsilon of a run that stops after 0, 1, ..., steps noisy steps.

    Arguments and errors as for `epsilon`.

    Returns:
      float64 `[steps + 1]`, infinity at 0 (no noise, no guarantee), and wherever the closed form
      does not hold.

    >>> from certunlearn.mechanisms import GradientClipping
    >>> m = GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=3)
    >>> curve = epsilon_curve(m, noise_scale=5.0, delta=1e-5, accountant="interpolation")
    >>> curve.round(2).tolist()
    [inf, 1.73, 1.3, 1.13]
    """
    delta = checks.open_unit("delta", delta)
    scale = _arguments(mechanism, noise_scale, accountant)
    if accountant is None:
        return np.min(_by_each(epsilon_curve, mechanism, scale, delta=delta), axis=0)
    if accountant == "closed-form":
        return closed_form.epsilon_curve(mechanism, scale, delta)
    if accountant == "coupling":
        return coupling.epsilon_curve(_coupled(mechanism, scale), delta)
    return np.concatenate([[np.inf], gaussian.epsilon(_mu_curve(mechanism, scale), delta)])


def epsilon_lower_bound(mechanism: Mechanism, *, noise_scale: Any, delta: float) -> float:
    """An epsilon that the true one is not below: what the best attack known reaches.

    Arguments and errors as for `epsilon`. The truth lies between this and any accountant's epsilon,
    so it says how much a better accountant could still gain.

    Returns:
      epsilon >= 0, rounded down; at most 300.

    Source:
      An adversary's choice of loss, found by policy iteration: see `accounting.attack`.

    >>> from certunlearn.mechanisms import GradientClipping
    >>> m = GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=100)
    >>> round(epsilon_lower_bound(m, noise_scale=5.0, delta=1e-5), 3)
    0.176
    """
    delta = checks.open_unit("delta", delta)
    scale = _arguments(mechanism, noise_scale)
    return attack.epsilon(
        mechanism.initial_distance, mechanism.contraction, mechanism.shift, np.asarray(scale), delta
    )


def epsilon_bracket(
    mechanism: Mechanism, *, noise_scale: Any, delta: float, tolerance: float = 0.02
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
      first is no certificate of anything: see `certunlearn.accounting.coupling`.

    >>> from certunlearn.mechanisms import GradientClipping
    >>> m = GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.25, steps=2)
    >>> low, high = epsilon_bracket(m, noise_scale=5.0, delta=1e-5)
    >>> 0.98 * high <= low <= high
    True
    """
    delta, tolerance = checks.open_unit("delta", delta), checks.positive("tolerance", tolerance)
    scale = _arguments(mechanism, noise_scale)
    return coupling.bracket(_coupled(mechanism, scale), delta, tolerance)


def affordable_lower_bound(mechanism: Mechanism, *, noise_scale: Any, delta: float) -> float | None:
    """`epsilon_lower_bound`, or None for more than `MOST_ATTACKED` steps: it would take long."""
    scale = _arguments(mechanism, noise_scale)
    if mechanism.steps > MOST_ATTACKED:
        return None
    return epsilon_lower_bound(mechanism, noise_scale=scale, delta=delta)


def mu(mechanism: Mechanism, *, noise_scale: Any) -> float:
    """The run's Gaussian-DP mu by exact shifted interpolation; arguments as for `epsilon`."""
    return float(_mu_curve(mechanism, _arguments(mechanism, noise_scale))[-1])


def total_variation(
    mechanism: Mechanism, *, noise_scale: Any, accountant: str | None = None
) -> float:
    """The most by which any event can be more likely than under the reference.

    What no certificate can give: an unlearned model that is better than the reference process, at
    anything, with a probability higher by more than this. By `mu` of interpolation, or by coupling
    if that is the accountant; the lower of them if it is None. Arguments as for `epsilon`.
    """
    scale = _arguments(mechanism, noise_scale, accountant)
    if accountant is None:
        return min(_by_each(total_variation, mechanism, scale))
    if accountant == "coupling":
        return coupling.delta(_coupled(mechanism, scale), 0.0)
    return float(gaussian.total_variation(_mu_curve(mechanism, scale)[-1]))


def best_steps(mechanism: Any) -> int:
    """The fewest steps at which interpolation asks for the least noise, all else as it is.

    Args:
      mechanism: with constant parameters; its number of steps only widens the search, which goes to
        ten times the larger of it and of initial_distance / shift, or as far as weight decay
        forgets, but not beyond 200,000.

    Raises:
      ValueError: if the mechanism has schedules.

    >>> from certunlearn.mechanisms import GradientClipping
    >>> m = GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=1)
    >>> best_steps(m)  # init_radius / (learning_rate * clip_norm)
    10
    """
    _arguments(mechanism, 1.0)
    contraction, shift = np.unique(mechanism.contraction), np.unique(mechanism.shift)
    if len(contraction) > 1 or len(shift) > 1:
        raise ValueError("best_steps needs constant parameters, got a mechanism with schedules")
    c, s = float(contraction[0]), float(shift[0])
    horizon = 10 * max(mechanism.steps, math.ceil(mechanism.initial_distance / s) + 1)
    if 0 < c < 1:
        horizon = max(horizon, math.ceil(60 / -math.log(c)))
    count = min(horizon, _MAX_HORIZON)
    curve = interpolation.gdp_mu_curve(
        mechanism.initial_distance, np.full(count, c), s, 1.0, mechanism.memoryless
    )
    return int(np.argmax(curve <= curve.min() * (1 + 1e-9))) + 1


def _candidates(mechanism: Mechanism, scale: checks.PerStep) -> tuple[str, ...]:
    """The accountants that may give the least number, none of which refuses this noise.

    Not the closed form: it claims only what interpolation confirms for the very same noise, so
    where it holds it is never below interpolation (by more than 1e-9 of delta).
    """
    coupled = mechanism.memoryless and _mu_curve(mechanism, scale)[-1] <= _COUPLED_MU
    return ("interpolation", "coupling") if coupled else ("interpolation",)


def _by_each(
    function: Callable[..., Any], mechanism: Mechanism, scale: checks.PerStep, **arguments: float
) -> list[Any]:
    """What a function gives by each candidate."""
    return [
        function(mechanism, noise_scale=scale, accountant=name, **arguments)
        for name in _candidates(mechanism, scale)
    ]


def _least(found: list[tuple[float, str]]) -> tuple[float, str]:
    """The least number and its accountant; the first of those that are as good as equal."""
    best = found[0]
    for other in found[1:]:
        if other[0] < best[0] * (1 - _TIE):
            best = other
    return best


def _mu_curve(mechanism: Mechanism, scale: checks.PerStep) -> np.ndarray:
    return interpolation.gdp_mu_curve(
        mechanism.initial_distance,
        mechanism.contraction,
        mechanism.shift,
        np.asarray(scale),
        mechanism.memoryless,
    )


def _coupled(mechanism: Mechanism, scale: checks.PerStep) -> coupling.Steps:
    if not mechanism.memoryless:
        raise ValueError(
            "accountant='coupling' needs a memoryless mechanism: with optimizer state, runs whose "
            "parameters meet need not stay together; use accountant='interpolation'"
        )
    return coupling.Steps(
        mechanism.initial_distance,
        mechanism.contraction,
        mechanism.shift,
        np.broadcast_to(np.asarray(scale, float), (mechanism.steps,)),
    )


def _arguments(mechanism: Any, noise_scale: Any, accountant: str | None = None) -> checks.PerStep:
    needed = ("initial_distance", "contraction", "shift", "steps", "memoryless")
    if isinstance(mechanism, type) or not all(hasattr(mechanism, name) for name in needed):
        raise TypeError(f"mechanism must be one, such as GradientClipping(...), got {mechanism!r}")
    if accountant is not None:
        checks.choice("accountant", accountant, ACCOUNTANTS)
    return checks.per_step("noise_scale", noise_scale, mechanism.steps)
