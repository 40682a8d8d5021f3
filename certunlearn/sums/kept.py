"""What is kept between deletions, so that the next head costs O(k d^2 + a few d^2 outputs)."""

import dataclasses
import math

import numpy as np
import scipy.linalg
from jax.typing import ArrayLike

from certunlearn.sums import exact_solution, statistics, systems
from certunlearn.sums.exact_solution import Point, System
from certunlearn.sums.statistics import Statistics

# Columns of a block in float64 products: a block sums up so many terms, and d / 32 blocks follow.
_BLOCK = 32
_UNIT = 2.0**-53
# The inverse is worked out anew when so large a share of the weight is gone since.
_MOST_DRIFT = 0.01
# Relative accuracy to which the drift of the diagonal is followed within one correction.
_FOLLOWED = 1e-9
_MOST_CORRECTIONS = 3


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Kept:
    """Sums, an inverse for them, and a solution with its exact residual. All of it is private.

    Like the sums, it holds traces of every row until that row is removed from it, and its float64
    numbers hold rounding errors of rows that were removed. None of that reaches a head.

    Attributes:
      statistics: the sums.
      l2: weight of the L2 term.
      inverse: float64 `[d, d]`, about (A + lambda I)^-1 but for the drift of lambda.
      drift: how much lambda has changed since the inverse was worked out, in its units.
      point: a solution of the equations of some earlier sums; its residual is for the present ones.
    """

    statistics: Statistics
    l2: float
    inverse: np.ndarray
    drift: float
    point: Point

    def __repr__(self) -> str:
        """What is public of it."""
        return f"Kept({self.statistics.settings}, l2={self.l2!r}, <private>)"


def keep(stats: Statistics, l2: float = 1e-3) -> Kept:
    """Works out what makes later deletions cheap: O(d^3), once.

    Args:
      stats: the sums.
      l2: as for `ridge`.

    Raises:
      TypeError: if an argument is not of the right kind.
      ValueError: if `l2` is out of range, or there are no rows.

    >>> import numpy as np
    >>> from certunlearn import exact
    >>> features, targets = np.eye(3, dtype=np.float32), np.array([1.0, 0.5, -1.0])
    >>> kept = exact.keep(exact.collect(features, targets), l2=0.1)
    >>> kept = exact.remove(kept, features[:1], targets[:1])
    >>> print(exact.ridge(kept))
    [ 0.          0.41666666 -0.8333333 ]
    """
    system = systems.ridge_system(stats, l2)
    return _kept(stats, l2, system, exact_solution.origin(system))


def add(stats: Statistics | Kept, features: ArrayLike, targets: ArrayLike) -> Statistics | Kept:
    """The sums, or what is kept of them, with more rows."""
    if isinstance(stats, Kept):
        return _changed(
            stats, statistics.add(stats.statistics, features, targets), features, targets, 1
        )
    return statistics.add(stats, features, targets)


def remove(stats: Statistics | Kept, features: ArrayLike, targets: ArrayLike) -> Statistics | Kept:
    """The sums, or what is kept of them, without these rows."""
    if isinstance(stats, Kept):
        return _changed(
            stats, statistics.remove(stats.statistics, features, targets), features, targets, -1
        )
    return statistics.remove(stats, features, targets)


def _changed(
    kept: Kept, stats: Statistics, features: ArrayLike, targets: ArrayLike, sign: int
) -> Kept:
    """What is kept, for sums to which rows were added (sign 1) or from which they were taken."""
    settings = stats.settings
    rows = settings.feature_rows(features).astype(np.float64)
    weights, wanted = systems.weights_and_targets(settings, settings.target_rows(targets))
    system = systems.ridge_system(stats, kept.l2)
    old = systems.ridge_system(kept.statistics, kept.l2)
    point = _moved_residual(kept.point, rows, sign * weights, wanted, old, system)
    drift = kept.drift + system.ridge - old.ridge
    if abs(drift) > _MOST_DRIFT * system.ridge:
        return _kept(stats, kept.l2, system, point)
    # Woodbury: (M + U W U^T)^-1 = Z - Z U (W^-1 + U^T Z U)^-1 U^T Z.
    reached = kept.inverse @ rows.T
    middle = rows @ reached + np.diag(1.0 / (sign * weights))
    try:
        inverse = kept.inverse - reached @ np.linalg.solve(middle, reached.T)
    except np.linalg.LinAlgError:
        return _kept(stats, kept.l2, system, point)
    return Kept(stats, kept.l2, inverse, drift, point)


