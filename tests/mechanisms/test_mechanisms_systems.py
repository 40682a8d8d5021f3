import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mechanism_helpers import DESCENT, REWIND, length
from sklearn.datasets import load_digits

import certunlearn as cu
from certunlearn import accounting, convex, mechanisms

CLIPPED = {"init_radius": 1.0, "model_radius": 0.5, "learning_rate": 0.1, "steps": 4}
PRIVATE = {
    "clip_norm": 2.0,
    "learning_rate": 0.5,
    "steps": 4,
    "sampling_rate": 0.1,
    "batch_size": 20,
    "deletions": 3,
}
RATES = [0.1, 0.2, 0.3, 0.4]

EVERY = [
    cu.GradientClipping(init_radius=1.0, clip_norm=2.0, learning_rate=RATES, steps=4),
    cu.ModelClipping(**CLIPPED, init_noise_scale=0.3, reference="center"),
    cu.ModelClipping(**CLIPPED | {"learning_rate": RATES}, weight_decay=0.5, clip_norm=RATES),
    cu.OutputPerturbation(init_radius=2.0, reference="center"),
    cu.ProjectedNoisySGD(**DESCENT),
    cu.ProjectedNoisySGD(**DESCENT | {"learning_rate": RATES}, radius=0.7),
    cu.DescentToDelete(**DESCENT | {"learning_rate": lambda t: 0.1 / (1 + t)}),
    cu.RewindToDelete(**REWIND | {"learning_rate": RATES}),
    cu.DPSGD(**PRIVATE),
    cu.PerturbedMinimizer(gradient_norm=1e-3, strong_convexity=0.1),
    cu.PerturbedMinimizer(gradient_norm=1e-3, strong_convexity=0.1, reference="retrained"),
]
# Their only noise follows the last step: no run may stop before it.
AT_THE_END = (cu.OutputPerturbation, cu.DescentToDelete, cu.RewindToDelete, cu.PerturbedMinimizer)
# Those without noise: tests/accounting/test_accounting_exact.py.
EXACT = {kind for kind in mechanisms.MECHANISMS.values() if kind.exact}
every = pytest.mark.parametrize("m", EVERY, ids=lambda m: type(m).__name__)


@every
def test_record_round_trip(m):
    record = json.loads(json.dumps(mechanisms.to_record(m)))
    back = mechanisms.from_record(record)
    assert back == m
    assert type(back) is type(m)
    assert hash(back) == hash(m)
    missing = dict(list(record.items())[:-1])
    for bad in (record | {"surplus": 1}, missing):
        with pytest.raises(ValueError, match="missing or unknown fields"):
            mechanisms.from_record(bad)


@every
def test_mechanisms_are_values(m):
    for field in dataclasses.fields(m):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(m, field.name, getattr(m, field.name))


def test_every_mechanism_is_tried_here():
    tried = {type(m) for m in EVERY} | {cu.Separations} | EXACT
    assert tried == set(mechanisms.MECHANISMS.values())
    assert {cu.Retraining, mechanisms.ExactHead} == EXACT


@every
def test_what_every_mechanism_answers(m):
    assert m.reference in (*mechanisms.REFERENCES, "minimizer")
    assert all(isinstance(sentence, str) for sentence in m.assumptions)
    assert isinstance(m.sequence, str)
    assert len(set(m.assumptions)) == len(m.assumptions) >= 5
    if isinstance(m, cu.DPSGD):
        return
    for values in (m.contraction, m.shift, m.noisy):
        assert values.shape == (m.steps,)
    last = isinstance(m, AT_THE_END)
    assert m.noisy.tolist() == [not last] * (m.steps - 1) + [True]
    for t in range(m.steps):
        assert m.separation(t, 0.3) == pytest.approx(0.3 * m.contraction[t] + m.shift[t])


