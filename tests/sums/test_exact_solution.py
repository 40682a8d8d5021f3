"""The float32 that leaves is the exact solution's, whoever guessed it."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sums_helpers import solved

from certunlearn.sums import exact_solution
from certunlearn.sums.exact_solution import System
from certunlearn.sums.wide_integers import WideIntegers


def system_of(matrix, ridge, right, exponent=0):
    """Equations from lists of whole numbers and a fraction with a power of two below."""
    ridge = Fraction(ridge)
    return System(
        WideIntegers.from_objects(np.array(matrix, dtype=object)),
        ridge.numerator,
        ridge.denominator.bit_length() - 1,
        np.array(right, dtype=object),
        exponent,
    )


def nearest(number):
    """The float32 nearest to a fraction; of two the lower."""
    near = np.float32(float(number))
    around = (np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf)))
    return min(around, key=lambda x: abs(Fraction(float(x)) - number))


@st.composite
def equations(draw):
    d, outputs, rows = (draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 8)))
    most = draw(st.sampled_from([2, 100, 2**19]))
    whole = st.integers(-most, most)
    q = np.array(
        draw(st.lists(st.lists(whole, min_size=d, max_size=d), min_size=rows, max_size=rows)),
        dtype=object,
    )
    targets = st.integers(-(2 ** draw(st.sampled_from([1, 8, 31]))), 2**8)
    y = np.array(
        draw(
            st.lists(
                st.lists(targets, min_size=outputs, max_size=outputs), min_size=rows, max_size=rows
            )
        ),
        dtype=object,
    )
    ridge = draw(
        st.sampled_from([Fraction(1), Fraction(1e-3) * 2**38, Fraction(3, 2**40), Fraction(2**60)])
    )
    # Not so small that float64 could not guess: what `systems.check_l2` refuses.
    ridge = max(ridge, Fraction(most**2 * rows, 2**30))
    ridge = Fraction(int(ridge * 2**60), 2**60)
    return q.T @ q, ridge, q.T @ y, draw(st.sampled_from([-40, 0, 19]))


@given(equations())
@settings(max_examples=60, deadline=None)
def test_every_number_is_the_float32_nearest_to_the_exact_solution(case):
    matrix, ridge, right, exponent = case
    found = exact_solution.solution(system_of(matrix, ridge, right, exponent))
    exact = solved(matrix, ridge, right)
    expected = [[nearest(x * Fraction(2) ** exponent) for x in row] for row in exact]
    np.testing.assert_array_equal(found, np.array(expected, np.float32))


def large(seed=0, d=40, outputs=70, rows=300):
    rng = np.random.default_rng(seed)
    q = rng.integers(-(2**19), 2**19, (rows, d))
    q[:, 3] = q[:, 2] + rng.integers(-2, 3, rows)  # nearly the same feature twice
    y = np.where(rng.random((rows, outputs)) < 0.1, 1, -1)
    return system_of(q.T @ q, Fraction(1e-6) * 2**38 * rows, (q.T @ y).astype(object), 19)


GUESSES = {
    "right": lambda system: exact_solution.factored(system),
    "1% off": lambda system: lambda r: 0.99 * exact_solution.factored(system)(r),
    "noise": lambda system: (
        lambda r: (
            exact_solution.factored(system)(r)
            * (1 + 1e-2 * np.random.default_rng(1).normal(size=r.shape))
        )
    ),
    "nothing": lambda system: lambda r: 0 * r,
    "the wrong sign": lambda system: lambda r: -exact_solution.factored(system)(r),
}


@pytest.mark.parametrize("guess", GUESSES)
def test_bits_do_not_depend_on_who_guesses(guess):
    system = large()
    expected = exact_solution.solution(system)
    found = exact_solution.solution(system, GUESSES[guess](system))
    np.testing.assert_array_equal(found.view(np.int32), expected.view(np.int32))


def test_residuals_stay_exact():
    system = large(outputs=3)
    point = exact_solution.origin(system)
    digits = system.matrix.digits(exact_solution.DIGIT_BITS)
    matrix = system.matrix.to_objects()
    solve = exact_solution.factored(system)
    for _ in range(4):
        point = exact_solution.step(system, point, solve(point.left(system)), digits)
        units = np.array([1 << int(p) for p in point.places], dtype=object)
        expected = (system.right * units - matrix @ point.values) * (1 << system.binary_places)
        expected = expected - system.diagonal * point.values
        assert np.array_equal(point.residual, expected)


def test_the_radius_holds_the_exact_solution():
    matrix, ridge, right = [[5, 2], [2, 1]], Fraction(1, 8), [[7], [-3]]
    exact = solved(matrix, ridge, right)
    system = system_of(matrix, ridge, right)
    point = exact_solution.origin(system)
    digits = system.matrix.digits(exact_solution.DIGIT_BITS)
    for _ in range(3):
        point = exact_solution.step(system, point, point.left(system) / 4.0, digits)
        unit = Fraction(1, 1 << int(point.places[0]))
        distance = sum(
            (int(v) * unit - e[0]) ** 2 for v, e in zip(point.values[:, 0], exact, strict=True)
        )
        assert float(distance) ** 0.5 <= point.radius(system)[0] * float(unit)


@pytest.mark.parametrize(("surplus", "expected"), [(0, 1.0), (1, 1 + 2**-23), (-1, 1.0)])
def test_midpoints_of_two_float32_numbers_are_decided(surplus, expected):
    """(3 + 1) w = 4 (2^60 + 2^36) + surplus, so w is 1 + 2^-24 in units of 2^60, or next to it."""
    system = system_of([[3]], 1, [[4 * (2**60 + 2**36) + surplus]], -60)
    assert exact_solution.solution(system)[0, 0] == np.float32(expected)


@pytest.mark.parametrize("right", [[1, 3], [-1, -3], [3, 1], [0, 0]])
def test_zeros_are_zero_and_not_minus_zero(right):
    """3 w + v = right[0] and w + 3 v = right[1]."""
    found = exact_solution.solution(system_of([[2, 1], [1, 2]], 1, [[x] for x in right]))[:, 0]
    expected = np.array([3 * right[0] - right[1], 3 * right[1] - right[0]], np.float32) / 8
    assert found.tobytes() == (expected + np.float32(0)).tobytes()


def test_the_smallest_float32_numbers_are_rounded_like_others():
    smallest = float(np.finfo(np.float32).smallest_subnormal)
    for share, expected in ((0.49, 0.0), (0.51, 1.0), (1.4, 1.0), (2.6, 3.0)):
        right = round(share * 2**30) * 2
        found = exact_solution.solution(system_of([[1]], 1, [[right]], -149 - 30))
        assert found[0, 0] == np.float32(expected * smallest)


def test_what_float32_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="must fit into float32"):
        exact_solution.solution(system_of([[1]], 1, [[10**20]], 70))


@given(st.lists(st.integers(-(2**130), 2**130), min_size=1, max_size=5))
def test_digits_of_python_integers_add_up(numbers):
    digits = exact_solution.digits_of(np.array(numbers, dtype=object))
    total = sum(
        d.astype(object).astype(int).astype(object) * 2 ** (20 * i) for i, d in enumerate(digits)
    )
    assert list(total) == numbers
    assert all(np.abs(d).max() <= 2**19 for d in digits)
