"""Per-example clipping against an explicit loop, and its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certunlearn.transforms.gradients import clipped_value_and_grad


def loss_fn(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w"])
    return jnp.mean((hidden @ params["v"] - batch["y"]) ** 2)


def problem(size=12, features=4, width=6):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(features, width)), "v": rng.normal(size=width)}
    batch = {"x": 3 * rng.normal(size=(size, features)), "y": 5 * rng.normal(size=size)}
    as_float32 = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)  # noqa: E731
    return as_float32(params), as_float32(batch)


def norm(tree):
    return np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in jax.tree.leaves(tree)))


def by_hand(params, batch, clip_norm):
    """Clips and averages one example at a time, in float64."""
    size = len(batch["y"])
    total, losses, clipped, bad = None, [], 0, 0
    for i in range(size):
        example = jax.tree.map(lambda a, i=i: a[i : i + 1], batch)
        value, grads = jax.value_and_grad(loss_fn)(params, example)
        grads = jax.tree.map(lambda a: np.asarray(a, np.float64), grads)
        length = norm(grads)
        if np.isfinite(length):
            losses.append(float(value))
            clipped += length > clip_norm
            grads = jax.tree.map(lambda a, n=length: a * min(1, clip_norm / n), grads)
        else:
            bad += 1
            grads = jax.tree.map(np.zeros_like, grads)
        total = grads if total is None else jax.tree.map(np.add, total, grads)
    return np.mean(losses), jax.tree.map(lambda a: a / size, total), clipped / size, bad


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "microbatch_size", [None, pytest.param(1, marks=SLOW), 3, pytest.param(12, marks=SLOW)]
)
@pytest.mark.parametrize(
    "clip_norm", [pytest.param(0.01, marks=SLOW), 3.0, pytest.param(1e6, marks=SLOW)]
)
@pytest.mark.parametrize("poisoned", [False, True])
def test_equals_the_explicit_loop(microbatch_size, clip_norm, poisoned):
    params, batch = problem()
    if poisoned:
        batch["x"] = batch["x"].at[5, 1].set(jnp.nan).at[7, 0].set(jnp.inf)
        batch["y"] = batch["y"].at[9].set(jnp.inf)
    f = clipped_value_and_grad(loss_fn, clip_norm, microbatch_size=microbatch_size, with_stats=True)
    (value, stats), grads = jax.jit(f)(params, batch)
    expected_value, expected, share, bad = by_hand(params, batch, clip_norm)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, expected
    )
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    np.testing.assert_allclose(stats.clipped_fraction, share)
    assert int(stats.nonfinite) == bad
    assert bad >= 2 * poisoned
    assert norm(grads) <= clip_norm


@pytest.mark.slow
def test_aligned_examples_do_not_push_the_mean_over_the_bound():
    params = jnp.zeros(500)
    direction = jnp.asarray(np.random.default_rng(1).normal(size=500), jnp.float32)
    batch = jnp.tile(direction, (64, 1)) * jnp.linspace(1, 9, 64)[:, None]
    for microbatch_size in (None, 8):
        f = clipped_value_and_grad(
            lambda p, x: jnp.mean(x @ p), 0.7, microbatch_size=microbatch_size
        )
        _, grads = f(params, batch)
        assert 0.6999 < norm(grads) <= 0.7


def test_all_examples_bad():
    params, batch = problem()
    batch["y"] = jnp.full(12, jnp.nan)
    value, grads = clipped_value_and_grad(loss_fn, 1.0)(params, batch)
    assert norm(grads) == 0
    assert float(value) == 0


@pytest.mark.parametrize("microbatch_size", [None, 4])
def test_batch_gradient_is_clipped_as_a_whole(microbatch_size):
    params, batch = problem()
    value, whole = jax.value_and_grad(loss_fn)(params, batch)
    for clip_norm in (0.5, 1e6):
        f = clipped_value_and_grad(
            loss_fn, clip_norm, per_example=False, microbatch_size=microbatch_size, with_stats=True
        )
        (ours, stats), grads = f(params, batch)
        factor = min(1, clip_norm / norm(whole))
        np.testing.assert_allclose(ours, value, rtol=1e-6)
        jax.tree.map(
            lambda a, b, c=factor: np.testing.assert_allclose(a, b * c, rtol=1e-4, atol=1e-6),
            grads,
            whole,
        )
        assert norm(grads) <= clip_norm
        assert float(stats.clipped_fraction) == (factor < 1)
    batch["x"] = batch["x"].at[0, 0].set(jnp.nan)
    (_, stats), grads = f(params, batch)
    assert norm(grads) == 0
    assert int(stats.nonfinite) == 1


def temporary_bytes(size, microbatch_size):
    params, batch = problem(size, features=64, width=256)
    f = clipped_value_and_grad(loss_fn, 1.0, microbatch_size=microbatch_size)
    return jax.jit(f).lower(params, batch).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_is_flat_in_the_batch_with_microbatches():
    one_gradient = 4 * 65 * 256
    small, large = temporary_bytes(16, 8), temporary_bytes(256, 8)
    # The batch itself is reshaped once; the gradients of all examples are never held.
    data = 4 * 65 * (256 - 16)
    assert large - small <= 2 * data
    assert temporary_bytes(256, None) > 200 * one_gradient > large


def test_bad_arguments():
    params, batch = problem()
    with pytest.raises(ValueError, match="microbatch_size must divide the batch size 12, got 5"):
        clipped_value_and_grad(loss_fn, 1.0, microbatch_size=5)(params, batch)
    for size in (0, -1):
        with pytest.raises(ValueError, match="microbatch_size"):
            clipped_value_and_grad(loss_fn, 1.0, microbatch_size=size)
    with pytest.raises(TypeError, match="microbatch_size"):
        clipped_value_and_grad(loss_fn, 1.0, microbatch_size=2.0)
    with pytest.raises(TypeError, match="per_example"):
        clipped_value_and_grad(loss_fn, 1.0, per_example=4)
    for bad in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="clip_norm"):
            clipped_value_and_grad(loss_fn, bad)
    f = clipped_value_and_grad(loss_fn, 1.0)
    with pytest.raises(ValueError, match="leading axis of examples"):
        f(params, {})
    with pytest.raises(ValueError, match=r"\[11, 12\]"):
        f(params, {"x": batch["x"], "y": batch["y"][:11]})
    with pytest.raises(ValueError, match=r"\[0\]"):
        f(params, jax.tree.map(lambda a: a[:0], batch))


@pytest.mark.parametrize("per_example", [True, False])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda p, b: b["y"][:, None] * jnp.ones(3), r"got an array of shape \(\d+, 3\)"),
        (lambda p, b: jnp.ones(9), r"got an array of shape \(9,\)"),
        (lambda p, b: (loss_fn(p, b), {}, {}), "got a tuple"),
        (lambda p, b: {"loss": loss_fn(p, b)}, "got a dict"),
        (lambda p, b: jnp.sum(b["y"] > 0), "got dtype int32"),
        (lambda p, b: 1j * loss_fn(p, b), "got dtype complex64"),
        (lambda p, b: None, "got None"),
    ],
)
def test_a_loss_that_is_none_is_refused_by_name(bad, message, per_example):
    params, batch = problem(4)
    f = clipped_value_and_grad(bad, 1.0, per_example=per_example)
    with pytest.raises(
        (TypeError, ValueError), match="loss_fn must return the mean loss.*" + message
    ):
        f(params, batch)


def test_flags_are_bools_of_any_make():
    params, batch = problem(4)
    with pytest.raises(TypeError, match="per_example must be True or False, got 'yes'"):
        clipped_value_and_grad(loss_fn, 1.0, per_example="yes")
    with pytest.raises(TypeError, match="loss_fn must be a function"):
        clipped_value_and_grad("loss", 1.0)
    f = clipped_value_and_grad(
        loss_fn, np.float32(1.0), np.bool_(False), np.int64(2), np.bool_(True)
    )
    (_, stats), _ = f(params, jax.tree.map(np.asarray, batch))
    assert float(stats.clipped_fraction) == 1


@pytest.mark.parametrize("per_example", [True, False])
def test_strict_promotion_of_dtypes(per_example):
    params, batch = problem(4)
    f = clipped_value_and_grad(loss_fn, 1.0, per_example, microbatch_size=2)
    value, grads = f(params, batch)
    with jax.numpy_dtype_promotion("strict"):
        strict_value, strict = f(params, batch)
    np.testing.assert_array_equal(value, strict_value)
    jax.tree.map(np.testing.assert_array_equal, grads, strict)
