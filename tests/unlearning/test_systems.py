"""Every mechanism through `unlearn`, certificates and `verify`."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from every_system import (
    BALLS,
    DATA,
    OTHERS,
    PARAMS,
    SIZE,
    SYSTEMS,
    accountant,
    batch_size,
    loss_fn,
    no_loss,
    run,
)
from loop_helpers import arguments
from transform_helpers import exact_norm

import certunlearn as cu
from certunlearn import mechanisms
from certunlearn.accounting import _gaussian
from certunlearn.certificates import issuing
from certunlearn.mechanisms import pairs
from certunlearn.unlearning import compiled_steps, data_feeds
from certunlearn.unlearning.leaf_split import Split
from certunlearn.unlearning.model_loss import Loss

SLOW = pytest.mark.slow


@pytest.fixture(scope="module", params=SYSTEMS)
def result(request):
    return run(SYSTEMS[request.param], forget_size=2)


def reissued(certificate, **changes):
    """The certificate altered by someone who also mends its digest."""
    record = dataclasses.asdict(certificate) | changes
    record["record_digest"] = issuing.record_digest(record)
    return cu.Certificate(**record)


def test_the_certificate_round_trip(result, tmp_path):
    certificate = result.certificate
    assert cu.verify(certificate, result.params)
    certificate.save(tmp_path / "certificate.json")
    loaded = cu.Certificate.load(tmp_path / "certificate.json")
    assert loaded == certificate
    assert cu.verify(loaded, result.params).summary
    assert certificate.epsilon <= 1.0
    at_end = isinstance(mechanisms.from_record(certificate.mechanism), pairs.LastNoisy)
    assert (result.history.before_noise is not None) == at_end
    assert mechanisms.from_record(certificate.mechanism).assumptions == tuple(
        certificate.assumptions
    )
    assert cu.verify(loaded, jax.tree.map(lambda x: x + 1e-3, result.params)).ok is False


# For each field of each mechanism that makes the claim too good.
BETTER = {
    "init_radius": 0.5,
    "model_radius": 0.25,
    "initial_distance": 0.25,
    "strong_convexity": 0.2,
    "gradient_bound": 1.0,
    "trained_steps": 2,
    "deletions": 1,
    "sampling_rate": 0.1,
}


def test_tampering_with_the_mechanism_is_found(result):
    record = result.certificate.mechanism
    better = {name: value for name, value in BETTER.items() if name in record}
    assert better
    model = record["name"] == "ModelClipping"
    for name, value in better.items():
        if model and name == "init_radius" and not record["init_noise_scale"]:
            continue  # models are projected, whatever the start was
        changed = reissued(result.certificate, mechanism=record | {name: value})
        assert not cu.verify(changed), name
    for field, value in (
        ("epsilon", result.certificate.epsilon / 2),
        ("noise_scale", 2 * result.certificate.noise_scale),
        ("total_variation", result.certificate.total_variation / 2),
        ("epsilon_lower_bound", 1.001 * result.certificate.epsilon),
        ("assumptions", result.certificate.assumptions[1:]),
        ("steps_run", 2),
    ):
        assert not cu.verify(reissued(result.certificate, **{field: value})), field
    if result.certificate.mu is not None:
        assert not cu.verify(reissued(result.certificate, mu=None))


@pytest.mark.parametrize("name", ["model", "output", "noisy", "descent", "rewind"])
def test_the_last_noise_has_its_scale_and_no_other(name):
    """One leaf at the origin, a zero loss: what is released is noise."""
    mechanism = SYSTEMS[name]
    if name == "noisy":
        mechanism = mechanism.first(1)
    if name == "model":
        mechanism = cu.ModelClipping(**(BALLS | {"steps": 1}))
    if name == "rewind":  # a distance that the rounding of so many parameters hardly adds to
        mechanism = dataclasses.replace(mechanism, gradient_bound=20.0)
    released = run(mechanism, {"w": jnp.zeros(20_000)}, loss=no_loss, noise_scale=0.7)
    values = np.asarray(released.params["w"], np.float64)
    for scale, right in ((0.7, True), (0.66, False), (0.74, False)):
        p = scipy.stats.kstest(values, "norm", (0, scale)).pvalue
        assert (p > 1e-3) == right


def test_noise_of_every_step_of_noisy_sgd_adds_up():
    released = run(SYSTEMS["noisy"], {"w": jnp.zeros(20_000)}, loss=no_loss, noise_scale=0.5)
    values = np.asarray(released.params["w"], np.float64)
    assert np.std(values) == pytest.approx(0.5 * np.sqrt(6), rel=0.02)


def test_noise_on_the_start_is_not_that_of_a_step():
    mechanism = cu.ModelClipping(**BALLS, init_noise_scale=2.0)
    key, zeros = jax.random.key(0), [jnp.zeros(5000)]
    start = mechanism.start(zeros, None, key)[0]
    p = scipy.stats.kstest(np.asarray(start, np.float64), "norm", (0, 2.0)).pvalue
    assert p > 1e-3
    tx = cu.transforms.add_gaussian_noise(2.0, key)
    state = tx.init(zeros)
    for _ in range(3):
        updates, state = tx.update(zeros, state)
        assert abs(np.corrcoef(start, updates[0])[0, 1]) < 0.06
    assert exact_norm(SYSTEMS["model"].start([jnp.ones(50)], None, key)) <= 1.0


@pytest.mark.parametrize("name", ["model", "model after noise", "projected"])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.slow
def test_models_stay_in_their_ball(name, centered):
    center = jax.tree.map(lambda x: 0 * x + 10.0, PARAMS) if centered else None
    mechanism = dataclasses.replace(SYSTEMS[name], learning_rate=1.5 if name != "projected" else 1)
    noise = 2e-4 if name == "model" else 5.0
    tx = cu.noisy_sgd(mechanism, noise, key=jax.random.key(1), center=center)
    params = jax.tree.map(lambda x: 100 * x, PARAMS)
    state = tx.init(params)
    radius = {"projected": 2.0}.get(name, 0.5)
    # After the projection in the one, before it in the others.
    after = cu.transforms.add_gaussian_noise(noise if name == "model" else 1e-30, jax.random.key(1))
    added = after.init(None)
    rng = np.random.default_rng(0)
    for step in range(mechanism.steps):
        grads = jax.tree.map(lambda x: jnp.asarray(50 * rng.normal(size=x.shape)), params)
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        middle = 0.0 if center is None else center["b"]
        late, added = after.update(jax.tree.map(jnp.zeros_like, params), added)
        distance = exact_norm(jax.tree.map(lambda x, n, m=middle: x - n - m, params, late))
        assert distance <= radius * (1 + 1e-5) + 1e-5
        # From far outside, where numbers are coarse, the strict projection may take the centre.
        assert step == 0 or distance > 0.9 * radius


def test_a_start_outside_the_ball_of_models_is_charged_in_full():
    """The first step's separation is that of the starts, not that of models in their ball."""
    mechanism = cu.ModelClipping(
        init_radius=5.0, model_radius=0.1, learning_rate=0.1, clip_norm=1.0, steps=1
    )
    exact = float(_gaussian.epsilon((10.0 + 0.2) / 4.0, 1e-5))
    for name in ("product", "interpolation"):
        found = cu.epsilon(mechanism, noise_scale=4.0, delta=1e-5, accountant=name)
        assert found == pytest.approx(exact, rel=1e-6)
    longer = dataclasses.replace(mechanism, steps=2)
    assert cu.epsilon(longer, noise_scale=4.0, delta=1e-5, accountant="product") < 0.1 * exact


