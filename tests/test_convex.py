"""Convex losses: constants neither too small nor slack, contraction, stability and training."""

import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
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


def distance_and_bound(loss, data, deletions, tolerance=1e-5):
    """Trains with and without the first `deletions` examples."""
    kept = tuple(part[deletions:] for part in data)
    start = loss.init(data[0].shape[1])
    with_all, without = (
        convex.gradient_descent(loss, start, part, tolerance=tolerance, max_steps=5000)
        for part in (data, kept)
    )
    bound = convex.stability_distance(
        loss,
        size=len(data[0]),
        deletions=deletions,
        gradient_norm=max(with_all.gradient_norm, without.gradient_norm),
    )
    return norm(with_all.params - without.params), bound


@every_loss
def test_the_stability_distance_is_never_exceeded(name):
    for seed in range(3):
        distance, bound = distance_and_bound(LOSSES[name], draw_data(name, seed), 4)
        assert 0 < distance <= bound


@every_loss
def test_the_stability_distance_holds_for_adversarial_deletions(name):
    """The deleted contradict the others, or alone speak for their direction."""
    features = np.tile(np.float32([2.0, 0.0, 0.0, 0.0]), (COUNT, 1))
    across = features.copy()
    across[:4] = [0.0, 2.0, 0.0, 0.0]
    targets = np.where(np.arange(COUNT) < 4, 0, 1)
    targets = np.float32(3.0 * targets - 1.5) if name == "ridge" else np.int32(targets)
    for x in (features, across):
        distance, bound = distance_and_bound(LOSSES[name], (x, targets), 4)
        assert 0 < distance <= bound


def test_the_stability_distance_holds_for_training_stopped_early():
    distance, bound = distance_and_bound(LOSSES["softmax"], draw_data("softmax"), 4, 0.1)
    assert distance <= bound
    exact = convex.stability_distance(LOSSES["softmax"], size=COUNT, deletions=4, gradient_norm=0)
    assert bound > exact


def opposite(deletions):
    return jnp.where(jnp.arange(20) < deletions, -1.0, 1.0)


@pytest.mark.parametrize("deletions", [1, 15])
def test_ridge_nearly_attains_the_stability_distance(deletions):
    """Short features: every example pulls with nearly its largest gradient."""
    loss = convex.ridge_regression(feature_norm=0.1, target_norm=1.0, l2=1.0)
    features = jnp.full((20, 1), 0.09999999)
    distance, bound = distance_and_bound(loss, (features, opposite(deletions)), deletions, 1e-7)
    assert 0.85 * bound < distance <= bound


def test_linear_losses_attain_the_stability_distance():
    loss = linear_loss()
    data = opposite(3)[:, None], jnp.zeros(20)
    distance, bound = distance_and_bound(loss, data, 3, 1e-6)
    assert 0.999 * bound < distance <= bound


def test_half_the_default_radius_holds_every_ridge_minimiser():
    """s / (s^2 + l2) is largest at s = sqrt(l2): one feature of that size attains it."""
    loss = convex.ridge_regression(feature_norm=0.5, target_norm=1.0, l2=0.25, radius=1.0)
    data = jnp.full((3, 1), 0.5), jnp.ones(3)
    out = convex.gradient_descent(loss, loss.init(1), data, tolerance=1e-6, max_steps=100)
    assert norm(out.params) == pytest.approx(1.0, rel=1e-5)
    assert loss.gradient_bound == 0.75


@every_loss
def test_the_gradient_norm_is_a_bound_and_close(name):
    loss = LOSSES[name]
    data = draw_data(name)
    for scale in (0.0, 1.0, 100.0):
        params = draw_params(name, scale, 1)
        with jax.enable_x64(True):
            wide = [jnp.asarray(part, jnp.float64) for part in (params, *data)]
            exact = norm(compiled(name)[1](wide[0], tuple(wide[1:])))
        assert exact <= convex.gradient_norm(loss, params, data) <= exact * (1 + 1e-9) + 1e-10


def test_the_gradient_norm_resolves_more_than_float32_could():
    data = draw_data("binary")
    loss = LOSSES["binary"]
    with jax.enable_x64(True):
        start = jnp.zeros(4, jnp.float64)
        out = convex.gradient_descent(loss, start, data, tolerance=1e-12, max_steps=5000)
        assert out.params.dtype == jnp.float64
        assert out.gradient_norm <= 1e-12
    narrow = convex.gradient_norm(loss, np.asarray(out.params, np.float32), data)
    assert 1e-12 < narrow < 1e-6  # rounded parameters are no longer that good, and it shows


