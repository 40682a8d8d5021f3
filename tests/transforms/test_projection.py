"""`clip_params`: the bound, the centre and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transform_helpers import exact_norm, mechanism

from certunlearn import transforms
from certunlearn.mechanisms import noisy_optimizer

KEY = jax.random.key(7)


@pytest.mark.parametrize("size", [1, 10, 3000])
@pytest.mark.parametrize("far", [0.0, 1e-3, 1.0, 1e4, 1e12])
def test_projection_is_inside_the_ball_around_a_far_center(size, far):
    rng = np.random.default_rng(size)
    for radius in (1e-3, 0.1, 7.0):
        center = {"w": jnp.asarray(far * rng.normal(size=size), jnp.float32)}
        params = {"w": center["w"] + jnp.asarray(100 * rng.normal(size=size), jnp.float32)}
        out = transforms.clip_params(params, radius, center)
        difference = np.asarray(out["w"], np.float64) - np.asarray(center["w"], np.float64)
        assert np.linalg.norm(difference) <= radius
        roundoff = 2.0**-24 * (exact_norm(center) + radius)
        if roundoff < 0.01 * radius:
            assert np.linalg.norm(difference) >= radius * 0.9


def test_projection_leaves_what_is_inside_alone_and_keeps_direction():
    params = {"w": jnp.array([0.3, -0.4]), "b": jnp.zeros(3)}
    jax.tree.map(np.testing.assert_array_equal, transforms.clip_params(params, 0.51), params)
    out = transforms.clip_params(params, 0.1)
    np.testing.assert_allclose(out["w"], [0.06, -0.08], rtol=1e-4)
    assert out["w"].dtype == jnp.float32
    center = {"w": jnp.array([0.3, -0.3]), "b": jnp.zeros(3)}
    out = transforms.clip_params(params, 0.05, center)
    np.testing.assert_allclose(out["w"], [0.3, -0.35], rtol=1e-4)


def test_projection_of_float64():
    with jax.enable_x64(True):
        params = jnp.asarray(np.random.default_rng(0).normal(size=500) * 50)
        out = np.asarray(transforms.clip_params(params, 0.1, params * 0 + 3), np.longdouble)
        assert 0.0999 < np.sqrt(np.sum((out - 3) ** 2)) <= 0.1
        assert transforms.clip_params(params, 0.1).dtype == jnp.float64


def test_projection_of_traced_nonfinite_parameters_is_the_center():
    project = jax.jit(lambda p, c: transforms.clip_params(p, 1.0, c))
    center = jnp.array([2.0, 3.0])
    np.testing.assert_array_equal(project(jnp.array([jnp.nan, 1.0]), center), center)
    np.testing.assert_array_equal(project(jnp.array([jnp.inf, 1.0]), center), center)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32, jnp.complex64])
def test_parameters_that_cannot_hold_the_noise_are_refused(dtype):
    params = {"fine": jnp.ones(2), "layer": {"w": jnp.ones(2, dtype)}}
    name = jnp.dtype(dtype).name
    with pytest.raises(ValueError, match=rf"{name} at \['layer'\]\['w'\]"):
        transforms.clip_params(params, 1.0)
    with pytest.raises(ValueError, match=rf"{name} at \['layer'\]\['w'\]; keep float32"):
        noisy_optimizer.noisy_sgd(mechanism(), 0.1, key=KEY).init(params)


def test_bad_arguments_of_clip_params():
    params = {"w": jnp.ones(3)}
    for radius in (0.0, -1.0, np.nan, np.inf, 1e-40):
        with pytest.raises(ValueError, match="radius"):
            transforms.clip_params(params, radius)
    with pytest.raises(TypeError, match="radius"):
        transforms.clip_params(params, "1")
    with pytest.raises(ValueError, match="center must have the structure"):
        transforms.clip_params(params, 1.0, {"v": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"center must have shape \(3,\) at \['w'\], got \(1,\)"):
        transforms.clip_params(params, 1.0, {"w": jnp.ones(1)})
    with pytest.raises(ValueError, match=r"params must be finite.*\['w'\]"):
        transforms.clip_params({"w": jnp.array([1.0, jnp.nan])}, 1.0)
    with pytest.raises(ValueError, match="center must be finite"):
        transforms.clip_params(params, 1.0, {"w": jnp.full(3, jnp.inf)})
