"""Standard normal noise whose tails are right far beyond what `jax.random.normal` can draw.

In float32, `jax.random.normal` turns 23 random bits into a number and so ends at about 5.4
standard deviations. A Gaussian certificate with a delta of 1e-5 over a million coordinates is about
events that such noise never produces. Here 63 bits choose the magnitude.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# The least standard deviation of noise, in spacings of floating-point numbers at the largest
# parameter. Rounding swallows too much of smaller noise: see `docs/theory/rounding.md`.
NOISE_SPACINGS = 4.0


def standard_normal(
    key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Independent N(0, 1) draws, deep into the tails.

    Args:
      key: a key; never use it for anything else.
      shape: shape of the result.
      dtype: float32 or float64 (float64 needs JAX's 64-bit mode).

    Returns:
      An array of draws.

    Raises:
      ValueError: for any other dtype: narrower numbers would round the tails and the centre.

    Guarantee:
      See `normal_from_words`; the bits are taken to be independent and uniform.

    >>> standard_normal(jax.random.key(0), (2, 3)).shape
    (2, 3)
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.float64)):
        raise ValueError(f"dtype must be float32 or float64, got {dtype}")
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    return _standard_normal(key, tuple(shape), dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _standard_normal(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    high, low = jax.random.bits(key, (2, *shape), jnp.uint32)
    return normal_from_words(high, low, dtype)


def normal_from_words(high: jax.Array, low: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """The normal draw that 64 uniform random bits stand for.

    The last bit of `low` is the sign. The other 63 are a whole number n, and the magnitude is the
    one exceeded with probability p = (n + 1/2) / 2^63, by inverting the distribution function at
    the *small* end, p / 2, where floating point resolves best.

    Args:
      high: uint32 array, the upper 32 bits of n.
      low: uint32 array of the same shape, the lower 31 bits of n and the sign.
      dtype: float32 or float64.

    Returns:
      Array of `dtype`.

    Guarantee:
      Sign and magnitude are independent, since they use different bits. p is formed with full
      relative precision however small, and the inverse is good to 1e-6 relative, so tail
      probabilities are right to 1e-4 relative out to 8 standard deviations and to 2% out to 8.7;
      the largest possible magnitude is 9.16 (p = 2^-64).

    Source:
      Inversion: Devroye, Non-Uniform Random Variate Generation (1986), section II.2.

    >>> word = jnp.uint32(0)
    >>> print(f"{normal_from_words(word, word):.2f}")
    9.16
    """
    # Each conversion keeps full relative precision; the scales are powers of two, hence exact.
    fraction = ((low >> 1).astype(dtype) + 0.5) * 2.0**-31
    exceeded = (high.astype(dtype) + fraction) * 2.0**-32
    # p rounds to one at the centre, where the inverse may come out as a negative zero.
    magnitude = jnp.abs(jax.scipy.special.ndtri(0.5 * exceeded))
    return jnp.where((low & 1) == 1, -magnitude, magnitude)
