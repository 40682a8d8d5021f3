"""Modules in, modules out: NNX, Linen's `TrainState`, Equinox and Haiku."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.dynamic_scale import DynamicScale
from flax.training.train_state import TrainState
from loop_helpers import BATCH, DATA, MECHANISM, PARAMS, Notes, loss_fn, run, same

import certunlearn as cu
from certunlearn._numerics import files

SLOW = pytest.mark.slow


def squares(outputs, batch):
    return jnp.mean((outputs.reshape(-1) - batch["y"]) ** 2)


def through(path, params):
    """A round trip through a file."""
    cu.certificates.save_params(path, params)
    return cu.certificates.load_params(path)


# ------------------------------------------------------------------------------- Flax NNX


class Linear(nnx.Module):
    """The model of `loss_fn`."""

    def __init__(self, w, b):
        self.w, self.b = nnx.Param(jnp.asarray(w)), nnx.Param(jnp.asarray(b))

    def __call__(self, x):
        return x @ self.w[...] + self.b[...]


def nnx_loss(model, batch):
    assert isinstance(model, nnx.Module)
    return squares(model(batch["x"]), batch)


def test_an_nnx_module_takes_the_steps_of_its_parameters(tmp_path):
    model = Linear(**PARAMS)
    before = jax.tree.map(jnp.array, nnx.state(model))
    result = run(params=model, loss=nnx_loss, center=Linear(np.ones(3, np.float32), 0.0))
    plain = run(center={"w": np.ones(3, np.float32), "b": 0.0})
    assert type(result.params) is Linear
    # Flax orders leaves by name, as dicts are, so the noise is the same.
    np.testing.assert_array_equal(result.params.w[...], plain.params["w"])
    np.testing.assert_array_equal(result.params.b[...], plain.params["b"])
    assert same(nnx.state(model), before)  # the module that was given is as it was
    certificate = result.certificate
    assert cu.verify(certificate, result.params)
    assert cu.verify(certificate, nnx.state(result.params, nnx.Param))
    assert cu.verify(certificate, through(tmp_path / "model.npz", result.params))
    assert not cu.verify(certificate, model)
    digest = files.params_digest(nnx.state(result.params, nnx.Param))
    assert certificate.params_digest == files.params_digest(result.params) == digest
    claim = {"noise_scale": 1.0, "delta": 1e-5, "accountant": "interpolation"}
    mine = cu.certify(MECHANISM, **claim, params=result.params, steps_run=6)
    assert cu.verify(mine, result.params)
    assert mine.params_digest == certificate.params_digest


class Network(nnx.Module):
    """Layers as in Flax's tutorial, and a counter."""

    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(nnx.relu(self.norm(self.first(x)))))


def trained_network():
    model = Network(nnx.Rngs(0))
    model.norm.mean[...] += 100.0  # what only the trained model could know
    model.norm.var[...] += 100.0
    model(DATA["x"])
    assert int(model.dropout.rngs.count[...]) == 1
    return model


def recompute(model, data):
    for _ in range(2):
        model(data["x"])


@SLOW
def test_nothing_that_training_left_in_an_nnx_module_leaves_with_it():
    model = trained_network()
    stale = nnx.state(model, nnx.BatchStat)
    with pytest.raises(ValueError, match=r"NNX model that carries .*norm/mean.*norm/var"):
        run(params=model, loss=nnx_loss)
    result = run(params=model, loss=nnx_loss, recompute_state=recompute)
    released = result.params
    assert cu.verify(result.certificate, released)
    # Two updates with momentum 0.99, from a mean of 0 and a variance of 1.
    hidden = released.first(DATA["x"])
    np.testing.assert_allclose(
        released.norm.mean[...], 0.0199 * hidden.mean(0), rtol=1e-3, atol=1e-5
    )
    var = 0.99**2 + 0.0199 * hidden.var(0)
    np.testing.assert_allclose(released.norm.var[...], var, rtol=1e-3)
    assert same(result.model_state["norm"]["mean"], released.norm.mean)
    assert np.all(np.abs(released.norm.mean[...]) < 50)
    assert same(stale, nnx.state(model, nnx.BatchStat))
    assert int(released.dropout.rngs.count[...]) == 0
    keys = [jax.random.key_data(each.dropout.rngs.key[...]) for each in (model, released)]
    assert not np.array_equal(*keys)


