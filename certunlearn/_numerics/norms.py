"""The strict ball: clipping in floating point that never ends outside the bound.

Every place that clips (parameters, updates, single examples) uses `clip_tree`, because the
guarantee rests on its bound and a bound that holds "up to rounding" is no bound.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from certunlearn._numerics import checks, parallel

SMALLEST_NORM = 1e-30
LARGEST_NORM = 1e30

# Longest stretch summed in an order left to the compiler.
_RUN = 128
# Number of slices folded into one at each level of a long sum.
_FOLD = 8
# Magnitudes are measured in units of a power of two, and moved into this range of exponents: the
# least keeps squares normal, the greatest keeps sums finite.
_LEAST, _GREATEST = -63, 40


class Clipped(NamedTuple):
    """A tree inside the ball, and what had to be done to it.

    Attributes:
      tree: the clipped tree.
      clipped: bool scalar, the tree was scaled down.
      nonfinite: bool scalar, the tree held a NaN or an infinity and became zeros. So would a tree
        whose bound cannot be confirmed, which no compiler is known to bring about.
    """

    tree: Any
    clipped: jax.Array
    nonfinite: jax.Array


class _Squares(NamedTuple):
    """A computed sum of squares, and what is known of its error."""

    total: jax.Array
    depth: int  # the largest number of additions that a term went through
    terms: int  # how many they were


class _Limit(NamedTuple):
    """A radius `factor * 2^exponent`, below the one asked for by at least five roundoffs."""

    factor: jax.Array  # at least 1 and below 2; zero if there is no radius
    exponent: jax.Array  # int32, at least -101 and at most 99


def clip_tree(tree: Any, max_norm: Any) -> Clipped:
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

      The proof speaks of a last check alone, not of how the numbers came about. The check is the
      condition of a loop that holds the numbers, so that what is measured are the very bits
      returned: a compiler may compute twice, and differently, what is used twice outside. All that
      it asks of the compiler is that sums and products of *normal* numbers have relative error at
      most u. No subnormal number, infinity or NaN takes part, so that flushing to zero and
      fast-math modes change nothing.

      * The bound is f 2^q with 1 <= f < 2: `max_norm` converted, which costs u, and lowered by 8 u.
      * For each number y the check uses v >= |y| 2^-q, made from y's bit pattern by subtracting q
        from the exponent: in integers, and so exactly. It is raised to a floor (2^-63, or the
        smallest normal number times 2^-q) and cut at 2^28 or above; a NaN is above all numbers.
      * Let the sum of the N squares v^2 come out as at most f^2 (1 - (k + 8) u), with k the largest
        number of additions that a square goes through. Then none was cut, and the exact sum is at
        most f^2: each square lost at most u in the product and in each addition, and the bound
        itself had three roundings. Otherwise zeros are returned.
      * Sums are folded eightfold by explicit additions of slices, 7 additions a level in any order,
        down to 128 terms: k <= 7 log_8(N) + 134, where a plain sum has N - 1 and stagnates.

      What the check does not confirm is scaled, once, in the same way with the largest number's
      exponent for q, and aimed (1.5 k + 50) u below the bound, so that the check passes then.

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
    limit = _limit(max_norm, common_dtype(leaves))

    def outside(state: Any) -> jax.Array:
        tries, _, leaves = state
        return (tries < 2) & ~_confirmed(leaves, limit)

    def scale_down(state: Any) -> Any:
        tries, _, leaves = state
        return (tries + 1, *_scaled(leaves, limit))

    tries, nonfinite = jnp.zeros((), jnp.int32), jnp.array(False)
    tries, nonfinite, leaves = jax.lax.while_loop(outside, scale_down, (tries, nonfinite, leaves))
    # One scaling is enough, so that a second leaves nothing that was confirmed.
    unconfirmed = tries == 2
    leaves = [jnp.where(unconfirmed, jnp.zeros_like(leaf), leaf) for leaf in leaves]
    nonfinite |= unconfirmed & (limit.factor > 0)
    return Clipped(jax.tree.unflatten(treedef, leaves), (tries > 0) & ~nonfinite, nonfinite)


def within(tree: Any, max_norm: Any) -> jax.Array:
    """Whether a tree is confirmed to be in the ball, by the check of `clip_tree`; False for NaN.

    It is the caller's part that the numbers measured are those used, as in a loop's condition.
    """
    leaves = [_widen(leaf) for leaf in jax.tree.leaves(tree)]
    return _confirmed(leaves, _limit(max_norm, common_dtype(leaves)))


def norm_bound(tree: Any) -> jax.Array:
    """An upper bound on a tree's L2 norm, above it by about 1e-5 (float32); NaN if not finite.

    >>> float(norm_bound(jnp.array([3.0, 4.0]))) >= 5.0
    True
    """
    leaves = [_widen(leaf) for leaf in jax.tree.leaves(tree)]
    dtype = common_dtype(leaves)
    exponent, state = _largest(leaves)
    norm = _norm(_sum_of_squares(leaves, exponent, dtype))
    # Twice the smallest normal number, as the product may be flushed to zero.
    bound = (norm * _power_of_two(exponent, dtype) + 2.0**-125) * (1 + 8 * _roundoff(dtype))
    bound = jnp.where(state == _ZERO, 0, bound)
    return jnp.where(state == _NONFINITE, jnp.nan, bound)


def all_finite(tree: Any) -> jax.Array:
    """Whether no number of a tree is a NaN or an infinity, on any device that holds a piece."""
    return _largest([_widen(leaf) for leaf in jax.tree.leaves(tree)])[1] != _NONFINITE


def spacing(leaf: Any) -> jax.Array:
    """Distance of neighbouring numbers of a leaf's dtype at its largest magnitude, all pieces'.

    In float32 or wider, and at least 2^-100 times the dtype's epsilon. Where the leaf is not finite
    it is half that of the largest numbers.
    """
    dtype = jnp.result_type(leaf)
    exponent, _ = _largest([_widen(leaf)])
    return _power_of_two(exponent - int(jnp.finfo(dtype).nmant), wide_dtype(leaf))


def holds_nan(tree: Any) -> jax.Array:
    """Whether a floating leaf of the tree has a NaN in it, read from bits, for fast-math's sake."""
    found = jnp.asarray(False)
    for leaf in jax.tree.leaves(tree):
        magnitude, infinity = _masks(leaf.dtype)
        found |= jnp.any((_bits(leaf) & magnitude) > infinity)
    return found


