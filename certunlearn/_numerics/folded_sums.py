"""Sums in an order that the compiler does not choose, with a bound on their rounding."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from certunlearn._numerics import float_formats

# Longest stretch of terms summed in an order left to the compiler.
_LONGEST_RUN = 128
# Longer sums are first folded by slices, which processors do fastest, and then summed in runs.
_LONGEST_IN_RUNS = 32 * _LONGEST_RUN
# Number of slices folded into one at each level of a long sum.
_SLICES = 8


def folded_sum(terms: jax.Array, rows: int = 0) -> tuple[jax.Array, int]:
    """Sum of an array, and the largest number of additions that any of its terms goes through.

    Args:
      terms: floating-point numbers, none negative.
      rows: number of leading axes that are kept: each of their rows has a sum of its own.

    Returns:
      The sum, or an array of the rows' sums, and the number of additions. For N terms it is at most
      7 ceil(log_8(N / 4096)) + 158 on one device: 193 for 1e8 terms. With D devices it is at most
      D - 1 more for each axis.

    Elementwise additions of slices bound that number and vectorise. What they leave is reduced in
    runs of at most 128 terms. A compiler may merge a reduction of a reduction into one, of any
    order; so there is a maximum in between, which no compiler can take away. It raises a partial
    sum to the smallest normal number, at most. A dot product would not do: it may run in reduced
    precision on accelerators.

    Slices and runs are taken within as many blocks of each axis as there are devices, so that an
    array which is sharded over them is summed where it is.
    """
    if math.prod(terms.shape[rows:]) <= _LONGEST_RUN:
        axes = tuple(range(rows, terms.ndim))
        return jnp.sum(terms, axis=axes), max(0, math.prod(terms.shape[rows:]) - 1)
    terms, inner = _in_blocks(terms, rows)
    depth = 0
    while math.prod(terms.shape[axis] for axis in inner) > _LONGEST_IN_RUNS:
        longest = max(inner, key=lambda axis: terms.shape[axis])
        terms, parts = _fold(terms, longest)
        depth += parts - 1
    for axis in reversed(inner):
        while terms.shape[axis] > 1:
            terms, run = _sum_runs(terms, axis)
            depth += run - 1
    # What is left are the blocks.
    while terms.ndim > rows:
        last = terms.shape[-1]
        terms = _fenced(jnp.sum(terms, axis=-1)) if last > 1 else jnp.squeeze(terms, -1)
        depth += last - 1
    return terms, depth


def _in_blocks(terms: jax.Array, rows: int) -> tuple[jax.Array, list[int]]:
    """The array with each axis split into blocks, and the axes within the blocks."""
    devices = jax.device_count()
    shape: list[int] = [*terms.shape[:rows], 1]
    # On a mesh with explicit axes, JAX wants to be told that the blocks stay where they are.
    sharding = jax.typeof(terms).sharding
    places: list[Any] = [*sharding.spec[:rows], None]
    inner = [rows]
    for length, place in zip(terms.shape[rows:], sharding.spec[rows:], strict=True):
        blocks = math.gcd(length, devices)
        if blocks > 1:
            shape += [blocks, length // blocks]
            places += [place, None]
            inner.append(len(shape) - 1)
        else:
            shape[-1] *= length
    explicit = any(place is not None for place in places)
    kept = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*places))
    return jax.lax.reshape(terms, shape, out_sharding=kept if explicit else None), inner


def _fold(terms: jax.Array, axis: int) -> tuple[jax.Array, int]:
    """The sum of up to eight slices along an axis, and how many they were."""
    length = terms.shape[axis]
    width = math.ceil(length / _SLICES)
    parts = [
        jax.lax.slice_in_dim(terms, start, min(start + width, length), axis=axis)
        for start in range(0, length, width)
    ]
    parts[-1] = _lengthened(parts[-1], axis, width)
    count = len(parts)
    while len(parts) > 1:
        odd = [parts[-1]] if len(parts) % 2 else []
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)] + odd
    return parts[0], count


def _sum_runs(terms: jax.Array, axis: int) -> tuple[jax.Array, int]:
    """The sums of runs of at most 128 terms along an axis, and how long the runs were."""
    length = terms.shape[axis]
    runs = math.ceil(length / _LONGEST_RUN)
    run = math.ceil(length / runs)
    terms = _lengthened(terms, axis, runs * run)
    shape = (*terms.shape[:axis], runs, run, *terms.shape[axis + 1 :])
    spec = jax.typeof(terms).sharding.spec
    kept = jax.typeof(terms).sharding.update(spec=(*spec[: axis + 1], None, *spec[axis + 1 :]))
    explicit = any(place is not None for place in spec)
    terms = jax.lax.reshape(terms, shape, out_sharding=kept if explicit else None)
    return _fenced(jnp.sum(terms, axis=axis + 1)), run


def _fenced(sums: jax.Array) -> jax.Array:
    """Sums that are not merged with a further sum: raised to the smallest normal number.

    By bit patterns, since a maximum of numbers may drop a NaN under fast-math.
    """
    bits = float_formats.bits_of(sums) & float_formats.masks(sums.dtype)[0]
    least = float_formats.bits_of(jnp.asarray(jnp.finfo(sums.dtype).tiny))
    return jax.lax.bitcast_convert_type(jnp.maximum(bits, least), sums.dtype)


def _lengthened(terms: jax.Array, axis: int, length: int) -> jax.Array:
    """Terms with zeros after them along an axis, up to a length."""
    short = length - terms.shape[axis]
    if not short:
        return terms
    return jnp.pad(terms, [(0, short if i == axis else 0) for i in range(terms.ndim)])
