"""Heads that are functions of whole-number sums: ridge regression and linear discriminants."""

import dataclasses
from decimal import Context, Decimal
from fractions import Fraction
from typing import NamedTuple, Self

import numpy as np

from certunlearn.sums import exact_solution, fast_solution, systems
from certunlearn.sums.kept import Kept
from certunlearn.sums.statistics import Statistics

_DIGITS = 60  # decimal digits of a bias before it is rounded to float32


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Which function of the sums a head is.

    Attributes:
      kind: `"ridge"` or `"lda"`.
      l2: weight of the L2 term.
    """

    kind: str
    l2: float


class Head(np.ndarray):
    """A float32 array that cannot be written to, and knows its `recipe`.

    What is computed from it, a slice or a sum, is a head no more: its recipe is None.
    """

    recipe: Recipe | None

    @classmethod
    def of(cls, values: np.ndarray, recipe: Recipe) -> Self:
        """These float32 values as a head."""
        head = np.array(values, np.float32).view(cls)
        head.recipe = recipe
        head.flags.writeable = False
        return head

    def __array_finalize__(self, source: object) -> None:
        """What NumPy derives from a head has no recipe."""
        self.recipe = None


class LinearDiscriminants(NamedTuple):
    """Scores are features @ weights + bias; the largest is the predicted class.

    Attributes:
      weights: `[d, classes]`.
      bias: `[classes]`.
    """

    weights: Head
    bias: Head


def ridge(stats: Statistics | Kept, l2: float | None = None) -> Head:
    """The ridge head of the rows in the sums: exactly rounded, so the same whatever the route.

    Args:
      stats: the sums; or what `keep` returned, which gives the same bits sooner.
      l2: weight of the L2 term, at least 2^-30 feature_norm^2; None for 1e-3, or what `keep` got.

    Returns:
      float32 params `[d]`, or `[d, outputs]`, that minimise the mean over the rows of
      (x^T w - y)^2 / 2 plus l2 / 2 ||w||^2, summed over outputs. Rows count by their class's public
      weight. Labels become targets: 1 for the class of an output and -1 for others; two classes
      have one output, positive for class 1.

    Raises:
      TypeError: if an argument is not of the right kind.
      ValueError: if `l2` is out of range or not that of `keep`, there are no rows, or a number is
        too large for float32.

    Guarantee:
      The head is a function of the whole-number sums alone. Removing rows from the sums gives the
      sums, and so the bits, of a model that never saw the rows: epsilon = delta = 0, for any
      number, order and choice of deletions, adaptive or not. Every number is the float32 nearest to
      the exact solution of the normal equations; where that is within 1.5 * 2^-256 of the midpoint
      of two, it is one of these, always the same.

    >>> import numpy as np
    >>> from certunlearn import exact
    >>> features, targets = np.eye(2, dtype=np.float32), np.array([1.0, -1.0])
    >>> stats = exact.collect(features, targets)
    >>> print(ridge(stats, l2=0.5))
    [ 0.5 -0.5]
    """
    if isinstance(stats, Kept):
        if l2 is not None and float(l2) != stats.l2:
            raise ValueError(f"l2 must be {stats.l2!r}, as keep got it, or None; got {l2!r}")
        return _shaped(fast_solution.solution(stats), stats.stats, stats.l2)
    chosen = 1e-3 if l2 is None else l2
    system = systems.ridge_system(_statistics(stats), chosen)
    return _shaped(exact_solution.solution(system), stats, float(chosen))


def lda(stats: Statistics, l2: float = 1e-3) -> LinearDiscriminants:
    """Linear discriminant analysis: class means and a pooled covariance, from the same sums.

    Args:
      stats: sums of labels.
      l2: what is added to the diagonal of the covariance; at least 2^-30 feature_norm^2.

    Returns:
      `LinearDiscriminants`, float32: weights (covariance + l2 I)^-1 mean_c, and biases
      -mean_c^T weights_c / 2 + log(share of class c).

    Raises:
      TypeError: if an argument is not of the right kind.
      ValueError: if `l2` is out of range, the targets are no labels, or a class has no rows.

    Guarantee:
      As for `ridge`: a function of the whole-number sums alone. Means are rounded to whole numbers
      of the features' unit, feature_norm / 2^(bits - 1) or less; biases follow from the released
      weights.

    >>> import numpy as np
    >>> from certunlearn import exact
    >>> stats = exact.collect(np.array([[1.0], [0.5], [-1.0]]), np.array([1, 1, 0]))
    >>> found = lda(stats, l2=0.1)
    >>> print(np.argmax(np.array([[0.7], [-0.9]]) @ found.weights + found.bias, axis=1))
    [1 0]
    """
    system, means = systems.discriminant_system(_statistics(stats), l2)
    weights = exact_solution.solution(system)
    recipe = Recipe("lda", float(l2))
    unit = Fraction(2) ** stats.settings.feature_exponent
    counts = systems.class_weight(stats)
    biases = [
        _bias(means[:, c], weights[:, c], unit, Fraction(int(counts[c]), stats.weight))
        for c in range(len(counts))
    ]
    return LinearDiscriminants(Head.of(weights, recipe), Head.of(np.array(biases), recipe))


def _bias(mean: np.ndarray, weights: np.ndarray, unit: Fraction, share: Fraction) -> np.float32:
    """-mean . weights / 2 + log(share), by arithmetic that is the same everywhere."""
    exact = Context(prec=_DIGITS)
    product = sum(
        (int(m) * Fraction(float(w)) for m, w in zip(mean, weights, strict=True)), Fraction(0)
    )
    half = -product * unit / 2
    linear = exact.divide(Decimal(half.numerator), Decimal(half.denominator))
    logarithm = exact.ln(exact.divide(Decimal(share.numerator), Decimal(share.denominator)))
    return np.float32(float(exact.add(linear, logarithm)))


def _statistics(stats: Statistics) -> Statistics:
    if not isinstance(stats, Statistics):
        raise TypeError(f"stats must be exact.Statistics, as collect makes them, got {stats!r:.80}")
    return stats


def _shaped(values: np.ndarray, stats: Statistics, l2: float) -> Head:
    """`[d, outputs]`, or `[d]` where targets are one number a row or labels of two classes."""
    settings = stats.settings
    single = settings.classes == 2 or (settings.classes is None and settings.outputs is None)
    return Head.of(values[:, 0] if single else values, Recipe("ridge", l2))
