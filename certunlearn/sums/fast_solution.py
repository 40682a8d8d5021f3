"""The head of what is kept: float64 corrects an older solution, and proves what it can.

The bits are those of `exact_solution.solution` for the same sums. Only the work differs.
"""

from typing import NamedTuple

import numpy as np

from certunlearn.sums import exact_solution, systems
from certunlearn.sums.exact_solution import Point, System
from certunlearn.sums.kept import Kept

# Columns of a block in float64 products: a block sums up so many terms, and d / 32 blocks follow.
_BLOCK = 32
_UNIT = 2.0**-53
# To what share of itself a correction is worked out: before an exact step, and where none follows.
_NEAR, _CLOSE = 1e-6, 1e-12
_MOST_CORRECTIONS = 3
_MOST_STEPS = 3
# Where float64 is expected to leave more numbers open than this, an exact step comes first.
_MOST_OPEN = 0.5


class Series(NamedTuple):
    """About (A + lambda I)^-1 times some columns.

    The kept inverse Z is for lambda - drift, so the product is the sum of Z (-drift Z)^j.

    Attributes:
      total: the sum so far.
      term: its last term.
      share: of the total, about what is left out.
    """

    total: np.ndarray
    term: np.ndarray
    share: float


def solution(kept: Kept) -> np.ndarray:
    """The float32 `[d, outputs]` of the sums that are kept.

    Float64 corrects the older solution and bounds what is left, which decides nearly all numbers if
    the correction is small. Where it is not, exact steps make it smaller.
    """
    system = systems.ridge_system(kept.stats, kept.l2)
    matrix = kept.stats.gram.to_float()
    found = np.full(system.right.shape, np.nan)
    columns, point, digits = np.arange(system.right.shape[1]), kept.point, list[np.ndarray]()
    for accuracy in (_CLOSE, *[_NEAR] * (_MOST_STEPS - 1)):
        part = system.columns(columns)
        ahead = further(kept, part, point.left(part), _NEAR)
        if _expected_open(part, point, ahead.total, matrix) <= _MOST_OPEN:
            ahead = further(kept, part, ahead, accuracy)
            found[:, columns] = corrected(kept, part, point, ahead, matrix)
        still = np.isnan(found[:, columns]).any(axis=0)
        columns, point, part = columns[still], point.columns(still), part.columns(still)
        if not len(columns):
            return found.astype(np.float32)
        digits = digits or system.matrix.digits(exact_solution.DIGIT_BITS)
        point = exact_solution.step(part, point, ahead.total[:, still], digits)

    def solve(right: np.ndarray) -> np.ndarray:
        return further(kept, part, right, _NEAR).total

    point = exact_solution.refined(part, point, solve)
    found[:, columns] = exact_solution.rounded(part, point)
    return found.astype(np.float32)


def corrected(
    kept: Kept, system: System, point: Point, ahead: Series, matrix: np.ndarray
) -> np.ndarray:
    """Float64: the float32 numbers that float64 decides, and NaN for others.

    Args:
      kept: the inverse.
      system: the equations.
      point: a guess with its exact residual r.
      ahead: a guess of the correction.
      matrix: A in float64, each number rounded twice at most.

    The correction D solves (A + lambda I) D = r. What it leaves is computed in float64, with a
    bound on its rounding: r was rounded once, A twice, a product in blocks is a sum with at most
    32 + d / 32 + 1 roundings on the way of a term, in whatever order, and the norm of |A| |D| is
    at most ||A||_F ||D||.
    """
    size = float(np.linalg.norm(matrix)) * (1 + 1e-9)
    rest, more = point.left(system), ahead.total
    values = np.ldexp(point.values.astype(np.float64), -point.places.astype(np.int64))
    correction = np.zeros_like(rest)
    rounding = 4 * _UNIT * exact_solution.norms(rest)
    for _ in range(_MOST_CORRECTIONS):
        correction = correction + more
        rest = rest - _blocked(matrix, more) - system.ridge * more
        length, left = exact_solution.norms(more), exact_solution.norms(rest)
        rounding = rounding + _UNIT * (
            (_roundings(matrix) * size + 8 * system.ridge) * length + 4 * left
        )
        radius = (left + rounding) * (1 + 1e-9) / system.ridge
        # Adding up value and correction rounds, too, as did turning whole numbers into float64:
        # each by 2^-53 of its magnitude, which `enclosed` allows for fourfold, and twice for sums.
        radius = radius + 4 * _UNIT * np.max(np.abs(correction), axis=0, initial=0.0)
        found = exact_solution.enclosed(
            np.ldexp(values + correction, system.exponent), np.ldexp(radius, system.exponent)
        )
        found[system.absent] = 0.0
        if not np.isnan(found).any() or np.all(left <= rounding):
            break
        more = further(kept, system, rest, _NEAR).total
    return found


def further(kept: Kept, system: System, begun: Series | np.ndarray, accuracy: float) -> Series:
    """A series with more terms, until what it leaves out is a share of `accuracy`.

    Args:
      kept: the inverse.
      system: the equations.
      begun: the series so far, or the columns that it is for.
      accuracy: the share.
    """
    series = begun if isinstance(begun, Series) else Series(np.zeros_like(begun), begun, 1.0)
    drift = abs(kept.drift) / system.ridge
    total, term, share = series
    while share > accuracy:
        term = multiplied(kept.inverse, term if share == 1 else -kept.drift * term)
        total, share = total + term, share * drift
    return Series(total, term, share)


def _expected_open(system: System, point: Point, ahead: np.ndarray, matrix: np.ndarray) -> float:
    """About how many numbers `corrected` would leave open: no bound, a guess of what is cheaper."""
    values = np.ldexp(point.values.astype(np.float64), -point.places.astype(np.int64)) + ahead
    length = _roundings(matrix) * float(np.linalg.norm(matrix)) * exact_solution.norms(ahead)
    radius = np.ldexp(_UNIT * length / system.ridge, system.exponent)
    with np.errstate(over="ignore", invalid="ignore"):  # a wrong inverse may lead anywhere
        spacing = np.spacing(np.abs(np.ldexp(values, system.exponent)).astype(np.float32))
    shares = np.minimum(2 * radius / spacing.astype(np.float64), 1)
    return float(np.sum(shares[~system.absent]))


def multiplied(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """matrix @ right."""
    product: np.ndarray = matrix @ right
    return product


def _blocked(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """matrix @ right, in blocks of 32 columns that are added up afterwards."""
    total = np.zeros_like(right)
    for first in range(0, len(matrix), _BLOCK):
        total += matrix[:, first : first + _BLOCK] @ right[first : first + _BLOCK]
    return total


def _roundings(matrix: np.ndarray) -> int:
    """Of a term of `_blocked`, at most: in its block, of the sums of blocks, and of the matrix."""
    return _BLOCK + -(-len(matrix) // _BLOCK) + 8
