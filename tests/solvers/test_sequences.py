"""Several requests in turn: what is carried along, where bounds must hold, and what is said."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mechanism_helpers import DESCENT, length
from scipy import stats

import certunlearn as cu
from certunlearn import convex, mechanisms

SLOPES = {"strong_convexity": 0.5, "smoothness": 1.0}


def served_by_hand(requests, gradient, start):
    """Steps of all `requests`, (rate, steps) each, on one loss."""
    w = start
    for rate, steps in requests:
        for _ in range(steps):
            w = w - rate * gradient(w)
    return w


def test_a_lower_rate_does_not_make_what_higher_ones_did_forgotten():
    # Gradients that differ by up to 1 where training stopped (far out), and nearly agree at the
    # minimum: the reference drifts away from what was served in the first request's large steps.
    wide, far = 1e4, 1e5

    def last(w):  # what the third request retains
        return (1 - 1 / wide) * w

    def before(w):
        return last(w) + math.tanh(w / wide)

    requests = [(1.99, 300), (0.1, 1)]
    actual = abs(served_by_hand(requests, before, far) - served_by_hand(requests, last, far))
    tiny = {"stability_distance": 1e-6, "gradient_difference": 1e-6}
    first = cu.DescentToDelete(initial_distance=1e-6, learning_rate=1.99, steps=300, **SLOPES)
    second = dataclasses.replace(first.next(**tiny), learning_rate=0.1, steps=1)
    third = second.next(stability_distance=1e-6, gradient_difference=1.0)
    assert 100 < actual <= third.initial_distance < 2 * actual
    # The second request's own rate alone would have promised 2.
    assert 0.1 / (1 - second.factors[0]) == pytest.approx(2)


@pytest.mark.parametrize("kind", [cu.DescentToDelete, cu.ProjectedNoisySGD])
def test_quadratics_attain_the_distance_whatever_the_rates(kind):
    # Mean losses 1/2 curvature x^2 - b x, b moved one way by 0.3 in every request.
    rng, curvature = np.random.default_rng(0), 2.0
    shape = {"strong_convexity": curvature, "smoothness": curvature}
    gap = {"stability_distance": 0.3 / curvature, "gradient_difference": 0.3}
    m = kind(initial_distance=0.3 / curvature, learning_rate=0.1, steps=4, **shape)
    b, state, reserve = 1.0, 1.0 / curvature, 0.0
    for request in range(4):
        b += 0.3
        if request:
            # Where noise comes last, a thousandth is kept for rounding and carried on.
            reserve += m.final_distance / 1000 * (kind is cu.DescentToDelete)
            rates = tuple(rng.uniform(0, 0.5, size=request + 2) * (rng.random(request + 2) < 0.7))
            m = dataclasses.replace(m.next(**gap), learning_rate=rates, steps=request + 2)
        for rate in np.broadcast_to(m.learning_rate, m.steps):
            state -= rate * (curvature * state - b)
        reserve *= np.prod(m.factors)
        left = b / curvature - state + reserve
        assert left == pytest.approx(m.final_distance, rel=1e-12)


def test_training_that_went_nowhere_attains_the_drift():
    # Losses 1/2 x^2 and 1/2 x^2 - x from the common start 0, where training stopped at once.
    rng = np.random.default_rng(1)
    shape = {"strong_convexity": 1.0, "smoothness": 1.0}
    m = cu.DescentToDelete(initial_distance=1e-9, learning_rate=0.5, steps=1, **shape)
    requests = []
    for _ in range(3):
        rates = tuple(rng.uniform(0, 1, size=3))
        m = dataclasses.replace(m, learning_rate=rates, steps=3)
        requests += [(rate, 1) for rate in rates]
        m = m.next(stability_distance=1e-9, gradient_difference=1.0)
        apart = served_by_hand(requests, lambda w: w - 1, 0.0)
        assert apart == pytest.approx(m.past_drift, rel=1e-12)
        assert m.past_steps == len(requests)
        assert m.past_factor == pytest.approx(math.prod(1 - rate for rate, _ in requests))
    # Each request was charged for its own difference, over all steps before it.
    assert m.initial_distance >= m.past_drift


def test_what_is_carried_is_recorded_and_said():
    first = cu.ProjectedNoisySGD(**DESCENT, radius=3.0)
    assert (first.past_steps, first.past_factor, first.past_drift) == (0, 1.0, 0.0)
    assert any(s.startswith("Training with and without the forget set") for s in first.assumptions)
    second = first.next(stability_distance=0.1, gradient_difference=0.2)
    assert second.past_steps == 4
    assert second.past_factor == pytest.approx(0.95**4)
    assert second.past_drift == pytest.approx(0.1 * (1 + 0.95 + 0.95**2 + 0.95**3))
    said = [s for s in second.assumptions if "apart" in s and "earlier requests" in s]
    assert len(said) == 1
    assert repr(second.initial_distance) in said[0]
    assert not any(s.startswith("Training with and") for s in second.assumptions)
    record = json.loads(json.dumps(mechanisms.to_record(second)))
    assert mechanisms.from_record(record) == second
    certificate = cu.certify(
        second, noise_scale=1.0, delta=1e-5, params={"w": jnp.ones(2)}, steps_run=4
    )
    assert certificate.mechanism["past_drift"] == second.past_drift
    assert cu.verify(certificate)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"past_steps": 3, "past_factor": 1.1}, "past_factor must be between 0 and 1"),
        ({"past_steps": 3, "past_factor": math.nan}, "past_factor must be between 0 and 1"),
        ({"past_steps": 3, "past_drift": -0.1}, "past_drift must be at least 0"),
        ({"past_steps": 3, "past_drift": math.inf}, "past_drift must be at least 0 and finite"),
        ({"past_steps": -1}, "past_steps must be at least 0"),
        ({"past_drift": 0.1}, "must be 1 and 0 without past_steps"),
        ({"past_factor": 0.5}, "must be 1 and 0 without past_steps"),
    ],
)
def test_what_cannot_have_been_carried_is_refused(change, words):
    for kind in (cu.ProjectedNoisySGD, cu.DescentToDelete):
        with pytest.raises(ValueError, match=words):
            kind(**DESCENT | change)
    for error in (-1.0, 3.5, math.nan):
        with pytest.raises(ValueError, match="past_error must be between 0 and past_steps=3"):
            cu.DescentToDelete(**DESCENT | {"past_steps": 3, "past_error": error})
    with pytest.raises(ValueError, match="past_radius must be None without past_steps"):
        cu.ProjectedNoisySGD(**DESCENT, past_radius=1.0)


def test_the_users_own_distance_is_said_and_the_ball_counts():
    m = cu.ProjectedNoisySGD(**DESCENT | {"initial_distance": 50.0}, radius=1.0)
    assert m.initial_distance == 50.0
    assert m.start_distance == 2.0
    assert any("ends at most 50.0 apart" in s for s in m.assumptions)
    near = cu.ProjectedNoisySGD(**DESCENT | {"initial_distance": 2.0}, radius=1.0)
    for accountant in ("interpolation", "product"):
        both = [
            cu.epsilon(each, noise_scale=2.0, delta=1e-5, accountant=accountant)
            for each in (m, near)
        ]
        assert both[0] == both[1]
    assert m.final_distance == near.final_distance


# Where bounds hold

RIDGE = convex.ridge_regression(feature_norm=1.0, target_norm=1.0, l2=0.1)  # G within 3.16
STEP = {
    "learning_rate": 0.9,
    "strong_convexity": RIDGE.strong_convexity,
    "smoothness": RIDGE.smoothness,
}
CHAIN = {"size": 300, "deletions": 100, "gradient_norm": 0.0}


def test_noise_that_leaves_the_ball_where_a_bound_holds_is_refused():
    m = cu.ProjectedNoisySGD(initial_distance=1.0, steps=2, **STEP)
    with pytest.raises(ValueError, match=r"norm at most 3.162.*and not up to inf: noisy steps"):
        convex.next_request(m, RIDGE, **CHAIN)
    with pytest.raises(ValueError, match="not up to 4"):
        convex.next_request(dataclasses.replace(m, radius=4.0), RIDGE, **CHAIN)
    inside = dataclasses.replace(m, radius=3.0)
    second = convex.next_request(inside, RIDGE, **CHAIN)
    assert second == inside.next(
        stability_distance=convex.stability_distance(RIDGE, **CHAIN),
        gradient_difference=2 * 100 * RIDGE.gradient_bound / 300,
    )
    # The ball is around a centre, the bound around zero.
    with pytest.raises(ValueError, match=r"not up to 3\.2"):
        convex.next_request(inside, RIDGE, **CHAIN, center_norm=0.2)
    # And earlier requests must have kept to it too.
    assert second.reach == 3.0
    wild = dataclasses.replace(m.next(stability_distance=1.0, gradient_difference=1.0), radius=3.0)
    assert wild.reach == math.inf
    with pytest.raises(ValueError, match="not up to inf"):
        convex.next_request(wild, RIDGE, **CHAIN)
    wide = dataclasses.replace(m, radius=4.0).next(stability_distance=1.0, gradient_difference=1.0)
    assert dataclasses.replace(wide, radius=3.0).reach == 4.0


def test_the_attack_on_ridge_outside_its_ball_gets_no_certificate():
    # All targets 0; what the second request deletes has feature 1, the rest feature 0. With noise
    # and no ball, the law of what was served and of the reference are Gaussians of other widths.
    sizes = {"size": 300, "deletions": 100}
    m = cu.ProjectedNoisySGD(initial_distance=1.0, steps=2, **STEP | {"learning_rate": 1.0})
    numbers = {
        "stability_distance": convex.stability_distance(RIDGE, **CHAIN),
        "gradient_difference": 2 * 100 * RIDGE.gradient_bound / 300,
    }
    wrong = m.next(**numbers)  # the numbers of the ball, at the user's own word
    first, second = 200.0, cu.noise_scale(wrong, epsilon=1.0, delta=1e-5)
    keep, gone = 1 - 0.1, 1 - (0.1 + 100 / 300)
    widths = []
    for factor in (gone, keep):  # the first request's steps, then the second's on what is left
        variance = (factor**2 + 1) * first**2
        widths.append(math.sqrt(keep**4 * variance + (keep**2 + 1) * second**2))
    x = np.linspace(-30, 30, 400_001) * max(widths)
    p, q = (stats.norm.pdf(x, scale=width) for width in widths)
    true = max(np.trapezoid(np.maximum(a - math.e * b, 0), x) for a, b in ((p, q), (q, p)))
    assert true > 1e-3  # far above the delta of 1e-5 that those numbers would certify
    for refused in (
        lambda: convex.gradient_difference(RIDGE, **sizes),
        lambda: convex.gradient_difference(RIDGE, **sizes, radius=3.2),
        lambda: convex.next_request(m, RIDGE, **CHAIN),
    ):
        with pytest.raises(ValueError, match="gradient bound that holds for parameters of norm"):
            refused()
    inside = convex.gradient_difference(RIDGE, **sizes, radius=3.0)
    assert inside == numbers["gradient_difference"]


def test_a_bound_for_all_parameters_needs_no_ball():
    loss = convex.logistic_regression(feature_norm=1.0, l2=0.1)
    m = cu.ProjectedNoisySGD(
        initial_distance=1.0,
        steps=2,
        learning_rate=0.9,
        strong_convexity=0.1,
        smoothness=loss.smoothness,
    )
    assert convex.next_request(m, loss, **CHAIN).past_steps == 2
    assert convex.gradient_difference(loss, size=300, deletions=100) == pytest.approx(2 / 3)


def test_curvatures_of_another_loss_are_refused():
    m = cu.DescentToDelete(initial_distance=1.0, steps=2, **STEP | {"smoothness": 0.9})
    with pytest.raises(ValueError, match="curvatures that include the loss's"):
        convex.next_request(m, RIDGE, **CHAIN)
    m = cu.DescentToDelete(initial_distance=1.0, steps=2, **STEP | {"strong_convexity": 0.2})
    with pytest.raises(ValueError, match="curvatures that include the loss's"):
        convex.next_request(m, RIDGE, **CHAIN)
    with pytest.raises(TypeError, match="ProjectedNoisySGD or DescentToDelete"):
        convex.next_request(cu.OutputPerturbation(init_radius=1.0), RIDGE, **CHAIN)


@pytest.mark.parametrize(
    ("kind", "radius"), [(cu.DescentToDelete, None), (cu.ProjectedNoisySGD, 1.0)]
)
def test_chains_on_ridge_stay_within_their_distances(kind, radius):
    rng = np.random.default_rng(4)
    x = rng.normal(size=(60, 3))
    x /= np.maximum(length(x), 1.0)[:, None]
    y = rng.choice([-1.0, 1.0], size=60)
    order = np.argsort(-x[:, 0] * y)  # those that pull the hardest leave first
    loss = convex.ridge_regression(feature_norm=1.0, target_norm=1.0, l2=0.1)

    def gradient(w, rows):
        return x[rows].T @ (x[rows] @ w - y[rows]) / len(rows) + 0.1 * w

    def project(w):
        return w if radius is None else w * min(1.0, radius / length(w))

    def minimiser(rows):
        a = x[rows]
        return np.linalg.solve(a.T @ a / len(rows) + 0.1 * np.eye(3), a.T @ y[rows] / len(rows))

    def served(w, rows, draws):
        for draw in draws:
            w = project(w - 0.9 * gradient(w, rows) + draw)
        return w

    fields = {} if radius is None else {"radius": radius}
    rows, state, draws, m = np.arange(60), project(minimiser(np.arange(60))), [], None
    for request in range(3):
        sizes = {"size": len(rows), "deletions": 5, "gradient_norm": 0.0}
        rows = np.setdiff1d(rows, order[5 * request : 5 * request + 5])
        if m is None:
            distance = convex.stability_distance(loss, **sizes)
            m = kind(initial_distance=distance, steps=3, **STEP, **fields)
        else:
            m = convex.next_request(m, loss, **sizes)
        reference = project(minimiser(rows))
        for earlier in draws:
            reference = served(reference, rows, earlier)
        assert 0 < length(state - reference) <= m.start_distance
        draws.append(rng.normal(size=(3, 3)) * (kind is cu.ProjectedNoisySGD))
        state, reference = (served(w, rows, draws[-1]) for w in (state, reference))
        assert length(state - reference) <= m.final_distance


def test_training_distances_need_the_bound_to_hold_on_the_way():
    loss = convex.ridge_regression(feature_norm=1.0, target_norm=1.0, l2=0.1)
    how = {"size": 60, "deletions": 5, "learning_rate": 1.0, "steps": 4}
    with pytest.raises(ValueError, match="pass start_norm"):
        convex.training_distance(loss, **how)
    with pytest.raises(ValueError, match=r"not up to 3\.26"):
        convex.training_distance(loss, **how, start_norm=0.1)
    with pytest.raises(ValueError, match="start_norm must be at least 0"):
        convex.training_distance(loss, **how, start_norm=-1.0)
    claimed = convex.training_distance(loss, **how, start_norm=0.0)
    roomy = convex.ridge_regression(feature_norm=1.0, target_norm=1.0, l2=0.1, radius=4.0)
    assert convex.training_distance(roomy, **how, start_norm=0.5) > claimed
    # Iterates from zero stay within twice the largest minimiser, even where steps overshoot.
    a, w, largest = math.sqrt(0.1), 0.0, 0.0
    for _ in range(50):  # one feature sqrt(l2), targets 1: the largest minimiser of all
        w -= 9.9 * (a * (a * w - 1) + 0.1 * w)
        largest = max(largest, abs(w))
    assert loss.solution_norm == pytest.approx(0.5 / a)
    assert 1.9 * loss.solution_norm < largest <= 2 * loss.solution_norm <= loss.radius


def test_training_to_a_tolerance_has_no_training_distance():
    loss = convex.logistic_regression(feature_norm=1.0, l2=0.1)
    x = convex.clip_features(np.random.default_rng(0).normal(size=(40, 4)), 1.0)
    data = x, (x[:, 0] > 0).astype(jnp.int32)
    how = {"size": 40, "deletions": 5, "learning_rate": 0.5}
    out = convex.gradient_descent(
        loss, loss.init(4), data, learning_rate=0.5, tolerance=0.05, max_steps=99
    )
    assert out.steps > 1
    with pytest.raises(
        ValueError, match=rf"got the {int(out.steps)} steps that a training to a to"
    ):
        convex.training_distance(loss, **how, steps=out.steps)
    # For a fixed number both trainings take it, and stay within the distance.
    fixed, without = (
        convex.gradient_descent(loss, loss.init(4), part, learning_rate=0.5, steps=7)
        for part in (data, tuple(each[5:] for each in data))
    )
    assert fixed.steps == without.steps == 7
    claimed = convex.training_distance(loss, **how, steps=fixed.steps)
    assert 0 < length(np.asarray(fixed.params - without.params)) <= claimed
    w, slope = loss.init(4), jax.jit(jax.grad(loss.loss_fn))
    for _ in range(7):
        w = w - 0.5 * slope(w, data)
    np.testing.assert_allclose(fixed.params, w, atol=1e-6)
    assert fixed.gradient_norm == pytest.approx(convex.gradient_norm(loss, fixed.params, data))
    still = convex.gradient_descent(loss, out.params, data, learning_rate=0.5, steps=10_000)
    assert still.steps == 10_000
