"""Strict norms: clipping in floating point that never ends outside the bound, and norm bounds.

Everything that clips (parameters, updates, single examples) uses `clip_tree`. The guarantee rests
on its bound, which therefore holds in exact arithmetic and not only up to rounding. The proof is in
`docs/theory/strict-norms.md`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from chex import ArrayTree
from jax.typing import ArrayLike

from certunlearn._numerics import checks, float_formats, folded_sums, parallel

SMALLEST_NORM = 1e-30
LARGEST_NORM = 1e30

# Magnitudes are measured in units of a power of two, and moved into this range of exponents: the
# least keeps squares normal, the greatest keeps sums finite.
_LEAST_EXPONENT, _GREATEST_EXPONENT = -63, 40


class Clipped(NamedTuple):
    """A tree inside the ball, and what had to be done to it.

    Attributes:
      tree: the clipped tree.
      clipped: bool scalar, the tree was scaled down.
      nonfinite: bool scalar, the tree held a NaN or an infinity and became zeros. So would a tree
        whose bound cannot be confirmed, which no compiler is known to bring about.
    """

    tree: ArrayTree
    clipped: jax.Array
    nonfinite: jax.Array


class _Squares(NamedTuple):
    """A computed sum of squares, and what is known of its error."""

    total: jax.Array
    depth: int  # the largest number of additions that a term went through
    terms: int  # the number of terms


class _Limit(NamedTuple):
    """A radius `factor * 2^exponent`, below the one asked for by at least five roundoffs."""

    factor: jax.Array  # at least 1 and below 2; zero if there is no radius
    exponent: jax.Array  # int32, at least -101 and at most 99


def clip_tree(tree: ArrayTree, max_norm: ArrayLike) -> Clipped:
    """Projects a pytree onto the L2 ball of radius `max_norm` around zero, strictly.

    Args:
      tree: a pytree of real arrays of any dtype. Inside `shard_map`, leaves that differ between
        devices are pieces of one array, and the whole is clipped as one. Callers see to it that JAX
        keeps track (`parallel.check_tracked`).
      max_norm: the radius, between 1e-30 and 1e30; may be traced, and is then moved into that
        range from above and treated as zero from below.

    Returns:
      A `Clipped`. Leaves come back in float32 or their own wider dtype: a bfloat16 result would
      round above the bound, by up to 0.4%. A tree that is inside by 2e-5 of the radius or more
      comes back bit for bit. There is no reverse-mode derivative.

    Raises:
      TypeError: if `max_norm` is not one number, or a leaf is not real.
      ValueError: if `max_norm` is a concrete number out of range.

    Guarantee:
      In exact arithmetic on the returned numbers, the norm is at most `max_norm * (1 - 5 u)` with u
      the unit roundoff of the arithmetic (float32, or float64 if a leaf is), for every input, NaN
      and infinities included (they give zeros).

      The proof is in `docs/theory/strict-norms.md`. The code relies on the following:

      * The numbers returned are those that the last check measured: the check is the condition of
        the loop that holds them.
      * The check is made of exact operations on bit patterns, and of sums and products of *normal*
        numbers, whose relative error is at most u.
      * `folded_sums.folded_sum` states the largest number k of additions that a term goes through,
        and the check passes at a sum of squares of at most f^2 (1 - (k + 8) u) only.

    Source:
      Higham, Accuracy and Stability of Numerical Algorithms (2002), section 4.2.

    >>> import numpy as np
    >>> out = clip_tree({"a": jnp.array([3.0, 4.0])}, 1.0)
    >>> bool(np.linalg.norm(np.float64(out.tree["a"])) <= 1.0), bool(out.clipped)
    (True, True)
    """
    check_norm("max_norm", max_norm)
    return _clip_tree(tree, max_norm)


@jax.jit
def _clip_tree(tree: ArrayTree, max_norm: ArrayLike) -> Clipped:
    leaves, treedef = jax.tree.flatten(tree)
    leaves = [_widen(leaf) for leaf in leaves]
    limit = _limit(max_norm, float_formats.common_dtype(leaves))

    def outside(state: Any) -> jax.Array:
        tries, _, leaves = state
        return (tries < 2) & ~_confirmed(leaves, limit)

    def scale_down(state: Any) -> Any:
        tries, _, leaves = state
        return (tries + 1, *_scaled(leaves, limit))

    tries, nonfinite = jnp.zeros((), jnp.int32), jnp.array(False)
    tries, nonfinite, leaves = jax.lax.while_loop(outside, scale_down, (tries, nonfinite, leaves))
    # One scaling is enough: after a second, nothing was confirmed.
    unconfirmed = tries == 2
    leaves = [jnp.where(unconfirmed, jnp.zeros_like(leaf), leaf) for leaf in leaves]
    nonfinite |= unconfirmed & (limit.factor > 0)
    return Clipped(jax.tree.unflatten(treedef, leaves), (tries > 0) & ~nonfinite, nonfinite)


def within(tree: ArrayTree, max_norm: ArrayLike) -> jax.Array:
    """Whether a tree is confirmed to be in the ball, by the check of `clip_tree`; False for NaN.

    The caller must use the very numbers that were measured, as in a loop's condition.
    """
    leaves = [_widen(leaf) for leaf in jax.tree.leaves(tree)]
    return _confirmed(leaves, _limit(max_norm, float_formats.common_dtype(leaves)))


def norm_bound(tree: ArrayTree) -> jax.Array:
    """An upper bound on a tree's L2 norm, above it by about 1e-5 (float32); NaN if not finite.

    >>> float(norm_bound(jnp.array([3.0, 4.0]))) >= 5.0
    True
    """
    leaves = [_widen(leaf) for leaf in jax.tree.leaves(tree)]
    dtype = float_formats.common_dtype(leaves)
    exponent, state = _largest(leaves)
    norm = _norm(_sum_of_squares(leaves, exponent, dtype))
    # Twice the smallest normal number, as the product may be flushed to zero.
    bound = (norm * float_formats.power_of_two(exponent, dtype) + 2.0**-125) * (
        1 + 8 * float_formats.roundoff(dtype)
    )
    bound = jnp.where(state == _ZERO, 0, bound)
    return jnp.where(state == _NONFINITE, jnp.nan, bound)


def all_finite(tree: ArrayTree) -> jax.Array:
    """Whether no number of a tree is a NaN or an infinity, on any device that holds a piece."""
    return _largest([_widen(leaf) for leaf in jax.tree.leaves(tree)])[1] != _NONFINITE


def spacing(leaf: ArrayLike) -> jax.Array:
    """Distance of neighbouring numbers of a leaf's dtype at its largest magnitude, all pieces'.

    In float32 or wider, and at least 2^-100 times the dtype's epsilon. Where the leaf is not finite
    it is half that of the largest numbers.
    """
    dtype = jnp.result_type(leaf)
    exponent, _ = _largest([_widen(leaf)])
    return float_formats.power_of_two(
        exponent - int(jnp.finfo(dtype).nmant), float_formats.wide_dtype(leaf)
    )


def check_norm(name: str, value: object) -> None:
    """Raises if a concrete `value` is not a number in [1e-30, 1e30]; traced values pass."""
    if isinstance(value, jax.core.Tracer):
        return
    number = checks.positive(name, value)
    # 1e-30 as a float32 is slightly below 1e-30, and is fine.
    if not SMALLEST_NORM * (1 - 1e-6) <= number <= LARGEST_NORM * (1 + 1e-6):
        raise ValueError(
            f"{name} must be between {SMALLEST_NORM:g} and {LARGEST_NORM:g}, where float32 "
            f"arithmetic neither underflows nor overflows, got {number!r}"
        )


def _widen(leaf: ArrayLike) -> jax.Array:
    leaf = jnp.asarray(leaf)
    real = jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == jnp.bool_
    if not real or jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        raise TypeError(f"clipping needs real arrays, got one of dtype {leaf.dtype}")
    return leaf.astype(float_formats.wide_dtype(leaf))


def _limit(max_norm: ArrayLike, dtype: jnp.dtype) -> _Limit:
    """`max_norm` in the working precision, lowered by more than its conversion may raise it."""
    radius = jnp.asarray(max_norm, dtype)
    # By bit patterns, which order positive numbers. A traced radius may be anything: nothing
    # sensible means no update.
    least, infinity = (
        float_formats.bits_of(jnp.asarray(x, dtype)) for x in (SMALLEST_NORM / 2, jnp.inf)
    )
    positive = (float_formats.bits_of(radius) >= least) & (
        float_formats.bits_of(radius) <= infinity
    )
    radius = jnp.where(positive, jnp.minimum(radius, LARGEST_NORM), 1)
    radius = radius * (1 - 8 * float_formats.roundoff(dtype))
    exponent = float_formats.exponent_of(float_formats.bits_of(radius), dtype)
    return _Limit(
        jnp.where(positive, radius * float_formats.power_of_two(-exponent, dtype), 0), exponent
    )


def _confirmed(leaves: list[jax.Array], limit: _Limit) -> jax.Array:
    dtype = limit.factor.dtype
    squares = _sum_of_squares(leaves, limit.exponent, dtype)
    share = max(0.0, 1 - (squares.depth + 8) * float_formats.roundoff(dtype))
    return squares.total <= limit.factor * limit.factor * share


def _scaled(leaves: list[jax.Array], limit: _Limit) -> tuple[jax.Array, list[jax.Array]]:
    """Whether a leaf is not finite, and the leaves brought into the ball; zeros if so."""
    dtype = limit.factor.dtype
    exponent, state = _largest(leaves)
    squares = _sum_of_squares(leaves, exponent, dtype)
    # The floor of what is measured adds at most 2^-50 for each number.
    spare = (squares.depth + 24) * float_formats.roundoff(dtype) + 4 * float_formats.coarsest_eps(
        leaves
    )
    aim = limit.factor * max(0.0, 1 - spare - squares.terms * 2.0**-50)
    # A norm outside of the smallest ball is at least 1/2 in these units.
    factor = (
        aim / jnp.maximum(_norm(squares), 0.25) * float_formats.power_of_two(limit.exponent, dtype)
    )
    finite = state != _NONFINITE

    def scale(leaf: jax.Array) -> jax.Array:
        small = (leaf.astype(dtype) * float_formats.power_of_two(-exponent, dtype) * factor).astype(
            leaf.dtype
        )
        return jnp.where(finite, small, jnp.zeros_like(leaf))

    return ~finite, [scale(leaf) for leaf in leaves]


# What the largest magnitude among some numbers is: zero, finite, or neither.
_ZERO, _FINITE, _NONFINITE = range(3)


def _largest(leaves: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The largest number's exponent, but from -100 to below the dtype's own, and its state."""
    exponents, states = [jnp.asarray(-100, jnp.int32)], [jnp.asarray(_ZERO, jnp.int32)]
    for axes, group in _grouped(leaves).items():
        for leaf in group:
            top = jnp.max(float_formats.bits_of(leaf) & float_formats.masks(leaf.dtype)[0])
            infinite = top >= float_formats.masks(leaf.dtype)[1]
            exponents.append(_over(jax.lax.pmax, axes, float_formats.exponent_of(top, leaf.dtype)))
            state = jnp.where(infinite, _NONFINITE, jnp.where(top > 0, _FINITE, _ZERO))
            states.append(_over(jax.lax.pmax, axes, state.astype(jnp.int32)))
    highest = jnp.finfo(float_formats.common_dtype(leaves)).maxexp - 2
    return jnp.minimum(jnp.max(jnp.stack(exponents)), highest), jnp.max(jnp.stack(states))