@every
def test_first(m):
    if isinstance(m, AT_THE_END):
        assert m.first(m.steps) == m
        for steps in {m.steps - 1, m.steps + 1} - {0}:
            with pytest.raises(ValueError, match=f"cannot stop early: steps must be {m.steps}"):
                m.first(steps)
        return
    cut = m.first(2)
    assert type(cut) is type(m)
    for field in dataclasses.fields(m):
        value = getattr(m, field.name)
        expected = 2 if field.name == "steps" else value[:2] if isinstance(value, tuple) else value
        assert getattr(cut, field.name) == expected
    assert m.first(4) == m
    with pytest.raises(ValueError, match="steps must be at most 4, got 5"):
        m.first(5)
    with pytest.raises(ValueError, match="at least 1"):
        m.first(0)


GOOD = {
    cu.ModelClipping: CLIPPED,
    cu.OutputPerturbation: {"init_radius": 1.0},
    cu.ProjectedNoisySGD: DESCENT,
    cu.DescentToDelete: DESCENT,
    cu.RewindToDelete: REWIND,
    cu.DPSGD: PRIVATE,
}


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (cu.ModelClipping, {"init_radius": 0.0}, "init_radius must be positive"),
        (cu.ModelClipping, {"model_radius": -1.0}, "model_radius must be positive"),
        (cu.ModelClipping, {"model_radius": math.inf}, "model_radius must be positive and finite"),
        (cu.ModelClipping, {"learning_rate": [0.1] * 3}, "one for each of the 4 steps"),
        (cu.ModelClipping, {"weight_decay": 11.0}, "must be at most 1, got 1.1"),
        (cu.ModelClipping, {"weight_decay": -1.0}, "weight_decay must be at least 0"),
        (cu.ModelClipping, {"init_noise_scale": -1.0}, "init_noise_scale must be at least 0"),
        (cu.ModelClipping, {"init_noise_scale": math.nan}, "init_noise_scale must be at least 0"),
        (cu.ModelClipping, {"init_noise_scale": 1.0, "clip_norm": 1.0}, "must be 0 with clip_norm"),
        (cu.ModelClipping, {"clip_norm": 0.0}, "clip_norm must be positive"),
        (cu.ModelClipping, {"reference": "zero"}, "reference must be one of"),
        (cu.ModelClipping, {"steps": 0}, "steps must be at least 1"),
        (cu.OutputPerturbation, {"init_radius": -1.0}, "init_radius must be positive"),
        (cu.OutputPerturbation, {"reference": "zero"}, "reference must be one of"),
        (cu.ProjectedNoisySGD, {"initial_distance": 0.0}, "initial_distance must be positive"),
        (cu.ProjectedNoisySGD, {"radius": 0.0}, "radius must be positive"),
        (cu.ProjectedNoisySGD, {"smoothness": 0.1}, "smoothness must be at least strong_convexity"),
        (cu.ProjectedNoisySGD, {"learning_rate": 0.51}, "at most 2 / smoothness = 0.5"),
        (cu.DescentToDelete, {"learning_rate": [0.1, 0.1, 0.6, 0.1]}, "at most 2 / smoothness"),
        (cu.DescentToDelete, {"strong_convexity": 0.0}, "strong_convexity must be positive"),
        (cu.DescentToDelete, {"steps": -1}, "steps must be at least 1"),
        (cu.RewindToDelete, {"deletions": 100}, "deletions must be fewer than size=100"),
        (cu.RewindToDelete, {"gradient_bound": 0.0}, "gradient_bound must be positive"),
        (cu.RewindToDelete, {"trained_steps": 0}, "trained_steps must be at least 1"),
        (cu.RewindToDelete, {"trained_steps": 10**5}, "drift apart without bound"),
        (cu.RewindToDelete, {"steps": 10**5}, "drift apart without bound"),
        (cu.DPSGD, {"sampling_rate": 1.01}, "sampling_rate must be at most 1"),
        (cu.DPSGD, {"sampling_rate": 0.0}, "sampling_rate must be positive"),
        (cu.DPSGD, {"batch_size": 0}, "batch_size must be at least 1"),
        (cu.DPSGD, {"deletions": 0}, "deletions must be at least 1"),
    ],
)
def test_out_of_range_is_a_value_error(kind, change, words):
    kind(**GOOD[kind])
    with pytest.raises(ValueError, match=words):
        kind(**GOOD[kind] | change)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (cu.ModelClipping, {"model_radius": "1"}),
        (cu.ModelClipping, {"init_noise_scale": [0.1]}),
        (cu.ModelClipping, {"init_noise_scale": None}),
        (cu.ModelClipping, {"clip_norm": True}),
        (cu.OutputPerturbation, {"init_radius": [1.0]}),
        (cu.ProjectedNoisySGD, {"radius": "wide"}),
        (cu.ProjectedNoisySGD, {"strong_convexity": [1.0]}),
        (cu.DescentToDelete, {"initial_distance": True}),
        (cu.DescentToDelete, {"learning_rate": None}),
        (cu.RewindToDelete, {"size": 100.0}),
        (cu.RewindToDelete, {"training_learning_rate": [0.1] * 10}),
        (cu.DPSGD, {"learning_rate": [0.1] * 4}),
        (cu.DPSGD, {"batch_size": 2.5}),
    ],
)
def test_wrong_kind_is_a_type_error(kind, change):
    with pytest.raises(TypeError):
        kind(**GOOD[kind] | change)


