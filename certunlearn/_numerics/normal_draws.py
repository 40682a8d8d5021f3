"""Standard normal noise whose tails are right far beyond what `jax.random.normal` can draw.

In float32, `jax.random.normal` turns 23 random bits into a number and so ends at about 5.4
standard deviations. A Gaussian certificate with a delta of 1e-5 over a million coordinates is about
events that such noise never produces. Here 63 bits choose the magnitude. The proof of what is
promised is in `docs/theory/noise.md`.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from certunlearn._numerics import float_formats, random_keys, threefry
from certunlearn._numerics.threefry import Purpose, Words

# The least standard deviation of noise, in spacings of floating-point numbers at the largest
# parameter. Rounding swallows too much of smaller noise: see `docs/theory/rounding.md`.
NOISE_SPACINGS = 4.0
# The number of this stream. Whoever changes which word or which normal a coordinate gets gives the
# stream a new number: a run must not go on in another stream than it began.
STREAM = 2

# Coefficients from the highest power down, float32 numbers. `docs/theory/noise.md` says of what
# functions; a test derives their error anew.
_LOG = (
    *(-0.10102246, 0.164200038, -0.173334673, 0.198730454),
    *(-0.249593437, 0.333361834, -0.500006676, 0.999999821),
)
_CENTRAL = (
    *(-6.11771878e-09, -1.73037105e-08, 5.81606685e-07, -1.67385099e-06, -2.10590042e-05),
    *(0.000252282334, -0.000918158563, -0.00890245941, 0.337454319, 2.38093996),
)
_TAIL = (
    *(2.6979211e-07, -1.90815626e-06, 4.07588868e-06, -3.16627847e-06, 1.68848401e-05),
    *(-0.000115669951, 0.000521973008, -0.0021517959, 0.00794439111, 1.39377379, 6.21410322),
)
_CENTRAL_END, _CENTRAL_MIDDLE, _TAIL_MIDDLE = 6.5, 3.25, 4.4375
_LN2 = math.log(2)
_SQRT_HALF_BITS = 0x3F3504F3  # the float32 number next to sqrt(1/2)


def standard_normal(
    key: jax.Array,
    shape: Sequence[int],
    dtype: DTypeLike = jnp.float32,
    *,
    step: ArrayLike = 0,
) -> jax.Array:
    """Independent N(0, 1) draws, deep into the tails.

    Args:
      key: a key, of any kind, or two uint32 words; never use it for anything else.
      shape: shape of the result.
      dtype: float32 or float64 (float64 needs JAX's 64-bit mode).
      step: a whole number below 2^31; each has draws of its own.

    Returns:
      An array of draws.

    Raises:
      ValueError: for any other dtype: narrower numbers would round the tails and the centre. If an
        axis is longer than 2^32: its coordinates would repeat.

    Guarantee:
      Each coordinate's 64 bits are Threefry's for the key and the counters (step, coordinate), and
      no two coordinates or steps share counters. See `normal_from_words`; the bits are taken to be
      independent and uniform. A draw depends on key, step, coordinate and shape alone: bit for bit
      the same in eager mode, under jit, vmap, scan, and for every sharding, without communication.
      (A single number of a key that is a constant of the program may be worked out by the compiler,
      and differ in its last bit.)

    >>> standard_normal(jax.random.key(0), (2, 3)).shape
    (2, 3)
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.float64)):
        raise ValueError(f"dtype must be float32 or float64, got {dtype}")
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    return _standard_normal(random_keys.words_of(key), step, tuple(shape), dtype)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _standard_normal(
    key: jax.Array, step: ArrayLike, shape: tuple[int, ...], dtype: DTypeLike
) -> jax.Array:
    return draws((key[0], key[1]), jnp.asarray(step, jnp.uint32), shape, dtype)


def draws(
    key: Words,
    step: jax.Array,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    sharding: NamedSharding | None = None,
) -> jax.Array:
    """`standard_normal` for words of a key and a uint32 step, inside a compiled function.

    On a mesh whose axes are part of the types, the result has the given sharding.
    """
    split = upper_axes(shape)
    if split:
        rows = shape[:split] + (1,) * (len(shape) - split)
        upper = _numbers(rows, range(split), sharding)
        key = threefry.derived(key, Purpose.UPPER_COORDINATE, upper)
    lower = _numbers(shape, range(split, len(shape)), sharding)
    return normal_from_words(*threefry.words(key, step, lower), dtype)


