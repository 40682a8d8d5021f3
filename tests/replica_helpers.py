"""Runs that are to be taken together, for the tests of replicas."""

import jax
import jax.numpy as jnp
from loop_helpers import DATA, MECHANISM, PARAMS, loss_fn, request

import certunlearn as cu
from certunlearn import unlearning

ARRAYS = jax.tree.map(jnp.asarray, DATA)


def prepare(mechanism=MECHANISM, key=0, loss=loss_fn, params=PARAMS, data=ARRAYS, **changes):
    return unlearning.prepare(loss, params, data, mechanism, **request(key, **changes))


def clipping(number, **changes):
    """Mechanisms that differ in every number."""
    numbers = {
        "init_radius": 0.5 + number,
        "clip_norm": 0.3 + 0.2 * number,
        "learning_rate": 0.1 * (number + 1),
        "weight_decay": 0.1 + 0.2 * number,
        "steps": 6,
    }
    return cu.GradientClipping(**(numbers | changes))
