"""Sums in an order that the compiler does not choose, with a bound on their rounding."""

import math
from typing import Any

import jax
import jax.numpy as jnp

# Longest stretch of terms summed in an order left to the compiler.
_LONGEST_RUN = 128
# Number of slices folded into one at each level of a long sum.
_SLICES = 8


def folded_sum(terms: jax.Array) -> tuple[jax.Array, int]:
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
        while terms.shape[axis] > 1 and terms.size > _LONGEST_RUN:
            terms, parts = _fold(terms, axis)
            depth += parts - 1
    return jnp.sum(terms), depth + terms.size - 1


def _fold(terms: jax.Array, axis: int) -> tuple[jax.Array, int]:
    """The sum of up to eight slices along an axis, and how many they were."""
    length = terms.shape[axis]
    rows = math.ceil(length / _SLICES)
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
