"""Strict norms: clipping in floating point that never ends outside the bound, and norm bounds.

Everything that clips (parameters, updates, single examples) uses `clip_tree`. The guarantee rests
on its bound, which therefore holds in exact arithmetic and not only up to rounding. The proof is in
`docs/theory/strict-norms.md`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from chex import ArrayTree
from jax.typing import ArrayLike

from certunlearn._numerics import (
    checks,
    float_formats,
    folded_sums,
    magnitudes,
    parallel,
    small_leaves,
)

SMALLEST_NORM = 1e-30
LARGEST_NORM = 1e30

# Numbers with a norm above the largest are measured after a division by a power of two, for which
# this many attempts are enough: 2^148 is above the norm of 2^40 numbers, 2^-101 below each radius.
_ATTEMPTS = 6


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
    lost: jax.Array  # at most this is missing because of numbers that count as zero


class _Settled(NamedTuple):
    """Numbers that stay as they are, and what brings them into the ball.

    Attributes:
      attempt: int32, how often their norm was measured.
      total: the sum of squares, in units of the limit's.
      factor: scales them into the ball; 1 if they are inside.
      inside: bool, they are inside as they are.
      nonfinite: bool, they held a NaN or an infinity and are zeros now.
      leaves: the numbers.
    """

    attempt: jax.Array
    total: jax.Array
    factor: jax.Array
    inside: jax.Array
    nonfinite: jax.Array
    leaves: list[jax.Array]


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

      * The numbers that are scaled are those that were measured: they are the state of a loop,
        which no compiler computes twice. What is returned is the product of such a number and a
        factor that comes out of the same loop. So it may be computed again, rounded or not.
      * Sums and products have a relative error of at most u, or are off by at most the smallest
        normal number, as processors may flush to zero.
      * `folded_sums.folded_sum` states the largest number k of additions that a term goes through.

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
    leaves = [magnitudes.widen(leaf) for leaf in leaves]
    # Before the loop, for its state is what is scaled.
    groups = small_leaves.groups(leaves)
    settled = _settle(small_leaves.joined(leaves, groups), max_norm)
    arrays = [
        _scaled_at_once(array, settled) if len(places) > 1 else _scaled(array, settled)
        for array, places in zip(settled.leaves, groups, strict=True)
    ]
    scaled = small_leaves.parted(arrays, leaves, groups)
    clipped = ~settled.inside & ~settled.nonfinite
    return Clipped(jax.tree.unflatten(treedef, scaled), clipped, settled.nonfinite)


def sum_of_clipped(rows: ArrayTree, max_norm: ArrayLike) -> Clipped:
    """The sum of trees, each clipped as by `clip_tree`, without a copy of the clipped trees.

    Args:
      rows: a pytree of real arrays with one leading axis in common: a tree for each place.
      max_norm: as for `clip_tree`, the same for all.

    Returns:
      A `Clipped`. Its tree is the sum, rounded; `clipped` and `nonfinite` are arrays of bools, one
      for each tree.
    """
    leaves, treedef = jax.tree.flatten(rows)
    settled = _settle([magnitudes.widen(leaf) for leaf in leaves], max_norm, rows=1)
    sums = [
        jnp.tensordot(
            settled.factor.astype(leaf.dtype),
            leaf,
            axes=1,
            precision=jax.lax.Precision.HIGHEST,
            out_sharding=parallel.sharding_without_rows(leaf),
        )
        for leaf in settled.leaves
    ]
    clipped = ~settled.inside & ~settled.nonfinite
    return Clipped(jax.tree.unflatten(treedef, sums), clipped, settled.nonfinite)


def within(tree: ArrayTree, max_norm: ArrayLike) -> jax.Array:
    """Whether a tree is confirmed to be in the ball, by the check of `clip_tree`; False for NaN.

    The caller must use the very numbers that were measured, as in a loop's condition.
    """
    leaves = [magnitudes.widen(leaf) for leaf in jax.tree.leaves(tree)]
    limit = _limit(max_norm, float_formats.common_dtype(leaves))
    squares = _sum_of_squares(leaves, limit.exponent, limit.factor.dtype)
    return _measured(squares.total) & (_at_most(squares) <= _share(limit))


def norm_bound(tree: ArrayTree) -> jax.Array:
    """An upper bound on a tree's L2 norm, above it by about 1e-5 (float32); NaN if not finite.

    >>> float(norm_bound(jnp.array([3.0, 4.0]))) >= 5.0
    True
    """
    leaves = [magnitudes.widen(leaf) for leaf in jax.tree.leaves(tree)]
    dtype = float_formats.common_dtype(leaves)
    exponent, state = magnitudes.largest(leaves)
    norm = jnp.sqrt(_at_most(_sum_of_squares(leaves, exponent, dtype)))
    # Twice the smallest normal number, as the product may be flushed to zero.
    bound = (norm * float_formats.power_of_two(exponent, dtype) + 2.0**-125) * (
        1 + 16 * float_formats.roundoff(dtype)
    )
    bound = jnp.where(state == magnitudes.ZERO, 0, bound)
    return jnp.where(state == magnitudes.NONFINITE, jnp.nan, bound)


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


def _settle(leaves: list[jax.Array], max_norm: ArrayLike, rows: int = 0) -> _Settled:
    """Measures leaves, and says what brings them into the ball.

    The loop has one round, and another one only if numbers are so large that their squares
    overflow, or not finite. It is a loop all the same: its state are definite numbers, which are
    measured and, outside of it, scaled. A compiler may compute anything else twice, and
    differently, if it is used twice.
    """
    limit = _limit(max_norm, float_formats.common_dtype(leaves))
    dtype = limit.factor.dtype

    def unsettled(state: _Settled) -> jax.Array:
        again = jnp.any(~_measured(state.total)) & (state.attempt < _ATTEMPTS)
        return (state.attempt == 0) | again

    def measure(state: _Settled) -> _Settled:
        large = ~_measured(state.total)
        lost = _is_nan(state.total) | (large & (state.attempt == _ATTEMPTS - 1))
        leaves = _smaller(state.leaves, large, lost)
        squares = _sum_of_squares(leaves, limit.exponent, dtype, rows)
        inside = _at_most(squares) <= _share(limit)
        factor = jnp.where(inside, 1, _factor(_at_most(squares), limit, leaves))
        return _Settled(
            state.attempt + 1, squares.total, factor, inside, state.nonfinite | lost, leaves
        )

    none = parallel.no_rows(leaves, rows)
    first, zero, one = jnp.zeros((), jnp.int32), none.astype(dtype), (~none).astype(dtype)
    start = _Settled(first, zero, one, none, none, leaves)
    return jax.lax.while_loop(unsettled, measure, start)


def _smaller(leaves: list[jax.Array], large: jax.Array, lost: jax.Array) -> list[jax.Array]:
    """Leaves divided by a power of two where they are large, and zeros where they are lost.

    A loop again, of at most one round, so that it costs nothing where there is nothing to do.
    """

    def once(state: Any) -> Any:
        def divided(leaf: jax.Array) -> jax.Array:
            small = leaf * 2.0 ** (2 - _most_exponent(leaf.dtype))
            small = jnp.where(_beside(large, leaf), small, leaf)
            return jnp.where(_beside(lost, leaf), jnp.zeros_like(leaf), small)

        return jnp.zeros_like(state[0]), [divided(leaf) for leaf in state[1]]

    return jax.lax.while_loop(lambda state: state[0], once, (jnp.any(large | lost), leaves))[1]


def _factor(square: jax.Array, limit: _Limit, leaves: list[jax.Array]) -> jax.Array:
    """What brings numbers into the ball, given a bound on their sum of squares; zero if unsure."""
    dtype = limit.factor.dtype
    spare = 8 * float_formats.roundoff(dtype) + 2 * float_formats.coarsest_eps(leaves)
    factor = limit.factor * max(0.0, 1 - 2 * spare) / jnp.sqrt(square)
    # A root and a quotient may be rough on accelerators. So products have the last word.
    sure = square * factor * factor <= limit.factor * limit.factor * max(0.0, 1 - spare)
    return jnp.where(sure, factor, 0)


def _scaled(leaf: jax.Array, settled: _Settled) -> jax.Array:
    scaled = (leaf.astype(settled.factor.dtype) * settled.factor).astype(leaf.dtype)
    return jnp.where(settled.inside, leaf, scaled)


def _scaled_at_once(leaves: jax.Array, settled: _Settled) -> jax.Array:
    """As `_scaled`, in a kernel of its own: otherwise each leaf's part has the work in its own."""
    return jax.lax.cond(
        settled.inside, lambda leaves: leaves, lambda leaves: _scaled(leaves, settled), leaves
    )


