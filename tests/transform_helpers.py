"""What the tests of the transforms and of the whole optimizer share."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from certunlearn.mechanisms import GradientClipping


def mechanism(**changes):
    defaults = {"init_radius": 1.0, "clip_norm": 1.0, "learning_rate": 0.1, "steps": 20}
    return GradientClipping(**(defaults | changes))


def exact_norm(tree):
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return math.sqrt(math.fsum(np.square(np.concatenate(leaves)).tolist()))


def zeros(size=2000):
    return {"a": jnp.zeros(size), "b": {"c": jnp.zeros(size)}}


def draws(tx, steps, tree=None, state=None):
    """The updates of `steps` steps with zero gradients, and the last state."""
    tree = zeros() if tree is None else tree
    state = tx.init(tree) if state is None else state
    update, out = jax.jit(tx.update), []
    for _ in range(steps):
        updates, state = update(tree, state, tree)
        out.append(updates)
    return out, state


def assert_nothing_shared(arrays):
    """No two of the arrays are equal, shifted-equal, opposite or correlated."""
    flat = np.stack([np.asarray(a, np.float64).ravel() for a in arrays])
    correlation = np.corrcoef(flat) - np.eye(len(flat))
    assert np.max(np.abs(correlation)) < 6 / np.sqrt(flat.shape[1])
    values = np.abs(flat).ravel()
    # float32 draws collide by chance now and then, whole vectors never.
    assert len(np.unique(values)) > 0.99 * len(values)
