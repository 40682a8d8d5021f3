"""What a model carries besides parameters: refused, recomputed, or left behind."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.dynamic_scale import DynamicScale
from flax.training.train_state import TrainState
from loop_helpers import DATA, PARAMS, run, same

import certunlearn as cu
from certunlearn.unlearning import other_state


def params_of(model):
    """The parameters of a model that needs no recomputation."""
    return other_state.checked_form(model, None).params


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(4)(x))
        return nn.Dense(1)(x)[:, 0]


@pytest.mark.slow
def test_batch_statistics_are_refused_or_recomputed_from_the_released_parameters():
    net = Normed()
    variables = net.init(jax.random.key(0), DATA["x"][:2], train=False)
    stale = jax.tree.map(lambda x: x + 100.0, variables["batch_stats"])

    def loss(params, batch):
        out, _ = net.apply(
            {"params": params, "batch_stats": stale},
            batch["x"],
            train=True,
            mutable=["batch_stats"],
        )
        return jnp.mean((out - batch["y"]) ** 2)

    def recompute(params, data):
        def update(stats, batch):
            both = {"params": params, "batch_stats": stats}
            return net.apply(both, batch["x"], train=True, mutable=["batch_stats"])[1][
                "batch_stats"
            ]

        return cu.unlearning.recompute_statistics(
            update, variables["batch_stats"], data, batch_size=8
        )

    class State(TrainState):
        batch_stats: dict

    carried = {"params": variables["params"], "batch_stats": stale}
    state = State.create(
        apply_fn=net.apply, params=carried["params"], tx=optax.sgd(0.1), batch_stats=stale
    )
    for model in (carried, state):
        with pytest.raises(ValueError, match=r"batch_stats.*recompute_state"):
            run(params=model, loss=loss)
        result = run(params=model, loss=loss, recompute_state=recompute)
        mean = result.model_state["BatchNorm_0"]["mean"]
        released = result.params.params if model is state else result.params
        expected = np.mean(DATA["x"] @ released["Dense_0"]["kernel"], axis=0)
        expected += np.asarray(released["Dense_0"]["bias"])
        np.testing.assert_allclose(mean, expected, atol=0.35 * np.abs(expected).max() + 0.05)
        assert np.all(np.abs(mean) < 50)  # nothing of the stale statistics is left
        assert cu.verify(result.certificate, result.params)
    assert same(result.params.batch_stats, result.model_state)
    bare = TrainState.create(apply_fn=net.apply, params=PARAMS, tx=optax.adam(0.1))
    assert same(run(params=bare).params.params, run().params)

    class WithNorm(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(3, rngs=rngs)

    with pytest.raises(ValueError, match="NNX model that carries state"):
        run(params=WithNorm(nnx.Rngs(0)), loss=lambda p, b: 0.0)


@pytest.mark.parametrize(
    "key",
    [jax.random.key(0), jax.random.PRNGKey(0), jax.random.split(jax.random.key(0), 3)],
    ids=["typed", "raw", "several"],
)
def test_a_random_key_in_a_train_state_is_no_trace_of_data(key):
    class State(TrainState):
        dropout: jax.Array

    state = State.create(apply_fn=None, params=PARAMS, tx=optax.adam(0.1), dropout=key)
    assert params_of(state) is PARAMS
    assert params_of({"params": PARAMS, "rng": {"a": key}}) is PARAMS


def test_state_that_is_computed_from_data_is_no_random_key():
    class State(TrainState):
        scale: DynamicScale
        counts: jax.Array

    counts = jnp.zeros(3, jnp.uint32)
    state = State.create(
        apply_fn=None, params=PARAMS, tx=optax.adam(0.1), scale=DynamicScale(), counts=counts
    )
    with pytest.raises(ValueError, match=r"besides parameters \(counts\)"):
        params_of(state)
    without = state.replace(counts=None)
    assert params_of(without) is PARAMS


def test_an_nnx_model_with_keys_of_its_own_needs_no_recomputation():
    class Dropped(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(3, 1, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.key = nnx.Variable(jax.random.key(1))

    params = params_of(Dropped(nnx.Rngs(0)))
    assert len(jax.tree.leaves(params)) == 2


def test_a_failing_recomputation_does_not_lose_the_run():
    def fail(params, data):
        raise RuntimeError("no such layer")

    with pytest.warns(UserWarning, match=r"no such layer.*result\.params"):
        result = run(recompute_state=fail)
    assert result.model_state is None
    assert cu.verify(result.certificate, result.params)


def test_statistics_are_recomputed_from_arrays_only():
    average = lambda state, batch: 0.5 * state + 0.5 * batch.mean()  # noqa: E731
    for data in (iter([jnp.ones(3)]), "data.npz", np.ma.ones(3)):
        with pytest.raises(TypeError, match="retain_data must"):
            cu.unlearning.recompute_statistics(average, 0.0, data, batch_size=1)
    with pytest.raises(TypeError, match="update must be a function"):
        cu.unlearning.recompute_statistics(None, 0.0, jnp.ones(3), batch_size=1)