def nan_where(condition: jax.Array, leaf: jax.Array) -> jax.Array:
    """The leaf, or NaN where the condition holds; as bits, as fast-math may leave out a NaN."""
    _, infinity = _masks(leaf.dtype)
    quiet = infinity | 1 << (int(jnp.finfo(leaf.dtype).nmant) - 1)
    bits = _bits(leaf)
    bits = jnp.where(condition, jnp.asarray(quiet, bits.dtype), bits)
    return jax.lax.bitcast_convert_type(bits, leaf.dtype)


def coarsest_eps(tree: Any) -> float:
    """Largest machine epsilon (twice the unit roundoff) among the leaves, at most float32's."""
    dtypes = [wide_dtype(leaf) for leaf in jax.tree.leaves(tree)]
    return max(float(jnp.finfo(dtype).eps) for dtype in (dtypes or [jnp.float32]))


def wide_dtype(leaf: Any) -> Any:
    """The dtype that arithmetic on a real leaf is done in: its own, but float32 at least."""
    dtype = jnp.result_type(leaf)
    wide = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 32
    return dtype if wide else jnp.dtype(jnp.float32)


def common_dtype(leaves: Sequence[Any]) -> Any:
    """The widest of the dtypes that arithmetic on real leaves is done in."""
    wide = any(wide_dtype(leaf) == jnp.float64 for leaf in leaves)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def check_norm(name: str, value: Any) -> None:
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


def _widen(leaf: Any) -> jax.Array:
    leaf = jnp.asarray(leaf)
    real = jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == jnp.bool_
    if not real or jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        raise TypeError(f"clipping needs real arrays, got one of dtype {leaf.dtype}")
    return leaf.astype(wide_dtype(leaf))


def _limit(max_norm: Any, dtype: Any) -> _Limit:
    """`max_norm` in the working precision, lowered by more than its conversion may raise it."""
    radius = jnp.asarray(max_norm, dtype)
    # By bit patterns, which order positive numbers. A traced radius may be anything: nothing
    # sensible means no update.
    least, infinity = (_bits(jnp.asarray(x, dtype)) for x in (SMALLEST_NORM / 2, jnp.inf))
    positive = (_bits(radius) >= least) & (_bits(radius) <= infinity)
    radius = jnp.where(positive, jnp.minimum(radius, LARGEST_NORM), 1)
    radius = radius * (1 - 8 * _roundoff(dtype))
    exponent = _exponent(_bits(radius), dtype)
    return _Limit(jnp.where(positive, radius * _power_of_two(-exponent, dtype), 0), exponent)


