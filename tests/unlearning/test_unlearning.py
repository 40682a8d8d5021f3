"""`unlearn` from end to end: certificates, noise, fine-tuning, resumption, and odd models."""

import dataclasses
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from flax import nnx
from flax.training.train_state import TrainState
from loop_helpers import arguments

import certunlearn as cu
from certunlearn.unlearning import compiled_steps, data_feeds

DATA = {
    "x": np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32),
    "y": np.random.default_rng(1).normal(size=40).astype(np.float32),
}
PARAMS = {"w": jnp.array([3.0, -4.0, 1.0]), "b": jnp.array(0.5)}
MECHANISM = cu.GradientClipping(init_radius=1.0, clip_norm=0.5, learning_rate=0.1, steps=12)
EXACT = {"accountant": "interpolation"}  # takes no time, and its noise gives epsilon to the digit
CLAIM = {"epsilon": 1.0, "delta": 1e-5, "batch_size": 8, "progress": False, **EXACT}


def loss_fn(params, batch):
    return jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2)


def run(mechanism=MECHANISM, params=PARAMS, data=DATA, loss=loss_fn, key=7, **changes):
    key = None if key is None else jax.random.key(key)
    return cu.unlearn(loss, params, data, mechanism, key=key, **arguments(**(CLAIM | changes)))


def same(a, b):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def plain():
    """A run without anything rare, which several tests compare with."""
    return run()


def test_the_released_parameters_carry_a_certificate_that_verifies():
    result = run(forget_size=4)
    assert cu.verify(result.certificate, result.params)
    assert result.certificate.epsilon == 1.0
    assert result.certificate.steps_run == 12
    assert result.certificate.retain_size == 40
    assert result.certificate.forget_size == 4
    assert "experiments only" in result.certificate.key_source
    assert jax.tree.structure(result.params) == jax.tree.structure(PARAMS)
    assert result.history.losses.shape == result.history.clip_fractions.shape == (12,)
    assert result.history.state is None
    assert result.history.trained_digest == cu.certificates.params_digest(PARAMS)
    start = cu.clip_params(PARAMS, 1.0)
    assert result.history.start_digest == cu.certificates.params_digest(start)


@pytest.mark.slow
def test_a_hand_written_flax_loop_gives_the_same_parameters():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(nn.relu(nn.Dense(5)(x)))[:, 0]

    net = Net()
    params = net.init(jax.random.key(0), DATA["x"][:1])

    def loss(params, batch):
        return jnp.mean((net.apply(params, batch["x"]) - batch["y"]) ** 2)

    decayed = cu.GradientClipping(
        init_radius=1.0,
        clip_norm=np.linspace(0.5, 0.1, 12),
        learning_rate=optax.cosine_decay_schedule(0.2, 20),
        weight_decay=0.3,
        steps=12,
    )
    center = jax.tree.map(lambda x: x + 0.1, params)
    result = run(decayed, params, loss=loss, center=center)

    keys = cu.split_key(jax.random.key(7))
    sigma = cu.noise_scale(decayed, epsilon=1.0, delta=1e-5, **EXACT)
    state = TrainState.create(
        apply_fn=net.apply,
        params=cu.clip_params(params, decayed.init_radius, center),
        tx=cu.noisy_sgd(decayed, sigma, key=keys.noise, center=center),
    )
    for indices in cu.batch_indices(keys.data, 40, 8, decayed.steps):
        batch = jax.tree.map(lambda x: x[indices], DATA)  # noqa: B023
        state = state.apply_gradients(grads=jax.grad(loss)(state.params, batch))
    for mine, theirs in zip(
        jax.tree.leaves(result.params), jax.tree.leaves(state.params), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_without_a_gradient_the_result_is_the_start_plus_calibrated_noise():
    d = 60_000
    m = cu.GradientClipping(
        init_radius=1.0, clip_norm=1.0, learning_rate=0.1, weight_decay=2.0, steps=9
    )
    flat = lambda params, batch: 0.0 * params.sum() + batch.mean()  # noqa: E731
    trained = jnp.full(d, 5.0)
    result = run(m, trained, np.ones((8, 1), np.float32), flat)
    start = np.full(d, 1.0 / np.sqrt(d))
    sigma = cu.noise_scale(m, epsilon=1.0, delta=1e-5, **EXACT)
    spread = sigma * np.sqrt(sum(0.8 ** (2 * k) for k in range(9)))
    z = (np.asarray(result.params) - 0.8**9 * start) / spread
    assert scipy.stats.kstest(z, "norm").pvalue > 1e-3
    for wrong in (0.95, 1.05, 0.1):  # 0.1: noise scaled by the learning rate, a classic mistake
        assert scipy.stats.kstest(z / wrong, "norm").pvalue < 1e-3


@pytest.mark.slow
def test_by_default_the_accountant_with_the_least_noise_is_used_and_named():
    short = cu.GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.5, steps=2)
    result = run(short, accountant=None)
    certificate = result.certificate
    assert certificate.accountant == "coupling"
    assert certificate.noise_scale == cu.noise_scale(short, epsilon=1.0, delta=1e-5)
    assert certificate.noise_scale < 0.9 * run(short).certificate.noise_scale
    assert 0.97 < certificate.epsilon <= 1.0
    assert cu.verify(certificate, result.params)
    given = run(short, accountant=None, epsilon=None, noise_scale=certificate.noise_scale)
    assert given.certificate.epsilon == certificate.epsilon


