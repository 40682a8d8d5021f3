"""A run's plan in digests, and its state between two steps, from which a stopped run goes on."""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from chex import ArrayTree

from certunlearn._numerics import normal_draws, processes, recognition
from certunlearn._numerics import random_keys as keys_lib
from certunlearn.unlearning.private_history import UnlearningState


def plan(settings: dict[str, Any], arrays: dict[str, ArrayTree | None]) -> dict[str, str]:
    """Digests of what decides the course of a run, under the names of `unlearn`'s arguments.

    Losses and optimizers have no digest: that they are the same is the caller's word.

    Args:
      settings: values that JSON can hold.
      arrays: pytrees of arrays; None for one that was not given.
    """
    digests = {
        name: hashlib.sha256(json.dumps(value).encode()).hexdigest()
        for name, value in settings.items()
    }
    return digests | {name: digest(tree) for name, tree in arrays.items()}


def digest(tree: Any) -> str:
    """SHA-256 of a pytree's paths, dtypes, shapes and values; typed keys count as their words."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        host = processes.on_host(_words(leaf))
        header = [jax.tree_util.keystr(path), str(host.dtype), list(host.shape)]
        found.update(json.dumps(header).encode())
        found.update(host.tobytes())
    return found.hexdigest()


def snapshot(carry: ArrayTree, on_host: bool = True) -> tuple[np.ndarray | jax.Array, ...] | None:
    """Copies of parameters and optimizer state; None if a failed step has lost them.

    A compiled step overwrites its input, and what it leaves behind may be an error.

    Args:
      carry: parameters and optimizer state.
      on_host: whether copies are NumPy arrays; else they lie where the originals do. So do always
        those of arrays that span processes, for others may not be there to send their pieces.
    """

    def copied(leaf: Any) -> np.ndarray | jax.Array:
        here = on_host and (leaf.is_fully_addressable or leaf.is_fully_replicated)
        return np.array(leaf) if here else jnp.array(leaf, copy=True)

    try:
        return tuple(copied(jnp.asarray(_words(leaf))) for leaf in jax.tree.leaves(carry))
    except RuntimeError:
        return None


def state(
    step: int,
    leaves: tuple[np.ndarray | jax.Array, ...],
    keys: keys_lib.Keys,
    key_source: str,
    plan: dict[str, str],
) -> UnlearningState:
    """What it takes to go on after `step` noisy steps."""
    return UnlearningState(
        step=step,
        leaves=leaves,
        data_key=np.asarray(jax.random.key_data(keys.data)),
        finetune_key=np.asarray(jax.random.key_data(keys.finetune)),
        key_source=key_source,
        plan=plan,
        noise_stream=normal_draws.STREAM,
    )


def restore(saved: UnlearningState, plan: dict[str, str], carry: ArrayTree) -> ArrayTree:
    """Parameters and optimizer state of a stopped run, structured like `carry`.

    Raises:
      ValueError: if the state is that of another plan, naming what differs, or is damaged; or if
        its noise was drawn from another stream than this version's.
    """
    if saved.noise_stream != normal_draws.STREAM:
        raise ValueError(
            f"resume must be the state of a run with noise stream {normal_draws.STREAM}, the only "
            f"one that this version draws, got stream {saved.noise_stream}: finish that run with "
            "the version that began it, or begin the run anew, with a new key"
        )
    differ = sorted(name for name in plan | saved.plan if plan.get(name) != saved.plan.get(name))
    if differ:
        raise ValueError(
            f"resume is the state of another plan: {', '.join(differ)} must be as in the run that "
            "was stopped. With the same noise on other steps, the noise would hide nothing"
        )
    mine, structure = jax.tree.flatten(carry)
    kinds = [(np.shape(leaf), jnp.result_type(leaf)) for leaf in map(_words, mine)]
    if kinds != [(np.shape(leaf), jnp.result_type(leaf)) for leaf in saved.leaves]:
        raise ValueError("resume is damaged: its arrays are not those of this plan's steps")
    return jax.tree.unflatten(structure, list(map(_like, mine, saved.leaves)))


def _words(leaf: Any) -> Any:
    """A typed key's words, which NumPy can hold; other leaves as they are."""
    return jax.random.key_data(leaf) if recognition.is_prng_key(leaf) else leaf


def _like(leaf: Any, saved: np.ndarray | jax.Array) -> jax.Array:
    """A copy, for the steps overwrite their input and the state may be used again.

    It is spread over devices as the leaf is.
    """
    spread = isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1
    if spread and not recognition.is_prng_key(leaf):
        host_or_spread = saved if isinstance(saved, jax.Array) else np.array(saved)
        return jax.device_put(host_or_spread, leaf.sharding, may_alias=False)
    copy = jnp.array(saved, copy=True)
    if not recognition.is_prng_key(leaf):
        return copy
    return jax.random.wrap_key_data(copy, impl=jax.random.key_impl(leaf))
