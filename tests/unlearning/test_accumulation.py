"""Microbatches of whole batches: one mean gradient, one clip, one noise."""

import dataclasses
import itertools

import every_system
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from loop_helpers import BATCH, DATA, MECHANISM, SIZE, Notes, loss_fn, run, same

import certunlearn as cu
from certunlearn.transforms import gradients
from certunlearn.unlearning.model_loss import loss_key

SLOW = pytest.mark.slow


def close(a, b, tolerance=2e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance), a, b)


def each_and_more(params, batch):
    losses = (batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2
    return losses, {"largest": losses.max()}


@pytest.mark.parametrize(
    ("loss", "microbatch_size"),
    [
        (each_and_more, 2),
        pytest.param(loss_fn, 4, marks=SLOW),
        pytest.param(loss_fn, BATCH, marks=SLOW),
    ],
)
def test_the_run_is_that_of_whole_batches(loss, microbatch_size):
    tuned = {"loss": loss, "finetune": (optax.adam(0.1), 2)}
    whole, cut = run(**tuned), run(**tuned, microbatch_size=microbatch_size)
    close(cut.params, whole.params)
    close(cut.history.losses, whole.history.losses, 1e-5)
    close(cut.history.finetune_losses, whole.history.finetune_losses, 1e-5)
    assert same(cut.history.clip_fractions, whole.history.clip_fractions)
    # The clip bounds any gradient, so there is nothing to say of where it came from.
    own = dict.fromkeys(("params_digest", "record_digest", "created"))
    claims = [dataclasses.asdict(each.certificate) | own for each in (whole, cut)]
    assert claims[0] == claims[1]
    assert cu.verify(cut.certificate, cut.params)


@SLOW
def test_many_parts_run_in_a_loop():
    whole, cut = (run(batch_size=SIZE, microbatch_size=size) for size in (None, 1))
    close(cut.params, whole.params)


# Gradients of examples are 100 times the clip, and cancel: of a batch, and of no microbatch of 2,
# which takes rows 0 and 4, 1 and 5, 2 and 6, or 3 and 7.
OPPOSED = np.tile([50.0, -50.0, -50.0, 50.0], 2).astype(np.float32)


def slope(params, batch):
    return jnp.mean(batch) * params


def opposed(**changes):
    mechanism = dataclasses.replace(MECHANISM, steps=1, init_radius=10.0)
    data = OPPOSED + np.float32(0.25)
    return run(mechanism, jnp.array(1.0), data, slope, batch_size=8, **changes)


def test_the_mean_is_clipped_and_no_microbatch():
    whole, cut = opposed(), opposed(microbatch_size=2)
    close(cut.params, whole.params)
    assert cut.history.clip_fractions == 0.0  # the mean is 0.25, the clip 0.5
    assert not same(opposed(per_example=True).params, whole.params)


@SLOW
def test_a_gradient_that_is_not_finite_counts_as_one():
    data = DATA | {"x": DATA["x"].copy()}
    data["x"][3, 1] = np.nan
    for size in (None, 2):
        result = run(data=data, batch_size=SIZE, microbatch_size=size)
        assert result.history.nonfinite == MECHANISM.steps
        assert np.all(np.isfinite(result.params["w"]))


def noted(notes):
    def loss(params, batch, key):
        jax.debug.callback(lambda words: notes.append(words.tobytes()), jax.random.key_data(key))
        kept = jax.random.bernoulli(key, 0.5, batch["x"].shape)
        return jnp.mean((batch["x"] * kept) @ params["w"])

    return loss


def keys_of(**changes):
    notes = Notes()
    result = run(loss=noted(notes), **changes)
    jax.effects_barrier()
    return result, notes.seen


def test_every_microbatch_has_a_key_of_its_own():
    _, seen = keys_of(microbatch_size=2, finetune=(optax.sgd(0.1), 1))
    keys, parts = cu.split_key(jax.random.key(7)), BATCH // 2
    of_phases = [(keys.data, MECHANISM.steps), (keys.finetune, 1)]
    wanted = {
        jax.random.key_data(
            jax.random.fold_in(jax.random.fold_in(loss_key(key), step), part)
        ).tobytes()
        for key, steps in of_phases
        for step, part in itertools.product(range(steps), range(parts))
    }
    assert set(seen) == wanted
    assert len(seen) == len(wanted) == parts * (MECHANISM.steps + 1)


@SLOW
def test_a_resumed_run_draws_the_same_keys_and_another_size_is_another_plan():
    whole, seen = keys_of(microbatch_size=2)
    stopped, first = keys_of(microbatch_size=2, stop_after=2)
    resumed, rest = keys_of(microbatch_size=2, resume=stopped.history.state)
    assert same(whole.params, resumed.params)
    assert sorted(first + rest) == sorted(seen)
    for size in (4, None):
        with pytest.raises(ValueError, match="another plan: microbatch_size"):
            run(microbatch_size=size, resume=stopped.history.state)
    # Keys of examples do not depend on it: there it may change with the machine.
    stopped = run(per_example=True, microbatch_size=2, stop_after=2)
    run(per_example=True, microbatch_size=4, resume=stopped.history.state)


@SLOW
def test_full_batches_of_a_mechanism_without_a_clip():
    mechanism = every_system.SYSTEMS["rewind"]
    whole, cut = (every_system.run(mechanism, microbatch_size=size) for size in (None, 5))
    close(cut.params, whole.params)


@SLOW
def test_line_searches_see_the_mean_of_microbatches():
    tuned = {"finetune": (optax.lbfgs(), 3), "batch_size": SIZE}
    whole, cut = run(**tuned), run(**tuned, microbatch_size=6)
    close(cut.params, whole.params, 1e-4)
    assert cut.history.finetune_losses[-1] < cut.history.finetune_losses[0]


def problem(size):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(16, 256)), "v": rng.normal(size=256)}
    batch = {"x": rng.normal(size=(size, 16)), "y": rng.normal(size=size)}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (params, batch))


def hidden(params, batch, key):
    del key
    return jnp.mean((jnp.tanh(batch["x"] @ params["w"]) @ params["v"] - batch["y"]) ** 2)


def of_value(microbatch_size):
    return jax.value_and_grad(gradients.mean_value(hidden, microbatch_size))


FORMS = {
    "gradients": lambda size: gradients.mean_value_and_grad(hidden, size),
    "line searches": of_value,
}


@pytest.mark.parametrize("name", FORMS)
def test_both_forms_are_the_gradient(name):
    params, batch = problem(24)
    value, grads = jax.value_and_grad(hidden)(params, batch, None)
    for size in (4, 1):  # written out, and in a loop
        found, ours = jax.jit(FORMS[name](size))(params, batch)
        np.testing.assert_allclose(found, value, rtol=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), ours, grads
        )


@SLOW
@pytest.mark.parametrize("name", FORMS)
def test_memory_is_that_of_one_microbatch(name):
    def room(size, microbatch_size):
        lowered = jax.jit(FORMS[name](microbatch_size)).lower(*problem(size))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    activations = 4 * 64 * 256
    for parts in (8, 32):
        assert room(64 * parts, None) > parts * activations
        assert room(64 * parts, 64) < 6 * activations
