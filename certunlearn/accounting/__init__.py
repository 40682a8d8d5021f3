"""From a mechanism and its noise to (epsilon, delta), and back. Pure float64 functions.

Every `noise_scale` here is a standard deviation, of the noise in each coordinate of a step, in
parameter units.
"""

import math
from types import ModuleType
from typing import Any

import numpy as np

from certunlearn import mechanisms
from certunlearn._numerics import checks
from certunlearn.accounting import (
    _runs,
    _taut_string,
    closed_form,
    coupling,
    interpolation,
    poisson_training,
    product,
)
from certunlearn.accounting._attack import best_loss
from certunlearn.accounting._reflection import solution
from certunlearn.accounting._taut_string import gdp_mu as gdp_mu
from certunlearn.mechanisms.separations import with_noise

# An accountant is a module that says of which mechanisms it refuses to speak, and has the functions
# below without their checks.
_ACCOUNTANTS: dict[str, ModuleType] = {
    "interpolation": interpolation,
    "closed-form": closed_form,
    "coupling": coupling,
    "product": product,
    "dp-accounting": poisson_training,
}
ACCOUNTANTS = tuple(_ACCOUNTANTS)

# Most steps for which plans and certificates work out `epsilon_lower_bound`: a few seconds.
MOST_ATTACKED = 2000
# In multiplications a round: some ten seconds. Constant steps and usual schedules take 1e9 at most.
_MOST_ATTACK_WORK = 3e9

_MAX_HORIZON = 200_000
# Most mu, by interpolation, at which coupling is tried unasked. Beyond it epsilon is in the
# hundreds: worth nothing to anyone, and e^epsilon nears the end of float64.
COUPLED_MU = 20.0
# Coupling is never worse than interpolation, but may reach the same number by other sums.
_TIE = 1e-9


def epsilon(
    mechanism: Any, *, noise_scale: Any, delta: float, accountant: str | None = None
) -> float:
    """The epsilon that a run of the mechanism with this noise is certified for.

    Args:
      mechanism: what the steps do.
      noise_scale: standard deviation in parameter units: a number, `[steps]` numbers or an Optax
        schedule.
      delta: strictly between 0 and 1.
      accountant: None for the least epsilon that any of them certifies (see `least_epsilon`);
        `"interpolation"`, exact shifted interpolation, in no time; `"closed-form"`, the published
        formulas, refused where they are unsound; `"coupling"`, reflection coupling, which is far
        tighter but for memoryless mechanisms only and takes seconds (see
        `certunlearn.accounting`); `"product"`, a product of contraction coefficients, for
        models that are projected at every step; `"dp-accounting"`, for `DPSGD`. `available` says
        which may be asked for a mechanism.

    Returns:
      epsilon >= 0, rounded up; 0 if delta alone covers the total variation.

    Raises:
      TypeError: if an argument is of the wrong kind.
      ValueError: if one is out of range, the closed form does not hold, or the accountant is not
        for such a mechanism, as coupling is not for one with memory.

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
    return float(_ACCOUNTANTS[accountant].epsilon(mechanism, scale, delta))


def least_epsilon(mechanism: Any, *, noise_scale: Any, delta: float) -> tuple[float, str]:
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
    return _least(
        [
            (_ACCOUNTANTS[name].epsilon(mechanism, scale, delta), name)
            for name in _candidates(mechanism, scale)
        ]
    )


def delta(
    mechanism: Any, *, noise_scale: Any, epsilon: float, accountant: str | None = None
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
    names = _candidates(mechanism, scale) if accountant is None else (accountant,)
    return min(float(_ACCOUNTANTS[name].delta(mechanism, scale, epsilon)) for name in names)


def noise_scale(
    mechanism: Any,
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
    if accountant is not None:
        return float(_ACCOUNTANTS[accountant].noise_scale(mechanism, target, delta, progress))
    found: list[tuple[float, str]] = []
    for name in available(mechanism):
        # For the noise that is found, too, this must be an accountant that is asked by default.
        if name not in _candidates(mechanism, found[0][0] if found else None):
            continue
        least = float(_ACCOUNTANTS[name].noise_scale(mechanism, target, delta, progress))
        if name in _candidates(mechanism, least):
            found.append((least, name))
    return _least(found)[0]


def epsilon_curve(
    mechanism: Any, *, noise_scale: Any, delta: float, accountant: str | None = None
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
    names = _candidates(mechanism, scale) if accountant is None else (accountant,)
    curves = [_ACCOUNTANTS[name].epsilon_curve(mechanism, scale, delta) for name in names]
    return np.asarray(np.min(curves, axis=0))


def epsilon_lower_bound(mechanism: Any, *, noise_scale: Any, delta: float) -> float:
    """An epsilon that the true one is not below: what the best attack known reaches.

    Arguments and errors as for `epsilon`. The truth lies between this and any accountant's epsilon,
    so it says how much a better accountant could still gain.

    Returns:
      epsilon >= 0, rounded down; at most 300.

    Raises:
      ValueError: if no attack is known on such a mechanism, or an argument is out of range.

    Source:
      An adversary's choice of loss, found by policy iteration: see `accounting.attack`.

    >>> from certunlearn.mechanisms import GradientClipping
    >>> m = GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=100)
    >>> round(epsilon_lower_bound(m, noise_scale=5.0, delta=1e-5), 3)
    0.176
    """
    delta = checks.open_unit("delta", delta)
    scale = _arguments(mechanism, noise_scale)
    if not mechanism.attackable:
        raise ValueError(
            f"epsilon_lower_bound knows no attack on {type(mechanism).__name__}: what its "
            "assumptions exclude an attack would have to respect"
        )
    return best_loss.epsilon(*_game(mechanism, scale), delta)


def epsilon_bracket(
    mechanism: Any, *, noise_scale: Any, delta: float, tolerance: float = 0.02
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
      first is no certificate of anything: see `certunlearn.accounting`.

    >>> from certunlearn.mechanisms import GradientClipping
    >>> m = GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.25, steps=2)
    >>> low, high = epsilon_bracket(m, noise_scale=5.0, delta=1e-5)
    >>> 0.98 * high <= low <= high
    True
    """
    delta, tolerance = checks.open_unit("delta", delta), checks.positive("tolerance", tolerance)
    scale = _arguments(mechanism, noise_scale)
    refused = coupling.refusal(mechanism)
    if refused:
        raise ValueError(refused)
    return solution.bracket(coupling.steps(mechanism, scale), delta, tolerance)


