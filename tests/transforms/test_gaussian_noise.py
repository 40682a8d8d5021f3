"""`add_gaussian_noise`: scale, independence, replay, keys and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import scipy.stats
from flax import serialization
from transform_helpers import assert_nothing_shared, draws, mechanism, zeros

from certunlearn import transforms
from certunlearn._numerics import schedules
from certunlearn._numerics.normal_draws import STREAM
from certunlearn.mechanisms import noisy_optimizer

KEY = jax.random.key(7)
SCALE = 0.25


def test_noise_has_the_right_scale_and_not_another():
    (updates, *_), _ = draws(transforms.add_gaussian_noise(SCALE, KEY), 1, zeros(100_000))
    sample = np.concatenate([np.asarray(u, np.float64) for u in jax.tree.leaves(updates)])
    assert scipy.stats.kstest(sample / SCALE, "norm").pvalue > 1e-3
    for wrong in (0.97, 1.03):
        assert scipy.stats.kstest(sample / (wrong * SCALE), "norm").pvalue < 1e-4
    assert abs(np.mean(sample)) < 5 * SCALE / np.sqrt(len(sample))


def test_noise_is_added_to_the_updates_and_follows_a_schedule():
    tree = {"w": jnp.full(5000, 100.0)}
    tx = transforms.add_gaussian_noise(lambda count: 0.1 * (count + 1), KEY)
    out, _ = draws(tx, 3, tree)
    for step, updates in enumerate(out):
        noise = np.asarray(updates["w"], np.float64) - 100
        assert abs(np.std(noise) / (0.1 * (step + 1)) - 1) < 0.06


def test_noise_is_independent_across_steps_leaves_runs_and_replicas():
    tx = transforms.add_gaussian_noise(SCALE, KEY)
    first, _ = draws(tx, 3)
    other, _ = draws(transforms.add_gaussian_noise(SCALE, jax.random.key(8)), 3)

    def replica(key):
        replicated = transforms.add_gaussian_noise(SCALE, key)
        updates, state = replicated.update(zeros(), replicated.init(zeros()))
        return updates, replicated.update(zeros(), state)[0]

    mapped = jax.vmap(replica)(jax.random.split(jax.random.key(9), 2))
    rows = [row for leaf in jax.tree.leaves(mapped) for row in leaf]
    assert len(rows) == 8
    assert_nothing_shared(jax.tree.leaves([first, other]) + rows)


@pytest.mark.slow
def test_a_state_per_replica_is_enough_for_vmap():
    # One transform, states made from different keys: the state alone decides.
    tx = transforms.add_gaussian_noise(SCALE, KEY)
    keys = jax.random.split(jax.random.key(3), 4)
    states = jax.vmap(lambda k: transforms.add_gaussian_noise(SCALE, k).init(None))(keys)
    mapped, _ = jax.vmap(tx.update, in_axes=(None, 0))(zeros(), states)
    for i, key in enumerate(keys):
        (alone, *_), _ = draws(transforms.add_gaussian_noise(SCALE, key), 1)
        np.testing.assert_array_equal(mapped["a"][i], alone["a"])
    assert_nothing_shared(mapped["a"])


def test_init_again_replays_the_noise_as_documented():
    tx = transforms.add_gaussian_noise(SCALE, KEY)
    (once,), _ = draws(tx, 1)
    (again,), _ = draws(tx, 1)
    jax.tree.map(np.testing.assert_array_equal, once, again)


def test_noise_under_scan_jit_and_donation_is_the_same():
    tx = transforms.add_gaussian_noise(SCALE, KEY)
    looped, _ = draws(tx, 4)

    def step(state, _):
        updates, state = tx.update(zeros(), state)
        return state, updates

    _, scanned = jax.lax.scan(step, tx.init(zeros()), length=4)
    donated = jax.jit(lambda g, s: tx.update(g, s), donate_argnums=1)
    state = tx.init(zeros())
    for i, expected in enumerate(looped):
        np.testing.assert_array_equal(scanned["a"][i], expected["a"])
        updates, state = donated(zeros(), state)
        np.testing.assert_array_equal(updates["b"]["c"], expected["b"]["c"])
    # The donated state took nothing of the key with it.
    assert tx.init(zeros()).key_data.tolist() == [*jax.random.key_data(KEY).tolist(), STREAM]


@pytest.mark.parametrize("how", ["orbax", "flax", "numpy"])
def test_restored_noise_continues_and_repeats_nothing(how, tmp_path):
    tx = noisy_optimizer.noisy_sgd(mechanism(), SCALE, key=KEY)
    whole, _ = draws(tx, 4)
    before, state = draws(tx, 2)
    blank = noisy_optimizer.noisy_sgd(mechanism(), SCALE, key=jax.random.key(99)).init(zeros())
    if how == "orbax":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", state)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "state", blank)
    elif how == "flax":
        restored = serialization.from_bytes(blank, serialization.to_bytes(state))
    else:
        leaves, treedef = jax.tree.flatten(state)
        np.savez(tmp_path / "state.npz", *leaves)
        with np.load(tmp_path / "state.npz") as archive:
            restored = jax.tree.unflatten(treedef, [archive[name] for name in archive.files])
    after, _ = draws(tx, 2, state=jax.tree.map(jnp.asarray, restored))
    jax.tree.map(np.testing.assert_array_equal, before + after, whole)
    assert_nothing_shared(jax.tree.leaves(before + after))


@pytest.mark.parametrize("jitted", [False, True])
def test_the_state_of_an_older_stream_is_refused_by_name(jitted):
    # Before streams had numbers, the state held the two words of the key alone.
    tx = transforms.add_gaussian_noise(SCALE, KEY)
    old = tx.init(None)._replace(key_data=jax.random.key_data(KEY))
    update = jax.jit(tx.update) if jitted else tx.update
    with pytest.raises(ValueError, match=r"number of the stream of noise.*begin the run anew"):
        update(zeros(), old)


def test_the_state_of_another_stream_gives_nan():
    tx = transforms.add_gaussian_noise(SCALE, KEY)
    state = tx.init(None)
    other = state._replace(key_data=state.key_data.at[2].set(STREAM + 1))
    assert np.all(np.isnan(tx.update(jnp.zeros(3), other)[0]))


def test_noise_and_its_checks_are_two_loops_that_store_nothing():
    # One reads the update and its parameter for their largest entry; one writes the result.
    tx, leaf = transforms.add_gaussian_noise(SCALE, KEY), jnp.zeros((300, 200))
    compiled = jax.jit(tx.update).lower(leaf, tx.init(None), leaf).compile()
    assert "while" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 1000


def test_an_entry_too_large_for_the_noise_is_seen_in_update_and_parameter():
    tx = transforms.add_gaussian_noise(1e-6, KEY)
    small, large = jnp.zeros((3, 5)), jnp.zeros((3, 5)).at[1, 2].set(-1e3)
    for bad in (large, small.at[2, 4].set(jnp.nan), small.at[0, 0].set(-jnp.inf)):
        for pair in ((bad, small), (small, bad), (small, bad.astype(jnp.bfloat16))):
            assert np.all(np.isnan(tx.update(pair[0], tx.init(None), pair[1])[0]))
    assert np.all(np.isfinite(tx.update(small, tx.init(None), small)[0]))


def test_noise_dtypes():
    tx = transforms.add_gaussian_noise(SCALE, KEY)
    updates, _ = tx.update(jnp.zeros(3, jnp.bfloat16), tx.init(None))
    assert updates.dtype == jnp.float32
    assert tx.update({}, tx.init(None))[0] == {}
    with jax.enable_x64(True):
        updates, _ = tx.update(jnp.zeros(3), tx.init(None))
        assert updates.dtype == jnp.float64


def test_noise_scale_is_never_rounded_down():
    scales = np.random.default_rng(0).uniform(1e-8, 10, 2000)
    rounded = schedules.round_up(scales, jnp.float32)
    assert rounded.dtype == np.float32
    assert np.all(rounded.astype(np.float64) >= scales)
    np.testing.assert_allclose(rounded, scales, rtol=1.2e-7)
    table = schedules.Lookup(scales)
    assert float(table.rounded_up(5, jnp.float32)) >= scales[5]
    assert float(table.rounded_up(5000, jnp.float32)) >= scales[-1]


def test_legacy_keys_are_taken_and_draw_the_same():
    (new,), _ = draws(transforms.add_gaussian_noise(SCALE, jax.random.key(3)), 1)
    (old,), _ = draws(transforms.add_gaussian_noise(SCALE, jax.random.PRNGKey(3)), 1)
    jax.tree.map(np.testing.assert_array_equal, new, old)


@pytest.mark.parametrize(
    "key", [0, 1.5, None, np.zeros(2, np.float32), np.zeros(4, np.uint32), np.zeros(2, np.int32)]
)
def test_what_is_no_key_is_refused(key):
    with pytest.raises(TypeError, match="key must be"):
        transforms.add_gaussian_noise(SCALE, key)


def test_other_kinds_of_keys_have_noise_of_their_own():
    tx = [transforms.add_gaussian_noise(SCALE, jax.random.key(seed, impl="rbg")) for seed in (0, 1)]
    first, second = (draws(t, 2)[0] for t in (*tx,))
    assert_nothing_shared(jax.tree.leaves([first, second]))


def test_batches_of_keys_are_refused():
    with pytest.raises(TypeError, match="key must be"):
        transforms.add_gaussian_noise(SCALE, jax.random.split(KEY))


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, 1e300, 2e30, 1e-31])
def test_bad_noise_scale(scale):
    with pytest.raises(ValueError, match="noise_scale"):
        transforms.add_gaussian_noise(scale, KEY)
    with pytest.raises(ValueError, match="noise_scale"):
        noisy_optimizer.noisy_sgd(mechanism(), scale, key=KEY)
    with pytest.raises(ValueError, match="noise_scale"):
        noisy_optimizer.noisy_sgd(mechanism(steps=2), [0.1, scale], key=KEY)


def test_the_largest_noise_is_finite_and_more_of_it_is_nan():
    def noised(scale):
        tx = transforms.add_gaussian_noise(scale, KEY)
        return tx.update(jnp.zeros(1000), tx.init(None))[0]

    for make in (noised, jax.jit(noised)):
        assert 0.9e30 < np.std(np.float64(make(1e30))) < 1.1e30
    for bad in (2e30, 1e38, np.inf, np.nan, -1.0):
        assert np.all(np.isnan(jax.jit(noised)(jnp.float32(bad))))
        assert np.all(np.isnan(noised(lambda count, bad=bad: jnp.float32(bad))))


def test_the_stream_of_noise_ends_with_the_count():
    tx = transforms.add_gaussian_noise(SCALE, KEY)
    state = tx.init(None)._replace(count=jnp.int32(2**31 - 2))
    last, state = tx.update(jnp.zeros(5), state)
    assert np.all(np.isfinite(last))
    assert int(state.count) == 2**31 - 1
    for _ in range(2):
        over, state = tx.update(jnp.zeros(5), state)
        assert np.all(np.isnan(over))
    with pytest.raises(ValueError, match=r"steps must be at most 2147483646.*got 2147483653"):
        noisy_optimizer.noisy_sgd(mechanism(steps=2**31 + 5), 0.5, key=KEY)
