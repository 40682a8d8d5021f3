"""What is frozen may be picked by an NNX filter, which says the same as bools in its place."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from loop_helpers import PARAMS, run, same

import certunlearn as cu
from certunlearn.unlearning import leaf_split
from certunlearn.unlearning.model_forms import form_of


class Adapted(nnx.Module):
    """Two layers with adapters, the first of which is used twice."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.base = nnx.LoRALinear(3, 3, lora_rank=2, rngs=rngs)
        self.again = self.base
        self.head = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.again(self.base(x)))


MODEL = Adapted()
ADAPTERS = {"again/lora/lora_a", "again/lora/lora_b"}
KERNELS = {"again/kernel", "head/kernel"}
BIASES = {"again/bias", "head/bias"}


def frozen_names(chosen, model=MODEL):
    form = form_of(model)
    names = leaf_split.Split.make(form.params, form.flags(chosen)).frozen_names
    return {name.removesuffix("/value") for name in names}


PICKS = {
    "a type": (nnx.LoRAParam, ADAPTERS),
    "not a type": (nnx.Not(nnx.LoRAParam), KERNELS | BIASES),
    "a list": ([nnx.LoRAParam, nnx.PathContains("bias")], ADAPTERS | BIASES),
    "all of some": (nnx.All(nnx.Param, nnx.PathContains("head")), {"head/kernel", "head/bias"}),
    "a path": (lambda path, leaf: path == ("head", "bias"), {"head/bias"}),
    "a shape": (lambda path, leaf: leaf.shape == (3, 1), {"head/kernel"}),
    "dimensions": (lambda path, leaf: leaf.get_value().ndim == 1, BIASES),
    "bools as before": (True, None),
    "nothing as before": (None, set()),
    "none as before": (False, set()),
}


@pytest.mark.parametrize("name", PICKS)
def test_a_filter_picks_what_it_is_true_of(name):
    chosen, expected = PICKS[name]
    if expected is None:
        with pytest.raises(ValueError, match="at least one leaf to train, got True for all"):
            frozen_names(chosen)
    else:
        assert frozen_names(chosen) == expected


def of_numbers(path, leaf):
    return bool(leaf.get_value().sum() == 0.0)


def at_one_place(path, leaf):
    return path[0] != "base"  # the first layer is `again`, too


REFUSED = {
    "everything": (..., ValueError, "at least one leaf to train"),
    "nothing": (nnx.BatchStat, ValueError, "true of some parameter.*none of again/bias, "),
    "a tag": ("bias", ValueError, "true of some parameter, got 'bias'"),
    "never": (lambda path, leaf: None, ValueError, "true of some parameter"),
    "by numbers": (of_numbers, TypeError, "must not depend on what was trained; of again/bias"),
    "shared": (at_one_place, ValueError, "same of again/bias and base/bias, .* got True and False"),
    "texts": (lambda path, leaf: "yes", TypeError, "True or False for each leaf, got 'yes'"),
    "no filter": ([3], TypeError, "bools or an NNX filter, got \\[3\\]"),
    "a number": (3, TypeError, "True or False for each leaf, got 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_filter_that_cannot_be_meant_is_refused(name):
    chosen, kind, match = REFUSED[name]
    with pytest.raises(kind, match=match):
        frozen_names(chosen)


def test_a_shared_layer_is_frozen_at_all_its_places_or_none():
    both = lambda path, leaf: path[0] in ("base", "again")  # noqa: E731
    assert frozen_names(both) == ADAPTERS | {"again/kernel", "again/bias"}


class Tied(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(4, 3, rngs=nnx.Rngs(0))
        self.out = nnx.Linear(4, 3, use_bias=False, rngs=nnx.Rngs(1))
        self.out.kernel = self.embed.embedding


def test_a_tied_weight_is_not_frozen_under_one_name_and_trained_under_the_other():
    for name in ("embed", "out"):
        with pytest.raises(ValueError, match="embed/embedding and out/kernel, which are one"):
            frozen_names(nnx.PathContains(name), Tied())


OTHERS = {
    "pytree": PARAMS,
    "variables": {"params": PARAMS, "batch_stats": {}},
    "train state": TrainState.create(apply_fn=None, params=PARAMS, tx=optax.sgd(0.1)),
    "state": nnx.state(MODEL, nnx.Param),
}


@pytest.mark.parametrize("model", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("chosen", [nnx.LoRAParam, lambda path, leaf: True, ..., "bias"])
def test_filters_are_for_modules(model, chosen):
    with pytest.raises(TypeError, match=r"frozen must be a pytree of bools .* for NNX modules"):
        form_of(model).flags(chosen)


def test_an_equinox_module_that_can_be_called_is_no_filter():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.Linear(3, 1, key=jax.random.key(0))
    flags = eqx.tree_at(lambda m: m.bias, jax.tree.map(lambda _: False, model), True)
    assert callable(flags)
    assert frozen_names(flags, model) == {"bias"}
    with pytest.raises(TypeError, match="for NNX modules"):
        form_of(model).flags(jnp.zeros_like)


def test_a_run_with_a_filter_is_the_run_with_its_bools():
    loss = lambda model, batch: jnp.mean((model(batch["x"])[:, 0] - batch["y"]) ** 2)  # noqa: E731
    chosen = nnx.Not(nnx.LoRAParam)
    bools = form_of(MODEL).flags(chosen)
    by_filter, by_bools = (run(params=MODEL, loss=loss, frozen=each) for each in (chosen, bools))
    assert same(*(nnx.state(each.params) for each in (by_filter, by_bools)))
    coverage = by_filter.certificate.coverage
    assert coverage == by_bools.certificate.coverage
    names = {name.removesuffix("/value") for name in coverage["frozen"]}
    assert names == frozen_names(chosen) == KERNELS | BIASES
    assert cu.verify(by_filter.certificate, by_filter.params)
    np.testing.assert_array_equal(by_filter.params.base.kernel[...], MODEL.base.kernel[...])
    assert not same(nnx.state(by_filter.params, nnx.LoRAParam), nnx.state(MODEL, nnx.LoRAParam))
    # A state of the one goes on with the other: the plan is the same.
    stopped = run(params=MODEL, loss=loss, frozen=chosen, stop_after=2).history.state
    resumed = run(params=MODEL, loss=loss, frozen=bools, resume=stopped)
    assert same(nnx.state(resumed.params), nnx.state(by_filter.params))