def test_a_model_that_is_not_finite_becomes_the_centre():
    tx = cu.transforms.project_onto_ball(1.0, {"w": jnp.array([5.0, 5.0])})
    params = {"w": jnp.array([5.5, 5.0])}
    updates, _ = tx.update({"w": jnp.array([jnp.inf, 0.0])}, tx.init(params), params)
    assert (params["w"] + updates["w"]).tolist() == [5.0, 5.0]
    inside = {"w": jnp.array([0.25, -0.125])}
    assert tx.update(inside, None, params)[0]["w"].tolist() == inside["w"].tolist()
    with pytest.raises(ValueError, match="project_onto_ball needs params"):
        tx.update(inside, None)
    with pytest.raises(ValueError, match="radius"):
        cu.transforms.project_onto_ball(-1.0)


def test_descent_is_plain_gradient_descent_until_its_noise():
    noisy = run(SYSTEMS["descent"], noise_scale=0.1)
    params = PARAMS
    for batch in cu.batch_indices(cu.split_key(jax.random.key(3)).data, SIZE, 12, 6):
        grads = jax.grad(loss_fn)(params, jax.tree.map(lambda x, i=batch: x[i], DATA))
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), noisy.history.before_noise, params
    )
    assert exact_norm(jax.tree.map(jnp.subtract, noisy.params, params)) > 1e-2


