"""What callers ask: epsilon, delta, noise scale, curve, from one accountant or the best of them.

Arguments are checked here, once; accountants get them checked. An accountant is given by its name,
or as an object of a user's own subclass of `Accountant`.
"""

import math

import numpy as np

from certunlearn import mechanisms
from certunlearn._numerics import checks
from certunlearn._numerics.checks import PerStep, ScalarOrSchedule
from certunlearn.accounting import interpolation
from certunlearn.accounting.accountant_base import Accountant, checked_delta, checked_noise
from certunlearn.accounting.closed_form import ClosedForm
from certunlearn.accounting.coupling import COUPLED_MU, Coupling
from certunlearn.accounting.exactness import Exact
from certunlearn.accounting.interpolation import Interpolation
from certunlearn.accounting.product import Product
from certunlearn.accounting.subsampled import Subsampled
from certunlearn.mechanisms import Mechanism

_ACCOUNTANTS: dict[str, Accountant] = {
    each.name: each
    for each in (Interpolation(), ClosedForm(), Coupling(), Product(), Subsampled(), Exact())
}
# Names of the package's accountants: what certificates may be by.
ACCOUNTANTS = tuple(_ACCOUNTANTS)

# Coupling is never worse than interpolation, but may reach the same number by other sums.
_TIE = 1e-9


def epsilon(
    mechanism: Mechanism,
    *,
    noise_scale: ScalarOrSchedule | None = None,
    delta: float | None = None,
    accountant: str | Accountant | None = None,
) -> float:
    """The epsilon that a run of the mechanism with this noise is certified for.

    Args:
      mechanism: what the steps do.
      noise_scale: standard deviation in parameter units: a number, `[steps]` numbers or an Optax
        schedule. An exact mechanism needs none: epsilon is 0.
      delta: strictly between 0 and 1; of an exact mechanism None or 0, too.
      accountant: None for the least epsilon that any of the package's certifies (see
        `least_epsilon`); a name: `"interpolation"`, exact shifted interpolation, in no time;
        `"closed-form"`, the published formulas, refused where they are unsound; `"coupling"`,
        reflection coupling, which is far tighter, is for memoryless mechanisms only and takes
        seconds; `"product"`, a product of contraction coefficients, for models that are projected
        at every step; `"dp-accounting"`, for `DPSGD`; `"exact"`, for mechanisms without noise, such
        as `Retraining`. `supported_accountants` says which may be asked for a mechanism. Or an
        object of a subclass of `accounting.Accountant` of your own.

    Returns:
      epsilon >= 0, rounded up; 0 if delta alone covers the total variation.

    Raises:
      TypeError: if an argument is of the wrong kind.
      ValueError: if one is out of range, the closed form does not hold, or the accountant is not
        for such a mechanism, as coupling is not for one with memory.

    Guarantee:
      The last parameters are (epsilon, delta)-indistinguishable from those of the mechanism's
      reference process, in both directions, if the mechanism's assumptions hold. For an accountant
      of your own that is your word.

    Source:
      Shifted interpolation: Bok, Su & Altschuler (2024). Conversion: Balle & Wang (2018). Closed
      forms: Koloskova et al. (ICML 2025). Coupling: ours, proved in docs/theory/coupling.md.

    >>> from certunlearn.mechanisms import GradientClipping
    >>> m = GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=100)
    >>> round(epsilon(m, noise_scale=5.0, delta=1e-5, accountant="interpolation"), 4)
    0.9385
    """
    scale = checked_noise(mechanism, noise_scale)
    delta = checked_delta(mechanism, delta)
    if accountant is None:
        return least_epsilon(mechanism, noise_scale=scale, delta=delta)[0]
    chosen = _supported(accountant, mechanism)
    return _returned(chosen, "epsilon", chosen.epsilon(mechanism, scale, delta))


def least_epsilon(
    mechanism: Mechanism, *, noise_scale: ScalarOrSchedule | None = None, delta: float | None = None
) -> tuple[float, str]:
    """The least epsilon that any of the package's accountants certifies, and which of them does.

    Arguments, errors and guarantee as for `epsilon`.

    >>> from certunlearn.mechanisms import GradientClipping
    >>> m = GradientClipping(
    ...     init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=100, memoryless=False
    ... )
    >>> value, accountant = least_epsilon(m, noise_scale=5.0, delta=1e-5)
    >>> round(value, 4), accountant
    (1.7285, 'interpolation')
    """
    scale = checked_noise(mechanism, noise_scale)
    delta = checked_delta(mechanism, delta)
    return _least(
        [
            (_ACCOUNTANTS[name].epsilon(mechanism, scale, delta), name)
            for name in _worth_asking(mechanism, scale)
        ]
    )


