"""Convex losses: constants neither too small nor slack, contraction, and what is refused."""

import math

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from convex_helpers import (
    COUNT,
    LOSSES,
    ROUNDING,
    compiled,
    draw_data,
    draw_params,
    every_loss,
    norm,
    worst_case,
)

from certunlearn import convex


def hessian_range(name, params, data):
    hessian = np.asarray(compiled(name)[0](params, data), np.float64)
    eigenvalues = np.linalg.eigvalsh(hessian.reshape(params.size, params.size))
    return eigenvalues[0], eigenvalues[-1]


def largest_example_gradient(name, params, data):
    return max(norm(grad) for grad in compiled(name)[2](params, *data))


@every_loss
def test_constants_hold_everywhere(name):
    loss = LOSSES[name]
    for seed, scale in enumerate((0.0, 0.1, 1.0, 10.0, 100.0)):
        params, data = draw_params(name, scale, seed), draw_data(name, seed)
        same = tuple(np.repeat(part[:1], COUNT, axis=0) for part in data)
        for batch in (data, same):
            low, high = hessian_range(name, params, batch)
            assert low >= loss.strong_convexity * (1 - 1e-3)
            assert high <= loss.smoothness * ROUNDING
        assert largest_example_gradient(name, params, data) <= loss.gradient_bound * ROUNDING


@every_loss
def test_constants_are_attained(name):
    loss = LOSSES[name]
    low, high = hessian_range(name, *worst_case(name, "hessian"))
    assert low == pytest.approx(loss.strong_convexity, rel=1e-4)
    assert high == pytest.approx(loss.smoothness, rel=1e-4)
    largest = largest_example_gradient(name, *worst_case(name, "gradient"))
    assert largest == pytest.approx(loss.gradient_bound, rel=1e-4)


@every_loss
def test_the_loss_is_a_mean_with_the_l2_term(name):
    loss = LOSSES[name]
    data = draw_data(name)
    params = draw_params(name, 1.0, 3)
    x, y, w = (np.asarray(part, np.float64) for part in (*data, params))
    z = x @ w
    plain = {
        "binary": lambda: np.log1p(np.exp(z)) - y * z,
        "softmax": lambda: np.log(np.exp(z).sum(axis=1)) - z[np.arange(COUNT), y.astype(int)],
        "ridge": lambda: (z - y) ** 2 / 2,
    }[name]()
    expected = np.mean(plain) + loss.l2 / 2 * np.sum(w**2)
    np.testing.assert_allclose(loss.loss_fn(params, data), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32, bool])
def test_labels_of_any_dtype(dtype):
    data = draw_data("binary")
    params = draw_params("binary", 1.0, 0)
    loss_fn = LOSSES["binary"].loss_fn
    same = (data[0], data[1].astype(dtype))
    np.testing.assert_array_equal(loss_fn(params, data), loss_fn(params, same))


def broken(name):
    """Features of norm up to 60 instead of 2, and targets that are no labels or beyond the norm."""
    rng = np.random.default_rng(7)
    features = 20 * rng.normal(size=(COUNT, 4)).astype(np.float32)
    features[:4] *= 1e6
    odd = [-1, 2, 7, 0.5, -3.5, 1e6] if name != "ridge" else [1e3, -1e3, 1e20, 2.0, -1.6, 0.0]
    return features, np.resize(np.float32(odd), COUNT)


@every_loss
def test_constants_hold_for_data_that_break_the_bounds(name):
    loss, data = LOSSES[name], broken(name)
    with pytest.raises(ValueError, match="must"):
        loss.check_data(data)
    for seed, scale in enumerate((0.0, 1.0, 30.0)):
        params = draw_params(name, scale, seed)
        if scale:  # along the longest example, where its gradient is largest
            along = data[0][0] / norm(data[0][0])
            params = params + scale * (along if params.ndim == 1 else along[:, None])
        if name == "ridge":
            params *= min(1, loss.radius / max(norm(params), 1e-9))
        params = params.astype(np.float32)
        for one in (data, tuple(np.repeat(part[:1], COUNT, axis=0) for part in data)):
            low, high = hessian_range(name, params, one)
            assert low >= loss.strong_convexity * (1 - 1e-3)
            assert high <= loss.smoothness * ROUNDING
        assert largest_example_gradient(name, params, data) <= loss.gradient_bound * ROUNDING


