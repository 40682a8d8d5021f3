"""Correctly rounded solutions of linear systems in whole numbers.

A head must not tell how it was worked out: a fresh solve, an update of an older solution and
another machine's LAPACK all have to give the same bits. So floating-point only guesses here. Every
guess is checked in exact arithmetic, and a number leaves when it is *proved* which float32 it
rounds to.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import scipy  # its parts load when they are first used

from certunlearn.sums.wide_integers import WideIntegers

# Bits of a digit of the matrix and of a step. 2^14 products of two of them, in magnitude at most
# 2^19 and 2^20, sum up to at most 2^53: exact in float64, in any order. `Settings` allows no more
# features.
DIGIT_BITS, STEP_BITS = 20, 20
# Columns worked on at once, which bounds the memory that Python's integers take.
_COLUMNS = 64
# Where the boundaries between float32 numbers lie: above their midpoints by sqrt(2) * 2^-256. No
# rational number lies there, so every solution is decided after finitely many digits.
_OFFSET_EXPONENT = -256
# Radius, beyond float64's own, below which two numbers are not told apart by float64: far more than
# the offset, far less than half the spacing of the smallest float32 numbers.
_LEAST_RADIUS = 2.0**-200
_LARGEST = 2.0**127  # half the largest float32
_SHARE = 1 + 1e-12  # more than the rounding of a float64 norm of nonnegative terms
# Steps that gain less than this factor mean that the guess of the inverse is useless.
_LEAST_GAIN = 4.0
_MOST_STEPS = 400

Solve = Callable[[np.ndarray], np.ndarray]


class System(NamedTuple):
    """The equations (A + lambda I) w = b in whole numbers, and the unit of their solution.

    Attributes:
      matrix: A, `[d, d]`, symmetric and positive semidefinite.
      diagonal: lambda * 2^binary_places, positive.
      binary_places: how many binary places lambda has.
      right: b, Python integers `[d, outputs]`.
      exponent: what is released is w * 2^exponent.
    """

    matrix: WideIntegers
    diagonal: int
    binary_places: int
    right: np.ndarray
    exponent: int

    def columns(self, chosen: np.ndarray | slice) -> "System":
        """The equations of some of the outputs."""
        return self._replace(right=self.right[:, chosen])

    @property
    def ridge(self) -> float:
        """Lambda, to float64."""
        return float(Fraction(self.diagonal, 1 << self.binary_places))

    @property
    def absent(self) -> np.ndarray:
        """Bool `[d]`: features that are 0 in every row, whose exact solution is 0."""
        return (np.diagonal(self.matrix.high) | np.diagonal(self.matrix.low)) == 0


class Point(NamedTuple):
    """A guess w = values * 2^-places, and its exact residual. Both are private, like the sums.

    Attributes:
      values: Python integers `[d, outputs]`.
      places: Python integers `[outputs]`.
      residual: 2^(binary_places + places) * (b - (A + lambda I) w), Python integers.
    """

    values: np.ndarray
    places: np.ndarray
    residual: np.ndarray

    def columns(self, chosen: np.ndarray | slice) -> "Point":
        """Some of the outputs."""
        return Point(self.values[:, chosen], self.places[chosen], self.residual[:, chosen])

    def left(self, system: System) -> np.ndarray:
        """Float64 `[d, outputs]`: b - (A + lambda I) w, rounded once."""
        exponents = -self.places.astype(np.int64) - system.binary_places
        found: np.ndarray = np.ldexp(self.residual.astype(np.float64), exponents)
        return found

    def radius(self, system: System) -> np.ndarray:
        """Float64 `[outputs]`: how far w is from the solution at most, in units of 2^-places.

        A is positive semidefinite, so ||w - w*|| <= ||(A + lambda I) (w - w*)|| / lambda.
        """
        return norms(self.residual.astype(np.float64)) / float(system.diagonal) * _SHARE


def norms(columns: np.ndarray) -> np.ndarray:
    """Upper bounds of the columns' L2 norms."""
    largest = np.max(np.abs(columns), axis=0, initial=0.0)
    scale = np.where(largest > 0, largest, 1.0)  # squares neither overflow nor vanish
    squares = np.sum(np.square(columns / scale), axis=0)
    found: np.ndarray = scale * np.sqrt(squares) * _SHARE
    return found


def origin(system: System) -> Point:
    """The guess w = 0."""
    outputs = system.right.shape[1]
    zeros = np.zeros(system.right.shape, np.int64).astype(object)
    places = np.zeros(outputs, np.int64).astype(object)
    return Point(zeros, places, system.right * (1 << system.binary_places))


