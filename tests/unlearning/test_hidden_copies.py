"""Attacks: ways in which the trained model, or another run's work, could survive or be lost."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from loop_helpers import DATA, PARAMS, WITH_MEMORY, loss_fn, run, same

import certunlearn as cu
from certunlearn.unlearning import Stream, UnlearningFailed, leaf_split, load_state
from certunlearn.unlearning.model_forms import form_of

SLOW = pytest.mark.slow
HOLDS = "must not hold the trained model"


# ------------------------------------------------------------- a loss that holds the trained model


def distance(params, other):
    return sum(jnp.sum((params[name] - other[name]) ** 2) for name in params)


def near(other):
    """The loss with a penalty on the distance from other parameters."""
    return lambda params, batch: loss_fn(params, batch) + distance(params, other)


COPIES = {
    "itself": lambda: PARAMS,
    "a copy": lambda: jax.tree.map(jnp.array, PARAMS),
    "on the host": lambda: jax.tree.map(np.array, PARAMS),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_loss_that_holds_the_trained_model_is_refused(name):
    with pytest.raises(ValueError, match=f"^loss_fn {HOLDS}"):
        run(loss=near(COPIES[name]()))


def test_it_is_refused_within_functions_that_it_calls():
    compiled = jax.jit(lambda params: distance(params, PARAMS))
    with pytest.raises(ValueError, match=HOLDS):
        run(loss=lambda params, batch: loss_fn(params, batch) + compiled(params))
    looped = lambda params: jax.lax.fori_loop(0, 2, lambda i, c: c + PARAMS["w"].sum(), 0.0)  # noqa: E731
    with pytest.raises(ValueError, match=HOLDS):
        run(loss=lambda params, batch: loss_fn(params, batch) * looped(params))


def test_a_teacher_of_a_module_is_refused():
    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.array([1.0, 2.0, 3.0]))

        def __call__(self, x):
            return x @ self.w[...]

    model = Model()
    loss = lambda mine, batch: jnp.mean((mine(batch["x"]) - model(batch["x"])) ** 2)  # noqa: E731
    with pytest.raises(ValueError, match=HOLDS):
        run(params=model, loss=loss)


def test_fine_tuning_may_never_hold_it_and_steps_with_memory_may():
    tuned = {"mechanism": WITH_MEMORY, "loss": near(PARAMS)}
    with pytest.raises(ValueError, match=f"^finetune loss_fn {HOLDS}"):
        run(**tuned, finetune=cu.Finetune(optax.sgd(0.1), 1, near(PARAMS)))
    run(**tuned, finetune=cu.Finetune(optax.sgd(0.1), 1, loss_fn))


@SLOW
def test_other_arrays_may_be_held():
    zeros = {"w": jnp.zeros(3), "b": jnp.zeros(())}
    run(loss=near({"w": PARAMS["w"] + 1.0, "b": jnp.array(0.25)}), stop_after=1)
    # Zeros are no trace of a model that begins there; a frozen leaf is not what is trained.
    run(params=zeros, loss=near({"w": np.zeros(3, np.float32), "b": 0.0}), stop_after=1)
    held = lambda params, batch: loss_fn(params, batch) * PARAMS["b"]  # noqa: E731
    run(loss=held, frozen={"w": False, "b": True}, stop_after=1)
    # What is left out of the loss does no harm.
    seen = lambda params, batch: (loss_fn(params, batch), distance(params, PARAMS))  # noqa: E731
    run(loss=seen, stop_after=1)


# ------------------------------------------------------------- copies in the model


def test_an_array_is_not_frozen_in_one_place_and_trained_in_another():
    tied = jnp.array([1.0, 2.0, 3.0])
    params = {"embed": tied, "out": tied, "b": jnp.zeros(3)}
    with pytest.raises(ValueError, match="frozen must say the same of one array in two places"):
        leaf_split.Split.make(params, {"embed": True, "out": False, "b": False})
    for flag in (True, False):
        leaf_split.Split.make(params, {"embed": flag, "out": flag, "b": not flag})
    apart = params | {"out": jnp.array(tied)}
    leaf_split.Split.make(apart, {"embed": True, "out": False, "b": False})


def test_averages_do_not_hide_in_settings_of_a_train_state():
    class Averaged(TrainState):
        average: dict | None = flax.struct.field(pytree_node=False, default=None)
        name: str = flax.struct.field(pytree_node=False, default="mine")

    state = Averaged.create(
        apply_fn=None, params=PARAMS, tx=optax.ema(0.9), average={"w": np.ones(3)}
    )
    with pytest.raises(ValueError, match=r"TrainState that carries .*\(average\)"):
        run(params=state)
    released = run(params=state, recompute_state=lambda params, data: None).params
    assert released.average is None
    assert released.name == "mine"
    assert same(released.opt_state, state.tx.init(released.params))  # a fresh average
    plain = Averaged.create(apply_fn=None, params=PARAMS, tx=optax.sgd(0.1))
    assert form_of(plain).seen == ()


class Counting(nnx.Module):
    """Keeps arrays that are no variables, and counts its calls."""

    def __init__(self):
        self.w = nnx.Param(jnp.array([1.0, 2.0, 3.0]))
        self.calls = nnx.BatchStat(jnp.zeros(()))
        self.cached, self.table = jnp.arange(3.0) + 7, np.arange(3.0) + 7

    def __call__(self, x):
        self.calls[...] += 1
        return x @ self.w[...]


def squares(model, batch):
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


def test_arrays_that_a_module_caches_do_not_leave():
    assert set(form_of(Counting()).seen) == {"cached", "calls/value", "table"}
    released = run(params=Counting(), loss=squares, recompute_state=lambda *_: None).params
    assert not np.any(released.cached)
    assert not np.any(released.table)


def test_who_changes_a_module_in_place_changes_nothing_that_is_released():
    def doubled(model, *_):
        model.w[...] *= 2.0
        model(DATA["x"])

    def loss(model, batch):
        value = squares(model, batch)
        doubled(model)
        return value

    plain = run(params=Counting(), loss=squares, recompute_state=lambda *_: None)
    looks = {"evaluate": doubled, "evaluate_every": 1}
    changed = run(params=Counting(), loss=loss, recompute_state=doubled, **looks)
    assert cu.verify(changed.certificate, changed.params)
    np.testing.assert_array_equal(changed.params.w[...], plain.params.w[...])
    assert float(changed.params.calls[...]) == 1.0


# ------------------------------------------------------------- streams and saves


def test_a_loader_may_use_one_buffer_for_all_its_batches():
    room = np.zeros(8 * 3 * 4 + 64, np.uint8)
    start = -room.ctypes.data % 64  # aligned, so that it could be used without a copy
    buffer = room[start : start + 8 * 3 * 4].view(np.float32).reshape(8, 3)

    def loader(epoch):
        for first in range(0, 24, 8):
            buffer[...] = DATA["x"][first : first + 8]
            yield buffer

    own = [DATA["x"][first : first + 8].copy() for first in range(0, 24, 8)]
    loss = lambda params, x: jnp.mean((x @ params["w"] + params["b"] - 1) ** 2)  # noqa: E731
    found = [
        run(data=Stream(each, size=24, batch_size=8), loss=loss, prefetch=prefetch).params
        for each, prefetch in ((own, 0), (loader, 0), (loader, 2))
    ]
    assert same(found[0], found[1])
    assert same(found[0], found[2])


def test_a_resumed_run_overwrites_no_other_run_and_nothing_later(tmp_path):
    path = tmp_path / "run.private.npz"
    saves = {"save_every": 2, "save_to": path}
    early = run(stop_after=2).history.state
    run(stop_after=4, **saves)
    kept = path.read_bytes()
    other = run(stop_after=2, key=8).history.state
    same_key = run(stop_after=2, batch_size=12).history.state
    for state, changes in ((other, {}), (early, {}), (same_key, {"batch_size": 12})):
        with pytest.raises(ValueError, match=r"is there already, .* a later one of this run"):
            run(resume=state, **saves, **changes)
        assert path.read_bytes() == kept
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is there already"):
        run(resume=early, **saves)
    path.write_bytes(kept)
    resumed = run(resume=load_state(path), **saves)
    assert same(resumed.params, run().params)


@SLOW
def test_runs_of_one_key_do_not_share_a_folder(tmp_path):
    orbax_checkpoints = pytest.importorskip("certunlearn.unlearning.orbax_checkpoints")
    with orbax_checkpoints.Saver(tmp_path / "run.private") as saver:
        run(stop_after=2, save_every=2, save_to=saver)
        with pytest.raises(UnlearningFailed, match="holds step 2 of a run already"):
            run(save_every=3, save_to=saver, batch_size=12)  # of the same key
    assert orbax_checkpoints.restore_state(tmp_path / "run.private").step == 2


def test_keys_and_empty_arrays_are_no_copies():
    """A key and an array of no number have the shapes of trained ones, and say nothing of them."""
    key, empty = jax.random.key(3), jnp.zeros((0, 3))

    def loss(params, batch):
        more = params["b"] * jax.random.normal(key) + jnp.sum(params["none"] * empty)
        return loss_fn(params, batch) + more

    assert run(params=PARAMS | {"none": empty}, loss=loss).certificate


def test_the_public_centre_may_be_held_where_a_run_starts_from_it():
    center = jax.tree.map(lambda leaf: leaf + 1, PARAMS)
    assert run(params=center, center=center, loss=near(center)).certificate
    with pytest.raises(ValueError, match=HOLDS):
        run(params=PARAMS, center=center, loss=near(PARAMS))
