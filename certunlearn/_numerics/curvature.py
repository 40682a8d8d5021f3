"""What one step of gradient descent does to distances, on losses of known curvature."""

from collections.abc import Sequence

import numpy as np

from certunlearn._numerics import checks


def contraction(
    learning_rate: float | Sequence[float] | np.ndarray, strong_convexity: float, smoothness: float
) -> np.ndarray:
    """The factor by which a step of gradient descent brings two points closer, at most.

    Args:
      learning_rate: gamma: a positive number, or numbers, of which some may be 0.
      strong_convexity: m > 0 of every batch's loss.
      smoothness: L of every batch's loss, at least m.

    Returns:
      max(|1 - gamma m|, |1 - gamma L|), float64 of the shape of `learning_rate`. It is below 1 if
      and only if gamma < 2 / L.

    Raises:
      TypeError: if an argument is not a number.
      ValueError: if one is out of range.

    Guarantee:
      It bounds ||T(x) - T(y)|| / ||x - y|| for T(x) = x - gamma grad F(x), F the same batch's loss:
      T(x) - T(y) = (1 - gamma H) (x - y), where H, the mean Hessian between x and y, is symmetric
      with eigenvalues in [m, L]. Quadratics attain it.

    >>> float(contraction(learning_rate=1.0, strong_convexity=0.25, smoothness=1.5))
    0.75
    """
    several = np.ndim(learning_rate) > 0
    gamma = np.asarray(
        checks.per_step(
            "learning_rate", learning_rate, np.size(learning_rate), zero_allowed=several
        )
    )
    low = checks.positive("strong_convexity", strong_convexity)
    high = checks.positive("smoothness", smoothness)
    check_curvature(low, high)
    return factors(gamma, low, high)


def factors(gamma: np.ndarray, low: float, high: float) -> np.ndarray:
    """`contraction` without its checks."""
    return np.maximum(np.abs(1 - gamma * low), np.abs(1 - gamma * high))


def check_curvature(low: float, high: float) -> None:
    """Raises ValueError if the smoothness is below the strong convexity."""
    if high < low:
        raise ValueError(f"smoothness must be at least strong_convexity {low!r}, got {high!r}")
