"""The equations of each head in whole numbers."""

from fractions import Fraction

import numpy as np

from certunlearn._numerics import checks
from certunlearn.sums import exact_solution
from certunlearn.sums.exact_solution import System
from certunlearn.sums.fixed_point import Settings
from certunlearn.sums.statistics import Statistics

# Least L2 weight, as a share of feature_norm^2: float64 then guesses solutions to three digits.
LEAST_SHARE = 2.0**-30
# So few numbers Python multiplies sooner than it splits the other factor into digits.
_FEW = 2048


def ridge_system(stats: Statistics, l2: float) -> System:
    """The normal equations of ridge regression.

    The objective is the mean of (x^T w - y)^2 / 2, weighted by public class weights, plus
    l2 / 2 ||w||^2. With x = u q and y = v p in whole numbers, sums A = sum q q^T and b = sum q p,
    and total weight n, its gradient is 0 where (u^2 A + n l2 I) w = u v b, so w = (v / u) w' with
    (A + (n l2 / u^2) I) w' = b. A float is a whole number of some 2^-s, so n l2 / u^2 is one, too.

    Raises:
      TypeError: if `l2` is not a number.
      ValueError: if it is too small, or there are no rows.
    """
    l2, settings = check_l2(l2, stats.settings), stats.settings
    _require_rows(stats)
    diagonal, places = _diagonal(l2, settings)
    cross = stats.cross.to_objects()
    exponent = -settings.feature_exponent
    if settings.classes is None:
        exponent += settings.target_exponent
    else:
        cross = _one_against_all(cross)
    return System(stats.gram, diagonal * stats.weight, places, cross, exponent)


def discriminant_system(stats: Statistics, l2: float) -> tuple[System, np.ndarray]:
    """The equations of linear discriminants, and the class means in whole numbers.

    The mean of class c is m_c, its sum divided by its weight n_c and rounded to a whole number of
    units. The pooled covariance around these is u^2 C / n with
    C = sum w (q - m)(q - m)^T = A - sum_c (s_c m_c^T + m_c s_c^T - n_c m_c m_c^T), and with
    e_c = s_c - n_c m_c the bracket is n_c m_c m_c^T + e_c m_c^T + m_c e_c^T. Weights solve
    (u^2 C / n + l2 I) w = u m_c, so w = w' / u with (C + (n l2 / u^2) I) w' = n m_c.

    Raises:
      TypeError: if `l2` is not a number.
      ValueError: if it is too small, the targets are no labels, or a class has no rows.
    """
    l2, settings = check_l2(l2, stats.settings), stats.settings
    if settings.classes is None:
        raise ValueError(
            "stats must be of labels, collect(..., classes=...), got regression targets"
        )
    _require_rows(stats)
    counts = class_weight(stats)
    if not np.all(counts):
        raise ValueError(f"every class must have rows, got none of class {int(np.argmin(counts))}")
    sums = stats.cross.to_objects()
    means = (2 * sums + counts) // (2 * counts)  # to the nearest
    spread = stats.gram
    for mean, rest, count in zip(
        means.T.astype(np.int64),
        (sums - means * counts).T.astype(np.int64),
        counts.tolist(),
        strict=True,
    ):
        square = np.outer(mean, mean)  # below 2^40; and so is half the count
        high, low = divmod(count, 1 << 20)
        cross = np.outer(rest, mean)
        spread = spread.minus(square * low + cross + cross.T).minus(square * high, 20)
    diagonal, places = _diagonal(l2, settings)
    right = means * stats.weight
    return (
        System(spread, diagonal * stats.weight, places, right, -settings.feature_exponent),
        means,
    )


def class_weight(stats: Statistics) -> np.ndarray:
    """Python integers `[classes]`: each class's rows, times its public weight."""
    assert stats.class_counts is not None
    weights = stats.settings.class_weights
    counts = stats.class_counts.astype(object)
    return counts if weights is None else counts * np.array(weights, dtype=object)


def weights_and_targets(settings: Settings, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row's weight `[k]`, float64, and what its outputs should be, Python integers."""
    weights = np.ones(len(targets))
    if settings.classes is None:
        return weights, targets.reshape(len(targets), -1).astype(object)
    if settings.class_weights is not None:
        weights = np.asarray(settings.class_weights, np.float64)[targets]
    labels = np.arange(settings.classes) == targets[:, None]
    wanted = np.where(labels, 1, -1).astype(object)
    return weights, wanted[:, 1:] if settings.classes == 2 else wanted


def product_with(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Python integers: whole numbers of magnitude at most 2^20, float64, times Python integers."""
    if left.size <= _FEW:
        plain: np.ndarray = left.astype(np.int64).astype(object) @ right
        return plain
    total = np.zeros((len(left), right.shape[1]), np.int64).astype(object)
    for place, digit in enumerate(exact_solution.digits_of(right)):
        part = (left @ digit).astype(np.int64).astype(object)
        total = total + part * (1 << exact_solution.DIGIT_BITS * place)
    return total


def check_l2(l2: float, settings: Settings) -> float:
    """An L2 weight as a float, or an error."""
    l2 = checks.positive("l2", l2)
    least = LEAST_SHARE * settings.feature_norm**2
    if l2 < least:
        raise ValueError(f"l2 must be at least 2^-30 * feature_norm^2 = {least:.6g}, got {l2!r}")
    return l2


def _require_rows(stats: Statistics) -> None:
    if stats.rows == 0:
        raise ValueError("stats must hold at least one row, got none: a head of no data is no head")


def _diagonal(l2: float, settings: Settings) -> tuple[int, int]:
    """l2 / u^2 as a whole number of 2^-places, and the places."""
    exact = Fraction(l2) * Fraction(2) ** (-2 * settings.feature_exponent)
    return exact.numerator, exact.denominator.bit_length() - 1


def _one_against_all(sums: np.ndarray) -> np.ndarray:
    """sum w q y with y = 1 for the class and -1 for the others, from the sums of each class."""
    against = 2 * sums - sums.sum(axis=1, keepdims=True)
    return against[:, 1:] if sums.shape[1] == 2 else against
