"""Optax's wrappers around the noisy optimizer: what keeps the guarantee, and what breaks it.

Each claim of `noisy_sgd`'s docstring under "Wrappers" has its test here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from certunlearn import transforms
from certunlearn.mechanisms import GradientClipping, noisy_optimizer

KEY = jax.random.key(5)
MECHANISM = GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=3)
PARAMS = {"a": jnp.ones(300), "b": jnp.full(300, 2.0)}
GRADIENT = {"a": jnp.full(300, 7.0), "b": jnp.full(300, -9.0)}
QUIET = 1e-6


def noisy(scale=0.2, key=KEY, mechanism=MECHANISM, **options):
    return noisy_optimizer.noisy_sgd(mechanism, scale, key=key, **options)


def norm(tree):
    return float(np.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in jax.tree.leaves(tree))))


def run(tx, gradients, params=PARAMS):
    """All updates, with a jitted update and fixed parameters."""
    state, update, out = tx.init(params), jax.jit(tx.update), []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        out.append(updates)
    return out, state


def close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), left, right)


# Every transform, alone, under every way of running it.
ALL = {
    "clip": lambda: transforms.clip_by_global_norm(0.5),
    "decay": lambda: transforms.decay_toward(0.1, PARAMS),
    "noise": lambda: transforms.add_gaussian_noise(0.2, KEY),
    "chain": lambda: noisy(),
    "adam": lambda: noisy(
        mechanism=GradientClipping(
            init_radius=1.0,
            clip_norm=1.0,
            learning_rate=[0.1, 0.2, 0.3],
            weight_decay=0.5,
            steps=3,
            memoryless=False,
        ),
        before_clip=optax.scale_by_adam(),
        center=PARAMS,
    ),
}


# The whole with Adam takes long to compile.
EACH = [pytest.param(name, marks=[pytest.mark.slow] * (name in ("adam", "noise"))) for name in ALL]


@pytest.mark.parametrize("name", EACH)
def test_jit_scan_and_vmap_agree_with_plain_calls(name):
    tx = ALL[name]()
    expected, _ = run(tx, [GRADIENT] * 2)

    def step(state, gradient):
        updates, state = tx.update(gradient, state, PARAMS)
        return state, updates

    stacked = jax.tree.map(lambda g: jnp.stack([g, g]), GRADIENT)
    _, scanned = jax.lax.scan(step, tx.init(PARAMS), stacked)
    replicas = jax.vmap(lambda g: tx.update(g, tx.init(PARAMS), PARAMS)[0])(stacked)
    plain, _ = tx.update(GRADIENT, tx.init(PARAMS), PARAMS)
    close(plain, expected[0])
    for i in range(2):
        close(jax.tree.map(lambda leaf, i=i: leaf[i], scanned), expected[i])
        # Replicas with one key repeat one another: the caller must map the key as well.
        close(jax.tree.map(lambda leaf, i=i: leaf[i], replicas), expected[0])


@pytest.mark.parametrize("name", ALL)
def test_state_structure_is_stable_and_plain(name):
    tx = ALL[name]()
    before = tx.init(PARAMS)
    _, after = tx.update(GRADIENT, before, PARAMS)
    same = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)  # noqa: E731
    assert all(jax.tree.leaves(jax.tree.map(same, before, after)))
    # Plain numbers only, so that any checkpointer takes it.
    assert all(np.asarray(leaf).dtype.kind in "iuf" for leaf in jax.tree.leaves(after))


# ------------------------------------------------------------------- inject_hyperparams


@pytest.mark.parametrize("scale", [0.2, (0.1, 0.2, 0.3), jnp.array([0.1, 0.2, 0.3])])
@pytest.mark.slow
def test_inject_hyperparams_draws_the_same_noise(scale):
    wrapped = optax.inject_hyperparams(noisy_optimizer.noisy_sgd, static_args=("key",))
    out, state = run(wrapped(MECHANISM, scale, key=KEY), [GRADIENT] * 4)
    expected, _ = run(noisy(scale), [GRADIENT] * 4)
    close(out, expected)
    assert norm(out[3]) == 0
    assert "key" not in state.hyperparams


@pytest.mark.slow
def test_inject_hyperparams_with_a_schedule_and_on_every_single_transform():
    schedule = lambda count: 0.1 * (1 + count)  # noqa: E731
    inject = optax.inject_hyperparams
    pairs = [
        (inject(noisy_optimizer.noisy_sgd)(MECHANISM, schedule, key=KEY), noisy(schedule)),
        (
            inject(transforms.clip_by_global_norm)(schedule),
            transforms.clip_by_global_norm(schedule),
        ),
        (inject(transforms.decay_toward)(0.3), transforms.decay_toward(0.3)),
        (
            inject(transforms.add_gaussian_noise)(schedule, KEY),
            transforms.add_gaussian_noise(schedule, KEY),
        ),
    ]
    for wrapped, plain in pairs:
        close(run(wrapped, [GRADIENT] * 3)[0], run(plain, [GRADIENT] * 3)[0])


def test_injected_keys_stay_keys():
    # A raw key is an array of numbers; turned to floats it would be another, and is refused.
    wrapped = optax.inject_hyperparams(transforms.add_gaussian_noise)
    raw = jax.random.key_data(KEY)
    close(
        run(wrapped(0.2, raw), [GRADIENT])[0],
        run(transforms.add_gaussian_noise(0.2, KEY), [GRADIENT])[0],
    )
    with pytest.raises(TypeError, match="key must be"):
        wrapped(0.2, raw.astype(jnp.float32)).init(PARAMS)
    # Not named static, the key shows among the hyperparameters, as documented.
    assert "key" in wrapped(0.2, raw).init(PARAMS).hyperparams


# ----------------------------------------------------------------------------- MultiSteps


@pytest.mark.slow
def test_multisteps_averages_then_clips_and_noises_once_per_k_calls():
    k, rng = 2, np.random.default_rng(0)
    gradients = [
        jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), PARAMS)
        for _ in range(4 * k)
    ]
    out, _ = run(optax.MultiSteps(noisy(), k), gradients)
    pairs = zip(gradients[::k], gradients[1::k], strict=True)
    means = [jax.tree.map(lambda a, b: (a + b) / 2, *pair) for pair in pairs]
    expected, _ = run(noisy(), means)
    for i, updates in enumerate(out):
        if i % k == k - 1:
            close(updates, expected[i // k])
        else:
            assert norm(updates) == 0
    assert norm(out[-1]) == 0  # the steps are over after k * steps calls


def test_multisteps_keeps_a_nan_for_good_without_leaking():
    bad = jax.tree.map(lambda g: g.at[0].set(jnp.nan), GRADIENT)
    out, _ = run(optax.MultiSteps(noisy(), 2), [bad, GRADIENT, GRADIENT, GRADIENT])
    zero = jax.tree.map(jnp.zeros_like, GRADIENT)
    noise_only, _ = run(noisy(), [zero, zero])
    close(out[1], noise_only[0])
    close(out[3], noise_only[1])


# ------------------------------------------------------------------- masked and partition


def test_masked_leaves_raw_gradients_without_noise_on_the_rest():
    (updates,), _ = run(optax.masked(noisy(), {"a": True, "b": False}), [GRADIENT])
    assert norm(updates["a"]) > 0
    # The documented danger: the raw gradient, uphill, unclipped, without noise.
    np.testing.assert_array_equal(updates["b"], GRADIENT["b"])


def test_partition_with_frozen_leaves_covers_the_trained_ones():
    center = {"a": jnp.zeros(300), "b": optax.MaskedNode()}
    m = GradientClipping(
        init_radius=1.0, clip_norm=1.0, learning_rate=0.1, weight_decay=0.5, steps=3
    )
    groups = {"train": noisy(mechanism=m, center=center), "freeze": optax.set_to_zero()}
    tx = optax.partition(groups, {"a": "train", "b": "freeze"})
    out, _ = run(tx, [GRADIENT] * 2)
    alone = noisy(mechanism=m, center={"a": jnp.zeros(300)})
    state, update = alone.init({"a": PARAMS["a"]}), jax.jit(alone.update)
    for updates in out:
        expected, state = update({"a": GRADIENT["a"]}, state, {"a": PARAMS["a"]})
        np.testing.assert_allclose(updates["a"], expected["a"], rtol=1e-5)
        assert norm(updates["b"]) == 0
    whole = noisy(mechanism=m, center={"a": jnp.zeros(300), "b": jnp.zeros(300)})
    with pytest.raises(ValueError, match="center must have the structure"):
        optax.partition({"t": whole, "f": optax.set_to_zero()}, {"a": "t", "b": "f"}).init(PARAMS)


def test_partition_into_noisy_groups_adds_norms_in_quadrature():
    groups = {"x": noisy(QUIET), "y": noisy(QUIET, key=jax.random.key(6))}
    (updates,), _ = run(optax.partition(groups, {"a": "x", "b": "y"}), [GRADIENT])
    assert abs(norm(updates) / (np.sqrt(2) * 0.1) - 1) < 1e-4


def test_partition_with_equal_keys_repeats_noise():
    zero = jax.tree.map(jnp.zeros_like, GRADIENT)
    labels = {"a": "x", "b": "y"}
    (same,), _ = run(optax.partition({"x": noisy(), "y": noisy()}, labels), [zero])
    np.testing.assert_array_equal(same["a"], same["b"])
    other = optax.partition({"x": noisy(), "y": noisy(key=jax.random.key(6))}, labels)
    (apart,), _ = run(other, [zero])
    assert not np.any(np.asarray(apart["a"]) == np.asarray(apart["b"]))
    assert abs(np.corrcoef(apart["a"], apart["b"])[0, 1]) < 0.3
