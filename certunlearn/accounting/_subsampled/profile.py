"""The certificate of noisy training (Abadi et al. 2016), for the deletion of k examples at once.

docs/theory/subsampled.md proves it. What the code relies on:

- Every step draws each example with probability q, independently, adds up gradients clipped to norm
  C, adds noise N(0, (noise_multiplier * C)^2 I), and divides by a number that does not depend on
  who was drawn or deleted.
- A step is dominated, in both directions, by P = sum_i Binomial(k, q)(i) N(i, noise_multiplier^2)
  against Q = N(0, noise_multiplier^2), in units of C; T steps by the T-fold products.
- The least of three bounds is taken, each sound by itself: tables of privacy losses, composed by
  dp_accounting, with what the FFT may lose added to delta; Renyi divergences (`renyi`), at any
  delta; and what whoever is told who is drawn would see (`_told`).
- Draws beyond a chance of 1e-21 in a step are left out of P, and that chance is added to its
  divergence from Q; Q's from P only grows by it.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import scipy  # its parts load when they are first used

from certunlearn._numerics import binomial, checks
from certunlearn.accounting import _gaussian
from certunlearn.accounting._subsampled import renyi

_INTERVAL = 1e-4
_MOST_CELLS = 2**18
_MOST_TERMS = 2**24  # cells times draws
_MOST_DRAWN = 1000  # in a step, of the k
_MOST_STEPS = 1_000_000  # composing takes seconds there, and loses 1e-9 of delta
_WIDEST = 500.0  # of a cell: e^width must be within float64
_UNSEEN = 1e-21  # chance of so many draws in a step that tables leave them out
_TAIL = 9.5  # in standard deviations: 1e-21 lies beyond
# Of delta and for each step: 1e-14 in all was seen to be lost at 10,000 steps.
_FFT_LOSS = 1e-15
_LEAST = 0.01


def delta(
    noise_multiplier: float, sampling_rate: float, steps: int, deletions: int, epsilon: float
) -> float:
    """The delta at which a training run is certified for `epsilon`.

    Args:
      noise_multiplier: positive; standard deviation of a step's noise, as a multiple of clip norm.
      sampling_rate: probability q of each example in each step, above 0 and at most 1.
      steps: number of steps.
      deletions: how many examples may be deleted, at most.
      epsilon: at least 0 and finite.

    Returns:
      delta between 0 and 1, rounded up.

    Raises:
      ModuleNotFoundError: if dp_accounting is missing and sampling_rate is below 1.
      TypeError: if an argument is of the wrong kind.
      ValueError: if one is out of range.

    Guarantee:
      The parameters, of all steps together, are (epsilon, delta)-indistinguishable in both
      directions from those of a run that never had the deleted examples, if examples are drawn
      as the module says (Poisson sampling; shuffled batches are not covered).

    Source:
      Abadi et al. (2016); Ganesh (2024); connecting the dots: Doroshenko et al. (2022).

    >>> print(f"{delta(1.0, 0.01, 1000, 1, epsilon=2.0):.2g}")
    2.7e-06
    """
    run = _checked(noise_multiplier, sampling_rate, steps, deletions)
    return _delta(*run, _nonnegative("epsilon", epsilon))


def epsilon(
    noise_multiplier: float, sampling_rate: float, steps: int, deletions: int, delta: float
) -> float:
    """The epsilon that a run is certified for, rounded up; else as `delta`, strictly in (0, 1).

    >>> print(f"{epsilon(1.0, 0.01, 1000, 1, delta=1e-5):.2f}")
    1.83
    """
    run = _checked(noise_multiplier, sampling_rate, steps, deletions)
    target = checks.open_unit("delta", delta)
    everyone = float(_gaussian.epsilon(_everyone(*run), target))
    if run[1] == 1:
        return everyone
    found = min(everyone, renyi.epsilon(*run, target))
    left = target - _fft_loss(run[2])
    if left > 0 and (losses := _losses(*run)) is not None:
        found = min(found, _table_epsilon(losses, left))
    return _least(lambda e: _told(*run, e), target, found)


def noise_multiplier(
    sampling_rate: float, steps: int, deletions: int, epsilon: float, delta: float
) -> float:
    """The least noise multiplier for a guarantee, rounded up by at most about 0.2 percent.

    As for `delta`, but epsilon must be positive. With sampling it is not sought below 0.01.

    >>> round(noise_multiplier(1.0, 100, 1, epsilon=1.0, delta=1e-5), 3)
    37.306
    """
    _, rate, steps, deletions = _checked(1.0, sampling_rate, steps, deletions)
    epsilon, delta = checks.positive("epsilon", epsilon), checks.open_unit("delta", delta)
    high = deletions * math.sqrt(steps) / _gaussian.mu(epsilon, delta)  # enough at every rate
    if rate == 1 or high <= _LEAST:
        return high
    if -math.expm1(steps * deletions * math.log1p(-rate)) <= delta:  # that any is drawn at all
        return _LEAST

    def excess(log_sigma: float) -> float:
        found = _delta(math.exp(log_sigma), rate, steps, deletions, epsilon)
        return math.log(max(found, 1e-300) / delta)

    top = low = math.log(high)
    while excess(low) <= 0:
        if low <= math.log(_LEAST):
            return math.exp(low)
        top, low = low, max(low - 1, math.log(_LEAST))
    root = scipy.optimize.brentq(excess, low, top, xtol=5e-4) if excess(top) < 0 else top
    while root < top and excess(root) > 0:
        root += 5e-4
    return math.exp(min(root, top))


def group_delta(profile: Callable[[float], float], deletions: int, epsilon: float) -> float:
    """Delta of `deletions` examples by group privacy; `profile` is one's, from epsilon to delta.

    >>> group_delta(lambda epsilon: 1e-6, 3, 0.0) == 3e-6
    True
    """
    k, epsilon = checks.positive_int("deletions", deletions), _nonnegative("epsilon", epsilon)
    share = epsilon / k
    one = profile(share)
    if share < 1e-300 or one == 0:
        return min(1.0, k * one)
    # In logarithms, as e^epsilon may be beyond float64.
    log_sum = share * (k - 1) + math.log(math.expm1(-epsilon) / math.expm1(-share))
    return math.exp(min(0.0, math.log(one) + log_sum))


@lru_cache(maxsize=1024)
def _delta(sigma: float, rate: float, steps: int, deletions: int, epsilon: float) -> float:
    run = sigma, rate, steps, deletions
    everyone = float(_gaussian.delta(epsilon, _everyone(*run)))
    if rate == 1:
        return everyone
    found = min(everyone, _told(*run, epsilon), renyi.delta(*run, epsilon))
    if found > _fft_loss(steps) and (losses := _losses(*run)) is not None:
        tabled = float(losses.get_delta_for_epsilon(epsilon))
        found = min(found, max(tabled, 0.0) + _fft_loss(steps))
    return found


def _everyone(sigma: float, rate: float, steps: int, deletions: int) -> float:
    """mu if everyone is in every step."""
    del rate
    return deletions * math.sqrt(steps) / sigma


def _fft_loss(steps: int) -> float:
    return _FFT_LOSS * (steps + 10)


def _told(sigma: float, rate: float, steps: int, deletions: int, epsilon: float) -> float:
    """The bound that tells who is drawn."""
    edges, beyond = _draws(deletions * steps, rate)
    apart = np.sqrt(np.minimum(deletions * edges, float(deletions) ** 2 * steps)) / sigma
    gain = np.exp(_gaussian.log_delta(epsilon, apart))
    rise = np.maximum(np.diff(gain), 0)
    return min(1.0, float(gain[0] + np.sum(rise * beyond)) * (1 + 1e-9))


@lru_cache(maxsize=16)
def _draws(most: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of draws out of `most`, and the chance of more than each but the last, `most`."""
    mean, spread = most * rate, math.sqrt(most * rate * (1 - rate))
    low, high = max(0.0, mean - 12 * spread - 1), min(float(most), mean + 45 * spread + 300)
    edges = np.unique(np.append(np.floor(np.linspace(low, high, 1000)), most))
    return edges, scipy.stats.binom.sf(edges[:-1], most, rate) * (1 + 1e-9)


