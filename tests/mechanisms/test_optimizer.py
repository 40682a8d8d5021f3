"""The whole optimizer: what a step is, schedules, memory and the end of the run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from transform_helpers import draws, exact_norm, mechanism, zeros

import certunlearn as cu
from certunlearn.mechanisms import ModelClipping, noisy_optimizer

KEY = jax.random.key(7)
SCALE = 0.25


def test_a_step_is_what_the_mechanism_says():
    m = mechanism(weight_decay=0.5, learning_rate=0.2, clip_norm=0.3)
    center = {"w": jnp.array([1.0, -1.0, 0.5])}
    params = {"w": jnp.array([2.0, 0.0, 0.0])}
    gradient = {"w": jnp.array([3.0, 4.0, 0.0])}
    tx = noisy_optimizer.noisy_sgd(m, 1e-6, key=KEY, center=center)
    updates, _ = tx.update(gradient, tx.init(params), params)
    clipped = 0.3 * gradient["w"] / 5
    expected = -0.2 * (clipped + 0.5 * (params["w"] - center["w"]))
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-4)


def test_noise_is_in_parameter_units_whatever_the_rate():
    for rate in (1e-3, 0.9):
        m = mechanism(learning_rate=rate)
        out, _ = draws(noisy_optimizer.noisy_sgd(m, SCALE, key=KEY), 1, zeros(20_000))
        sample = np.asarray(out[0]["a"], np.float64)
        assert scipy.stats.kstest(sample / SCALE, "norm").pvalue > 1e-3


def test_every_schedule_is_followed_step_by_step():
    steps = 4
    rates, decays = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.0, 1.0, 0.5, 2.0])
    clips, scales = np.array([1.0, 0.5, 2.0, 0.1]), np.array([1e-6, 2e-6, 1e-6, 3e-6])
    m = mechanism(steps=steps, learning_rate=rates, weight_decay=decays, clip_norm=clips)
    params = {"w": jnp.array([1.0, 2.0])}
    gradient = {"w": jnp.array([30.0, -40.0])}
    tx = noisy_optimizer.noisy_sgd(m, scales, key=KEY)
    unit, _ = draws(cu.transforms.add_gaussian_noise(1.0, KEY), steps, {"w": jnp.zeros(2)})
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(steps):
        updates, state = update(gradient, state, params)
        updates["w"] -= scales[t] * unit[t]["w"]
        clipped = clips[t] * np.array([0.6, -0.8])
        expected = -rates[t] * (clipped + decays[t] * np.array([1.0, 2.0]))
        np.testing.assert_allclose(updates["w"], expected, rtol=1e-4)
    noisy = noisy_optimizer.noisy_sgd(m, scales * 1e5, key=KEY)
    out, _ = draws(noisy, steps, {"w": jnp.zeros(20_000)})
    for scale, updates in zip(scales * 1e5, out, strict=True):
        assert abs(np.std(updates["w"]) / scale - 1) < 0.03


def test_a_noise_schedule_is_read_at_every_step():
    tx = noisy_optimizer.noisy_sgd(mechanism(steps=3), lambda t: 0.1 * 2.0**t, key=KEY)
    out, _ = draws(tx, 3, {"w": jnp.zeros(20_000)})
    for t, updates in enumerate(out):
        assert abs(np.std(updates["w"]) / (0.1 * 2**t) - 1) < 0.03
    with pytest.raises(ValueError, match="noise_scale"):
        noisy_optimizer.noisy_sgd(mechanism(steps=3), [0.1, 0.2], key=KEY)


@pytest.mark.slow
def test_nothing_moves_after_the_last_step():
    tx = noisy_optimizer.noisy_sgd(mechanism(steps=3), SCALE, key=KEY)
    out, state = draws(tx, 6)
    assert all(exact_norm(u) > 0 for u in out[:3])
    assert all(exact_norm(u) == 0 for u in out[3:])
    assert int(state.count) == 3
    bad = {"a": jnp.full(2000, jnp.nan), "b": {"c": jnp.zeros(2000)}}
    updates, _ = tx.update(bad, state, bad)
    assert exact_norm(updates) == 0


def test_a_nonfinite_gradient_gives_noise_only_and_is_counted():
    tx = noisy_optimizer.noisy_sgd(mechanism(), SCALE, key=KEY)
    bad = {"a": jnp.full(2000, jnp.nan), "b": {"c": jnp.ones(2000)}}
    params = jax.tree.map(jnp.zeros_like, bad)
    updates, state = jax.jit(tx.update)(bad, tx.init(params), params)
    (quiet,), _ = draws(tx, 1)
    jax.tree.map(np.testing.assert_array_equal, updates, quiet)
    assert int(optax.tree.get(state, "nonfinite")) == 1


@pytest.mark.parametrize(
    "before", [optax.trace(0.9), optax.scale_by_adam(), optax.scale(1e6)], ids=["sgdm", "adam", "x"]
)
def test_any_transform_before_the_clip_stays_bounded(before):
    m = mechanism(memoryless=False, learning_rate=1.0, clip_norm=0.01)
    tx = noisy_optimizer.noisy_sgd(m, 1e-8, key=KEY, before_clip=before)
    noise, _ = draws(cu.transforms.add_gaussian_noise(1e-8, KEY), 6, {"w": jnp.zeros(50)})
    params = {"w": jnp.zeros(50)}
    state = tx.init(params)
    rng = np.random.default_rng(0)
    for t in range(6):
        gradient = {"w": jnp.asarray(rng.normal(size=50) * 10.0 ** (4 * t - 2), jnp.float32)}
        if t == 2:
            gradient = {"w": gradient["w"].at[3].set(jnp.nan)}
        updates, state = tx.update(gradient, state, params)
        moved = exact_norm({"w": updates["w"] - noise[t]["w"]})
        assert moved > 0.009 or t == 2
        assert moved <= 0.01 + 1e-10
    # A NaN did not poison the state.
    assert int(optax.tree.get(state, "zeroed")) == 1
    assert int(optax.tree.get(state, "nonfinite")) == 0


def test_memory_must_be_declared():
    with pytest.raises(ValueError, match="memoryless=False"):
        noisy_optimizer.noisy_sgd(mechanism(), SCALE, key=KEY, before_clip=optax.scale_by_adam())
    # The loss may hold memory (a teacher), so the declaration alone is fine.
    noisy_optimizer.noisy_sgd(mechanism(memoryless=False), SCALE, key=KEY)
    with pytest.raises(TypeError, match="GradientClipping"):
        noisy_optimizer.noisy_sgd({"steps": 3}, SCALE, key=KEY)
    tx = noisy_optimizer.noisy_sgd(mechanism(), SCALE, key=KEY, center={"v": jnp.ones(3)})
    with pytest.raises(ValueError, match="center"):
        tx.init({"w": jnp.ones(3)})


def test_the_whole_loop_under_scan_equals_the_python_loop():
    m = mechanism(steps=5, weight_decay=0.3)
    tx = noisy_optimizer.noisy_sgd(m, 0.05, key=KEY)
    grad = jax.grad(lambda p: jnp.sum((p["w"] - 3) ** 2))
    params = {"w": jnp.zeros(7)}

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(grad(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = (params, tx.init(params))
    scanned = jax.jit(lambda c: jax.lax.scan(step, c, length=8)[0])(carry)
    jitted = jax.jit(lambda c: step(c, None)[0])
    for _ in range(8):
        carry = jitted(carry)
    np.testing.assert_allclose(scanned[0]["w"], carry[0]["w"], rtol=1e-6)
    assert int(carry[1].count) == 5


def test_steps_too_short_for_float32_are_refused():
    with pytest.raises(ValueError, match=r"learning_rate \* clip_norm .*1e-30, .*got 1e-33"):
        noisy_optimizer.noisy_sgd(mechanism(clip_norm=1e-30, learning_rate=1e-3), SCALE, key=KEY)
    noisy_optimizer.noisy_sgd(mechanism(clip_norm=1e-27, learning_rate=1e-3), SCALE, key=KEY)


def test_steps_with_a_learning_rate_of_zero_are_noise_alone():
    m = mechanism(steps=3, learning_rate=[0.0, 0.5, 0.0])
    tx = noisy_optimizer.noisy_sgd(m, 1e-6, key=KEY)
    noise, _ = draws(cu.transforms.add_gaussian_noise(1e-6, KEY), 3, {"w": jnp.zeros(4)})
    params = {"w": jnp.ones(4)}
    state, update = tx.init(params), jax.jit(tx.update)
    moved = []
    for t in range(3):
        updates, state = update(params, state, params)
        moved.append(updates["w"] - noise[t]["w"])
    np.testing.assert_array_equal(moved[0], 0)
    assert exact_norm(moved[1]) > 0.49
    np.testing.assert_array_equal(moved[2], 0)
    assert noisy_optimizer.evidence(state) == (3, 0)


def test_before_clip_gets_the_callers_tree_and_extra_arguments():
    seen = {}

    def update(updates, state, params=None, *, value, **extra):
        seen.update(updates=updates, params=params, value=value, extra=extra)
        return jax.tree.map(lambda u: value * u, updates), state

    before = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    before = optax.chain(before, optax.masked(optax.scale(2.0), {"a": True, "b": {"c": False}}))
    m = mechanism(memoryless=False, clip_norm=1e3, learning_rate=1.0)
    tx = noisy_optimizer.noisy_sgd(m, 1e-5, key=KEY, before_clip=before)
    params = {"a": jnp.ones(2), "b": {"c": jnp.ones(3)}}
    gradient = {"a": jnp.ones(2), "b": {"c": jnp.ones(3)}}
    updates, _ = tx.update(gradient, tx.init(params), params, value=3.0, other=4)
    assert jax.tree.structure(seen["updates"]) == jax.tree.structure(gradient)
    assert jax.tree.structure(seen["params"]) == jax.tree.structure(params)
    assert (seen["value"], seen["extra"]) == (3.0, {"other": 4})
    np.testing.assert_allclose(updates["a"], -6, rtol=1e-4)
    np.testing.assert_allclose(updates["b"]["c"], -3, rtol=1e-4)


def test_strict_promotion_of_dtypes():
    params = {"w": jnp.ones(3)}
    schedule = mechanism(steps=2, learning_rate=[0.1, 0.2], weight_decay=[0.1, 0.0])
    ball = ModelClipping(init_radius=1.0, model_radius=1.0, learning_rate=0.1, steps=2)
    each = [
        noisy_optimizer.noisy_sgd(schedule, [0.1, 0.2], key=KEY, center=params),
        noisy_optimizer.noisy_sgd(ball, lambda count: 0.1 / (1 + count), key=KEY, center=params),
    ]
    gradient = {"w": jnp.full(3, 2, jnp.bfloat16)}
    for tx in each:
        update = lambda state, tx=tx: tx.update(gradient, state, params)  # noqa: E731
        expected, _ = update(tx.init(params))
        with jax.numpy_dtype_promotion("strict"):
            updates, _ = update(tx.init(params))
        np.testing.assert_array_equal(updates["w"], expected["w"])
        assert updates["w"].dtype == jnp.float32
