"""Losses of all forms: with a key, with more than a loss, one for each example, narrow ones."""

import dataclasses
import functools

import every_system
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from every_system import SYSTEMS
from loop_helpers import BATCH, DATA, MECHANISM, PARAMS, Notes, loss_fn, run, same

import certunlearn as cu
from certunlearn._numerics import loss_functions
from certunlearn.unlearning import compiled_steps
from certunlearn.unlearning.leaf_split import Split
from certunlearn.unlearning.model_loss import Loss, loss_key


def each(params, batch):
    return (batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2


SLOW = pytest.mark.slow

# ------------------------------------------------------------------------- what a loss returns


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(each, marks=SLOW),
        pytest.param(lambda p, b: (loss_fn(p, b), {"seen": b, "name": "aux"}), marks=SLOW),
        lambda p, b: (each(p, b), 0),
    ],
    ids=["each", "aux", "each with aux"],
)
def test_losses_of_other_forms_take_the_same_steps(other):
    options = {"finetune": (optax.sgd(0.1), 2)}
    assert same(run(loss=other, **options).params, run(**options).params)


@SLOW
def test_one_loss_for_each_example_with_gradients_of_each():
    f, g = (cu.transforms.clipped_value_and_grad(l, 0.5) for l in (each, loss_fn))  # noqa: E741
    batch = jax.tree.map(lambda x: x[:BATCH], DATA)
    assert same(f(PARAMS, batch), g(PARAMS, batch))


@pytest.mark.parametrize("narrow", [jnp.bfloat16, pytest.param(jnp.float16, marks=SLOW)])
def test_narrow_losses_become_float32_before_their_mean(narrow):
    def loss(params, batch):
        cast = jax.tree.map(lambda leaf: leaf.astype(narrow), (params, batch))
        return each(*cast)

    value = loss_functions.scalar(loss(PARAMS, jax.tree.map(jnp.asarray, DATA)), DATA)
    each_one = np.asarray(loss(PARAMS, jax.tree.map(jnp.asarray, DATA)), np.float64)
    np.testing.assert_allclose(value, each_one.mean(), rtol=1e-6)
    assert value.dtype == jnp.float32
    result = run(loss=loss)
    assert result.params["w"].dtype == jnp.float32
    assert cu.verify(result.certificate, result.params)
    assert result.history.losses[0] == np.float32(result.history.losses[0])


# ------------------------------------------------------------------------- random losses


def words(key):
    return tuple(np.asarray(key).tolist())


def masked(seen):
    """A loss whose gradient in `w` is the mask that its key draws, and that notes its keys."""

    def loss(params, batch, key):
        jax.debug.callback(lambda key: seen.append(words(key)), jax.random.key_data(key))
        mask = jax.random.bernoulli(key, 0.5, batch["x"].shape)
        return jnp.mean((mask * batch["x"]) @ params["w"])

    return loss


def keys_of(**changes):
    notes = Notes()
    result = run(loss=masked(notes), **changes)
    jax.effects_barrier()
    return result, notes.seen


def test_every_step_has_a_key_of_its_own_and_so_has_every_step_of_fine_tuning():
    _, seen = keys_of(finetune=(optax.sgd(0.1), 3))
    assert len(set(seen)) == len(seen) == MECHANISM.steps + 3
    keys = cu.split_key(jax.random.key(7))
    for key in keys:  # none is a key that draws noise, batches or their order
        assert words(jax.random.key_data(key)) not in seen


@pytest.mark.parametrize("microbatch_size", [pytest.param(None, marks=SLOW), 2])
def test_every_example_has_a_key_of_its_own(microbatch_size):
    _, seen = keys_of(per_example=True, microbatch_size=microbatch_size)
    assert len(set(seen)) == len(seen) == MECHANISM.steps * BATCH
    # Whatever the microbatches, they are these.
    of_step = lambda step: jax.random.fold_in(loss_key(cu.split_key(jax.random.key(7)).data), step)  # noqa: E731
    places = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    wanted = [places(of_step(step), jnp.arange(BATCH)) for step in range(MECHANISM.steps)]
    assert set(seen) == {words(each) for keys in wanted for each in jax.random.key_data(keys)}


@SLOW
def test_places_of_a_poisson_sample_have_keys_of_their_own():
    mechanism = dataclasses.replace(SYSTEMS["dp"], steps=3)
    _, seen = keys_of(
        mechanism=mechanism,
        data=every_system.DATA,
        noise_scale=mechanism.noise_scale(1.0),
        batch_size=12,
        microbatch_size=5,
        accountant=None,
    )
    assert len(set(seen)) == len(seen) >= 3 * 12