def _kept(stats: Statistics, l2: float, system: System, start: Point) -> Kept:
    factor = scipy.linalg.cho_factor(
        exact_solution.dense(system), lower=True, overwrite_a=True, check_finite=False
    )
    inverse = scipy.linalg.cho_solve(factor, np.eye(len(system.right)), overwrite_b=True)
    inverse = (inverse + inverse.T) / 2
    point = exact_solution.refined(system, start, lambda right: inverse @ right)
    return Kept(stats, l2, inverse, 0.0, point)


def _moved_residual(
    point: Point,
    rows: np.ndarray,
    weights: np.ndarray,
    wanted: np.ndarray,
    old: System,
    new: System,
) -> Point:
    """The point with its residual for the sums after rows of these weights were added, exactly.

    b - (A + lambda I) w changes by sum weight * row * (target - row . w) - (lambda's change) w.
    """
    scale = 1 << new.binary_places
    fits = systems.product_with(rows, point.values)  # [k, outputs], in units of 2^-places
    units = np.array([1 << int(places) for places in point.places], dtype=object)
    misses = (wanted * units - fits) * weights.astype(np.int64).astype(object)[:, None]
    gained = systems.product_with(np.ascontiguousarray(rows.T), misses) * scale
    residual = point.residual + gained - point.values * (new.diagonal - old.diagonal)
    return Point(point.values, point.places, residual)


def solution(kept: Kept) -> np.ndarray:
    """The float32 `[d, outputs]` that `exact_solution.solution` gives for the same sums, sooner.

    Float64 corrects the older solution and bounds what is left; where that decides all numbers, it
    is enough. Otherwise exact steps go on from the older solution.
    """
    system = systems.ridge_system(kept.statistics, kept.l2)
    solve = _solver(kept, system)
    point = kept.point
    corrected = _corrected(kept, system, point)
    if corrected is not None:
        return corrected.astype(np.float32)
    return exact_solution.rounded(system, exact_solution.refined(system, point, solve))


def _solver(kept: Kept, system: System) -> exact_solution.Solve:
    """Solves with A + lambda I: the inverse is for lambda - drift, and a series follows."""
    share = abs(kept.drift) / system.ridge
    terms = 1 if share == 0 else max(1, math.ceil(math.log(_FOLLOWED) / math.log(share)))

    def solve(right: np.ndarray) -> np.ndarray:
        term = total = kept.inverse @ right
        for _ in range(terms - 1):
            term = kept.inverse @ (-kept.drift * term)
            total = total + term
        return total

    return solve


def _corrected(kept: Kept, system: System, point: Point) -> np.ndarray | None:
    """The float32 numbers if float64 decides them all, else None.

    The correction D solves (A + lambda I) D = r, r the exact residual. What it leaves is computed
    in float64, with a bound on its rounding: r itself is rounded once, A twice, a product in blocks
    is a sum of at most 32 + d / 32 + 1 roundings, in whatever order, of terms |a| |D|, whose
    norms are at most ||A||_F ||D||.
    """
    solve = _solver(kept, system)
    matrix = kept.statistics.gram.to_float()
    frobenius = float(np.linalg.norm(matrix)) * (1 + 1e-9)
    places = point.places.astype(np.int64)
    residual = np.ldexp(point.residual.astype(np.float64), -places - system.binary_places)
    values = np.ldexp(point.values.astype(np.float64), -places)
    terms = _BLOCK + math.ceil(len(matrix) / _BLOCK) + 8
    correction = np.zeros_like(residual)
    rounding = 4 * _UNIT * exact_solution.norms(residual)
    rest = residual
    for _ in range(_MOST_CORRECTIONS):
        ahead = solve(rest)
        correction = correction + ahead
        rest = rest - _blocked(matrix, ahead) - system.ridge * ahead
        length = exact_solution.norms(ahead)
        rounding = rounding + _UNIT * (
            terms * frobenius * length + 8 * system.ridge * length + 4 * exact_solution.norms(rest)
        )
        left = exact_solution.norms(rest)
        if np.all(left <= rounding):
            break
    radius = (left + rounding) * (1 + 1e-9) / system.ridge * (1 + 1e-12)
    # Adding up value and correction rounds, too, as did turning whole numbers into float64: each
    # by 2^-53 of its magnitude, which `enclosed` allows for fourfold, and twice for the sum.
    radius = radius + 4 * _UNIT * np.max(np.abs(correction), axis=0, initial=0.0)
    found = exact_solution.enclosed(
        np.ldexp(values + correction, system.exponent), np.ldexp(radius, system.exponent)
    )
    found[system.absent] = 0.0
    return None if np.isnan(found).any() else found


def _blocked(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """matrix @ right, in blocks of 32 columns that are added up afterwards."""
    total = np.zeros_like(right)
    for first in range(0, len(matrix), _BLOCK):
        total += matrix[:, first : first + _BLOCK] @ right[first : first + _BLOCK]
    return total
