"""Distances that mechanisms state, measured: rewinding, and chains of requests."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mechanism_helpers import DESCENT, REWIND, length

import certunlearn as cu
from certunlearn import convex


def tanh_network():
    """A small nonconvex network on bounded inputs: its mean loss over examples, 13 parameters."""
    rng = np.random.default_rng(5)
    features = rng.uniform(-1, 1, size=(40, 2))
    labels = np.sign(features[:, 0] * features[:, 1])

    def loss(params, x, y):
        hidden = jnp.tanh(x @ params[:6].reshape(2, 3) + params[6:9])
        return jnp.mean(jax.nn.softplus(-y * (hidden @ params[9:12] + params[12])))

    return loss, features, labels, rng.normal(size=13)


def test_rewinding_stays_within_the_distances_that_constants_measured_on_the_way_give():
    loss, features, labels, start = tanh_network()
    rate, trained, rewound, gone = 0.4, 15, 8, 3
    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(loss))
        hessian = jax.jit(jax.hessian(loss))
        each = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))
        everything = features, labels
        # The examples whose gradients differ the most from the others' leave.
        odd = np.asarray(each(start, *everything) - gradient(start, *everything))
        order = np.argsort(-length(odd))
        kept = features[order[gone:]], labels[order[gone:]]

        def descend(params, data, steps):
            path = [params]
            for _ in range(steps):
                path.append(path[-1] - rate * np.asarray(gradient(path[-1], *data)))
            return path

        on_all = descend(start, everything, trained)
        unlearned = on_all + descend(on_all[-1], kept, rewound)[1:]
        reference = descend(start, kept, trained + rewound)
        # Between the two runs too, where the mean value theorem looks.
        between = [
            (1 - w) * x + w * y
            for x, y in zip(unlearned, reference, strict=True)
            for w in (0.0, 0.5, 1.0)
        ]
        smoothness = 1.1 * max(
            np.abs(np.linalg.eigvalsh(np.asarray(hessian(p, *data)))).max()
            for p in between
            for data in (everything, kept)
        )
        bound = max(length(np.asarray(each(p, *everything))).max() for p in between)
    m = cu.RewindToDelete(
        learning_rate=rate,
        smoothness=smoothness,
        gradient_bound=1.1 * bound,
        training_learning_rate=rate,
        trained_steps=trained,
        steps=rewound,
        size=40,
        deletions=gone,
    )
    apart = [length(x - y) for x, y in zip(unlearned, reference, strict=True)]
    assert 0 < apart[trained] <= m.initial_distance
    assert 0 < apart[-1] <= m.final_distance
    # The first step starts at one point, so nothing but the gradients' difference counts.
    assert 0.1 < apart[1] / (2 * rate * gone * 1.1 * bound / 40) <= 1


def test_some_losses_drive_training_apart_as_far_as_the_rewinds_formula_says():
    # Retained examples have a gradient of -G where training stops, one of curvature -L there, and
    # training steps from one such place to the next; the deleted examples have gradient G.
    rate, smoothness, size, gone, trained, rewound = 0.1, 1.0, 10**6, 2, 20, 10
    period = rate  # what a step on gradient -1 moves

    def retained(x):
        wave = 2 * math.pi / period
        return -1 - smoothness / wave * math.sin(wave * x)

    def step(x, without):
        if without:
            return x - rate * retained(x)
        return x - rate * ((size - gone) * retained(x) + gone) / size

    unlearned = reference = 0.0
    m = cu.RewindToDelete(
        learning_rate=rate,
        smoothness=smoothness,
        gradient_bound=1.0,
        training_learning_rate=rate,
        trained_steps=trained,
        steps=rewound,
        size=size,
        deletions=gone,
    )
    for t in range(trained + rewound):
        if t == trained:
            assert abs(unlearned - reference) == pytest.approx(m.initial_distance, rel=0.01)
        assert abs(retained(reference)) == pytest.approx(1, abs=1e-4)  # G, wherever training goes
        assert retained(unlearned) >= -1.001
        unlearned, reference = step(unlearned, t >= trained), step(reference, True)
    assert abs(unlearned - reference) == pytest.approx(m.final_distance, rel=0.01)
    assert m.final_distance > 5 * trained * rate * 2 * gone / size  # growth counts


def test_the_next_rewind_counts_all_deletions():
    m = cu.RewindToDelete(**REWIND)
    third = m.next(deletions=2).next(deletions=1)
    assert third == cu.RewindToDelete(**REWIND | {"deletions": 8})
    assert third.initial_distance == pytest.approx(m.initial_distance * 8 / 5)
    with pytest.raises(ValueError, match="fewer than size"):
        m.next(deletions=95)


# Chains of requests on strongly convex losses


@functools.cache
def logistic_chain():
    """A loss, its data, and the rows that leave by request: those that pull the hardest."""
    rng = np.random.default_rng(8)
    loss = cu.convex.logistic_regression(feature_norm=1.0, l2=0.2)
    features = np.asarray(convex.clip_features(rng.normal(size=(120, 4)), 1.0), np.float64)
    labels = (features[:, 0] > 0).astype(np.int32)
    order = np.argsort(-features[:, 0])  # the surest of one class
    return loss, features, labels, [order[:4], order[4:10], order[10:13]]


@pytest.mark.parametrize(
    ("kind", "radius"),
    [
        pytest.param(cu.DescentToDelete, None, marks=pytest.mark.slow),
        (cu.ProjectedNoisySGD, None),
        pytest.param(cu.ProjectedNoisySGD, 0.6, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_a_chain_of_three_requests_stays_within_its_distances(kind, radius):
    loss, features, labels, requests = logistic_chain()
    rate, steps, noise = 0.8, 3, np.random.default_rng(9)
    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(loss.loss_fn))

        def data(rows):
            return jnp.asarray(features[rows]), jnp.asarray(labels[rows])

        def trained(rows):
            start = loss.init(4, jnp.float64)
            out = convex.gradient_descent(loss, start, data(rows), tolerance=1e-3, max_steps=500)
            return project(np.asarray(out.params))

        def project(w):
            return w if radius is None else w * min(1.0, radius / length(w))

        def served(w, rows, draws):
            """One request: the same noise, if there is any, in both of two runs."""
            for draw in draws:
                w = project(w - rate * np.asarray(gradient(w, data(rows))) + draw)
            return w

        rows = np.arange(120)
        state, m, draws = trained(rows), None, []
        for gone in requests:
            size, rows = len(rows), np.setdiff1d(rows, gone)
            stability = convex.stability_distance(
                loss, size=size, deletions=len(gone), gradient_norm=1e-3
            )
            if m is None:
                fields = {"learning_rate": rate, "steps": steps, "smoothness": loss.smoothness}
                fields |= {} if radius is None else {"radius": radius}
                m = kind(
                    initial_distance=stability, strong_convexity=loss.strong_convexity, **fields
                )
            else:
                difference = 2 * len(gone) * loss.gradient_bound / size
                before, kept = m.initial_distance, m.final_distance / 1000
                m = m.next(stability_distance=stability, gradient_difference=difference)
                # Not worse than charging for what endless steps of this rate would do.
                drift = max(stability, float(rate * difference / (1 - m.factors[0])))
                most = before + drift
                for _ in range(steps):
                    most = m.factors[0] * most + rate * difference
                assert m.initial_distance <= most + kept
            reference = trained(rows)
            for earlier in draws:
                reference = served(reference, rows, earlier)
            assert 0 < length(state - reference) <= m.initial_distance
            noisy = kind is cu.ProjectedNoisySGD
            draws.append(0.3 * noise.normal(size=(steps, 4)) * noisy)
            state, reference = (served(w, rows, draws[-1]) for w in (state, reference))
            assert 0.002 * m.final_distance < length(state - reference) <= m.final_distance


def test_quadratics_attain_the_distances_of_a_chain():
    # Mean losses curvature / 2 x^2 - b x whose b every request moves by 2 k G / n = 0.3, one way.
    curvature, rate, steps = 2.0, 0.1, 4
    fields = {"learning_rate": rate, "strong_convexity": curvature, "smoothness": curvature}
    m = cu.DescentToDelete(initial_distance=0.3 / curvature, steps=steps, **fields)
    b, state, reserve = 1.0, 1.0 / curvature, 0.0
    for request in range(3):
        b += 0.3
        if request:
            # A thousandth of what is left is kept for rounding, and carried on.
            reserve = 0.8**4 * (reserve + m.final_distance / 1000)
            m = m.next(stability_distance=0.3 / curvature, gradient_difference=0.3)
        reference = b / curvature  # training is over, and its steps move nothing
        for _ in range(steps):
            state -= rate * (curvature * state - b)
        assert reference - state + reserve == pytest.approx(m.final_distance, rel=1e-12)


def test_a_chain_needs_positive_numbers_and_adds_up_where_steps_do_not_contract():
    m = cu.DescentToDelete(**DESCENT | {"learning_rate": 0.5})
    assert m.next(stability_distance=0.1, gradient_difference=0.1).initial_distance == (
        pytest.approx(2.0 * 1.001 + 0.1 + 4 * 0.5 * 0.1)
    )
    m = cu.ProjectedNoisySGD(**DESCENT, radius=1.0)
    assert m.next(stability_distance=50.0, gradient_difference=0.1).start_distance == 2.0
    for change in ({"stability_distance": 0.0}, {"gradient_difference": -1.0}):
        with pytest.raises(ValueError, match="must be positive"):
            m.next(**{"stability_distance": 0.1, "gradient_difference": 0.1} | change)


@pytest.mark.slow
def test_a_chain_of_gradient_clipping_starts_in_the_ball_and_repeats_its_certificate():
    m = cu.GradientClipping(init_radius=0.5, clip_norm=1.0, learning_rate=0.1, steps=6)
    rng = np.random.default_rng(0)
    features, params = rng.normal(size=(30, 3)).astype(np.float32), jnp.array([3.0, -4.0, 0.0])

    def loss(params, batch):
        return jnp.mean(jnp.square(batch @ params - 1))

    epsilons = []
    for request, left in enumerate((28, 25, 20)):
        result = cu.unlearn(
            loss,
            params,
            features[:left],
            m,
            noise_scale=2.0,
            delta=1e-5,
            batch_size=10,
            key=jax.random.key(request),
            accountant="interpolation",
            options=cu.Options(forget_size=30 - left),
            progress=False,
        )
        start = cu.clip_params(params, 0.5)
        assert length(np.asarray(start, np.float64)) <= 0.5
        assert result.history.start_digest == cu.certificates.params_digest(start)
        assert cu.verify(result.certificate, result.params)
        assert length(result.params) > 0.5  # so the next start is another point than this end
        epsilons.append(result.certificate.epsilon)
        params = result.params
    expected = cu.epsilon(m, noise_scale=2.0, delta=1e-5, accountant="interpolation")
    assert epsilons == [expected] * 3