def test_labels_above_zero_are_class_one_and_no_class_pulls_nowhere():
    params, (x, _) = draw_params("binary", 1.0, 0), draw_data("binary")
    signs = np.where(np.arange(COUNT) % 3 == 0, 1, -1)
    same = [LOSSES["binary"].loss_fn(params, (x, y)) for y in (signs, signs > 0, 7 * signs)]
    assert same[0] == same[1] == same[2]
    params, loss = draw_params("softmax", 1.0, 0), LOSSES["softmax"]
    for label in (-1, 3, 0.5, np.nan):
        value = loss.loss_fn(params, (x, np.full(COUNT, label, np.float32)))
        logits = np.asarray(x) @ params
        expected = np.mean(np.log(np.exp(logits).sum(axis=1))) + 0.05 * norm(params) ** 2
        assert float(value) == pytest.approx(expected, rel=1e-5)


def test_a_bound_within_a_ball_reaches_the_minimisers():
    with pytest.raises(ValueError, match=r"radius must be at least target_norm / \(2 sqrt\(l2\)\)"):
        convex.ridge_regression(1.0, 1.0, 0.25, radius=0.99)
    loss = convex.ridge_regression(1.0, 1.0, 0.25)
    assert (loss.radius, loss.solution_norm) == (2.0, 1.0)
    assert LOSSES["binary"].radius == math.inf
    fields = {"loss_fn": loss.loss_fn, "strong_convexity": 1.0, "smoothness": 1.0}
    fields |= {"gradient_bound": 1.0, "l2": 1.0, "feature_norm": 1.0}
    for least in (2.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="radius must be at least solution_norm"):
            convex.ConvexLoss(**fields, radius=1.0, solution_norm=least)


@every_loss
@pytest.mark.parametrize("scale", [1e4, 1e15])
def test_gradients_are_finite_for_huge_logits(name, scale):
    shape = draw_params(name, 0.0, 0).shape
    params = np.float32(scale) * np.random.default_rng(0).normal(size=shape).astype(np.float32)
    assert np.isfinite(LOSSES[name].loss_fn(params, draw_data(name)))
    assert np.all(np.isfinite(compiled(name)[1](params, draw_data(name))))


@every_loss
def test_a_step_contracts_as_claimed(name):
    loss = LOSSES[name]
    data, grad = draw_data(name), compiled(name)[1]
    for share in (0.5, 1.0, 1.9):
        rate = share / loss.smoothness
        claimed = convex.contraction(rate, loss.strong_convexity, loss.smoothness)
        for seed in range(10):
            x = draw_params(name, 1.0, seed)
            y = x + draw_params(name, 10.0 ** -(seed % 3), seed + 100)
            after = norm(x - rate * grad(x, data) - y + rate * grad(y, data))
            assert after <= claimed * norm(x - y) * (1 + 1e-4)


@pytest.mark.parametrize("share", [0.5, 1.9])
def test_the_contraction_is_attained_by_some_pair(share):
    loss, grad = LOSSES["ridge"], compiled("ridge")[1]
    _, data = worst_case("ridge", "hessian")
    rate = share / loss.smoothness
    at_zero = grad(np.zeros(4, np.float32), data)
    apart = np.eye(4, dtype=np.float32)[:2]  # along the example, and across it
    shrunk = [norm(y - rate * (grad(y, data) - at_zero)) for y in apart]
    claimed = convex.contraction(rate, loss.strong_convexity, loss.smoothness)
    assert max(shrunk) == pytest.approx(claimed, rel=1e-5)


def test_the_default_learning_rate_contracts_fastest():
    rates = np.linspace(0.01, 1.99, 400) / 1.5
    best = min(convex.contraction(rate, 0.25, 1.5) for rate in rates)
    claimed = convex.contraction(2 / 1.75, 0.25, 1.5)
    assert claimed == pytest.approx((1.5 - 0.25) / (1.5 + 0.25))
    assert claimed <= best
    assert convex.contraction(2 / 1.5, 0.25, 1.5) == pytest.approx(1.0)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    exponent=st.floats(-20, 20),
    radius=st.floats(1e-20, 1e20),
)
def test_clipped_rows_are_strictly_inside(seed, exponent, radius):
    rows = np.random.default_rng(seed).normal(size=(5, 7)) * 10.0**exponent
    rows[1] = np.nan
    rows[2, 3] = np.inf
    out = np.asarray(convex.clip_features(rows.astype(np.float32), radius), np.float64)
    lengths = [math.sqrt(math.fsum((row**2).tolist())) for row in out]
    assert max(lengths) <= radius
    assert lengths[1] == lengths[2] == 0.0
    inside = np.linalg.norm(rows[[0, 3, 4]], axis=1) <= radius * (1 - 1e-4)
    np.testing.assert_array_equal(out[[0, 3, 4]][inside], rows[[0, 3, 4]][inside].astype("f4"))
    np.testing.assert_allclose(np.asarray(lengths)[[0, 3, 4]][~inside], radius, rtol=2e-4)