def dense(system: System) -> np.ndarray:
    """A + lambda I in float64, every number to within a few roundings."""
    matrix = system.matrix.to_float()
    matrix[np.diag_indices_from(matrix)] += system.ridge
    return matrix


def factored(system: System) -> Solve:
    """Solves with A + lambda I, to float64's accuracy."""
    factor = scipy.linalg.cho_factor(dense(system), lower=True, overwrite_a=True)
    return lambda right: scipy.linalg.cho_solve(factor, right)


def solution(system: System, solve: Solve | None = None) -> np.ndarray:
    """The float32 numbers `[d, outputs]` that the exact solution rounds to.

    Args:
      system: the equations.
      solve: solves with A + lambda I about; None factors the matrix.

    Raises:
      ValueError: if a number is too large for float32.

    Guarantee:
      The result is a function of the system alone, whatever `solve` does. Every number is the
      float32 nearest to the exact solution's. One that is within 1.5 * 2^-256 of the midpoint of
      two float32 numbers may be either of these, but always the same.
    """
    solve = factored(system) if solve is None else solve
    return rounded(system, refined(system, origin(system), solve))


def refined(system: System, start: Point, solve: Solve) -> Point:
    """A point from which every number's float32 is decided.

    Arguments, errors as for `solution`; `start` is where to begin.
    """
    digits = system.matrix.digits(DIGIT_BITS)
    outputs = system.right.shape[1]
    parts = []
    for first in range(0, outputs, _COLUMNS):
        chosen = slice(first, min(first + _COLUMNS, outputs))
        part = system.columns(chosen)
        parts.append(_refined(part, start.columns(chosen), solve, digits))
    values, places, residual = zip(*parts, strict=True)
    return Point(np.hstack(values), np.hstack(places), np.hstack(residual))


def _refined(system: System, point: Point, solve: Solve, digits: list[np.ndarray]) -> Point:
    values, places, residual = (np.array(each) for each in point)
    open_columns = np.arange(system.right.shape[1])
    for _ in range(_MOST_STEPS):
        part = Point(values, places, residual).columns(open_columns)
        decided = ~np.isnan(_decided(system, part)).any(axis=0)
        open_columns, part = open_columns[~decided], part.columns(~decided)
        if not len(open_columns):
            return Point(values, places, residual)
        before = part.radius(system) / 2.0 ** part.places.astype(np.float64)
        moved = step(system, part, solve(part.left(system)), digits)
        after = moved.radius(system) / 2.0 ** moved.places.astype(np.float64)
        if not np.all(after * _LEAST_GAIN <= before):  # a kept inverse that has become too old
            solve = factored(system)
        better = after < before
        kept = open_columns[better]
        values[:, kept], residual[:, kept] = moved.values[:, better], moved.residual[:, better]
        places[kept] = moved.places[better]
    raise ArithmeticError(
        f"the solution is not decided after {_MOST_STEPS} steps; report this with the sums"
    )


def step(system: System, point: Point, ahead: np.ndarray, digits: list[np.ndarray]) -> Point:
    """Moves a point by the leading `STEP_BITS` bits of a guess, exactly.

    Args:
      system: the equations.
      point: where to begin.
      ahead: float64 `[d, outputs]`, about how far the solution is from the point.
      digits: of A, as `WideIntegers.digits(DIGIT_BITS)` gives them.
    """
    ahead = np.where(np.isfinite(ahead), ahead, 0.0)
    _, exponents = np.frexp(np.max(np.abs(ahead), axis=0, initial=0.0))
    # In units of 2^-places, the guess is below 2^exponents.
    exponents = exponents + point.places.astype(np.int64)
    more = np.maximum(STEP_BITS - exponents, 0)
    lift = np.maximum(exponents - STEP_BITS, 0)  # the rest of such a move is for later steps
    whole = np.rint(np.ldexp(ahead, point.places.astype(np.int64) + more - lift))
    move = whole.astype(np.int64).astype(object) * _powers(lift)
    moved = exact_product(digits, whole) * (1 << system.binary_places) * _powers(lift)
    return Point(
        values=point.values * _powers(more) + move,
        places=point.places + more.astype(object),
        residual=point.residual * _powers(more) - moved - move * system.diagonal,
    )


def _powers(exponents: np.ndarray) -> np.ndarray:
    """2^exponents, Python integers."""
    return np.array([1 << int(exponent) for exponent in exponents], dtype=object)


