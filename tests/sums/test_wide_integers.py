"""Whole numbers of 95 bits are Python's, up to their last bit and edge."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from certunlearn.sums import WideIntegers

LEAST, MOST = -(2**95), 2**95 - 1
POWERS = st.tuples(st.sampled_from((-1, 1)), st.integers(0, 95), st.integers(-1, 1))
WIDE = st.one_of(
    st.integers(LEAST, MOST),
    st.integers(-3, 3),
    POWERS.map(lambda p: max(LEAST, min(MOST, p[0] * 2 ** p[1] + p[2]))),  # where words end
)
SUMMAND = st.one_of(st.integers(-(2**62) + 1, 2**62 - 1), st.integers(-5, 5))


def wide(*values):
    return WideIntegers.from_objects(np.array(values, object))


def same(result, *values):
    return result.to_objects().tolist() == list(values)


def expect(compute, *values):
    """The computation gives these numbers, or an error if one of them does not fit."""
    if all(LEAST <= value <= MOST for value in values):
        assert same(compute(), *values)
    else:
        with pytest.raises(OverflowError, match=r"below 2\^95"):
            compute()


@settings(max_examples=60, deadline=None)
@given(WIDE, WIDE, SUMMAND, st.integers(0, 93))
def test_sums_are_those_of_pythons_integers(a, b, c, shift):
    left, right = wide(a, 0), wide(b, 1)
    assert same(left, a, 0)
    expect(lambda: left + right, a + b, 1)
    expect(lambda: left - right, a - b, -1)
    summand = np.array([c, 1])
    if abs(c) < 2 ** (94 - shift):
        expect(lambda: left.plus(summand, shift), a + (c << shift), 1 << shift)
        expect(lambda: left.minus(summand, shift), a - (c << shift), -(1 << shift))
    else:
        with pytest.raises(OverflowError, match="magnitudes"):
            left.plus(summand, shift)
    assert same(left, a, 0)  # and stay as they were


@settings(max_examples=60, deadline=None)
@given(st.lists(WIDE, min_size=1, max_size=4), st.integers(2, 32))
def test_digits_are_balanced_and_add_up(values, bits):
    digits = wide(*values).digits(bits)
    found = [0] * len(values)
    for place, digit in enumerate(digits):
        assert digit.dtype == np.float64
        assert (-(2 ** (bits - 1)) <= digit).all()
        assert (digit < 2 ** (bits - 1)).all()
        found = [
            value + int(d) * 2 ** (bits * place) for value, d in zip(found, digit, strict=True)
        ]
    assert found == values
    assert len(digits) == 1 or digits[-1].any()


@settings(max_examples=60, deadline=None)
@given(WIDE)
def test_floats_are_as_near_as_promised(value):
    found = wide(value).to_float()[0]
    if abs(value) < 2**85:
        assert found == float(value)  # Python's conversion is correctly rounded
    assert abs(int(found) - value) * 2**52 <= abs(value)


@pytest.mark.parametrize("value", [MOST, LEAST, 2**63 * 2**31, -(2**94) - 1])
def test_edges(value):
    edge, one = wide(value), np.array([1])
    expect(lambda: edge.plus(one), value + 1)
    expect(lambda: edge.minus(one), value - 1)
    expect(lambda: edge + edge, 2 * value)
    expect(lambda: edge - edge, 0)
    expect(lambda: wide(0) - edge, -value)
    expect(lambda: wide(-1) - edge, -value - 1)


def test_carries_reach_all_words_of_large_arrays():
    numbers = np.arange(-40_000, 40_000)  # more than are worked on at a time
    sums = WideIntegers.zeros((2, 40_000)).plus(numbers.reshape(2, -1), 31)
    sums = sums.plus(numbers.reshape(2, -1)[:, ::-1], 0)
    expected = (numbers.astype(object) * 2**31).reshape(2, -1)
    expected = expected + numbers.astype(object).reshape(2, -1)[:, ::-1]
    assert (sums.to_objects() == expected).all()
    assert (sums - sums).is_zero()
    assert not sums.is_zero()


def test_equal_numbers_are_equal_arrays_whatever_the_way():
    numbers = np.random.default_rng(0).integers(-(2**61), 2**61, (7, 3))
    one = WideIntegers.zeros((7, 3)).plus(numbers, 20).minus(numbers, 3)
    other = WideIntegers.zeros((7, 3)).minus(numbers.T.copy().T, 3) + (
        WideIntegers.zeros((7, 3)).plus(numbers, 20)
    )
    assert one.equals(other)
    assert not one.equals(other.plus(np.eye(7, 3, dtype=np.int64)))


def test_what_is_no_such_array_is_refused():
    zeros = np.zeros(2, np.int64)
    for high, low in ((zeros, zeros - 1), (zeros, zeros + 2**32)):
        with pytest.raises(ValueError, match="low must be"):
            WideIntegers(high, low)
    with pytest.raises(ValueError, match="int64"):
        WideIntegers(zeros.astype(np.float64), zeros)
    with pytest.raises(ValueError, match="one shape"):
        WideIntegers(zeros, zeros[:1])
    with pytest.raises(ValueError, match="array must be int64"):
        WideIntegers.zeros((2,)).plus(np.zeros(2))
    with pytest.raises(ValueError, match="shift"):
        WideIntegers.zeros((2,)).plus(zeros, 94)
    with pytest.raises(ValueError, match="bits"):
        WideIntegers.zeros((2,)).digits(1)
    for value in (MOST + 1, LEAST - 1):
        with pytest.raises(OverflowError):
            wide(value)


def test_they_cannot_be_changed_and_show_nothing():
    numbers = wide(123456)
    with pytest.raises(ValueError, match="read-only"):
        numbers.high[0] = 1
    assert "123456" not in repr(numbers)