def _sum_of_squares(leaves: list[jax.Array], exponent: jax.Array, dtype: jnp.dtype) -> _Squares:
    """The sum of squares in units of 2^exponent, over all leaves and devices with their pieces."""
    totals, depths, count = [jnp.zeros((), dtype)], [0], 0
    for axes, group in _grouped(leaves).items():
        terms = [jnp.square(_in_units(leaf, exponent, dtype)) for leaf in group]
        sums, each = zip(*map(folded_sums.folded_sum, terms), strict=True)
        total, depth = folded_sums.folded_sum(jnp.stack(sums))
        totals.append(_over(jax.lax.psum, axes, total))
        depths.append(max(each) + depth + _size(axes) - 1)
        count += sum(leaf.size for leaf in group) * _size(axes)
    return _Squares(jnp.sum(jnp.stack(totals)), max(depths) + len(totals) - 1, count)


def _norm(squares: _Squares) -> jax.Array:
    """The square root, raised by more than its rounding and that of the sum."""
    roundoff = float_formats.roundoff(squares.total.dtype)
    return jnp.sqrt(squares.total) * (1 + (squares.depth / 2 + 8) * roundoff)


def _in_units(leaf: jax.Array, exponent: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Magnitudes times 2^-exponent, moved into the range that is measured; normal numbers all."""
    top, infinity = float_formats.masks(leaf.dtype)
    bits = float_formats.bits_of(leaf) & top
    if leaf.dtype != dtype:
        # Without subnormal and infinite numbers, of which a conversion may make anything.
        bits = jnp.clip(bits, 1 << int(jnp.finfo(leaf.dtype).nmant), infinity - 1)
        bits = float_formats.bits_of(jax.lax.bitcast_convert_type(bits, leaf.dtype).astype(dtype))
    least, greatest = (
        float_formats.power_of_two_bits(exponent + end, dtype)
        for end in (_LEAST_EXPONENT, _GREATEST_EXPONENT)
    )
    moved = exponent.astype(bits.dtype) << int(jnp.finfo(dtype).nmant)
    return jax.lax.bitcast_convert_type(jnp.clip(bits, least, greatest) - moved, dtype)


def _grouped(leaves: list[jax.Array]) -> dict[tuple[str, ...], list[jax.Array]]:
    """Leaves that hold something, by the axes over which they are pieces."""
    grouped: dict[tuple[str, ...], list[jax.Array]] = {}
    for leaf in leaves:
        if leaf.size:
            grouped.setdefault(parallel.pieces_axes(leaf), []).append(leaf)
    return grouped


def _over(
    collective: Callable[..., jax.Array], axes: tuple[str, ...], value: jax.Array
) -> jax.Array:
    return collective(value, axes) if axes else value


def _size(axes: tuple[str, ...]) -> int:
    return math.prod(jax.lax.axis_size(name) for name in axes)
