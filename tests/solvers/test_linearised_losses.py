"""Distances for losses of linearised networks, and what such losses refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import certunlearn as cu
from certunlearn import convex

SIZE, DELETIONS, RATE = 30, 4, 1.0
SIZES = {"size": SIZE, "deletions": DELETIONS}

SLOW = pytest.mark.slow


def net(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def problem():
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(4, 5)), "v": rng.normal(size=(5, 3))}
    model = convex.linearized(net, jax.tree.map(jnp.asarray, params), radius=1.0)
    x = jnp.asarray(rng.normal(size=(SIZE, 4)))
    batch = (x, model.scales(x), jnp.asarray(rng.integers(0, 3, SIZE)))
    return model, model.logistic_loss(l2=0.2), batch


def descend(loss, w, batch, steps):
    slope = jax.grad(loss.loss_fn)
    step = lambda _, w: jax.tree.map(lambda a, g: a - RATE * g, w, slope(w, batch))  # noqa: E731
    return jax.jit(lambda w: jax.lax.fori_loop(0, steps, step, w))(w)


def apart(a, b):
    return float(jnp.linalg.norm(ravel_pytree(a)[0] - ravel_pytree(b)[0]))


@pytest.mark.parametrize(
    "steps",
    [pytest.param(1, marks=SLOW), pytest.param(5, marks=SLOW), pytest.param(500, marks=SLOW)],
)
def test_trainings_stay_within_the_distances(steps):
    with jax.enable_x64(True):
        model, loss, batch = problem()
        assert isinstance(loss, convex.ConvexLoss)
        kept = tuple(part[DELETIONS:] for part in batch)
        ours, theirs = (descend(loss, model.zeros(), part, steps) for part in (batch, kept))
        assert apart(ours, theirs) > 0
        assert apart(ours, theirs) <= convex.training_distance(
            loss, **SIZES, learning_rate=RATE, steps=steps
        )
        slopes = [jax.grad(loss.loss_fn)(ours, part) for part in (batch, kept)]
        assert apart(*slopes) <= convex.gradient_difference(loss, **SIZES)
        reached = [
            apart(jax.grad(loss.loss_fn)(w, part), model.zeros())
            for w, part in ((ours, batch), (theirs, kept))
        ]
        stability = convex.stability_distance(loss, **SIZES, gradient_norm=max(reached))
        assert apart(ours, theirs) <= stability


def test_a_further_request_has_its_distance():
    _, loss, _ = problem()
    numbers = {**SIZES, "gradient_norm": 1e-3}
    first = cu.DescentToDelete(
        initial_distance=0.1,
        learning_rate=RATE,
        strong_convexity=loss.strong_convexity,
        smoothness=loss.smoothness,
        steps=4,
    )
    assert convex.next_request(first, loss, **numbers) == first.next(
        stability_distance=convex.stability_distance(loss, **numbers),
        gradient_difference=convex.gradient_difference(loss, **SIZES),
    )


def test_what_needs_a_linear_model_says_what_to_use():
    model, loss, batch = problem()
    assert loss.feature_norm is None
    for refused, remedy in (
        (lambda: loss.init(4), r"Linearized\.zeros\(\)"),
        (lambda: loss.check_data(batch), r"Linearized\.scales"),
        (
            lambda: convex.gradient_descent(loss, model.zeros(), batch, steps=3),
            "number of steps fixed beforehand and use training_distance",
        ),
    ):
        with pytest.raises(ValueError, match=f"loss must be one of a linear model.*{remedy}"):
            refused()


@pytest.mark.parametrize("field", [{"outputs": 3}, {"check_targets": lambda y: None}])
def test_fields_of_linear_models_need_a_feature_norm(field):
    constants = {"strong_convexity": 0.1, "smoothness": 1.0, "gradient_bound": 1.0, "l2": 0.1}
    with pytest.raises(ValueError, match="feature_norm must be given with outputs"):
        convex.ConvexLoss(loss_fn=net, **constants, **field)
