"""Small leaves set end to end in one array, so that one kernel does what each had its own for.

A compiler takes time for each kernel, and a kernel for each shape. Models of many leaves have many
shapes of few numbers. Setting these end to end costs no kernel, only a copy of few numbers.
"""

import collections
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from certunlearn._numerics import parallel

# Larger leaves have a kernel of their own: a copy of them would take time and memory.
LARGEST = 2**16
# Kernels for leaves of one shape are compiled once. So many leaves of one shape take no longer by
# themselves than their parts of one array would.
MOST_ALIKE = 3
# With fewer leaves there is little to save, and the copy would cost more than it saves.
FEWEST = 16


def groups(leaves: Sequence[jax.Array]) -> list[list[int]]:
    """The places of leaves that are to be set end to end; each other place by itself.

    Args:
      leaves: arrays.

    Returns:
      Lists of places, of one or at least `FEWEST`. Leaves of one list have one dtype, and the same
      axes inside `shard_map`. With several devices each leaf stays alone, for a part of a leaf must
      stay where it is.
    """
    shapes = collections.Counter(leaf.shape for leaf in leaves)
    found: dict[object, list[int]] = {}
    for place, leaf in enumerate(leaves):
        small = 0 < leaf.size <= LARGEST and jax.device_count() == 1
        rare = shapes[leaf.shape] <= MOST_ALIKE
        alone = not (small and rare) or parallel.explicit_sharding(leaf) is not None
        kind = place if alone else (leaf.dtype, parallel.pieces_axes(leaf))
        found.setdefault(kind, []).append(place)
    return [
        part
        for places in found.values()
        for part in ([places] if len(places) >= FEWEST else [[place] for place in places])
    ]


def joined(leaves: Sequence[jax.Array], groups: Sequence[Sequence[int]]) -> list[jax.Array]:
    """An array for each group: its leaves end to end, or its only leaf as it is."""
    return [
        jnp.concatenate([leaves[place].reshape(-1) for place in places])
        if len(places) > 1
        else leaves[places[0]]
        for places in groups
    ]


def parted(
    arrays: Sequence[jax.Array], leaves: Sequence[jax.Array], groups: Sequence[Sequence[int]]
) -> list[jax.Array]:
    """What `joined` has made of leaves, or numbers in their places, in the leaves' shapes."""
    found: dict[int, jax.Array] = {}
    for array, places in zip(arrays, groups, strict=True):
        if len(places) == 1:
            found[places[0]] = array
            continue
        start = 0
        for place in places:
            stop = start + leaves[place].size
            found[place] = array[start:stop].reshape(leaves[place].shape)
            start = stop
    return [found[place] for place in range(len(leaves))]
