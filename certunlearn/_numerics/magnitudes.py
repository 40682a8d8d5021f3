"""Magnitudes, read from bits: the largest, whether all numbers are finite, and their spacing."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from chex import ArrayTree
from jax.typing import ArrayLike

from certunlearn._numerics import float_formats, parallel, small_leaves

# What the largest magnitude among some numbers is: zero, finite, or neither.
ZERO, FINITE, NONFINITE = range(3)


def largest(leaves: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The largest number's exponent, but from -100 to below the dtype's own, and its state."""
    exponents, states = [jnp.asarray(-100, jnp.int32)], [jnp.asarray(ZERO, jnp.int32)]
    for axes, group in grouped(leaves).items():
        for leaf in group:
            top = jnp.max(float_formats.bits_of(leaf) & float_formats.masks(leaf.dtype)[0])
            infinite = top >= float_formats.masks(leaf.dtype)[1]
            exponents.append(across(jax.lax.pmax, axes, float_formats.exponent_of(top, leaf.dtype)))
            state = jnp.where(infinite, NONFINITE, jnp.where(top > 0, FINITE, ZERO))
            states.append(across(jax.lax.pmax, axes, state.astype(jnp.int32)))
    highest = jnp.finfo(float_formats.common_dtype(leaves)).maxexp - 2
    return jnp.minimum(jnp.max(jnp.stack(exponents)), highest), jnp.max(jnp.stack(states))


def all_finite(tree: ArrayTree) -> jax.Array:
    """Whether no number of a tree is a NaN or an infinity, on any device that holds a piece."""
    return largest([widen(leaf) for leaf in jax.tree.leaves(tree)])[1] != NONFINITE


def spacing(leaf: ArrayLike) -> jax.Array:
    """Distance of neighbouring numbers of a leaf's dtype at its largest magnitude, all pieces'.

    In float32 or wider, and at least 2^-100 times the dtype's epsilon. Where the leaf is not finite
    it is half that of the largest numbers.
    """
    dtype = jnp.result_type(leaf)
    exponent, _ = largest([widen(leaf)])
    return float_formats.power_of_two(
        exponent - int(jnp.finfo(dtype).nmant), float_formats.wide_dtype(leaf)
    )


def widen(leaf: ArrayLike) -> jax.Array:
    leaf = jnp.asarray(leaf)
    real = jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == jnp.bool_
    if not real or jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        raise TypeError(f"clipping needs real arrays, got one of dtype {leaf.dtype}")
    return leaf.astype(float_formats.wide_dtype(leaf))


def grouped(leaves: list[jax.Array], join: bool = True) -> dict[tuple[str, ...], list[jax.Array]]:
    """Leaves that hold something, by the axes over which they are pieces; small ones end to end."""
    found: dict[tuple[str, ...], list[jax.Array]] = {}
    for leaf in leaves:
        if leaf.size:
            found.setdefault(parallel.pieces_axes(leaf), []).append(leaf)
    if not join:
        return found
    return {
        axes: small_leaves.joined(group, small_leaves.groups(group))
        for axes, group in found.items()
    }


def across(
    collective: Callable[..., jax.Array], axes: tuple[str, ...], value: jax.Array
) -> jax.Array:
    return collective(value, axes) if axes else value


def axes_size(axes: tuple[str, ...]) -> int:
    return math.prod(jax.lax.axis_size(name) for name in axes)
