"""Steps without noise: what they may see, and what optimizers need to take them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from loop_helpers import DATA, MECHANISM, PARAMS, WITH_MEMORY, loss_fn, run, same

import certunlearn as cu
from certunlearn.unlearning import leaf_split

NAMES = {"w": "train", "b": "rest"}
GROUPS = {"train": optax.sgd(0.1), "rest": optax.set_to_zero()}


def to_teacher(params, batch):
    """A loss that holds the trained model, as `memoryless=False` allows for the noisy steps."""
    return loss_fn(params, batch) + jnp.sum((params["w"] - PARAMS["w"]) ** 2)


def test_a_loss_that_may_hold_the_trained_model_is_not_fine_tuned_on():
    with pytest.raises(ValueError, match="finetune needs a loss_fn of its own"):
        run(WITH_MEMORY, loss=to_teacher, finetune=(optax.sgd(0.1), 3))
    with pytest.raises(TypeError, match=r"missing 2 required .* 'optimizer' and 'steps'"):
        cu.Finetune(loss_fn=loss_fn)


def test_fine_tuning_takes_the_gradients_of_its_own_loss():
    plain = run(WITH_MEMORY, loss=to_teacher)
    tuned = run(WITH_MEMORY, loss=to_teacher, finetune=cu.Finetune(optax.sgd(0.1), 1, loss_fn))
    indices = next(cu.batch_indices(cu.split_key(jax.random.key(7)).finetune, 24, 8, 1))
    grads = jax.grad(loss_fn)(plain.params, jax.tree.map(lambda x: x[indices], DATA))
    for name in PARAMS:
        expected = plain.params[name] - 0.1 * grads[name]
        np.testing.assert_allclose(tuned.params[name], expected, rtol=1e-5, atol=1e-6)
    assert cu.verify(tuned.certificate, tuned.params)


@pytest.mark.parametrize(
    "frozen", [pytest.param(None, marks=pytest.mark.slow), {"w": False, "b": True}]
)
@pytest.mark.parametrize(
    "labels",
    [
        NAMES,
        lambda params: jax.tree_util.tree_map_with_path(
            lambda path, _: NAMES[path[-1].key], params
        ),
    ],
)
def test_optimizers_find_leaves_by_name(labels, frozen):
    optimizer = optax.partition(GROUPS, labels)
    before = run(frozen=frozen)
    tuned = run(finetune=(optimizer, 2), frozen=frozen)
    assert same(tuned.params["b"], before.params["b"])
    assert not same(tuned.params["w"], before.params["w"])
    if frozen:
        assert same(tuned.params["b"], PARAMS["b"])


@pytest.mark.slow
def test_masks_by_name_before_the_clip_and_after_the_noise():
    mask = {"w": True, "b": False}
    decayed = run(finetune=(optax.adamw(0.1, mask=mask), 2))
    assert not same(decayed.params, run(finetune=(optax.adamw(0.1), 2)).params)
    masked = run(WITH_MEMORY, before_clip=optax.masked(optax.scale_by_adam(), mask))
    frozen = run(
        WITH_MEMORY,
        before_clip=optax.masked(optax.scale_by_adam(), mask),
        frozen={"w": False, "b": True},
    )
    assert cu.verify(masked.certificate, masked.params)
    assert same(frozen.params["b"], PARAMS["b"])


class TwoLayers(nnx.Module):
    def __init__(self):
        self.first = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        self.second = nnx.Linear(2, 1, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.second(self.first(x))[:, 0]


def test_an_nnx_model_with_frozen_layers_and_a_labelled_optimizer():
    model = TwoLayers()
    params = nnx.state(model, nnx.Param)

    def loss(model, batch):
        return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)

    def label(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "train" if "kernel" in jax.tree_util.keystr(path) else "rest", params
        )

    frozen = jax.tree_util.tree_map_with_path(
        lambda path, _: "first" in jax.tree_util.keystr(path), params
    )
    center = jax.tree.map(jnp.zeros_like, params)
    options = {"frozen": frozen, "center": center}
    before = run(params=model, loss=loss, **options)
    tuned = run(params=model, loss=loss, finetune=(optax.partition(GROUPS, label), 2), **options)
    assert same(nnx.state(tuned.params.first), params["first"])
    assert same(tuned.params.second.bias, before.params.second.bias)
    assert not same(tuned.params.second.kernel, before.params.second.kernel)
    assert jax.tree.structure(nnx.state(tuned.params)) == jax.tree.structure(params)


def test_what_is_trained_keeps_the_tree_and_hides_the_frozen_leaves():
    split = leaf_split.Split.make(PARAMS, {"w": False, "b": True})
    assert jax.tree.leaves(split.trainable) == [PARAMS["w"]]
    assert isinstance(split.trainable["b"], optax.MaskedNode)
    assert same(split.merge(split.trainable), PARAMS)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.polyak_sgd(),
        optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau()),
        optax.GradientTransformation(
            *optax.sgd(0.1)
        ),  # one that takes no more than three arguments
    ],
    ids=["polyak", "plateau", "plain"],
)
def test_optimizers_get_the_values_they_ask_for(optimizer):
    # One batch an epoch, so that a line search lowers the very loss that is looked at.
    tuned = run(finetune=(optimizer, 4), batch_size=24, frozen={"w": False, "b": True})
    assert loss_fn(tuned.params, DATA) < tuned.history.finetune_losses[0]


@pytest.mark.slow
def test_a_line_search_lowers_the_loss_of_its_own_batch_at_every_step():
    tuned = run(finetune=(optax.lbfgs(), 4), batch_size=24, frozen={"w": False, "b": True})
    assert np.all(np.diff(tuned.history.finetune_losses) < 0)


def test_optimizers_before_the_clip_get_values_too():
    plateau = optax.contrib.reduce_on_plateau(patience=1, rtol=0.0, atol=1e9, factor=1e-9)
    result = run(WITH_MEMORY, before_clip=plateau)
    # Nothing is ever good enough for this plateau, so that soon no gradient is left to be clipped.
    assert result.history.clip_fractions[0] == 1
    assert not np.any(result.history.clip_fractions[3:])


class Lookalike:
    init = staticmethod(lambda params: {"slow": params})

    @staticmethod
    def update(grads, state, params=None):
        return jax.tree.map(lambda g: -0.1 * g, grads), state


@pytest.mark.slow
def test_tied_parameters_and_states_that_are_the_parameters_are_not_donated_twice():
    shared = jnp.array([1.0, 2.0, 3.0])
    params = {"w": shared, "v": shared}

    def loss(params, batch):
        return jnp.mean((batch["x"] @ (params["w"] + params["v"]) - batch["y"]) ** 2)

    result = run(params=params, loss=loss, finetune=(Lookalike(), 2))
    assert shared.tolist() == [1.0, 2.0, 3.0]
    assert not same(result.params["w"], result.params["v"])  # each has noise of its own
    before = optax.GradientTransformation(Lookalike.init, Lookalike.update)
    assert run(WITH_MEMORY, params=params, loss=loss, before_clip=before).history.state is None
    averaged = optax.contrib.schedule_free_sgd(0.1)
    assert run(params=params, loss=loss, finetune=(averaged, 2)).certificate.finetune_steps == 2


def test_what_an_optimizer_cannot_do_is_refused_before_any_step():
    def refuse(grads, state, params=None):
        raise NotImplementedError("no such tree")

    def grow(grads, state, params=None):
        return jax.tree.map(lambda g: jnp.ones((2, *g.shape)), grads), state

    def forget(grads, state, params=None):
        return grads, ()

    looks = []
    for options, words in (
        ({"finetune": (optax.partition(GROUPS, {"w": "other", "b": "rest"}), 2)}, "finetune does"),
        ({"finetune": (optax.GradientTransformation(lambda p: 0, refuse), 2)}, "no such tree"),
        ({"finetune": (optax.GradientTransformation(lambda p: 0, grow), 2)}, "keep the shapes"),
        ({"before_clip": optax.GradientTransformation(lambda p: 0, refuse)}, "before_clip does"),
        (
            {"before_clip": optax.GradientTransformation(lambda p: jnp.ones(3), forget)},
            "before_clip does not work",
        ),
    ):
        mechanism = WITH_MEMORY if "before_clip" in options else MECHANISM
        with pytest.raises(ValueError, match=words):
            run(mechanism, evaluate=looks.append, **options)
    assert not looks
