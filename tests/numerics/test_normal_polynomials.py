"""The three polynomials of the normal inverse: their error, derived anew, as `noise.md` states it.

Everything here is worked out in float64 with SciPy's functions, which mpmath confirms.
"""

import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from scipy import special

from certunlearn._numerics import normal_draws

U = 2.0**-24  # unit roundoff of float32
LOG, CENTRAL, TAIL = "_LOG", "_CENTRAL", "_TAIL"
# What `docs/theory/noise.md` states: of the logarithm absolutely, of the centre relative to the
# magnitude, of the tail relative to the tail's probability.
STATED = {LOG: 4e-8, CENTRAL: 1.4e-7, TAIL: 4e-6}
LAST = 63 * math.log(2)  # w at p = 2^-64
EDGES = (math.sqrt(5.5), math.sqrt(LAST - 1))  # of the tail's variable
POINTS = 20_001


def coefficients(name):
    return np.float64(np.float32(getattr(normal_draws, name)))


def at(w):
    """p, x = 1 - p and the magnitude, where w = -log(p (2 - p))."""
    product = np.exp(-w)
    x = np.sqrt(-np.expm1(-w))
    p = product / (1 + x)
    return p, x, -special.ndtri(p / 2)


def largest_error(name, c):
    """On a grid with both ends of the cell; and the largest change between neighbours."""
    if name == LOG:
        rest = np.linspace(np.sqrt(0.5) - 1e-7, np.sqrt(2) + 1e-7, POINTS) - 1
        error = rest * np.polyval(c, rest) - np.log1p(rest)
    elif name == CENTRAL:
        w = np.linspace(1e-9, 6.5, POINTS)
        _, x, z = at(w)
        error = x * np.polyval(c, w - 3.25) / z - 1
    else:
        v = np.linspace(*EDGES, POINTS)
        p, x, _ = at(v * v + 1)
        error = 2 * special.ndtr(-x * np.polyval(c, v - 4.4375)) / p - 1
    return np.max(np.abs(error)), np.max(np.abs(np.diff(error)))


@pytest.mark.parametrize("name", STATED)
def test_a_polynomial_is_as_good_as_stated(name):
    error, change = largest_error(name, coefficients(name))
    # Between two points of the grid there is no more than another change.
    assert error + change <= STATED[name]
    assert change < 1e-2 * STATED[name]


@pytest.mark.parametrize("name", STATED)
def test_another_coefficient_would_be_noticed(name):
    for i in range(len(coefficients(name))):
        for factor in (0.99, 1.01):
            changed = coefficients(name)
            changed[i] *= factor
            assert largest_error(name, changed)[0] > STATED[name], (name, i)


def test_scipy_and_mpmath_agree_on_what_is_approximated():
    with mpmath.workdps(40):
        for w in (1e-6, 0.1, 3.0, 6.5, 20.0, LAST):
            root = mpmath.sqrt(-mpmath.expm1(-mpmath.mpf(w)))
            p = mpmath.exp(-mpmath.mpf(w)) / (1 + root)
            z = mpmath.findroot(
                lambda t, p=p: mpmath.log(mpmath.erfc(t / mpmath.sqrt(2)) / p), at(w)[2]
            )
            assert float(z) == pytest.approx(float(at(w)[2]), rel=1e-13)


def horner_rounding(c, x):
    """A bound on the rounding of Horner's rule in float32."""
    powers = np.arange(len(c))[::-1]
    terms = np.abs(c)[:, None] * np.abs(x) ** powers[:, None]
    return U * np.sum((2 * powers[:, None] + 1) * terms, axis=0)


def test_with_all_roundings_the_tail_is_true_to_5e_5():
    # The steps of the proof, one line each, at every w that can occur.
    w = np.concatenate([np.linspace(1e-7, 6.5, POINTS), np.linspace(6.5, LAST, POINTS)])
    p, x, z = at(w)
    density = np.sqrt(2 / np.pi) * np.exp(-(z**2) / 2)
    hazard = density / p  # -d log(p) / dz
    slope = 0.5 * (2 - p) * p / x / density  # dz / dw
    exponent = np.floor(w / math.log(2) + 0.5)
    mantissa = np.abs(w - exponent * math.log(2))
    series = horner_rounding(coefficients(LOG), np.full_like(w, math.sqrt(2) - 1)) * 0.42
    in_w = 2 * U + STATED[LOG] + series + U * mantissa
    in_w = in_w + (U + 3e-9) * exponent * math.log(2) + U * w
    v = np.sqrt(np.maximum(w, 6.5) - 1)
    in_v = U * v / 2 + 2 * U * v + U * np.abs(v - 4.4375)
    tail = w >= 6.5
    c, t = coefficients(CENTRAL), coefficients(TAIL)
    step = 1e-4
    steepness = np.abs(np.polyval(t, v + step - 4.4375) - np.polyval(t, v - 4.4375)) / step
    in_ratio = np.where(
        tail,
        horner_rounding(t, v - 4.4375) + in_v * steepness,
        horner_rounding(c, w - 3.25) + U * np.abs(w - 3.25) * 0.4,
    )
    in_z = x * in_ratio + slope * in_w * np.where(tail, 1, 0) + 2 * U * z
    # At the centre w moves the ratio only, whose slope is below 0.4; x has its own rounding.
    in_z = in_z + np.where(tail, 0, x * 0.4 * in_w + STATED[CENTRAL] * z)
    in_p = 3 * U + hazard * in_z + np.where(tail, STATED[TAIL], 0)
    assert np.max(in_z / z) < 1e-6
    assert np.max(in_p) < 4.5e-5
    # The discrete steps of p, half of 2^-63, leave room for this up to 8 standard deviations.
    beyond = 2 * special.ndtr(-8.0)
    assert np.max(in_p[z <= 8]) + 2.0**-64 / beyond < 1e-4
    assert np.max(in_p) + 2.0**-64 / (2 * special.ndtr(-8.7)) < 2e-2


def at_floats(first, stride):
    """The compiled inverse beside the exact one, at every `stride`-th float32 number of (0, 1]."""
    inverse = jax.jit(normal_draws._magnitude)
    relative, tail = 0.0, 0.0
    for octave in range(64):
        bits = (126 - octave << 23) + np.arange(first, 2**23 + 1, stride, dtype=np.int32)
        p = bits.view(np.float32)
        magnitude = np.float64(inverse(jnp.asarray(p)))
        exact = np.abs(special.ndtri(np.float64(p) / 2))
        off = np.abs(magnitude - exact) / np.where(exact == 0, 1, exact)
        relative = max(relative, np.max(off))
        tail = max(tail, np.max(np.abs(2 * special.ndtr(-magnitude) / np.float64(p) - 1)))
    return relative, tail


def test_compiled_numbers_are_within_the_bound():
    relative, tail = at_floats(0, 2**23 // 1000)
    assert relative < 4e-7
    assert tail < 1.5e-5


@pytest.mark.slow
def test_compiled_numbers_are_within_the_bound_at_many_more():
    relative, tail = at_floats(3, 61)
    assert relative < 4e-7
    assert tail < 1.5e-5