def upper_axes(shape: Sequence[int], most: int = 2**32) -> int:
    """How many leading axes are counted in the key, as the others fill a counter of 32 bits.

    Raises:
      ValueError: if an axis is too long for a counter, or the leading ones together are.
    """
    split = len(shape)
    while split and math.prod(shape[split - 1 :]) <= most:
        split -= 1
    if split and (max(shape) > most or math.prod(shape[:split]) > most):
        raise ValueError(
            f"a leaf with noise must have axes of at most {most} numbers, got the shape "
            f"{tuple(shape)}, in which two coordinates would have the same noise"
        )
    return split


def _numbers(shape: tuple[int, ...], axes: range, sharding: NamedSharding | None) -> jax.Array:
    """Each coordinate's number, counted along some of the axes, the last one fastest.

    Made of one iota an axis, for a reshaped one would have to move between devices.
    """
    if sharding is not None:
        names = [
            None if size == 1 else name for size, name in zip(shape, sharding.spec, strict=True)
        ]
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*names))
    iota = functools.partial(jax.lax.broadcasted_iota, jnp.uint32, shape, out_sharding=sharding)
    strides = [math.prod(shape[axis + 1 : axes.stop]) for axis in axes]
    terms = [iota(axis) * jnp.uint32(stride) for axis, stride in zip(axes, strides, strict=True)]
    return sum(terms[1:], terms[0]) if terms else jnp.zeros(shape, jnp.uint32)


@functools.partial(jax.jit, static_argnames="dtype")
def normal_from_words(high: jax.Array, low: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """The normal draw that 64 uniform random bits stand for.

    The last bit of `low` is the sign. The other 63 are a whole number n, and the magnitude is the
    one exceeded with probability p = (n + 1/2) / 2^63, by inverting the distribution function at
    the *small* end, where floating point resolves best.

    Args:
      high: uint32 array, the upper 32 bits of n.
      low: uint32 array of the same shape, the lower 31 bits of n and the sign.
      dtype: float32 or float64.

    Returns:
      Array of `dtype`.

    Guarantee:
      Sign and magnitude are independent, since they use different bits. Tail probabilities are
      right to 1e-4 relative out to 8 standard deviations and to 2% out to 8.7; the largest possible
      magnitude is 9.16 (p = 2^-64). Every magnitude is the exact one to 1e-6 relative. The proof is
      in `docs/theory/noise.md`.

    Source:
      Inversion: Devroye, Non-Uniform Random Variate Generation (1986), section II.2. The variable
      log(p (2 - p)): Giles, Approximating the erfinv function (2011).

    >>> word = jnp.uint32(0)
    >>> print(f"{normal_from_words(word, word):.2f}")
    9.16
    """
    # Each conversion keeps full relative precision; the scales are powers of two, hence exact.
    fraction = ((low >> 1).astype(dtype) + 0.5) * 2.0**-31
    exceeded = (high.astype(dtype) + fraction) * 2.0**-32
    if jnp.dtype(dtype) == jnp.float32:
        magnitude = _magnitude(exceeded)
    else:
        magnitude = jax.scipy.special.ndtri(0.5 * exceeded)
    # The inverse may come out as a negative zero at the centre. As bits, so that no compiler joins
    # the last product with what is done to the draw.
    bits = float_formats.bits_of(magnitude) & float_formats.masks(magnitude.dtype)[0]
    sign = (low & 1).astype(bits.dtype) << (jnp.finfo(dtype).bits - 1)
    return jax.lax.bitcast_convert_type(bits | sign, magnitude.dtype)


def _magnitude(exceeded: jax.Array) -> jax.Array:
    """The float32 number that |Z| exceeds with a probability from 2^-64 to 1."""
    complement = exceeded * (2 - exceeded)
    # The logarithm by the exponent and a polynomial on [sqrt(1/2), sqrt(2)): no library's.
    bits = jax.lax.bitcast_convert_type(complement, jnp.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    rest = jax.lax.bitcast_convert_type(bits - (exponent << 23), jnp.float32) - 1
    w = exponent.astype(jnp.float32) * -_LN2 - rest * _horner(_LOG, rest)
    tail = jnp.sqrt(jnp.maximum(w, _CENTRAL_END) - 1)
    ratio = jnp.where(
        w < _CENTRAL_END,
        _horner(_CENTRAL, w - _CENTRAL_MIDDLE),
        _horner(_TAIL, tail - _TAIL_MIDDLE),
    )
    return ratio * (1 - exceeded)


def _horner(coefficients: Sequence[float], x: jax.Array) -> jax.Array:
    value = jnp.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value
