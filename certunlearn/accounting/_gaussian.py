"""The exact trade-off between N(0, 1) and N(mu, 1), in both directions.

With h = epsilon / mu, u = h - mu / 2 and v = h + mu / 2, Balle & Wang (2018, Theorem 8) and Dong,
Roth & Su (2022, Corollary 2.13) give

    delta = Phi(-u) - e^epsilon Phi(-v).

Evaluated as it stands, this cancels. Because v^2 - u^2 = 2 epsilon, phi(v) e^epsilon = phi(u), so
with Mills' ratio M(x) = Phi(-x) / phi(x), whose derivative is x M(x) - 1,

    delta = phi(u) (M(u) - M(v)) = phi(u) * integral from u to v of (1 - x M(x)) dx.

The integrand is positive and smooth; for mu <= 1 a Gauss-Legendre rule integrates it to full
precision. For mu > 1 the difference no longer cancels. Everything is done in logarithms.
"""

from collections.abc import Callable

import numpy as np
import scipy  # its parts load when they are first used
from numpy.typing import ArrayLike

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_SQRT_HALF_PI = np.sqrt(np.pi / 2)
_LOG_SQRT_2PI = np.log(2 * np.pi) / 2

# Special functions are good to a few units in the last place and get divided by gaps of at least
# 1/1500 of their size (x^2 for the integrand at x = 38); this much covers the result.
_SAFETY = 1e-12

_TIGHT = {"xatol": 0.0, "xrtol": 4e-15, "fatol": 0.0, "frtol": 0.0}


def log_delta(epsilon: ArrayLike, mu: ArrayLike) -> np.ndarray:
    """Logarithm of the exact delta at `epsilon` of N(0, 1) against N(mu, 1).

    Args:
      epsilon: array of numbers >= 0.
      mu: array of numbers >= 0 that broadcasts with it; infinity is allowed. NaN counts as
        infinity.

    Returns:
      float64 array, relative error of e^result at most 1e-9 for mu from 1e-6 to 1e3 and delta
      down to 1e-300; minus infinity at mu = 0.

    >>> round(float(np.exp(log_delta(1.0, 1.0))), 6)
    0.126937
    """
    epsilon, mu = np.broadcast_arrays(np.asarray(epsilon, float), np.asarray(mu, float))
    result = np.full(mu.shape, -np.inf)
    result[~np.isfinite(mu)] = 0.0  # NaN, too, proves nothing
    inside = (mu > 0) & np.isfinite(mu) & np.isfinite(epsilon)
    if np.any(inside):
        result[inside] = _log_delta(epsilon[inside], mu[inside])
    return result


def _log_delta(epsilon: np.ndarray, mu: np.ndarray) -> np.ndarray:
    u, v = epsilon / mu - mu / 2, epsilon / mu + mu / 2
    result = np.empty_like(mu)
    small, near = mu <= 1, (mu > 1) & (u <= 0)
    far = ~small & ~near
    if np.any(small):
        middle, half = (u + mu / 2)[small], mu[small] / 2
        nodes = middle[:, None] + half[:, None] * _NODES
        gap = half * (_one_minus_x_mills(nodes) @ _WEIGHTS)
        result[small] = _log_phi(u[small]) + np.log(gap)
    if np.any(far):
        result[far] = _log_phi(u[far]) + np.log(_mills(u[far]) - _mills(v[far]))
    if np.any(near):
        difference = scipy.special.ndtr(-u[near]) - np.exp(_log_phi(u[near])) * _mills(v[near])
        result[near] = np.log(difference)
    return result


def delta(epsilon: ArrayLike, mu: ArrayLike) -> np.ndarray:
    """The exact delta at `epsilon` of N(0, 1) against N(mu, 1); see `log_delta`."""
    return np.exp(log_delta(epsilon, mu))


def total_variation(mu: ArrayLike) -> np.ndarray:
    """Total-variation distance of N(0, 1) and N(mu, 1), 2 Phi(mu / 2) - 1.

    >>> round(float(total_variation(1.0)), 6)
    0.382925
    """
    return scipy.special.erf(np.asarray(mu, float) / np.sqrt(8))


def epsilon(mu: ArrayLike, delta: float) -> np.ndarray:
    """The smallest epsilon >= 0 at which N(0, 1) and N(mu, 1) are (epsilon, delta)-close.

    Args:
      mu: array of numbers >= 0; infinity is allowed.
      delta: between 0 and 1.

    Returns:
      float64 array, rounded up by about 1e-12 relative: 0 where delta covers the total variation,
      infinity where mu is infinite.

    >>> print(f"{float(epsilon(1.0, 1e-5)):.5f}")
    4.37718
    """
    mu = np.asarray(mu, float)
    log_target = np.log(delta)
    result = np.where(np.isfinite(mu), 0.0, np.inf)  # NaN, too, proves nothing
    open_ = np.isfinite(mu) & (log_delta(0.0, mu) > log_target)
    if np.any(open_):
        inner = mu[open_]
        # delta <= Phi(-u) <= exp(-u^2 / 2) bounds the root from above.
        high = inner * (np.sqrt(-2 * log_target) + inner / 2)
        root = _find_root(
            lambda e, m: log_delta(e, m) - log_target,
            (np.zeros_like(inner), high * (1 + 1e-9)),
            args=(inner,),
        )
        result[open_] = root * (1 + _SAFETY)
    return result


def mu(epsilon: float, delta: float) -> float:
    """The largest mu at which N(0, 1) and N(mu, 1) are (epsilon, delta)-close.

    Args:
      epsilon: positive.
      delta: between 0 and 1.

    Returns:
      mu, rounded down by about 1e-12 relative.

    >>> print(f"{mu(1.0, 1e-5):.5f}")
    0.26805
    """
    log_target = np.log(delta)
    low = high = 1.0
    while log_delta(epsilon, low) > log_target:
        low /= 2
    while log_delta(epsilon, high) <= log_target:
        high *= 2
    root = _find_root(lambda m: log_delta(epsilon, m) - log_target, (low, high))
    return float(root) * (1 - _SAFETY)


def _find_root(
    function: Callable[..., np.ndarray],
    bracket: tuple[ArrayLike, ArrayLike],
    args: tuple[np.ndarray, ...] = (),
) -> np.ndarray:
    """Where the function crosses zero in the bracket, elementwise, as closely as floats allow."""
    from scipy.optimize import elementwise  # loading it takes a third of a second

    return elementwise.find_root(function, bracket, args=args, tolerances=_TIGHT, maxiter=2000).x


def _log_phi(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # then minus infinity is right
        return -0.5 * x * x - _LOG_SQRT_2PI


def _mills(x: np.ndarray) -> np.ndarray:
    """Phi(-x) / phi(x)."""
    return _SQRT_HALF_PI * scipy.special.erfcx(x / np.sqrt(2))


def _one_minus_x_mills(x: np.ndarray) -> np.ndarray:
    """1 - x M(x): its asymptotic series far out, where the difference loses x^2 of precision."""
    direct = 1 - x * _mills(x)
    far = x > 20
    if not np.any(far):
        return direct
    y = 1 / x[far] ** 2
    # 1 - x M(x) = y (1 - 3 y (1 - 5 y (1 - ...))): the terms fall until the 200th at x = 20.
    series = np.ones_like(y)
    for odd in range(25, 1, -2):
        series = 1 - odd * y * series
    direct[far] = y * series
    return direct
