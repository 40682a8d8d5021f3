"""Random keys: drawn from the operating system, and split by what they are for."""

import secrets
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from certunlearn._numerics import recognition, threefry

FROM_SYSTEM = "64 bits for the noise drawn from the operating system"
FROM_CALLER = "given by the caller: reproducible, fit for experiments only"


class Keys(NamedTuple):
    """Independent keys for the three uses of randomness in a run."""

    noise: jax.Array
    data: jax.Array
    finetune: jax.Array

    def __repr__(self) -> str:
        """Without the keys."""
        return "Keys(noise=<secret>, data=<secret>, finetune=<secret>)"


def system_keys() -> Keys:
    """Fresh keys of 64 bits each from the operating system's generator."""
    return Keys(*(_wrap(np.frombuffer(secrets.token_bytes(8), np.uint32)) for _ in range(3)))


def split_key(key: jax.Array) -> Keys:
    """The noise, data and fine-tuning keys that `unlearn` derives from a given key.

    Args:
      key: a typed key (`jax.random.key`) or a raw one (uint32 `[2]`). One of another kind than
        threefry is hashed to one of that kind, of which a run's state holds the words.

    Raises:
      TypeError: if it is neither; a seed is not a key.

    >>> split_key(jax.random.key(0)).noise.shape
    ()
    """
    return Keys(*jax.random.split(_wrap(words_of(key)), 3))


def as_key(key: Any) -> jax.Array:
    """Returns a typed key, or raises TypeError naming the kind of what was given instead."""
    dtype = recognition.dtype_of(key)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and key.shape == ():
        return key
    if dtype == np.uint32 and key.shape == (2,):
        return _wrap(key)
    # Not the value: it may be somebody's key, or the seed of one.
    given = type(key).__name__
    if dtype is not None:
        given = f"an array of dtype {dtype} and shape {jnp.shape(key)}"
    raise TypeError(f"key must be one key, as of jax.random.key(...), got {given}")


def words_of(key: Any) -> jax.Array:
    """The two words that the noise of a key comes from, uint32 `[2]`.

    Of a threefry key they are its own. The words of another kind, such as rbg's four, are hashed
    two at a time by Threefry, each pair as the counters and what came before as the key: different
    keys of four words have different hashes, except with probability 2^-64. This goes key by key,
    under `vmap` too, where JAX's own numbers of such keys do not.

    Raises:
      TypeError: if it is no key.
    """
    key = as_key(key)
    data = jax.random.key_data(key)
    if str(jax.random.key_impl(key)) == "threefry2x32":
        return data
    given = list(data.reshape(-1)) + [jnp.uint32(0)] * (data.size % 2)
    hashed = (jnp.uint32(data.size), jnp.uint32(0))
    for first, second in zip(given[::2], given[1::2], strict=True):
        hashed = threefry.words(hashed, first, second)
    return jnp.stack(hashed)


def _wrap(data: ArrayLike) -> jax.Array:
    return jax.random.wrap_key_data(jnp.asarray(data), impl="threefry2x32")