@pytest.mark.slow
def test_keys_from_the_system_never_repeat(plain):
    a, b = run(key=None), run(key=None)
    assert not same(a.params, b.params)
    assert "operating system" in a.certificate.key_source
    assert same(run().params, plain.params)
    assert not same(plain.params, run(key=8).params)


def test_finetuning_continues_without_noise_and_costs_nothing(plain):
    tuned = run(finetune=(optax.sgd(0.05), 300))
    assert tuned.certificate.epsilon == plain.certificate.epsilon
    assert tuned.certificate.finetune_steps == 300
    assert cu.verify(tuned.certificate, tuned.params)
    design = np.c_[DATA["x"], np.ones(40)]
    best = np.linalg.lstsq(design, DATA["y"], rcond=None)[0]
    np.testing.assert_allclose(tuned.params["w"], best[:3], atol=0.15)
    assert not np.allclose(plain.params["w"], best[:3], atol=0.15)
    assert tuned.history.finetune_losses.shape == (300,)


@pytest.mark.slow
def test_stopping_and_resuming_through_disk_equals_an_uninterrupted_run(tmp_path):
    finetune = (optax.adam(0.01), 5)
    whole = run(finetune=finetune)
    early = run(stop_after=5, finetune=finetune)
    assert early.certificate.steps_run == 5
    assert early.certificate.finetune_steps == 0
    assert early.certificate.epsilon > 1.0
    assert cu.verify(early.certificate, early.params)
    path = tmp_path / "run.private.npz"
    with pytest.warns(UserWarning, match="holds the noise key"):
        cu.unlearning.save_state(path, early.history.state)
    resumed = run(key=None, resume=cu.unlearning.load_state(path), finetune=finetune)
    assert same(resumed.params, whole.params)
    assert resumed.certificate.epsilon == 1.0
    assert "experiments only" in resumed.certificate.key_source
    assert path.stat().st_mode & 0o077 == 0
    with pytest.raises(ValueError, match="key must be None"):
        run(resume=early.history.state)
    other = cu.GradientClipping(init_radius=1.0, clip_norm=0.6, learning_rate=0.1, steps=12)
    with pytest.raises(ValueError, match="another plan"):
        run(other, key=None, resume=early.history.state)
    with pytest.raises(ValueError, match="must end in"):
        cu.unlearning.save_state(tmp_path / "run.npz", early.history.state)


def test_evaluations_are_taken_where_asked_and_survive_the_next_step():
    result = run(evaluate=lambda p: p["w"], evaluate_every=5, finetune=(optax.sgd(0.1), 4))
    assert [step for step, _ in result.history.evaluations] == [0, 5, 10, 12, 15, 16]
    start = cu.clip_params(PARAMS, 1.0)
    np.testing.assert_allclose(result.history.evaluations[0][1], start["w"], rtol=1e-6)
    np.testing.assert_array_equal(result.history.evaluations[-1][1], result.params["w"])