# Separations, measured


def moved(m, params, gradients):
    """Rows after the mechanism's first update, with the same small noise in all rows."""
    tx = cu.noisy_sgd(m, 1e-4, key=jax.random.key(0))

    def one(row, gradient):
        return row + tx.update(gradient, tx.init(row), row)[0]

    params, gradients = (jnp.asarray(rows, jnp.float32) for rows in (params, gradients))
    return np.asarray(jax.vmap(one)(params, gradients), np.float64)


def pairs(seed, count=400):
    """Points at many distances, and gradients: random, or driving each pair apart or together."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, count, 3)) * np.geomspace(0.03, 3, count)[:, None]
    g, h = rng.normal(size=(2, count, 3)) * rng.choice([0.1, 1.0, 100.0], size=(2, count, 1))
    apart = rng.random(count)[:, None]
    far = 300 * (x - y) / length(x - y)[:, None]
    g, h = np.where(apart < 0.4, -far, g), np.where(apart < 0.4, far, h)
    g, h = np.where(apart > 0.9, far, g), np.where(apart > 0.9, -far, h)
    return x, y, g, h


@pytest.mark.parametrize(
    "m",
    [
        cu.ModelClipping(**CLIPPED),
        cu.ModelClipping(**CLIPPED, weight_decay=3.0),
        cu.ModelClipping(**CLIPPED | {"model_radius": 5.0}, clip_norm=2.0, weight_decay=3.0),
        cu.GradientClipping(init_radius=1.0, clip_norm=2.0, learning_rate=0.1, steps=4),
        cu.GradientClipping(
            init_radius=1.0, clip_norm=2.0, learning_rate=0.1, weight_decay=7.0, steps=4
        ),
    ],
)
def test_updates_are_never_farther_apart_than_the_separation_and_nearly_so(m):
    x, y, g, h = pairs(0)
    after = length(moved(m, x, g) - moved(m, y, h))
    allowed = np.array([m.separation(0, r) for r in length(x - y)])
    assert np.all(after <= allowed * (1 + 2e-6))
    assert np.mean(after > 0.999 * allowed) > 0.2


def test_a_projection_after_the_step_keeps_models_within_the_diameter():
    m = cu.ModelClipping(**CLIPPED, clip_norm=8.0)
    x, y, g, h = pairs(1)
    after = length(moved(m, x, g) - moved(m, y, h))
    assert m.diameter == 1.0
    assert 0.999 < after.max() <= 1 + 1e-6
    inside = cu.ModelClipping(**CLIPPED, clip_norm=8.0, reference="center")
    assert inside.initial_distance == 1.0
    assert inside.diameter == 1.0


@pytest.mark.parametrize("radius", [None, 0.5])
@pytest.mark.parametrize("rate", [0.1, 0.3, 0.48])
def test_steps_on_quadratics_contract_as_claimed_and_nearly_so(rate, radius):
    # Losses with curvatures from 0.5 to 4: random ones, and the two extremes.
    m = cu.ProjectedNoisySGD(**DESCENT | {"learning_rate": rate}, radius=radius)
    rng = np.random.default_rng(2)
    x, y, _, _ = pairs(3)
    if radius is not None:
        x, y = x / 8, y / 8  # so that few are projected
    curvature = rng.uniform(0.5, 4, size=(len(x), 3))
    curvature[::3], curvature[1::3] = 0.5, 4.0
    turn = np.linalg.qr(rng.normal(size=(len(x), 3, 3)))[0]
    hessian = np.einsum("nij,nj,nkj->nik", turn, curvature, turn)
    lowest = 0.1 * rng.normal(size=x.shape)
    g, h = (np.einsum("nij,nj->ni", hessian, point - lowest) for point in (x, y))
    after = length(moved(m, x, g) - moved(m, y, h))
    allowed = np.array([m.separation(0, r) for r in length(x - y)])
    assert np.all(after <= allowed * (1 + 1e-4) + 1e-6)
    assert np.mean(after > 0.999 * allowed) > 0.2
    if radius is not None:
        assert after.max() <= m.diameter == 1.0


@pytest.mark.parametrize("share", [0.1, 0.5, 1.9])
def test_gradient_steps_on_real_data_contract_as_claimed(share):
    digits = load_digits()
    loss = cu.convex.logistic_regression(feature_norm=2.0, l2=0.3, classes=10)
    features = convex.clip_features(digits.data / 16, 2.0)[:200]
    data = features, jnp.asarray(digits.target[:200])
    rate = share / loss.smoothness
    claimed = cu.convex.contraction(rate, loss.strong_convexity, loss.smoothness)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 10))
    with jax.enable_x64(True):
        step = jax.jit(lambda w: w - rate * jax.grad(loss.loss_fn)(w, data))
        worst = 0.0
        for scale in np.geomspace(1e-3, 3, 12):
            direction = rng.normal(size=x.shape)
            y = x + scale * direction / np.linalg.norm(direction)
            worst = max(worst, float(jnp.linalg.norm(step(x) - step(y))) / scale)
        assert worst <= claimed
        # Pixel 0 is always empty: only the L2 term acts on its weights.
        y = x + np.eye(64)[:, :1] * rng.normal(size=10)
        flat = float(jnp.linalg.norm(step(x) - step(y)) / np.linalg.norm(x - y))
    assert flat == pytest.approx(1 - rate * 0.3, rel=1e-9)
    assert flat <= claimed * (1 + 1e-12)
    if share < 1:
        assert flat == pytest.approx(claimed, rel=1e-9)


# Rewinding


@every
def test_what_holds_for_a_sequence_of_requests_is_said(m):
    if isinstance(m, cu.DPSGD):
        assert "One training serves all requests" in m.sequence
        return
    assert "union" in m.sequence
    chained = isinstance(m, cu.ProjectedNoisySGD | cu.DescentToDelete | cu.RewindToDelete)
    assert ("`next`" in m.sequence) == hasattr(m, "next") == chained
    assert ("last release alone" in m.sequence) == chained


def test_noise_multipliers_of_private_training_are_what_the_update_divides_by():
    m = cu.DPSGD(**PRIVATE)
    assert m.noise_multiplier(0.1) == pytest.approx(0.1 / (0.5 * 2.0 / 20))
    assert m.noise_scale(m.noise_multiplier(0.1)) == pytest.approx(0.1)
    x = np.zeros((1, 3))
    # One example more, of the largest gradient, in a sum divided by the batch size.
    gap = length(moved(m, x, [[2.0 / 20, 0, 0]]) - moved(m, x, x))[0]
    assert m.noise_multiplier(0.1) == pytest.approx(0.1 / gap, rel=1e-5)
    assert accounting.mu(m, noise_scale=0.1) is None
