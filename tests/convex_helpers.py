"""What the tests of convex losses share."""

import functools
import math

import jax
import numpy as np
import pytest

from certunlearn import convex

LOSSES = {
    "binary": convex.logistic_regression(feature_norm=2.0, l2=0.1),
    "softmax": convex.logistic_regression(feature_norm=2.0, l2=0.1, classes=3),
    "ridge": convex.ridge_regression(feature_norm=2.0, target_norm=1.5, l2=0.1),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
COUNT = 40  # one size of data nearly everywhere, so that little is compiled
# Measured in float32; a constant 5% too small is far outside.
ROUNDING = 1 + 1e-5


def draw_data(name, seed=0):
    rng = np.random.default_rng(seed)
    features = convex.clip_features(3 * rng.normal(size=(COUNT, 4)), 2.0)
    if name == "ridge":
        return features, rng.choice([-1.5, 1.5], size=COUNT).astype(np.float32)
    return features, rng.integers(2 if name == "binary" else 3, size=COUNT).astype(np.int32)


def draw_params(name, scale, seed):
    shape = (4, 3) if name == "softmax" else (4,)
    params = np.random.default_rng(seed).normal(size=shape) * scale
    if name == "ridge":  # its gradient bound holds within the radius only
        params *= min(1, 1.5 / math.sqrt(0.1) / max(norm(params), 1e-9))
    return params.astype(np.float32)


def worst_case(name, largest):
    """Parameters, and one example over and over, where a constant is nearly attained."""
    features = np.tile(np.float32([2.0, 0.0, 0.0, 0.0]), (COUNT, 1))
    params = draw_params(name, 0.0, 0)
    if name == "ridge":
        params[0] = -1.5 / math.sqrt(0.1)
        return params, (features, np.full(COUNT, 1.5, np.float32))
    if name == "binary":
        params[0] = -20.0 if largest == "gradient" else 0.0
        return params, (features, np.ones(COUNT, np.int32))
    # Class 2 is out of the running for the Hessian, and the sure choice for the gradient.
    params[0, 2] = 20.0 if largest == "gradient" else -20.0
    return params, (features, np.zeros(COUNT, np.int32))


def norm(x):
    return float(np.linalg.norm(np.asarray(x, np.float64)))


@functools.cache
def compiled(name):
    """The loss's Hessian, gradient, and example gradients without the L2 term."""
    loss = LOSSES[name]
    grad = jax.grad(loss.loss_fn)

    def one(params, x, y):
        return grad(params, (x[None], y[None])) - loss.l2 * params

    each = jax.vmap(one, (None, 0, 0))
    return jax.jit(jax.hessian(loss.loss_fn)), jax.jit(grad), jax.jit(each)
