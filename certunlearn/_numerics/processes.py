"""Arrays that lie on several devices or processes: their numbers on the host, and agreement."""

import contextlib
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from chex import ArrayTree
from jax.sharding import NamedSharding, PartitionSpec

from certunlearn._numerics import recognition


def is_spread(leaf: Any) -> bool:
    """Whether it is an array that lies on more than one device."""
    return _is_concrete(leaf) and len(leaf.sharding.device_set) > 1


def spans_processes(tree: ArrayTree) -> bool:
    """Whether a leaf lies on devices of several processes.

    Raises:
      ValueError: if one does, but not on devices of all of them.
    """
    everyone = range(jax.process_count())
    for leaf in jax.tree.leaves(tree):
        if _is_concrete(leaf) and not leaf.is_fully_addressable:
            holders = sorted({device.process_index for device in leaf.sharding.device_set})
            if holders != list(everyone):
                raise ValueError(
                    f"params must lie on devices of all {len(everyone)} processes, got an array on "
                    f"those of {holders} only"
                )
            return True
    return False


def on_host(leaf: Any) -> np.ndarray:
    """All of a leaf as an array of NumPy's; of one that spans processes, every one must call this.

    Such a leaf is copied to each of its devices for it.
    """
    elsewhere = _is_concrete(leaf) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)
    # Where the sharding has no mesh, JAX's error says that the array cannot be fetched.
    if elsewhere and isinstance(leaf.sharding, NamedSharding):
        leaf = jax.device_put(leaf, NamedSharding(leaf.sharding.mesh, PartitionSpec()))
    return np.asarray(leaf)


def largest(leaf: jax.Array) -> np.ndarray:
    """The largest magnitude in an array, in its dtype, worked out where it lies; NaN if one is."""
    if not is_spread(leaf):
        return np.max(np.abs(np.asarray(leaf)), initial=0)
    wide = jax.enable_x64(True) if leaf.dtype == jnp.float64 else contextlib.nullcontext()
    with wide:
        return np.asarray(jnp.max(jnp.abs(leaf), initial=0))


def check_agreed(what: str, *content: bytes) -> None:
    """Raises ValueError on all processes if some hold other bytes. All must call this.

    Digests are compared, so that nothing secret is sent.
    """
    from jax.experimental import multihost_utils  # takes long, and few need it

    mine = np.frombuffer(hashlib.sha256(b"".join(content)).digest(), np.uint8)
    found = np.asarray(multihost_utils.process_allgather(mine))
    if not np.all(found == found[0]):
        raise ValueError(f"{what} must be the same on all processes, got others on some")


def from_first(content: bytes) -> bytes:
    """What process 0 gives to this function. All must call it."""
    from jax.experimental import multihost_utils

    length = int(multihost_utils.broadcast_one_to_all(np.asarray(len(content))))
    text = np.zeros(length, np.uint8)
    mine = np.frombuffer(content, np.uint8)[:length]
    text[: len(mine)] = mine
    return np.asarray(multihost_utils.broadcast_one_to_all(text), np.uint8).tobytes()


def _is_concrete(leaf: Any) -> bool:
    """Whether it is an array with numbers on devices: no key, and not what JAX is tracing."""
    traced = isinstance(leaf, jax.core.Tracer)
    return isinstance(leaf, jax.Array) and not traced and not recognition.is_prng_key(leaf)