@SLOW
def test_other_state_of_an_nnx_module_is_reproducible_or_new():
    model, states = trained_network(), []
    for _ in range(2):
        released = run(params=model, loss=nnx_loss, recompute_state=recompute).params
        states.append(jax.random.key_data(released.dropout.rngs.key[...]))
    assert same(*states)  # of a given key
    other = run(params=model, loss=nnx_loss, recompute_state=recompute, key=None).params
    assert not np.array_equal(jax.random.key_data(other.dropout.rngs.key[...]), states[0])
    with pytest.warns(UserWarning, match="recompute_state failed"):
        failed = run(params=model, loss=nnx_loss, recompute_state=lambda model, data: 1 / 0)
    np.testing.assert_array_equal(failed.params.norm.mean[...], 0.0)
    np.testing.assert_array_equal(failed.params.norm.var[...], 1.0)
    assert failed.model_state is None

    def returned(model, data):
        model(data["x"])
        return nnx.state(model, nnx.BatchStat)

    both = [
        run(params=model, loss=nnx_loss, recompute_state=f).params.norm
        for f in (returned, lambda model, data: (model(data["x"]), model)[1])
    ]
    assert same(*map(nnx.state, both))
    assert not same(nnx.state(both[0]), nnx.state(failed.params.norm))


def test_a_loss_that_uses_running_statistics_is_refused():
    model = trained_network()
    model.eval()
    with pytest.raises(ValueError, match=r"loss_fn must not use .*norm/mean.*model\.train\(\)"):
        run(params=model, loss=nnx_loss, recompute_state=recompute)


def masks(seen):
    def loss(model, batch):
        kept = model.dropout(jnp.ones((len(batch["y"]), 4)))
        jax.debug.callback(lambda kept: seen.append(kept.tobytes()), kept)
        return squares(model.second(kept * model.first(batch["x"])), batch)

    return loss