def test_what_adds_noise_at_the_end_cannot_stop_early():
    for name in ("descent", "rewind"):
        with pytest.raises(ValueError, match="cannot stop early"):
            run(SYSTEMS[name], stop_after=2)


@pytest.mark.slow
def test_an_interrupt_before_any_noise_releases_nothing(monkeypatch):
    class Pressed:
        def __enter__(self):
            return lambda: True

        def __exit__(self, *_):
            return False

    monkeypatch.setattr("certunlearn.unlearning.interrupts.deferred_interrupts", Pressed)
    monkeypatch.setattr(compiled_steps, "longest_call", lambda params, convolutions: 1)
    with pytest.raises(KeyboardInterrupt, match="before any noise"):
        run(SYSTEMS["descent"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("model", "dp"):
            assert run(SYSTEMS[name]).certificate.steps_run == 1


@SLOW
@pytest.mark.parametrize("name", ["model", "noisy", "dp"])
def test_a_stopped_run_resumes_to_the_same_parameters(name):
    whole = run(SYSTEMS[name])
    stopped = run(SYSTEMS[name], stop_after=2)
    assert stopped.certificate.steps_run == 2
    options = {"key": None, "resume": stopped.history.state}
    options |= {"delta": 1e-5, "epsilon": 1.0, "batch_size": batch_size(SYSTEMS[name])}
    options |= {"accountant": accountant(SYSTEMS[name]), "progress": False}
    resumed = cu.unlearn(loss_fn, PARAMS, DATA, SYSTEMS[name], **arguments(**options))
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("output", {"per_example": True}, "needs a clip norm"),
        ("descent", {"center": PARAMS}, "projects onto no ball"),
        ("dp", {"center": PARAMS}, "projects onto no ball"),
        ("dp", {"batch_size": 13}, "must be the mechanism's, 12"),
        ("dp", {"finetune": (optax.sgd(0.1), 2)}, "keep a trace"),
        ("dp", {"recompute_state": lambda params, data: None}, "keep a trace"),
        ("rewind", {"batch_size": 12}, "full batches of the 60"),
        (
            "rewind",
            {"data": {"x": DATA["x"][:50], "y": DATA["y"][:50]}, "batch_size": 50},
            "full batches of the 60",
        ),
        ("model", {"before_clip": optax.scale_by_adam()}, "is for GradientClipping"),
        ("dp", {"accountant": "coupling"}, "needs a mechanism with separations"),
    ],
)
def test_what_a_mechanism_does_not_allow_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        run(SYSTEMS[name], **changes)


# ------------------------------------------------------------------------------ DP-SGD


@pytest.mark.slow
def test_poisson_samples_take_each_example_with_its_chance():
    data, mechanism = {"i": jnp.arange(50)}, SYSTEMS["dp"]
    counts, sizes = np.zeros(50), []
    sample = jax.jit(lambda key: mechanism.poisson_sampling().sample(data, key)[0])
    for key in jax.random.split(jax.random.key(0), 2000):
        examples, taken = sample(key)
        chosen = np.asarray(examples["i"])[np.asarray(taken)]
        assert len(set(chosen.tolist())) == len(chosen)
        counts[chosen] += 1
        sizes.append(len(chosen))
    assert np.abs(counts / 2000 - 0.2).max() < 5 * np.sqrt(0.16 / 2000)
    # The number of examples varies as a binomial does: no fixed batches.
    assert np.var(sizes) == pytest.approx(50 * 0.16, rel=0.15)


def dp_steps(count, data, mechanism=SYSTEMS["dp"], params=PARAMS, loss=loss_fn):
    """Parameters after some steps with hardly any noise, which no certificate would stand for."""
    leaves, treedef = jax.tree.flatten(params)
    scale = 2e-6
    tx = cu.noisy_sgd(mechanism, scale, key=jax.random.key(0))
    data_key = cu.split_key(jax.random.key(3)).data
    of_leaves = Loss.of(
        lambda leaves, batch: loss(jax.tree.unflatten(treedef, leaves), batch), Split.make(leaves)
    )
    step = compiled_steps.noisy_steps(of_leaves, mechanism, scale, key=data_key)
    carry = ([jnp.array(leaf) for leaf in leaves], tx.init(leaves))
    key = jax.random.key_data(data_key)
    for number in range(count):
        carry, _ = step(carry, data, key, number, count=1)
    return jax.tree.unflatten(treedef, carry[0])