def test_whole_numbers_can_be_clipped_and_flat_arrays_cannot():
    assert convex.clip_features(np.full((2, 3), 255, np.uint8), 1.0).dtype == jnp.float32
    with pytest.raises(ValueError, match=r"features must be of shape \[n, d\]"):
        convex.clip_features(jnp.ones(3), 1.0)
    with pytest.raises(ValueError, match="radius"):
        convex.clip_features(jnp.ones((1, 3)), -1.0)


@pytest.mark.parametrize(
    ("name", "features", "targets", "message"),
    [
        ("binary", [[2.0, 0.1]], [0], "feature_norm = 2.0 .*clip_features.*in row 0"),
        ("binary", [[0.0, 0.1], [np.nan, 0.0]], [0, 1], "nan in row 1"),
        ("binary", [[1.0, 0.0]], [-1], "labels from 0 to 1, got -1"),
        ("binary", [[1.0, 0.0]], [0.5], "labels from 0 to 1, got 0.5"),
        ("softmax", [[1.0, 0.0]], [3], "labels from 0 to 2, got 3"),
        ("ridge", [[1.0, 0.0]], [1.6], "target_norm = 1.5, got 1.6"),
        ("ridge", [[1.0, 0.0]], [np.nan], "got nan"),
        ("ridge", [[1.0, 0.0]], [[1.0]], r"targets must be of shape \(1,\)"),
        ("ridge", [[1.0, 0.0]], [1.0, 1.0], "data must be"),
        ("ridge", np.zeros((0, 2)), [], "data must be"),
        ("ridge", [1.0, 0.0], [1.0, 1.0], "data must be"),
    ],
)
def test_data_outside_the_bounds_are_errors(name, features, targets, message):
    loss, data = LOSSES[name], (np.asarray(features), np.asarray(targets))
    with pytest.raises(ValueError, match=message):
        convex.gradient_norm(loss, loss.init(2), data)
    with pytest.raises(ValueError, match=message):
        convex.gradient_descent(loss, loss.init(2), data, tolerance=1e-3, max_steps=9)


def test_parameters_of_another_shape_are_errors():
    with pytest.raises(ValueError, match=r"params must be of shape \(4, 3\), got \(4,\)"):
        convex.gradient_norm(LOSSES["softmax"], jnp.zeros(4), draw_data("softmax"))


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        ("logistic_regression", (0.0, 0.1), ValueError, "feature_norm must be positive"),
        ("logistic_regression", (1.0, -0.1), ValueError, "l2 must be positive"),
        ("logistic_regression", (1.0, 0.1, 1), ValueError, "classes must be at least 2"),
        ("logistic_regression", (1.0, 0.1, 2.5), TypeError, "classes must be a whole"),
        ("ridge_regression", (1.0, np.inf, 0.1), ValueError, "target_norm must be positive"),
        ("ridge_regression", (1.0, 1.0, 0.1, 0.0), ValueError, "radius must be positive"),
        ("contraction", (0.0, 0.1, 1.0), ValueError, "learning_rate must be positive"),
        ("contraction", (1.0, 1.0, 0.5), ValueError, "at least strong_convexity 1.0, got 0.5"),
    ],
)
def test_bad_constants_are_errors(function, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(convex, function)(*arguments)


def test_a_loss_needs_a_function():
    with pytest.raises(TypeError, match="loss_fn must be callable"):
        convex.ConvexLoss(
            loss_fn=None,
            strong_convexity=1.0,
            smoothness=1.0,
            gradient_bound=1.0,
            l2=1.0,
            feature_norm=1.0,
        )