def delta(
    mechanism: Mechanism,
    *,
    noise_scale: ScalarOrSchedule | None = None,
    epsilon: float,
    accountant: str | Accountant | None = None,
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
    scale = checked_noise(mechanism, noise_scale)
    return min(
        _returned(each, "delta", each.delta(mechanism, scale, epsilon))
        for each in _asked(accountant, mechanism, scale)
    )


def noise_scale(
    mechanism: Mechanism,
    *,
    epsilon: float,
    delta: float | None = None,
    accountant: str | Accountant | None = None,
    progress: bool = False,
) -> float:
    """The smallest standard deviation (parameter units, the same at every step) for a guarantee.

    Args:
      mechanism: what the steps do.
      epsilon: positive and finite; of an exact mechanism 0, too.
      delta: strictly between 0 and 1; of an exact mechanism None or 0, too.
      accountant: as for `epsilon`.
      progress: whether to show a progress bar while coupling searches (needs tqdm).

    Returns:
      sigma, rounded up: by the same accountant, `epsilon(mechanism, noise_scale=sigma,
      delta=delta) <= epsilon` holds. It is 0 for an exact mechanism. mu is proportional to
      1 / sigma, so interpolation takes one root-find and no search over sigma. Coupling searches,
      and stops somewhat above the smallest that it proves. One of your own searches by
      `Accountant.noise_scale`.

    Raises:
      TypeError: if an argument is of the wrong kind.
      ValueError: if one is out of range, the closed form does not hold, or no noise is enough.

    Guarantee:
      That of `epsilon`.

    >>> from certunlearn.mechanisms import GradientClipping
    >>> m = GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=100)
    >>> round(noise_scale(m, epsilon=1.0, delta=1e-5, accountant="interpolation"), 4)
    4.7189
    """
    checked_noise(mechanism, 1.0)
    delta = checked_delta(mechanism, delta)
    if mechanism.exact and epsilon == 0:
        epsilon = math.ulp(0.0)  # the least that is asked for
    target = checks.positive("epsilon", epsilon)
    if accountant is not None:
        chosen = _supported(accountant, mechanism)
        sigma = _returned(
            chosen, "noise_scale", chosen.noise_scale(mechanism, target, delta, progress)
        )
        return sigma if mechanism.exact else checks.positive("noise_scale", sigma)
    found: list[tuple[float, str]] = []
    for name in supported_names(mechanism):
        # For the noise that is found, too, this must be an accountant that is asked by default.
        if name not in _worth_asking(mechanism, found[0][0] if found else None):
            continue
        least = _ACCOUNTANTS[name].noise_scale(mechanism, target, delta, progress)
        if name in _worth_asking(mechanism, least):
            found.append((least, name))
    return _least(found)[0]


def epsilon_curve(
    mechanism: Mechanism,
    *,
    noise_scale: ScalarOrSchedule | None = None,
    delta: float | None = None,
    accountant: str | Accountant | None = None,
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
    scale = checked_noise(mechanism, noise_scale)
    delta = checked_delta(mechanism, delta)
    curves = []
    for each in _asked(accountant, mechanism, scale):
        curve = np.asarray(each.epsilon_curve(mechanism, scale, delta), np.float64)
        if curve.shape != (mechanism.steps + 1,) or not np.all(curve >= 0):
            raise ValueError(
                f"accountant {each.name!r} must give epsilons of at least 0 for 0 to "
                f"{mechanism.steps} steps, got a curve of shape {curve.shape}"
            )
        curves.append(curve)
    return np.asarray(np.min(curves, axis=0))


def total_variation(
    mechanism: Mechanism,
    *,
    noise_scale: ScalarOrSchedule | None = None,
    accountant: str | Accountant | None = None,
    delta: float = 1e-5,
) -> float:
    """The most by which any event can be more likely than under the reference.

    What no certificate can give: an unlearned model that is better than the reference process, at
    anything, with a probability higher by more than this. Delta at epsilon 0, by the accountant;
    the least if it is None. Arguments as for `epsilon`; `delta` is that which coupling makes its
    tables for. Any will do; that of a claim saves making others.
    """
    scale = checked_noise(mechanism, noise_scale)
    delta = checked_delta(mechanism, delta)
    return min(
        _returned(each, "total_variation", each.total_variation(mechanism, scale, delta))
        for each in _asked(accountant, mechanism, scale)
    )


def supported_accountants(mechanism: Mechanism) -> dict[str, str | None]:
    """Every accountant of the package by name, with why it does not apply; None where it does.

    >>> found = supported_accountants(mechanisms.OutputPerturbation(init_radius=1.0))
    >>> [name for name, reason in found.items() if reason is None]
    ['interpolation', 'closed-form', 'coupling', 'product']
    """
    mechanisms.check(mechanism)
    return {name: each.unsupported_reason(mechanism) for name, each in _ACCOUNTANTS.items()}


def supported_names(mechanism: Mechanism) -> tuple[str, ...]:
    """Names of the package's accountants that apply to such a mechanism, cheapest first."""
    return tuple(name for name, why in supported_accountants(mechanism).items() if why is None)


def unaffordable_reason(
    accountant: str | Accountant, mechanism: Mechanism, noise_scale: ScalarOrSchedule
) -> str | None:
    """Why claims by the accountant would take whoever verifies too long to derive, or None.

    Such as nobody issues: coupling where epsilon is in the hundreds anyway, or more deletions from
    private training than any table of them could hold. Arguments as for `epsilon`.

    >>> m = mechanisms.GradientClipping(
    ...     init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=9
    ... )
    >>> unaffordable_reason("coupling", m, 1.0)
    >>> unaffordable_reason("coupling", m, 0.01)
    'accountant must be another than coupling where interpolation gives mu above 20, got mu = ...'
    """
    scale = checked_noise(mechanism, noise_scale)
    chosen = _resolved(accountant)
    return None if mechanism.exact else chosen.unaffordable_reason(mechanism, scale)


def _resolved(accountant: str | Accountant) -> Accountant:
    """The accountant of a name, or the object itself."""
    if isinstance(accountant, Accountant):
        return accountant
    if not (isinstance(accountant, str) and accountant in _ACCOUNTANTS):
        raise ValueError(
            f"accountant must be one of {', '.join(map(repr, ACCOUNTANTS))}, or an object of a "
            "subclass of certunlearn.accounting.Accountant of your own, got "
            f"{checks.shown(accountant)}"
        )
    return _ACCOUNTANTS[accountant]


def _supported(accountant: str | Accountant, mechanism: Mechanism) -> Accountant:
    found = _resolved(accountant)
    reason = found.unsupported_reason(mechanism)
    if reason is not None:
        raise ValueError(reason)
    return found


def _asked(
    accountant: str | Accountant | None, mechanism: Mechanism, scale: PerStep
) -> list[Accountant]:
    """The given accountant, or all that may give the least number."""
    if accountant is not None:
        return [_supported(accountant, mechanism)]
    return [_ACCOUNTANTS[name] for name in _worth_asking(mechanism, scale)]


def _returned(accountant: Accountant, name: str, value: float) -> float:
    """What an accountant has returned, which may be a user's own: never NaN, never negative."""
    number = checks.real(name, value)
    if not number >= 0:
        raise ValueError(
            f"{name} by accountant {accountant.name!r} must be at least 0, got {number!r}"
        )
    return number


def _worth_asking(mechanism: Mechanism, scale: PerStep | None) -> tuple[str, ...]:
    """The accountants that may give the least number, none of which refuses this noise.

    Not the closed form: it claims only what interpolation confirms for the very same noise, so
    where it holds it is never below interpolation (by more than 1e-9 of delta). And one alone where
    it is exact: interpolation without shifts, or with one noise (but for noise on the starts, and a
    diameter); the product where separations do not depend on the distance, as the attack then
    reaches it.
    """
    names = supported_names(mechanism)
    stated = mechanism.separations()
    if stated is None:
        return names
    names = tuple(name for name in names if name != "closed-form")
    one_noise = np.count_nonzero(stated.noisy_steps) == 1 and not stated.init_noise_scale
    if one_noise or not np.any(stated.shift):
        return ("interpolation",)
    if not np.any(stated.contraction) and "product" in names:
        return ("interpolation", "product")
    if scale is None or interpolation.mu_curve(stated, scale)[-1] <= COUPLED_MU:
        return names
    return tuple(name for name in names if name != "coupling")


def _least(found: list[tuple[float, str]]) -> tuple[float, str]:
    """The least number and its accountant; the first of those that are as good as equal."""
    best = found[0]
    for other in found[1:]:
        if other[0] < best[0] * (1 - _TIE):
            best = other
    return best