def _confirmed(leaves: list[jax.Array], limit: _Limit) -> jax.Array:
    dtype = limit.factor.dtype
    squares = _sum_of_squares(leaves, limit.exponent, dtype)
    room = max(0.0, 1 - (squares.depth + 8) * _roundoff(dtype))
    return squares.total <= limit.factor * limit.factor * room


def _scaled(leaves: list[jax.Array], limit: _Limit) -> tuple[jax.Array, list[jax.Array]]:
    """Whether a leaf is not finite, and the leaves brought into the ball; zeros if so."""
    dtype = limit.factor.dtype
    exponent, state = _largest(leaves)
    squares = _sum_of_squares(leaves, exponent, dtype)
    # The floor of what is measured adds at most 2^-50 for each number.
    spare = (squares.depth + 24) * _roundoff(dtype) + 4 * coarsest_eps(leaves)
    aim = limit.factor * max(0.0, 1 - spare - squares.terms * 2.0**-50)
    # A norm outside of the smallest ball is at least 1/2 in these units.
    factor = aim / jnp.maximum(_norm(squares), 0.25) * _power_of_two(limit.exponent, dtype)
    finite = state != _NONFINITE

    def scale(leaf: jax.Array) -> jax.Array:
        small = (leaf.astype(dtype) * _power_of_two(-exponent, dtype) * factor).astype(leaf.dtype)
        return jnp.where(finite, small, jnp.zeros_like(leaf))

    return ~finite, [scale(leaf) for leaf in leaves]


# What the largest magnitude among some numbers is.
_ZERO, _FINITE, _NONFINITE = range(3)


