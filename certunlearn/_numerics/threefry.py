"""Threefry-2x32: two random words for a pair of counters, by elementwise operations alone.

JAX has the same function, but runs its rounds in a loop on CPU and gives out one word of two. Here
the rounds are written out, so that a compiler fuses them with what uses the words: nothing is
stored, and each device works out the words of its own part of a sharded array.
"""

import enum

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

# A key, or the result: two uint32 arrays of shapes that broadcast.
Words = tuple[jax.Array, jax.Array]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


class Purpose(enum.IntEnum):
    """What a key is derived for: the first counter, above all numbers of steps (31 bits).

    So no word of noise is a word of a key, and no two keys from one are the same.
    """

    LEAF = 0x80000000
    PIECE = 0x80000001
    START = 0x80000002
    UPPER_COORDINATE = 0x80000003


@jax.jit
def words(key: Words, first: ArrayLike, second: ArrayLike) -> Words:
    """The two words that a key and two counters stand for, with the full 20 rounds.

    Args:
      key: two uint32 arrays.
      first: uint32 array, the first counter.
      second: uint32 array, the second counter.

    Returns:
      Two uint32 arrays. For one key, the pairs of counters and the pairs of words are one to one.

    Source:
      Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011).

    >>> zero = jnp.uint32(0)
    >>> [f"{int(word):08x}" for word in words((zero, zero), 0, 0)]
    ['6b200159', '99ba4efe']
    """
    schedule = (*key, key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    a = jnp.asarray(first, jnp.uint32) + schedule[0]
    b = jnp.asarray(second, jnp.uint32) + schedule[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            a = a + b
            b = ((b << rotation) | (b >> (32 - rotation))) ^ a
        a = a + schedule[(group + 1) % 3]
        b = b + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return a, b


def derived(key: Words, purpose: Purpose, number: ArrayLike) -> Words:
    """The key number `number` (below 2^32) for a purpose; an array of numbers gives many."""
    return words(key, jnp.uint32(purpose), number)
