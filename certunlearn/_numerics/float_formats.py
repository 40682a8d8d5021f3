"""Floating-point formats: the dtypes of arithmetic, and numbers as bit patterns.

Bit patterns are integers. Arithmetic on them is exact, and fast-math modes do not change it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from chex import ArrayTree
from jax.typing import ArrayLike


def coarsest_eps(tree: ArrayTree) -> float:
    """Largest machine epsilon (twice the unit roundoff) among the leaves, at most float32's."""
    dtypes = [wide_dtype(leaf) for leaf in jax.tree.leaves(tree)]
    return max(float(jnp.finfo(dtype).eps) for dtype in (dtypes or [jnp.float32]))


def wide_dtype(leaf: ArrayLike) -> jnp.dtype:
    """The dtype that arithmetic on a real leaf is done in: its own, but float32 at least."""
    dtype = jnp.result_type(leaf)
    wide = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 32
    return dtype if wide else jnp.dtype(jnp.float32)


def common_dtype(leaves: Sequence[ArrayLike]) -> jnp.dtype:
    """The widest of the dtypes that arithmetic on real leaves is done in."""
    wide = any(wide_dtype(leaf) == jnp.float64 for leaf in leaves)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def holds_nan(tree: ArrayTree) -> jax.Array:
    """Whether a floating leaf of the tree has a NaN in it, read from bits, for fast-math's sake."""
    found = jnp.asarray(False)
    for leaf in jax.tree.leaves(tree):
        magnitude, infinity = masks(leaf.dtype)
        found |= jnp.any((bits_of(leaf) & magnitude) > infinity)
    return found


def nan_where(condition: jax.Array, leaf: jax.Array) -> jax.Array:
    """The leaf, or NaN where the condition holds; as bits, as fast-math may leave out a NaN."""
    _, infinity = masks(leaf.dtype)
    quiet = infinity | 1 << (int(jnp.finfo(leaf.dtype).nmant) - 1)
    bits = bits_of(leaf)
    bits = jnp.where(condition, jnp.asarray(quiet, bits.dtype), bits)
    return jax.lax.bitcast_convert_type(bits, leaf.dtype)


def roundoff(dtype: jnp.dtype) -> float:
    return float(jnp.finfo(dtype).eps) / 2


def bits_of(value: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(value, jnp.dtype(f"int{jnp.finfo(value.dtype).bits}"))


def masks(dtype: jnp.dtype) -> tuple[int, int]:
    """The bits of a magnitude, and those of infinity."""
    info = jnp.finfo(dtype)
    return 2 ** (info.bits - 1) - 1, (2 * info.maxexp - 1) << int(info.nmant)


def exponent_of(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """e with 2^e <= x < 2^(e+1), of a positive normal number x given by its bits; int32."""
    info = jnp.finfo(dtype)
    return (bits >> int(info.nmant)).astype(jnp.int32) - (info.maxexp - 1)


def power_of_two_bits(exponent: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The bits of 2^exponent, or of the nearest of the smallest normal number and infinity."""
    info = jnp.finfo(dtype)
    field = jnp.clip(exponent + (info.maxexp - 1), 1, 2 * info.maxexp - 1)
    return field.astype(f"int{info.bits}") << int(info.nmant)


def power_of_two(exponent: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """2^exponent, exactly, if that is a normal number."""
    return jax.lax.bitcast_convert_type(power_of_two_bits(exponent, dtype), dtype)