def affordable_lower_bound(mechanism: Any, *, noise_scale: Any, delta: float) -> float | None:
    """`epsilon_lower_bound`, or None if there is none or it would take long.

    It would for more than `MOST_ATTACKED` steps, a mu above `COUPLED_MU`, or noise whose scales
    differ so much from step to step that grids need very many nodes.
    """
    scale = _arguments(mechanism, noise_scale)
    if mechanism.steps > MOST_ATTACKED or not mechanism.attackable:
        return None
    if _runs.mu_curve(_runs.separations(mechanism), scale)[-1] > COUPLED_MU:
        return None  # an epsilon in the hundreds: what the attack reaches is of no use
    delta = checks.open_unit("delta", delta)
    if best_loss.work(*_game(mechanism, scale), delta) > _MOST_ATTACK_WORK:
        return None
    return epsilon_lower_bound(mechanism, noise_scale=scale, delta=delta)


def mu(mechanism: Any, *, noise_scale: Any) -> float | None:
    """The run's Gaussian-DP mu by exact shifted interpolation; None for `DPSGD`, which has none.

    Arguments as for `epsilon`.
    """
    scale = _arguments(mechanism, noise_scale)
    if mechanism.separations() is None:
        return None
    return float(_runs.mu_curve(_runs.separations(mechanism), scale)[-1])