@every_loss
def test_gradient_descent_reaches_its_tolerance(name):
    loss, data = LOSSES[name], draw_data(name)
    out = convex.gradient_descent(loss, loss.init(4), data, tolerance=1e-5, max_steps=2000)
    assert out.params.dtype == jnp.float32
    assert out.gradient_norm <= 1e-5
    assert out.gradient_norm == pytest.approx(convex.gradient_norm(loss, out.params, data))
    # As many steps as the contraction promises, at most: distances are gradients over m, or less.
    factor = convex.contraction(2 / (loss.smoothness + 0.1), 0.1, loss.smoothness)
    start = convex.gradient_norm(loss, loss.init(4), data)
    promised = math.log(start / 1e-5 * loss.smoothness / 0.1) / -math.log(factor)
    assert 0 < out.steps <= promised + 1
    again = convex.gradient_descent(loss, out.params, data, tolerance=1e-5, max_steps=1)
    assert again.steps == 0
    slower = convex.gradient_descent(
        loss,
        loss.init(4),
        data,
        learning_rate=0.5 / loss.smoothness,
        tolerance=1e-5,
        max_steps=2000,
    )
    assert slower.steps > out.steps
    np.testing.assert_allclose(slower.params, out.params, atol=2e-4)


def test_ridge_is_solved_exactly():
    loss, (x, y) = LOSSES["ridge"], draw_data("ridge")
    out = convex.gradient_descent(loss, loss.init(4), (x, y), tolerance=1e-5, max_steps=2000)
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    solution = np.linalg.solve(a.T @ a / COUNT + 0.1 * np.eye(4), a.T @ b / COUNT)
    assert np.linalg.norm(np.asarray(out.params) - solution) <= out.gradient_norm / 0.1


def test_unreached_tolerances_are_errors():
    loss, data = LOSSES["binary"], draw_data("binary")
    with pytest.raises(ValueError, match="after 3 steps: raise max_steps"):
        convex.gradient_descent(loss, loss.init(4), data, tolerance=1e-6, max_steps=3)
    with pytest.raises(ValueError, match="float32 parameters come no closer"):
        convex.gradient_descent(loss, loss.init(4), data, tolerance=1e-15, max_steps=10**6)
    start = jnp.full(4, jnp.nan)
    with pytest.raises(ValueError, match="gradient norm nan"):
        convex.gradient_descent(loss, start, data, tolerance=1e-6, max_steps=3)
    with pytest.raises(ValueError, match="finite gradient"):
        convex.gradient_norm(loss, jnp.full(4, jnp.inf), data)


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


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"deletions": 10}, ValueError, "deletions must be fewer than size 10, got 10"),
        ({"deletions": 0}, ValueError, "deletions must be at least 1"),
        ({"size": 10.0}, TypeError, "size must be a whole number"),
        ({"gradient_norm": -1.0}, ValueError, "gradient_norm must be at least 0"),
        ({"gradient_norm": None}, TypeError, "gradient_norm must be one real number"),
        ({"gradient_norm": np.nan}, ValueError, "gradient_norm must be at least 0"),
    ],
)
def test_bad_stability_arguments_are_errors(arguments, error, message):
    good = {"size": 10, "deletions": 1, "gradient_norm": 0.0}
    with pytest.raises(error, match=message):
        convex.stability_distance(LOSSES["ridge"], **(good | arguments))


def linear_loss():
    """Gradients of 1 and of -1: nothing deletions do could be worse."""
    return convex.ConvexLoss(
        loss_fn=lambda w, batch: jnp.mean(batch[0] @ w) + 0.25 * jnp.sum(w**2),
        strong_convexity=0.5,
        smoothness=0.5,
        gradient_bound=1.0,
        l2=0.5,
        feature_norm=1.0,
    )


@pytest.mark.parametrize("name", ["softmax", "linear"])
def test_training_stays_within_its_distance_at_every_step(name):
    loss = linear_loss() if name == "linear" else LOSSES[name]
    data = (opposite(3)[:, None], jnp.zeros(20)) if name == "linear" else draw_data(name)
    size, rate = len(data[0]), 0.3 if name == "linear" else 1.5 / LOSSES[name].smoothness
    ours = theirs = loss.init(data[0].shape[1])
    slope = jax.jit(jax.grad(loss.loss_fn))
    for step in range(1, 30):
        ours = ours - rate * slope(ours, data)
        theirs = theirs - rate * slope(theirs, tuple(part[3:] for part in data))
        bound = convex.training_distance(
            loss, size=size, deletions=3, learning_rate=rate, steps=step
        )
        assert norm(ours - theirs) <= bound * (1 + 1e-5)
        if name == "linear":
            assert norm(ours - theirs) > 0.99 * bound
    with pytest.raises(ValueError, match="at most 2 / smoothness"):
        convex.training_distance(
            loss, size=size, deletions=3, learning_rate=3 / loss.smoothness, steps=2
        )


def test_exact_minimisation_is_never_assumed():
    with pytest.raises(TypeError, match="gradient_norm"):
        convex.stability_distance(LOSSES["ridge"], size=10, deletions=1)


def test_diverging_learning_rates_are_errors():
    loss, data = LOSSES["ridge"], draw_data("ridge")
    with pytest.raises(ValueError, match="learning_rate must be below 2 / smoothness"):
        convex.gradient_descent(
            loss, loss.init(4), data, learning_rate=1.0, tolerance=1e-3, max_steps=9
        )


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
