"""Models with known constants in code bases that forbid operations on mixed types."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convex_helpers import LOSSES

from certunlearn import convex
from certunlearn.models.tangent import linearized

X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32) / 4


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("labels", [np.uint8, bool])
def test_convex_losses(dtype, labels):
    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("strict"):
        for name, loss in LOSSES.items():
            params, data = loss.init(4, dtype), (jnp.asarray(X), (X[:, 0] > 0).astype(labels))
            grad = jax.jit(jax.grad(loss.loss_fn))(params, data)
            assert grad.dtype == params.dtype
            assert np.all(np.isfinite(grad)), name


def test_convex_training():
    loss, data = LOSSES["binary"], (X, (X[:, 0] > 0).astype(np.int32))
    with jax.numpy_dtype_promotion("strict"):
        features = convex.clip_features(X, 2.0)
        strict = convex.gradient_descent(loss, loss.init(4), (features, data[1]), steps=3)
    plain = convex.gradient_descent(loss, loss.init(4), data, steps=3)
    np.testing.assert_array_equal(strict.params, plain.params)


@pytest.mark.parametrize("columns", [(), (3,)])
@pytest.mark.parametrize("labels", [np.uint8, bool])
def test_tangent_models(columns, labels):
    targets = (X[:, 0] > 0).astype(labels)
    model = linearized(lambda p, x: jnp.tanh(x @ p), jnp.ones((4, *columns)), 1.0)
    loss = model.logistic_loss(0.1, binary=np.bool_(columns == ()))
    slope = jax.jit(jax.grad(loss.loss_fn))
    plain = slope(model.zeros(), (X, model.scales(X), targets))
    with jax.numpy_dtype_promotion("strict"):
        strict = slope(model.zeros(), (X, model.scales(X), targets))
    np.testing.assert_allclose(strict, plain, rtol=1e-6)
    assert loss.radius == math.inf
