"""`clip_params`: the bound, the centre and errors."""

import functools

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


FAR = {"w": jnp.array([3.0, -4.0, 1.0]), "b": jnp.array([0.5, 2.0])}
ONES = jax.tree.map(jnp.ones_like, FAR)


def looked_at(params, radius, center, project=transforms.clip_params):
    """A number that depends on all of a projection, and the projection."""
    out = project(params, radius, center)
    weights = jnp.arange(1.0, 6.0)
    return jnp.sum(jnp.sin(jnp.concatenate(jax.tree.leaves(out))) * weights), out


def formula(params, radius, center):
    moved = jax.tree.map(jnp.subtract, params, center)
    length = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(moved)))
    return jax.tree.map(lambda x, c: c + x * jnp.minimum(1.0, radius / length), moved, center)


def test_derivatives_are_those_of_the_formula_and_change_nothing():
    def of_rows(project):
        value = functools.partial(looked_at, project=project)
        return jax.jit(jax.vmap(jax.grad(value, (0, 1, 2), has_aux=True), (0, 0, None)))

    rows, radii = jax.tree.map(lambda x: jnp.stack([x, x, 2 * x]), FAR), np.array([2.0, 100.0, 3.0])
    mine, out = of_rows(transforms.clip_params)(rows, radii, ONES)
    truth, exact = of_rows(formula)(rows, radii, ONES)
    for found, right in ((mine, truth), (out, exact)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, right
        )
    # What is differentiated is the projection with its strict bound.
    for number, radius in enumerate(radii):
        assert exact_norm(jax.tree.map(lambda x, n=number: np.float64(x[n]) - 1, out)) <= radius


@pytest.mark.slow
def test_derivatives_where_nothing_moves_and_where_squares_overflow():
    value = lambda params: looked_at(params, 2, None)[0]  # noqa: E731
    zeros = jax.tree.map(jnp.zeros_like, FAR)
    found = jnp.concatenate(jax.tree.leaves(jax.grad(value)(zeros)))
    np.testing.assert_allclose(found, jnp.arange(1.0, 6.0), rtol=1e-6)
    found = jax.grad(value)(jax.tree.map(lambda x: x * 1e30, FAR))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))
    # A projection moves nothing outwards.
    at = transforms.clip_params(FAR, 2.0)
    _, along = jax.jvp(lambda p: transforms.clip_params(p, 2.0), (FAR,), (FAR,))
    assert all(np.all(np.abs(leaf) < 1e-5) for leaf in jax.tree.leaves(along))
    assert exact_norm(at) <= 2


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