def _largest(leaves: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The largest number's exponent, but from -100 to below the dtype's own, and its state."""
    exponents, states = [jnp.asarray(-100, jnp.int32)], [jnp.asarray(_ZERO, jnp.int32)]
    for axes, group in _grouped(leaves).items():
        for leaf in group:
            top = jnp.max(_bits(leaf) & _masks(leaf.dtype)[0])
            infinite = top >= _masks(leaf.dtype)[1]
            exponents.append(_over(jax.lax.pmax, axes, _exponent(top, leaf.dtype)))
            state = jnp.where(infinite, _NONFINITE, jnp.where(top > 0, _FINITE, _ZERO))
            states.append(_over(jax.lax.pmax, axes, state.astype(jnp.int32)))
    highest = jnp.finfo(common_dtype(leaves)).maxexp - 2
    return jnp.minimum(jnp.max(jnp.stack(exponents)), highest), jnp.max(jnp.stack(states))


def _sum_of_squares(leaves: list[jax.Array], exponent: jax.Array, dtype: Any) -> _Squares:
    """The sum of squares in units of 2^exponent, over all leaves and devices with their pieces."""
    totals, depths, count = [jnp.zeros((), dtype)], [0], 0
    for axes, group in _grouped(leaves).items():
        terms = [jnp.square(_in_units(leaf, exponent, dtype)) for leaf in group]
        sums, each = zip(*map(_folded_sum, terms), strict=True)
        total, depth = _folded_sum(jnp.stack(sums))
        totals.append(_over(jax.lax.psum, axes, total))
        depths.append(max(each) + depth + _size(axes) - 1)
        count += sum(leaf.size for leaf in group) * _size(axes)
    return _Squares(jnp.sum(jnp.stack(totals)), max(depths) + len(totals) - 1, count)


def _norm(squares: _Squares) -> jax.Array:
    """The square root, raised by more than its rounding and that of the sum."""
    roundoff = _roundoff(squares.total.dtype)
    return jnp.sqrt(squares.total) * (1 + (squares.depth / 2 + 8) * roundoff)


def _in_units(leaf: jax.Array, exponent: jax.Array, dtype: Any) -> jax.Array:
    """Magnitudes times 2^-exponent, moved into the range that is measured; normal numbers all."""
    top, infinity = _masks(leaf.dtype)
    bits = _bits(leaf) & top
    if leaf.dtype != dtype:
        # Without subnormal and infinite numbers, of which a conversion may make anything.
        bits = jnp.clip(bits, 1 << int(jnp.finfo(leaf.dtype).nmant), infinity - 1)
        bits = _bits(jax.lax.bitcast_convert_type(bits, leaf.dtype).astype(dtype))
    least, greatest = (_biased(exponent + end, dtype) for end in (_LEAST, _GREATEST))
    moved = exponent.astype(bits.dtype) << int(jnp.finfo(dtype).nmant)
    return jax.lax.bitcast_convert_type(jnp.clip(bits, least, greatest) - moved, dtype)


def _grouped(leaves: list[jax.Array]) -> dict[tuple[str, ...], list[jax.Array]]:
    """Leaves that hold something, by the axes over which they are pieces."""
    grouped: dict[tuple[str, ...], list[jax.Array]] = {}
    for leaf in leaves:
        if leaf.size:
            grouped.setdefault(parallel.pieces_axes(leaf), []).append(leaf)
    return grouped


def _folded_sum(terms: jax.Array) -> tuple[jax.Array, int]:
    """Sum of an array, and the largest number of additions that any of its terms goes through.

    Elementwise additions of slices bound that number and vectorise; a reduction would not promise
    an order, and a dot product may run in reduced precision on accelerators. Slices are taken
    within as many blocks of each axis as there are devices, so that an array which is sharded over
    them is summed where it is.
    """
    devices = jax.device_count()
    shape: list[int] = [1, 1]
    # On a mesh with explicit axes, JAX wants to be told that the blocks stay where they are.
    sharding = jax.typeof(terms).sharding
    places: list[Any] = [None, None]
    for length, place in zip(terms.shape, sharding.spec, strict=True):
        blocks = math.gcd(length, devices)
        if blocks > 1:
            shape += [blocks, length // blocks]
            places += [place, None]
        else:
            shape[-1] *= length
    explicit = any(place is not None for place in places)
    kept = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*places))
    terms = jax.lax.reshape(terms, shape, out_sharding=kept if explicit else None)
    depth = 0
    for axis in range(1, len(shape), 2):
        while terms.shape[axis] > 1 and terms.size > _RUN:
            terms, parts = _fold(terms, axis)
            depth += parts - 1
    return jnp.sum(terms), depth + terms.size - 1


def _fold(terms: jax.Array, axis: int) -> tuple[jax.Array, int]:
    """The sum of up to eight slices along an axis, and how many they were."""
    length = terms.shape[axis]
    rows = math.ceil(length / _FOLD)
    parts = [
        jax.lax.slice_in_dim(terms, start, min(start + rows, length), axis=axis)
        for start in range(0, length, rows)
    ]
    short = rows - parts[-1].shape[axis]
    if short:
        widths = [(0, short if i == axis else 0) for i in range(terms.ndim)]
        parts[-1] = jnp.pad(parts[-1], widths)
    count = len(parts)
    while len(parts) > 1:
        odd = [parts[-1]] if len(parts) % 2 else []
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)] + odd
    return parts[0], count


def _over(collective: Any, axes: tuple[str, ...], value: jax.Array) -> jax.Array:
    return collective(value, axes) if axes else value


def _size(axes: tuple[str, ...]) -> int:
    return math.prod(jax.lax.axis_size(name) for name in axes)


def _roundoff(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps) / 2


# Floating-point numbers as integers, which are exact, and which fast-math modes do not touch.


def _bits(value: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(value, jnp.dtype(f"int{jnp.finfo(value.dtype).bits}"))


def _masks(dtype: Any) -> tuple[int, int]:
    """The bits of a magnitude, and those of infinity."""
    info = jnp.finfo(dtype)
    return 2 ** (info.bits - 1) - 1, (2 * info.maxexp - 1) << int(info.nmant)


def _exponent(bits: jax.Array, dtype: Any) -> jax.Array:
    """e with 2^e <= x < 2^(e+1), of a positive normal number x given by its bits; int32."""
    info = jnp.finfo(dtype)
    return (bits >> int(info.nmant)).astype(jnp.int32) - (info.maxexp - 1)


def _biased(exponent: jax.Array, dtype: Any) -> jax.Array:
    """The bits of 2^exponent, or of the nearest of the smallest normal number and infinity."""
    info = jnp.finfo(dtype)
    field = jnp.clip(exponent + (info.maxexp - 1), 1, 2 * info.maxexp - 1)
    return field.astype(f"int{info.bits}") << int(info.nmant)


def _power_of_two(exponent: jax.Array, dtype: Any) -> jax.Array:
    """2^exponent, exactly, if that is a normal number."""
    return jax.lax.bitcast_convert_type(_biased(exponent, dtype), dtype)