def exact_product(digits: list[np.ndarray], right: np.ndarray) -> np.ndarray:
    """Python integers: the whole-number matrix of these digits times whole numbers in float64.

    Args:
      digits: float64 `[rows, d]`, in magnitude at most 2^(DIGIT_BITS - 1), least first.
      right: float64 `[d, outputs]`, whole numbers of magnitude at most 2^STEP_BITS.
    """
    total = np.zeros((len(digits[0]), right.shape[1]), np.int64).astype(object)
    for place, digit in enumerate(digits):
        total = total + (digit @ right).astype(np.int64).astype(object) * (1 << DIGIT_BITS * place)
    return total


def digits_of(whole: np.ndarray) -> list[np.ndarray]:
    """Balanced digits of Python integers, float64, in magnitude at most 2^(DIGIT_BITS - 1)."""
    base, half = 1 << DIGIT_BITS, 1 << (DIGIT_BITS - 1)
    found, rest = [], np.asarray(whole, object)
    while True:
        digit = (rest + half) % base - half
        found.append(digit.astype(np.float64))
        rest = (rest - digit) // base
        if not rest.any():
            return found


def rounded(system: System, point: Point) -> np.ndarray:
    """The float32 numbers `[d, outputs]` of a point that `refined` returned."""
    found = _decided(system, point)
    assert not np.isnan(found).any()
    return found.astype(np.float32)


def _decided(system: System, point: Point) -> np.ndarray:
    """Float64: the float32 that each number surely rounds to; NaN where that is still open."""
    radius = point.radius(system)
    exponents = (system.exponent - point.places).astype(np.int64)
    found = enclosed(
        np.ldexp(point.values.astype(np.float64), exponents), np.ldexp(radius, exponents)
    )
    found[system.absent] = 0.0  # no other equation holds them, and on their right is 0
    # Beyond float64's accuracy: number by number, in exact arithmetic.
    worth = radius < np.ldexp(np.abs(point.values.astype(np.float64)), -40).max(axis=0, initial=0.0)
    for row, column in np.argwhere(np.isnan(found) & worth):
        unit = Fraction(2) ** int(exponents[column])
        value = int(point.values[row, column]) * unit
        found[row, column] = _decided_exactly(value, Fraction(float(radius[column])) * unit)
    return found


def enclosed(values: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Float64: the float32 of every number within `radius` of a value; NaN where they are several.

    Args:
      values: float64, of any true values within float64's rounding.
      radius: float64, broadcast against them.

    Raises:
      ValueError: if a number is too large for float32.
    """
    radius = radius * _SHARE + np.abs(values) * 2.0**-51 + _LEAST_RADIUS
    surely = np.abs(values) - radius
    if np.any(surely > _LARGEST):
        raise ValueError(
            "the head must fit into float32, got a number of magnitude "
            f"{np.nanmax(surely):.3g}: use larger features, smaller targets or a larger l2"
        )
    with np.errstate(over="ignore"):
        low, high = (values - radius).astype(np.float32), (values + radius).astype(np.float32)
    # The sum turns -0 into 0.
    return np.where((low == high) & np.isfinite(low), low.astype(np.float64) + 0.0, np.nan)


def _decided_exactly(value: Fraction, radius: Fraction) -> float:
    """The float32 between whose boundaries all of value +- radius lies, or NaN."""
    low, high = value - radius, value + radius
    near = np.float32(float(value))
    for candidate in (
        near,
        np.nextafter(near, np.float32(-np.inf)),
        np.nextafter(near, np.float32(np.inf)),
    ):
        below = _midpoint(np.nextafter(candidate, np.float32(-np.inf)), candidate)
        above = _midpoint(candidate, np.nextafter(candidate, np.float32(np.inf)))
        if _beyond_boundary(low, below) and _before_boundary(high, above):
            return float(candidate) + 0.0
    return math.nan


def _midpoint(low: np.float32, high: np.float32) -> Fraction:
    return (Fraction(float(low)) + Fraction(float(high))) / 2


def _beyond_boundary(number: Fraction, midpoint: Fraction) -> bool:
    """Whether a number is above midpoint + sqrt(2) * 2^_OFFSET_EXPONENT, in exact arithmetic."""
    above = (number - midpoint) * Fraction(2) ** -_OFFSET_EXPONENT
    return above > 0 and above * above > 2


def _before_boundary(number: Fraction, midpoint: Fraction) -> bool:
    above = (number - midpoint) * Fraction(2) ** -_OFFSET_EXPONENT
    return above <= 0 or above * above < 2