def total_variation(
    mechanism: Any, *, noise_scale: Any, accountant: str | None = None, delta: float = 1e-5
) -> float:
    """The most by which any event can be more likely than under the reference.

    What no certificate can give: an unlearned model that is better than the reference process, at
    anything, with a probability higher by more than this. Delta at epsilon 0, by the accountant;
    the least if it is None. Arguments as for `epsilon`; `delta` is that which coupling makes its
    tables for. Any will do; that of a claim saves making others.
    """
    delta = checks.open_unit("delta", delta)
    scale = _arguments(mechanism, noise_scale, accountant)
    names = _candidates(mechanism, scale) if accountant is None else (accountant,)
    # The published formulas say nothing of it; that they hold interpolation has confirmed.
    names = tuple("interpolation" if name == "closed-form" else name for name in names)
    return min(
        coupling.delta(mechanism, scale, 0.0, delta)
        if name == "coupling"
        else float(_ACCOUNTANTS[name].delta(mechanism, scale, 0.0))
        for name in names
    )


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
    stated = mechanism.separations()
    if stated is None or not np.all(stated.shift):
        raise ValueError(
            f"best_steps needs steps that drive runs apart, got {type(mechanism).__name__}: "
            "without them every step more lowers the noise"
        )
    contraction, shift = np.unique(stated.contraction), np.unique(stated.shift)
    if len(contraction) > 1 or len(shift) > 1:
        raise ValueError("best_steps needs constant parameters, got a mechanism with schedules")
    c, s = float(contraction[0]), float(shift[0])
    horizon = 10 * max(mechanism.steps, math.ceil(stated.initial_distance / s) + 1)
    if 0 < c < 1:
        horizon = max(horizon, math.ceil(60 / -math.log(c)))
    count = min(horizon, _MAX_HORIZON)
    curve = _taut_string.gdp_mu_curve(
        stated.initial_distance,
        np.full(count, c),
        s,
        1.0,
        stated.memoryless,
        stated.diameter,
    )
    return int(np.argmax(curve <= curve.min() * (1 + 1e-9))) + 1


def supported_accountants(mechanism: Any) -> dict[str, str | None]:
    """Every accountant by name, with the reason why it does not apply; None where it does.

    >>> found = supported_accountants(mechanisms.OutputPerturbation(init_radius=1.0))
    >>> [name for name, reason in found.items() if reason is None]
    ['interpolation', 'closed-form', 'coupling', 'product']
    """
    return {name: each.refusal(mechanism) for name, each in _ACCOUNTANTS.items()}


def available(mechanism: Any) -> tuple[str, ...]:
    """The accountants that apply to such a mechanism."""
    return tuple(name for name, why in supported_accountants(mechanism).items() if why is None)


def _candidates(mechanism: Any, scale: checks.PerStep | None) -> tuple[str, ...]:
    """The accountants that may give the least number, none of which refuses this noise.

    Not the closed form: it claims only what interpolation confirms for the very same noise, so
    where it holds it is never below interpolation (by more than 1e-9 of delta). And one alone where
    it is exact: interpolation without shifts, or with one noise; the product where separations do
    not depend on the distance, as the attack then reaches it.
    """
    names = available(mechanism)
    stated = mechanism.separations()
    if stated is None:
        return names
    names = tuple(name for name in names if name != "closed-form")
    one_noise = np.count_nonzero(stated.noisy_steps) == 1 and not stated.init_noise_scale
    if one_noise or not np.any(stated.shift):
        return ("interpolation",)
    if not np.any(stated.contraction):
        return ("interpolation", "product")
    if scale is None or _runs.mu_curve(_runs.separations(mechanism), scale)[-1] <= COUPLED_MU:
        return names
    return tuple(name for name in names if name != "coupling")


def _game(mechanism: Any, scale: checks.PerStep) -> tuple[float, Any, Any, Any]:
    """The run as `attack` reads it."""
    stated = _runs.separations(mechanism)
    distance, contraction, shift, noise = with_noise(stated, scale)
    if stated.init_noise_scale > 0:  # a first step that does nothing
        contraction, shift = np.insert(contraction, 0, 1.0), np.insert(shift, 0, 0.0)
        noise = np.insert(noise, 0, stated.init_noise_scale)
    return distance, contraction, shift, noise


def _least(found: list[tuple[float, str]]) -> tuple[float, str]:
    """The least number and its accountant; the first of those that are as good as equal."""
    best = found[0]
    for other in found[1:]:
        if other[0] < best[0] * (1 - _TIE):
            best = other
    return best


def _arguments(mechanism: Any, noise_scale: Any, accountant: str | None = None) -> checks.PerStep:
    mechanisms.check(mechanism)
    if accountant is not None:
        checks.choice("accountant", accountant, ACCOUNTANTS)
        refused = _ACCOUNTANTS[accountant].refusal(mechanism)
        if refused is not None:
            raise ValueError(refused)
    return checks.per_step("noise_scale", noise_scale, mechanism.steps)