@SLOW
def test_many_steps_in_a_call_have_the_keys_of_single_ones(monkeypatch):
    rolled, same_keys = keys_of()
    monkeypatch.setattr(compiled_steps, "longest_call", lambda params, convolutions: 1)
    single, seen = keys_of()
    assert sorted(seen) == sorted(same_keys)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), single.params, rolled.params
    )


@SLOW
def test_a_resumed_run_draws_the_same_keys():
    whole, seen = keys_of(finetune=(optax.sgd(0.1), 2))
    stopped, first = keys_of(finetune=(optax.sgd(0.1), 2), stop_after=2)
    resumed, rest = keys_of(finetune=(optax.sgd(0.1), 2), resume=stopped.history.state)
    assert same(whole.params, resumed.params)
    assert sorted(first + rest) == sorted(seen)


@SLOW
def test_a_step_is_the_gradient_at_its_own_key():
    """One step by hand: the batch's mask is drawn from the documented key."""
    mechanism = cu.GradientClipping(init_radius=100.0, clip_norm=1e3, learning_rate=0.1, steps=1)
    result = run(mechanism, loss=masked([]), noise_scale=1e-5)
    keys = cu.split_key(jax.random.key(7))
    (indices,) = cu.batch_indices(keys.data, 24, BATCH, 1)
    key = jax.random.fold_in(loss_key(keys.data), 0)
    mask = jax.random.bernoulli(key, 0.5, (BATCH, 3))
    expected = PARAMS["w"] - 0.1 * (mask * DATA["x"][indices]).mean(0)
    np.testing.assert_allclose(result.params["w"], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("per_example", "microbatch_size"),
    [
        pytest.param(True, None, marks=SLOW),
        pytest.param(True, 3, marks=SLOW),
        pytest.param(False, None, marks=SLOW),
        (False, 3),
    ],
)
def test_keys_of_the_transform(per_example, microbatch_size):
    seen = []
    f = cu.transforms.clipped_value_and_grad(
        masked(seen), 1.0, per_example=per_example, microbatch_size=microbatch_size
    )
    batch = jax.tree.map(lambda x: x[:6], DATA)
    with pytest.raises(TypeError, match="key must be given"):
        f(PARAMS, batch)
    for step in range(2):
        jax.jit(f)(PARAMS, batch, jax.random.key(step))
    jax.effects_barrier()
    calls = 6 if per_example else 6 // (microbatch_size or 6)
    assert len(set(seen)) == len(seen) == 2 * calls


def test_which_functions_take_a_key():
    def optional(params, batch, train=True): ...
    def named(params, batch, train=True, *, key=None): ...
    def needed(params, batch, rng): ...
    def bound(scale, params, batch, rng): ...
    def star(*args): ...

    class Method:
        def loss(self, params, batch, rng): ...

    takes = loss_functions.takes_key
    assert not any(map(takes, (optional, star, loss_fn, functools.partial(needed, rng=1))))
    assert all(map(takes, (named, needed, functools.partial(bound, 1), jax.jit(needed))))
    assert takes(Method().loss)
    assert loss_functions.call(named, 1, 2, 3) is None


# ------------------------------------------------------------------------- the form of the steps


def test_losses_are_equal_by_what_they_do():
    split = Split.make(PARAMS)
    one, other = Loss.of(loss_fn, split), Loss.of(loss_fn, Split.make(PARAMS))
    assert one == other
    assert hash(one) == hash(other)
    assert one != Loss.of(each, split)
    some = {"w": False, "b": True}
    left, right = Loss.of(loss_fn, Split.make(PARAMS, some)), Loss.of(loss_fn, split)
    assert left != right
    assert left == Loss.of(loss_fn, Split.make(PARAMS, some))  # of the same frozen array
    new = PARAMS | {"b": PARAMS["b"] + 0}
    assert left != Loss.of(loss_fn, Split.make(new, some))
    # Without the arrays they are the same program.
    assert jax.tree.structure(left) == jax.tree.structure(Loss.of(loss_fn, Split.make(new, some)))

    class Unhashable:
        __hash__ = None

        def __call__(self, params, batch):
            return loss_fn(params, batch)

    odd = Unhashable()
    assert hash(Loss.of(odd, split)) is not None
    batch = jax.tree.map(jnp.asarray, DATA)
    assert float(Loss.of(odd, split)(PARAMS, batch, jax.random.key(0))) == float(
        loss_fn(PARAMS, batch)
    )
