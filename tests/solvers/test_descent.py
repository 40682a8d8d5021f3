"""Training of convex losses: how far deletions move it, and that it gets where it says."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convex_helpers import COUNT, LOSSES, compiled, draw_data, draw_params, every_loss, norm

from certunlearn import convex


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


def test_either_a_tolerance_or_a_number_of_steps():
    loss, data = LOSSES["binary"], draw_data("binary")
    for odd in ({}, {"tolerance": 1e-3}, {"max_steps": 3}, {"steps": 3, "max_steps": 3}):
        with pytest.raises(ValueError, match="give either tolerance and max_steps, or steps"):
            convex.gradient_descent(loss, loss.init(4), data, **odd)
    with pytest.raises(ValueError, match="give either"):
        convex.gradient_descent(loss, loss.init(4), data, tolerance=1e-3, max_steps=3, steps=3)
    for odd in (0, 2**40):
        with pytest.raises(ValueError, match="steps must be at"):
            convex.gradient_descent(loss, loss.init(4), data, steps=odd)
    with pytest.raises(ValueError, match="finite gradients on the way"):
        convex.gradient_descent(loss, jnp.full(4, jnp.nan), data, steps=3)


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