def test_calls_of_several_steps_end_at_pauses_and_hold_the_batches_of_single_ones(monkeypatch):
    steps = data_feeds.Steps(key=jax.random.key(0), batch_size=8, first=3, stop=24, pauses=(7,))
    feed = data_feeds.feed_of(jnp.arange(43.0))
    single = [call.data for call in feed.calls(steps)]
    calls = list(feed.calls(steps._replace(longest=6)))
    assert [call.count for call in calls] == [4, 6, 1, 6, 1, 3]  # epochs have 5 batches
    assert [call.step for call in calls] == [3, 7, 13, 14, 20, 21]
    assert {call.data.shape for call in calls} == {(6, 8)}
    found = [batch for call in calls for batch in call.data[: call.count]]
    np.testing.assert_array_equal(found, single)
    calls = feed.calls(steps._replace(longest=6, pauses=(7, 4)))
    assert [call.count for call in calls] == [1, 3, 1, 4, 2, 2, 4, 1, 3]
    monkeypatch.setattr(data_feeds, "_BYTES_OF_A_CALL", 100)  # of 32 a batch
    assert {call.data.shape for call in feed.calls(steps._replace(longest=6))} == {(3, 8)}


@pytest.mark.slow
def test_many_steps_in_a_call_equal_one_at_a_time(monkeypatch):
    many = run(evaluate=lambda p: 0, evaluate_every=7)
    monkeypatch.setattr(compiled_steps, "longest_call", lambda params, convolutions: 1)
    one = run(evaluate=lambda p: 0, evaluate_every=7)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(many.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_allclose(one.history.losses, many.history.losses, rtol=1e-5)


@pytest.mark.slow
def test_per_example_clipping_and_microbatches_agree(plain):
    whole = run(per_example=True)
    micro = run(per_example=True, microbatch_size=2)
    assert not same(whole.params, plain.params)
    np.testing.assert_allclose(whole.params["w"], micro.params["w"], rtol=1e-5)
    assert np.all((whole.history.clip_fractions >= 0) & (whole.history.clip_fractions <= 1))
    scheduled = cu.GradientClipping(
        init_radius=1.0, clip_norm=[0.5] * 12, learning_rate=0.1, steps=12
    )
    np.testing.assert_allclose(
        run(scheduled, per_example=True).params["w"], whole.params["w"], rtol=1e-5
    )
    with pytest.raises(ValueError, match="microbatch_size"):
        run(per_example=True, microbatch_size=3)


def test_a_poisoned_example_is_counted_and_harmless():
    data = DATA | {"x": np.where(np.arange(40)[:, None] == 0, np.nan, DATA["x"])}
    batchwise, per_example = run(data=data), run(data=data, per_example=True)
    for result in (batchwise, per_example):
        assert np.all(np.isfinite(result.params["w"]))
        assert result.history.nonfinite >= 2  # twelve steps of eight are over two epochs
    assert per_example.history.nonfinite <= 3


def test_optimizers_before_the_clip_need_a_mechanism_with_memory(plain):
    momentum = optax.trace(decay=0.9)
    with pytest.raises(ValueError, match="memoryless"):
        run(before_clip=momentum)
    with_memory = dataclasses.replace(MECHANISM, memoryless=False)
    result = run(with_memory, before_clip=momentum)
    assert cu.verify(result.certificate, result.params)
    assert result.certificate.noise_scale >= plain.certificate.noise_scale
    adam = run(with_memory, before_clip=optax.scale_by_adam())
    assert cu.verify(adam.certificate, adam.params)


def test_frozen_leaves_stay_and_are_named():
    result = run(frozen={"w": False, "b": True}, finetune=(optax.sgd(0.1), 3))
    assert result.params["b"] == PARAMS["b"]
    assert not np.array_equal(result.params["w"], PARAMS["w"])
    assert result.certificate.coverage["frozen"] == ["b"]
    assert result.certificate.coverage["parameters"] == 3
    assert cu.verify(result.certificate, result.params)
    for wrong, words in [({"w": True, "b": True}, "at least one"), ({"w": True}, "structured")]:
        with pytest.raises(ValueError, match=words):
            run(frozen=wrong)


class Convolution(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 2, (3, 3), rngs=rngs)
        self.out = nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.conv(x)).reshape(x.shape[0], -1))[:, 0]


