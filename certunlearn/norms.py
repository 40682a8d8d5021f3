"""The strict ball: clipping in floating point that never ends outside the bound.

Every place that clips (parameters, updates, single examples) uses `clip_tree`, because the
guarantee rests on its bound and a bound that holds "up to rounding" is no bound.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from certunlearn import checks

SMALLEST_NORM = 1e-30
LARGEST_NORM = 1e30

# Longest stretch summed in an order left to the compiler.
_RUN = 128
# Number of slices folded into one at each level of a long sum.
_FOLD = 8


class Clipped(NamedTuple):
    """A tree inside the ball, and what had to be done to it.

    Attributes:
      tree: the clipped tree.
      clipped: bool scalar, the tree was scaled down.
      nonfinite: bool scalar, the tree held a NaN or an infinity and became zeros.
    """

    tree: Any
    clipped: jax.Array
    nonfinite: jax.Array


class _Measure(NamedTuple):
    """A tree's L2 norm, bounded above by `largest * ratio`."""

    largest: jax.Array  # scale: the largest magnitude, at least the smallest normal number
    ratio: jax.Array  # upper bound on the norm of tree / largest
    finite: jax.Array  # whether every element is finite


def clip_tree(tree: Any, max_norm: Any) -> Clipped:
    """Projects a pytree onto the L2 ball of radius `max_norm` around zero, strictly.

    Args:
      tree: a pytree of real arrays of any dtype.
      max_norm: the radius, between 1e-30 and 1e30; may be traced, and is then moved into that
        range from above and treated as zero from below.

    Returns:
      A `Clipped`. Leaves come back in float32 or their own wider dtype: a bfloat16 result would
      round above the bound, by up to 0.4%.

    Raises:
      TypeError: if `max_norm` is not one number, or a leaf is complex.
      ValueError: if `max_norm` is a concrete number out of range.

    Guarantee:
      In exact arithmetic on the returned numbers, the norm is at most `max_norm`, for every input,
      NaN and infinities included (they give zeros). The argument, with u the unit roundoff of the
      arithmetic (float32, or float64 if a leaf is):

      * Elements are divided by the largest magnitude m, so the largest ratio is 1 and squares
        cannot overflow. Squares that underflow are below 1e-37 of a sum that is at least 1.
      * All terms are non-negative, so a sum in which no term passes through more than k additions
        has relative error at most k u (to first order). Long sums are folded eightfold by explicit
        elementwise additions, at most 4 deep a level, down to 128 terms, whatever order the
        compiler takes for these: k <= 4 log_8(N) + 127, where a plain sum of N terms has k = N - 1
        and stagnates. The square root halves it: k u / 2.
      * The computed norm is enlarged by (k/2 + 16) u; the 16 covers division, squaring, square
        root and the multiplication by the bound's own factor, each at most 2 u.
      * The radius aimed at is `max_norm * (1 - 16 u')`, u' the roundoff of the narrowest leaf
        returned: it covers the conversion of `max_norm`, one division and one product.

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
def _clip_tree(tree: Any, max_norm: Any) -> Clipped:
    leaves, treedef = jax.tree.flatten(tree)
    leaves = [_widen(leaf) for leaf in leaves]
    measure = _measure(leaves)
    limit = _limit(max_norm, leaves)
    inside = measure.ratio <= limit / measure.largest
    scale = limit / jnp.maximum(measure.ratio, 1)

    def clip_leaf(leaf: jax.Array) -> jax.Array:
        scaled = (leaf.astype(limit.dtype) / measure.largest * scale).astype(leaf.dtype)
        return jnp.where(measure.finite, jnp.where(inside, leaf, scaled), 0)

    clipped = jax.tree.unflatten(treedef, [clip_leaf(leaf) for leaf in leaves])
    return Clipped(clipped, measure.finite & ~inside, ~measure.finite)


def norm_bound(tree: Any) -> jax.Array:
    """An upper bound on a tree's L2 norm, above it by about 1e-5 (float32); NaN if not finite.

    >>> float(norm_bound(jnp.array([3.0, 4.0]))) >= 5.0
    True
    """
    measure = _measure([_widen(leaf) for leaf in jax.tree.leaves(tree)])
    # Four roundoffs more than enough for this last product.
    bound = measure.largest * measure.ratio * (1 + 4 * jnp.finfo(measure.ratio.dtype).eps)
    return jnp.where(measure.finite, bound, jnp.nan)


def coarsest_eps(tree: Any) -> float:
    """Largest machine epsilon (twice the unit roundoff) among the leaves, at most float32's."""
    dtypes = [jnp.result_type(leaf, jnp.float32) for leaf in jax.tree.leaves(tree)]
    return max(float(jnp.finfo(dtype).eps) for dtype in (dtypes or [jnp.float32]))