def _beside(flags: jax.Array, leaf: jax.Array) -> jax.Array:
    """Flags of rows in a shape that goes with a leaf that has these rows."""
    return flags.reshape(flags.shape + (1,) * (leaf.ndim - flags.ndim)) if flags.ndim else flags


def _most_exponent(dtype: jnp.dtype) -> int:
    """The exponent of the largest norm that is measured without a risk of overflow."""
    return int(jnp.finfo(dtype).maxexp) // 2 - 2


def _measured(total: jax.Array) -> jax.Array:
    """Whether a sum of squares is small enough to be sure that nothing overflowed; no for NaN."""
    most = jnp.asarray(2.0 ** (2 * _most_exponent(total.dtype)), total.dtype)
    bits = float_formats.bits_of(total) & float_formats.masks(total.dtype)[0]
    return bits <= float_formats.bits_of(most)


def _is_nan(total: jax.Array) -> jax.Array:
    top, infinity = float_formats.masks(total.dtype)
    return (float_formats.bits_of(total) & top) > infinity


def _share(limit: _Limit) -> jax.Array:
    """The largest sum of squares that counts as inside."""
    roundoff = float_formats.roundoff(limit.factor.dtype)
    return limit.factor * limit.factor * (1 - 8 * roundoff)


def _at_most(squares: _Squares) -> jax.Array:
    """A bound on the exact sum of squares."""
    roundoff = float_formats.roundoff(squares.total.dtype)
    return squares.total * (1 / (1 - (squares.depth + 8) * roundoff)) + squares.lost