@pytest.mark.slow
def test_an_nnx_convolution_unlearns():
    data = {"x": np.random.default_rng(0).normal(size=(16, 4, 4, 1)).astype(np.float32)}
    data["y"] = np.ones(16, np.float32)

    def loss(model, batch):
        return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)

    small = cu.GradientClipping(init_radius=0.01, clip_norm=0.01, learning_rate=0.1, steps=10)
    tuned = {"finetune": (optax.adam(0.03), 200)}
    result = run(small, Convolution(nnx.Rngs(0)), data, loss, **tuned)
    assert cu.verify(result.certificate, result.params)
    assert loss(result.params, data) < 0.5


def test_history_is_saved_only_under_a_private_name(tmp_path):
    history = run(evaluate=lambda p: {"norm": jnp.sum(p["w"] ** 2)}).history
    with pytest.raises(ValueError, match=r"\.private\.json"):
        history.save(tmp_path / "history.json")
    history.save(tmp_path / "history.private.json")
    text = (tmp_path / "history.private.json").read_text()
    assert "voids the certificate" in text
    assert "key" not in text


BAD_VALUES = [
    ({"epsilon": 0.0}, "epsilon must be"),
    ({"epsilon": -1.0}, "epsilon must be"),
    ({"epsilon": None}, "either epsilon or noise_scale"),
    ({"noise_scale": 1.0}, "either epsilon or noise_scale"),
    ({"epsilon": None, "noise_scale": 0.0}, "noise_scale must be positive"),
    ({"epsilon": None, "noise_scale": [1.0] * 3}, "one for each of the 12 steps"),
    ({"delta": 0.0}, "delta must be"),
    ({"delta": 1.0}, "delta must be"),
    ({"batch_size": 0}, "batch_size must be at least 1"),
    ({"batch_size": 41}, "batch_size must be at most"),
    ({"stop_after": 0}, "stop_after must be at least 1"),
    ({"stop_after": 13}, "stop_after must be at most steps=12"),
    ({"microbatch_size": 3}, "microbatch_size must divide batch_size=8, got 3"),
    ({"data": {"x": np.zeros((0, 3)), "y": np.zeros(0)}}, "at least one example"),
    ({"data": {"x": DATA["x"], "y": DATA["y"][:5]}}, "one leading axis"),
    ({"center": {"w": jnp.zeros(3)}}, "center must be structured like params"),
    ({"center": {"w": jnp.zeros(4), "b": jnp.zeros(())}}, "center must have the shapes"),
    ({"params": PARAMS | {"w": jnp.array([1.0, jnp.nan, 0.0])}}, "finite"),
    ({"params": PARAMS | {"w": jnp.zeros(3, jnp.bfloat16)}}, "bfloat16"),
    ({"params": PARAMS | {"w": jnp.zeros(3, jnp.int32)}}, "int32"),
    ({"params": {}}, "at least one array"),
    ({"accountant": "guess"}, "accountant"),
    ({"accountant": "closed-form", "epsilon": 20.0}, "unsound"),
    ({"forget_size": -1}, "forget_size must be at least 0"),
    ({"params": {"a": PARAMS["w"].astype(jnp.bfloat16)}}, r"bfloat16 at \['a'\]"),
    ({"finetune": (optax.sgd(0.1), 0)}, "finetune steps must be at least 1"),
]


@pytest.mark.parametrize(("changes", "words"), BAD_VALUES)
def test_bad_values_are_refused_before_anything_runs(changes, words):
    def untouched(params, batch):
        raise AssertionError("the loss was called")

    with pytest.raises(ValueError, match=words):
        run(**({"loss": untouched} | changes))


def test_a_seed_is_not_a_key():
    with pytest.raises(TypeError, match="key must be"):
        cu.unlearn(loss_fn, PARAMS, DATA, MECHANISM, key=7, **CLAIM)


def test_no_warnings_in_a_plain_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(finetune=(optax.adam(0.01), 2))