@pytest.mark.slow
def test_an_update_is_the_sum_of_clipped_gradients_of_the_sample():
    data = {"x": DATA["x"].at[7].set(jnp.nan), "y": DATA["y"]}
    released = dp_steps(1, data)
    key = jax.random.fold_in(cu.split_key(jax.random.key(3)).data, 0)
    taken = np.asarray(jax.random.uniform(key, (SIZE,))) < 0.2
    assert 4 < taken.sum() < 25
    expected = jax.tree.map(np.zeros_like, PARAMS)
    for i in np.flatnonzero(taken):
        if i == 7:
            continue
        example = jax.tree.map(lambda x, i=i: x[i : i + 1], DATA)
        grads = jax.grad(loss_fn)(PARAMS, example)
        factor = min(1.0, 0.5 / exact_norm(grads))
        expected = jax.tree.map(lambda e, g, f=factor: e + f * g, expected, grads)
    expected = jax.tree.map(lambda p, e: p - 0.3 * e / 12, PARAMS, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), released, expected)


@SLOW
def test_the_noise_of_dp_sgd_is_its_multiplier():
    mechanism = dataclasses.replace(SYSTEMS["dp"], steps=1)
    scale = mechanism.noise_scale(2.0)
    assert scale == pytest.approx(2.0 * 0.3 * 0.5 / 12)
    released = run(mechanism, {"w": jnp.zeros(20_000)}, loss=no_loss, noise_scale=scale)
    values = np.asarray(released.params["w"], np.float64)
    assert scipy.stats.kstest(values, "norm", (0, scale)).pvalue > 1e-3
    assert scipy.stats.kstest(values, "norm", (0, 1.08 * scale)).pvalue < 1e-3


@pytest.mark.slow
def test_poisson_samples_differ_from_step_to_step():
    steps = data_feeds.Steps(
        key=jax.random.key(0),
        batch_size=12,
        first=0,
        stop=7,
        sampling=SYSTEMS["dp"].poisson_sampling(),
    )
    calls = list(data_feeds.feed_of(jnp.zeros(60)).calls(steps))
    assert sum(call.count for call in calls) == 7
    keys = {tuple(np.asarray(call.sampling_key).tolist()) for call in calls}
    assert keys == {tuple(np.asarray(jax.random.key_data(jax.random.key(0))).tolist())}
    # In 60 steps every example is missed with a chance of 1e-6: one sample would miss most.
    data = {"x": jnp.eye(SIZE), "y": jnp.zeros(SIZE)}

    def each_its_own(params, batch):
        return jnp.mean(batch["x"] @ params["w"])

    mechanism = dataclasses.replace(SYSTEMS["dp"], steps=60)
    moved = dp_steps(60, data, mechanism, {"w": jnp.zeros(SIZE)}, each_its_own)
    assert np.all(np.asarray(moved["w"]) < -1e-3)


# ------------------------------------------------------------------------------ sequences


@SLOW
def test_three_requests_in_turn_are_certified_for_their_union():
    """From any model of the ball: the certificate does not get worse."""
    mechanism = cu.GradientClipping(init_radius=1.0, clip_norm=0.5, learning_rate=0.1, steps=4)
    params, seen = PARAMS, []
    for request in range(1, 4):
        left = jax.tree.map(lambda x, k=3 * request: x[k:], DATA)
        result = run(mechanism, params, left, key=request, finetune=(optax.sgd(0.05), 3))
        params = result.params
        seen.append((result.certificate.epsilon, result.certificate.noise_scale))
        assert cu.verify(result.certificate, params)
        assert result.certificate.retain_size == SIZE - 3 * request
    assert seen[0] == seen[1] == seen[2]
    assert "union" in mechanism.sequence


@pytest.mark.parametrize("name", [*SYSTEMS, *OTHERS])
def test_every_mechanism_says_what_holds_for_several_requests(name):
    assert any(
        word in (SYSTEMS | OTHERS)[name].sequence for word in ("union", "serves all requests")
    )