def _table_epsilon(losses: Any, target: float) -> float:
    """Epsilon of dp_accounting's distribution at delta = `target`."""
    found = float(losses.get_epsilon_for_delta(target))
    if 600 < found < math.inf:
        # It took e^-epsilon for 0, which rounds epsilon up to a point of its grid.
        found = _least(lambda e: float(losses.get_delta_for_epsilon(e)), target, found)
    return found * (1 + 1e-9)


def _least(delta_at: Callable[[float], float], target: float, high: float) -> float:
    """The least epsilon, rounded up, at which delta is at most `target`; or `high`."""
    if delta_at(0.0) <= target:
        return 0.0
    if math.isinf(high) or delta_at(high) > target:
        return high
    low = 0.0
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        if delta_at(middle) <= target:
            high = middle
        else:
            low = middle
    return high


@lru_cache(maxsize=4)
def _losses(sigma: float, rate: float, steps: int, deletions: int) -> Any:
    """dp_accounting's distribution of the privacy losses of all steps, in both directions.

    None where a table would be too large, or its cells too wide.
    """
    try:
        from dp_accounting.pld import pld_pmf, privacy_loss_distribution
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'sampling_rate below 1 needs dp_accounting: pip install "certunlearn[dp]"',
            name="dp_accounting",
        ) from error
    most = max(1, binomial.quantile(deletions, rate, _UNSEEN))
    if sigma < _LEAST or most > _MOST_DRAWN or steps > _MOST_STEPS:
        return None
    unseen = float(scipy.stats.binom.sf(most, deletions, rate)) * (1 + 1e-9)
    log_weight = scipy.stats.binom.logpmf(np.arange(1, most + 1), deletions, rate)
    x = np.linspace(-_TAIL * sigma, most + _TAIL * sigma, 4001)
    log_none = deletions * math.log1p(-rate)
    loss = np.logaddexp(log_none, _log_some(x, sigma, log_weight)[0])
    log_density = scipy.stats.norm.logpdf(x, scale=sigma) + np.maximum(loss, 0)
    spread = math.sqrt(np.sum(loss**2 * np.exp(log_density)) * (x[1] - x[0]))
    width = loss[-1] - loss[0] + 20 * math.sqrt(steps) * spread
    step = max(min(_INTERVAL, spread / 10), width / min(_MOST_CELLS, _MOST_TERMS // most))
    if step > _WIDEST:
        return None
    low, high = math.floor(loss[0] / step), math.ceil(loss[-1] / step)
    remove, add = _profiles(np.arange(low, high + 1) * step, sigma, log_weight, log_none, unseen)
    connect = pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap
    pair = connect(step, low, high, remove), connect(step, -high, -low, add[::-1])
    return privacy_loss_distribution.PrivacyLossDistribution(*pair).self_compose(steps)


def _log_some(x: np.ndarray, sigma: float, log_weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log of the part of dP / dQ at x with examples drawn, and its slope: convex, increasing."""
    total, slope = np.full_like(x, -np.inf), np.zeros_like(x)
    for i, w in enumerate(log_weight.tolist(), start=1):
        term = w + (i * x - i * i / 2) / sigma**2
        total = np.logaddexp(total, term)
        slope += np.exp(term - total) * (i / sigma**2 - slope)
    return total, slope


def _profiles(
    loss: np.ndarray, sigma: float, log_weight: np.ndarray, log_none: float, unseen: float
) -> tuple[np.ndarray, np.ndarray]:
    """Divergences of P from Q at epsilon = loss, and of Q from P at epsilon = -loss."""
    # The draws of nobody, the same in P and Q, are subtracted beforehand: what is left is as small
    # as its result, and keeps its digits at a tiny sampling rate.
    open_ = loss > log_none  # dP / dQ is never below
    level = loss[open_] + np.log(-np.expm1(log_none - loss[open_]))
    x = np.full_like(level, np.inf)
    for i, w in enumerate(log_weight.tolist(), start=1):  # a term alone bounds x from above,
        x = np.minimum(x, (sigma**2 * (level - w) + i * i / 2) / i)
    for _ in range(100):  # and from there Newton's steps on a convex function cannot overshoot
        value, slope = _log_some(x, sigma, log_weight)
        move = (value - level) / slope
        x = x - move
        if np.all(np.abs(move) <= 1e-13 * (sigma + np.abs(x))):
            break
    remove, add = -np.expm1(np.minimum(loss, 0)), np.zeros_like(loss)
    loss = loss[open_]
    # P - e^loss Q beyond x, and Q - e^-loss P before it
    above = unseen - np.exp(level + scipy.special.log_ndtr(-x / sigma))
    below = np.exp(level - loss + scipy.special.log_ndtr(x / sigma))
    for i, w in enumerate(log_weight.tolist(), start=1):
        above += np.exp(w + scipy.special.log_ndtr((i - x) / sigma))
        below -= np.exp(w - loss + scipy.special.log_ndtr((x - i) / sigma))
    fall, rise = np.minimum(loss, 0), np.maximum(loss, 0)
    remove[open_] = np.where(loss > 0, above, np.exp(fall) * below - np.expm1(fall))
    add[open_] = np.where(loss > 0, np.exp(-rise) * above - np.expm1(-rise), below)
    # Rounding must not make a profile rise: the larger of it and what follows is never too small.
    remove = np.maximum.accumulate(np.clip(remove, 0, 1)[::-1])[::-1]
    return remove, np.maximum.accumulate(np.clip(add, 0, 1))


def _checked(sigma: Any, rate: Any, steps: Any, deletions: Any) -> tuple[float, float, int, int]:
    sigma, rate = checks.positive("noise_multiplier", sigma), checks.real("sampling_rate", rate)
    if not 0 < rate <= 1:
        raise ValueError(f"sampling_rate must be above 0 and at most 1, got {rate!r}")
    steps = checks.positive_int("steps", steps)
    return sigma, rate, steps, checks.positive_int("deletions", deletions)


def _nonnegative(name: str, value: Any) -> float:
    number = checks.real(name, value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} must be finite and at least 0, got {number!r}")
    return number