def _sum_of_squares(
    leaves: list[jax.Array], exponent: jax.Array, dtype: jnp.dtype, rows: int = 0
) -> _Squares:
    """The sum of squares in units of 2^exponent, over all leaves and devices with their pieces."""
    unit = float_formats.power_of_two(-exponent, dtype)
    totals, depths, count = [], [0], 0
    for axes, group in magnitudes.grouped(leaves, join=not rows).items():
        terms = [jnp.square(leaf.astype(dtype) * unit) for leaf in group]
        sums, each = zip(*(folded_sums.folded_sum(term, rows) for term in terms), strict=True)
        total, depth = folded_sums.folded_sum(jnp.stack(sums, axis=-1), rows)
        totals.append(magnitudes.across(jax.lax.psum, axes, total))
        depths.append(max(each) + depth + magnitudes.axes_size(axes) - 1)
        count += sum(leaf.size for leaf in group) * magnitudes.axes_size(axes)
    total = sum(totals[1:], totals[0]) if totals else jnp.zeros((), dtype)
    # Numbers below the smallest normal one, and their multiples and squares, may count as zero.
    least = max((int(jnp.finfo(leaf.dtype).minexp) for leaf in leaves), default=0)
    lost = float_formats.power_of_two(jnp.maximum(least - exponent, -60), dtype)
    return _Squares(total, max(depths) + len(totals), 2.0 * count * lost * lost)