def check_norm(name: str, value: Any) -> None:
    """Raises if a concrete `value` is not a number in [1e-30, 1e30]; traced values pass."""
    if isinstance(value, jax.core.Tracer):
        return
    number = checks.positive(name, value)
    # A hair of room, as 1e-30 in float32 is below 1e-30.
    if not SMALLEST_NORM * (1 - 1e-6) <= number <= LARGEST_NORM * (1 + 1e-6):
        raise ValueError(
            f"{name} must be between {SMALLEST_NORM:g} and {LARGEST_NORM:g}, where float32 "
            f"arithmetic neither underflows nor overflows, got {number!r}"
        )


def _widen(leaf: Any) -> jax.Array:
    leaf = jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        raise TypeError(f"clipping needs real arrays, got one of dtype {leaf.dtype}")
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _limit(max_norm: Any, leaves: list[jax.Array]) -> jax.Array:
    """`max_norm` in the working precision, lowered to leave room for rounding."""
    radius = jnp.asarray(max_norm, _working_dtype(leaves))
    # A traced radius may be anything, NaN included: nothing sensible means no update.
    radius = jnp.where(radius >= SMALLEST_NORM / 2, jnp.minimum(radius, LARGEST_NORM), 0)
    return radius * (1 - 8 * coarsest_eps(leaves))


def _working_dtype(leaves: list[jax.Array]) -> Any:
    return jnp.result_type(jnp.float32, *(leaf.dtype for leaf in leaves))


def _measure(leaves: list[jax.Array]) -> _Measure:
    dtype = _working_dtype(leaves)
    leaves = [leaf.astype(dtype) for leaf in leaves if leaf.size]
    if not leaves:
        return _Measure(jnp.ones((), dtype), jnp.zeros((), dtype), jnp.array(True))
    magnitude = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in leaves]))
    largest = jnp.maximum(magnitude, jnp.finfo(dtype).tiny)
    sums, depths = zip(*[_folded_sum(jnp.square(leaf / largest)) for leaf in leaves], strict=True)
    total, depth = _folded_sum(jnp.stack(sums))
    depth += max(depths)
    roundoff = float(jnp.finfo(dtype).eps) / 2
    ratio = jnp.sqrt(total) * (1 + (depth / 2 + 16) * roundoff)
    # The maximum alone does not tell: compiled for a CPU it may pass over a NaN. A sum does not.
    return _Measure(largest, ratio, jnp.isfinite(magnitude) & jnp.isfinite(ratio))


def _folded_sum(terms: jax.Array) -> tuple[jax.Array, int]:
    """Sum of an array, and the largest number of additions that any of its terms goes through.

    Elementwise additions of slices keep their order and vectorise; a reduction would not promise
    an order, and a dot product may run in reduced precision on accelerators.
    """
    terms = terms.reshape(-1)
    depth = 0
    while terms.size > _RUN:
        rows = terms.size // _FOLD
        parts = [terms[i * rows : (i + 1) * rows] for i in range(_FOLD)]
        rest = terms[_FOLD * rows :]  # shorter than the fold
        while len(parts) > 1:
            parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
        terms = parts[0]
        if rest.size:
            terms = terms.at[: rest.size].add(rest)
        depth += 4
    return jnp.sum(terms), depth + terms.size - 1