class Dropped(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(4, 1, rngs=rngs)


def masks_of(**changes):
    notes = Notes()
    result = run(params=Dropped(nnx.Rngs(0)), loss=masks(notes), **changes)
    jax.effects_barrier()
    return result, notes.seen


@SLOW
def test_no_two_steps_of_an_nnx_module_share_a_mask():
    _, seen = masks_of(finetune=(optax.sgd(0.1), 2))
    assert len(set(seen)) == len(seen) == MECHANISM.steps + 2  # of 2^32 masks


@SLOW
def test_examples_and_resumed_steps_have_masks_of_their_own():
    _, seen = masks_of(per_example=True, microbatch_size=4)
    assert len(seen) == MECHANISM.steps * BATCH
    assert len(set(seen)) > 10  # of 16 masks
    whole, seen = masks_of()
    stopped, first = masks_of(stop_after=3)
    resumed, rest = masks_of(resume=stopped.history.state)
    assert sorted(first + rest) == sorted(seen)
    assert same(nnx.state(whole.params, nnx.Param), nnx.state(resumed.params, nnx.Param))


class Adapted(nnx.Module):
    def __init__(self, rngs):
        self.base = nnx.Linear(3, 1, rngs=rngs)
        self.lora = nnx.LoRA(3, 2, 1, rngs=rngs)

    def __call__(self, x):
        return self.base(x) + self.lora(x)


@SLOW
def test_lora_is_trained_while_its_base_is_frozen():
    model = Adapted(nnx.Rngs(0))
    result = run(params=model, loss=nnx_loss, frozen=nnx.Not(nnx.LoRAParam))
    assert same(nnx.state(result.params.base), nnx.state(model.base))
    assert not same(nnx.state(result.params.lora), nnx.state(model.lora))
    assert [name.split("/")[0] for name in result.certificate.coverage["frozen"]] == ["base"] * 2
    assert result.certificate.coverage["parameters"] == 8
    assert cu.verify(result.certificate, result.params)


# ------------------------------------------------------------------------------- Linen


class State(TrainState):
    key: jax.Array
    scale: DynamicScale
    batch_stats: dict | None = None


def test_a_train_state_comes_back_fresh():
    tx = optax.chain(optax.clip(1.0), optax.adam(0.1))
    state = State.create(
        apply_fn=len,
        params=PARAMS,
        tx=tx,
        key=jax.random.key(5),
        scale=DynamicScale(growth_interval=7, fin_steps=jnp.array(3), scale=jnp.array(4.0)),
    )
    state = state.apply_gradients(grads=PARAMS)
    result = run(params=state, center=state.replace(params=PARAMS))
    plain = run(params=state.params, center=PARAMS)
    released = result.params
    assert type(released) is State
    assert same(released.params, plain.params)
    assert cu.verify(result.certificate, released)
    assert cu.verify(result.certificate, released.params)
    assert (int(released.step), released.apply_fn, released.tx) == (0, len, tx)
    assert same(released.opt_state, tx.init(released.params))
    assert released.scale == DynamicScale(growth_interval=7)
    assert released.batch_stats is None
    assert released.key.shape == ()
    assert not np.array_equal(*map(jax.random.key_data, (released.key, state.key)))
    released.apply_gradients(grads=released.params)  # it goes on as any other


def test_statistics_in_a_train_state_are_the_recomputed_ones():
    stats = {"mean": jnp.ones(2)}
    state = State.create(
        apply_fn=None,
        params=PARAMS,
        tx=optax.sgd(0.1),
        key=jax.random.PRNGKey(0),
        scale=None,
        batch_stats=stats,
    )
    with pytest.raises(ValueError, match=r"TrainState that carries .*\(batch_stats\)"):
        run(params=state)
    new = lambda params, data: {"mean": params["w"][:2]}  # noqa: E731
    released = run(params=state, recompute_state=new).params
    assert same(released.batch_stats, {"mean": released.params["w"][:2]})
    assert released.key.dtype == np.uint32
    named = run(params=state, recompute_state=lambda *a: {"batch_stats": new(*a)}).params
    assert same(named.batch_stats, released.batch_stats)
    with pytest.warns(UserWarning, match="recompute_state failed"):
        assert run(params=state, recompute_state=lambda *a: 1 / 0).params.batch_stats is None


# ------------------------------------------------------------------------------- others


def test_an_equinox_module_takes_the_steps_of_its_arrays(tmp_path):
    class Model(eqx.Module):
        w: jax.Array
        b: jax.Array
        table: jax.Array
        act: object
        name: str = eqx.field(static=True, default="linear")

        def __call__(self, x):
            return self.act(x @ self.w + self.b)

    def loss(model, batch):
        assert model.act is jnp.asarray
        assert model.table.dtype == jnp.int32
        return squares(model(batch["x"]), batch)

    model = Model(PARAMS["w"], PARAMS["b"], jnp.arange(3), jnp.asarray)
    result = run(params=model, loss=loss, center=model)
    assert type(result.params) is Model
    assert same(result.params.table, model.table)
    assert not same(result.params.w, model.w)
    assert np.all(np.isfinite(result.params.w))
    assert cu.verify(result.certificate, result.params)
    assert cu.verify(result.certificate, eqx.filter(result.params, eqx.is_inexact_array))
    assert cu.verify(result.certificate, through(tmp_path / "model.npz", result.params))
    assert not cu.verify(result.certificate, model)
    assert set(files.named_leaves(eqx.filter(model, eqx.is_inexact_array))) == {"w", "b"}
    flags = eqx.tree_at(lambda m: m.b, jax.tree.map(lambda _: False, model), True)
    frozen = run(params=model, loss=loss, frozen=flags)
    assert frozen.certificate.coverage["frozen"] == ["b"]
    assert same(frozen.params.b, model.b)


@SLOW
def test_equinox_layers_with_dropout():
    model = eqx.nn.Sequential(
        [
            eqx.nn.Linear(3, 8, key=jax.random.key(0)),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Dropout(0.5),
            eqx.nn.Linear(8, "scalar", key=jax.random.key(1)),
        ]
    )

    def loss(model, batch, key):
        keys = jax.random.split(key, len(batch["y"]))
        outputs = jax.vmap(lambda x, key: model(x, key=key))(batch["x"], keys)
        return (outputs - batch["y"]) ** 2

    result = run(params=model, loss=loss, per_example=True)
    assert cu.verify(result.certificate, result.params)
    assert result.params(DATA["x"][0], key=jax.random.key(0)).shape == ()


@SLOW
def test_haiku_parameters_with_dropout():
    def forward(x):
        return hk.Linear(1)(hk.dropout(hk.next_rng_key(), 0.5, jax.nn.relu(hk.Linear(8)(x))))

    net = hk.transform(forward)
    params = net.init(jax.random.key(0), DATA["x"])
    loss = lambda params, batch, key: squares(net.apply(params, key, batch["x"]), batch)  # noqa: E731
    result = run(params=params, loss=loss, finetune=(optax.adam(0.1), 2))
    assert set(result.params) == {"linear", "linear_1"}
    assert cu.verify(result.certificate, result.params)


@SLOW
def test_whatever_is_no_module_is_a_pytree_of_parameters():
    assert run(params=nn.FrozenDict(PARAMS)).params["w"].shape == (3,)
    state = nnx.state(Linear(**PARAMS), nnx.Param)
    released = run(
        params=state, loss=lambda p, b: loss_fn({k: v[...] for k, v in p.items()}, b)
    ).params
    assert type(released) is nnx.State
