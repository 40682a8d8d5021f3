"""A stopped run goes on as if it had never been stopped, or not at all."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from loop_helpers import CLIPPED, DATA, PARAMS, WITH_MEMORY, loss_fn, run, same

import certunlearn as cu
from certunlearn.unlearning import private_history

CENTER = jax.tree.map(lambda x: x - 1.0, PARAMS)
FROZEN = {"w": False, "b": True}


@pytest.fixture(scope="module")
def stopped():
    return run(stop_after=2, center=CENTER, frozen=FROZEN)


def test_a_state_is_resumed_as_often_as_one_likes(stopped):
    state = stopped.history.state
    whole = run(center=CENTER, frozen=FROZEN)
    for _ in range(2):
        assert same(run(resume=state, center=CENTER, frozen=FROZEN).params, whole.params)


OTHER_DATA = DATA | {"y": np.where(np.arange(24) == 5, 0.0, DATA["y"]).astype(np.float32)}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"data": OTHER_DATA}, "retain_data"),
        ({"data": DATA | {"y": DATA["y"].astype(np.float16)}}, "retain_data"),
        ({"data": {"x": DATA["x"], "z": DATA["y"]}, "loss": None}, "retain_data"),
        ({"center": jax.tree.map(lambda x: x + 0.25, CENTER)}, "center"),
        ({"center": None}, "center"),
        ({"params": PARAMS | {"w": PARAMS["w"] + 1e-6}}, "params"),
        ({"params": PARAMS | {"b": PARAMS["b"] + 1.0}}, "params"),  # a frozen leaf
        ({"frozen": {"w": True, "b": False}}, "frozen"),
        ({"noise_scale": 1.1}, "noise_scale"),
        ({"batch_size": 6}, "batch_size"),
        ({"per_example": True}, "per_example"),
        ({"mechanism": cu.GradientClipping(**CLIPPED | {"clip_norm": 0.6})}, "mechanism"),
        (
            {"data": OTHER_DATA, "center": None, "noise_scale": 1.1},
            "center, noise_scale, retain_data",
        ),
    ],
)
def test_what_another_plan_differs_in_is_named(stopped, changes, names):
    if changes.get("loss", 0) is None:
        changes["loss"] = lambda params, batch: loss_fn(params, {"x": batch["x"], "y": batch["z"]})
    options = {"center": CENTER, "frozen": FROZEN} | changes
    with pytest.raises(ValueError, match=f"another plan: {names} must be as in"):
        run(resume=stopped.history.state, **options)


def test_data_that_was_altered_in_place_is_other_data():
    data = jax.tree.map(np.array, DATA)
    state = run(data=data, stop_after=2).history.state
    assert same(run(data=data, resume=state).params, run().params)
    data["x"][3, 1] += 1.0
    with pytest.raises(ValueError, match="another plan: retain_data"):
        run(data=data, resume=state)


def with_noise_of_its_own():
    """Momentum and noise ahead of the clip: a state with narrow numbers and a typed key."""
    own = optax.GradientTransformation(
        lambda params: jax.random.key(3),
        lambda grads, key, params=None: (
            jax.tree.map(lambda g: g + jax.random.normal(key, g.shape), grads),
            jax.random.fold_in(key, 1),
        ),
    )
    return optax.chain(optax.scale_by_adam(mu_dtype=jnp.bfloat16), own)


@pytest.mark.slow
def test_any_optimizer_state_survives_the_disk(tmp_path):
    options = {"before_clip": with_noise_of_its_own()}
    whole = run(WITH_MEMORY, **options)
    state = run(WITH_MEMORY, stop_after=3, **options).history.state
    with pytest.warns(UserWarning, match="holds the noise key"):
        cu.unlearning.save_state(tmp_path / "run.private.npz", state)
    loaded = cu.unlearning.load_state(tmp_path / "run.private.npz")
    for saved in (state, loaded):
        assert same(run(WITH_MEMORY, resume=saved, **options).params, whole.params)


@pytest.mark.slow
def test_data_with_a_key_for_each_example():
    keyed = DATA | {"key": jax.random.split(jax.random.key(0), 24)}

    def dropped(params, batch):
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (3,)))(batch["key"])
        return loss_fn(params, batch | {"x": batch["x"] * keep})

    state = run(data=keyed, loss=dropped, stop_after=2).history.state
    assert same(
        run(data=keyed, loss=dropped, resume=state).params, run(data=keyed, loss=dropped).params
    )
    other = DATA | {"key": jax.random.split(jax.random.key(1), 24)}
    with pytest.raises(ValueError, match="another plan: retain_data"):
        run(data=other, loss=dropped, resume=state)


def test_a_damaged_or_finished_state_is_refused(stopped):
    options = {"center": CENTER, "frozen": FROZEN}
    state = stopped.history.state
    with pytest.raises(ValueError, match="resume is damaged"):
        run(resume=state._replace(leaves=state.leaves[:-1]), **options)
    with pytest.raises(ValueError, match="has run 2 steps already"):
        run(resume=state, stop_after=2, **options)
    with pytest.raises(ValueError, match="has run 7 steps already"):
        run(resume=state._replace(step=7), **options)


def test_a_run_of_an_older_noise_stream_is_refused_by_name(tmp_path, stopped):
    path = tmp_path / "run.private.npz"
    with pytest.warns(UserWarning, match="delete it"):
        cu.unlearning.save_state(path, stopped.history.state)
    arrays = dict(np.load(path))
    about = json.loads(str(arrays["about"]))
    assert about.pop("noise_stream") == stopped.history.state.noise_stream
    np.savez(path, **arrays | {"about": np.asarray(json.dumps(about))})  # as it was before
    with pytest.raises(ValueError, match=r"noise stream 2.*got stream 1.*begin the run anew"):
        run(resume=cu.unlearning.load_state(path), center=CENTER, frozen=FROZEN)


def test_a_file_of_another_format_is_not_a_state(tmp_path, stopped):
    path = tmp_path / "run.private.npz"
    with pytest.warns(UserWarning, match="delete it"):
        cu.unlearning.save_state(
            path, stopped.history.state._replace(plan="one digest of everything")
        )
    with pytest.raises(ValueError, match="not a saved unlearning state"):
        cu.unlearning.load_state(path)


def test_nothing_private_shows_in_a_repr(stopped):
    state = stopped.history.state
    result = run(finetune=(optax.sgd(0.1), 1), evaluate=lambda p: 0.123456)
    assert repr(state) == str(state) == "UnlearningState(step=2, <private>)"
    assert repr(result.history) == "PrivateHistory(<private: 6 noisy steps, 1 without noise>)"
    assert repr(stopped) == (
        f"UnlearningResult(epsilon={stopped.certificate.epsilon:g}, delta=1e-05, steps_run=2, "
        "params=<3 numbers>, history=<private>)"
    )
    for shown in (repr([state]), f"{stopped}", f"{result}", f"{result.history}"):
        assert "array" not in shown
        assert "0.123" not in shown


def saved(tmp_path, evaluations):
    empty = np.zeros(0, np.float32)
    record = private_history.PrivateHistory(
        losses=np.array([1.5, np.nan, np.inf], np.float32),
        clip_fractions=empty,
        nonfinite=np.int64(2),
        finetune_losses=empty,
        evaluations=evaluations,
        trained_digest="",
        start_digest="",
        state=None,
    )
    record.save(tmp_path / "run.private.json")

    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    return json.loads((tmp_path / "run.private.json").read_text(), parse_constant=refuse)


def test_a_history_is_valid_json_whatever_was_evaluated(tmp_path):
    narrow = jnp.array([1.5, jnp.nan], jnp.bfloat16)
    record = saved(
        tmp_path,
        [
            (0, {np.int64(3): np.float32(0.5), 4: jnp.ones(()), "c": (None, True, "text")}),
            (np.int32(1), {1: "a", "1": "b"}),
            (2, [narrow, np.bool_(True), float("nan"), np.float64(2.0), np.arange(2)]),
            (3, jax.random.key(77)),
            (4, 1 + 2j),
        ],
    )
    assert record["losses"] == [1.5, None, None]
    assert record["nonfinite"] == 2
    assert record["evaluations"] == [
        [0, {"3": 0.5, "4": 1.0, "c": [None, True, "text"]}],
        [1, [["1", "a"], ["1", "b"]]],
        [2, [[1.5, None], True, None, 2.0, [0, 1]]],
        [3, "a PRNG key"],
        [4, "(1+2j)"],
    ]


@pytest.mark.parametrize("name", ["float8_e5m2", "float8_e4m3fn", "bfloat16", "float16", "int4"])
def test_states_keep_numbers_of_every_type(name, tmp_path):
    leaf = np.asarray(jnp.arange(4).astype(name))
    key = np.zeros(2, np.uint32)
    saved = cu.unlearning.UnlearningState(1, (leaf,), key, key, "test", {})
    with pytest.warns(UserWarning, match="noise key"):
        cu.unlearning.save_state(tmp_path / "s.private.npz", saved)
    (found,) = cu.unlearning.load_state(tmp_path / "s.private.npz").leaves
    assert found.dtype == leaf.dtype
    assert found.tobytes() == leaf.tobytes()
