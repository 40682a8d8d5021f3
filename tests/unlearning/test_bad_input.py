"""One table of odd arguments: each is refused before any step, by a sentence that names it."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
import scipy.sparse
from jax.experimental import sparse
from loop_helpers import DATA, PARAMS, WITH_MEMORY, loss_fn, run

import certunlearn as cu
from certunlearn.unlearning import inputs

X, Y = DATA["x"], DATA["y"]
LARGE = np.arange(24, dtype=np.int64) + 2**40


class Loader:
    """Looks like a loader of some other library."""

    def __iter__(self):
        return iter([])


class Source:
    """Examples of a list."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def stream(loader):
    return cu.unlearning.Stream(loader, size=24, batch_size=4)


def data(x, y=Y):
    return {"data": {"x": x, "y": y}}


# Argument of `unlearn`, what kind of error, and the words that it must hold.
ODD = {
    # ------------------------------------------------------------------ data
    "no data": ({"data": None}, ValueError, "retain_data must be .* leading axis"),
    "an iterator": ({"data": iter([DATA])}, TypeError, r"retain_data must .*Stream.*iterator"),
    "a generator": ({"data": (d for d in [DATA])}, TypeError, r"must .*Stream.* generator"),
    "a loader": ({"data": Loader()}, TypeError, r"retain_data must .*Stream.* type Loader"),
    "a data frame": ({"data": pd.DataFrame(X)}, TypeError, "must be an array .*frame.to_numpy"),
    "no source": ({"data": Source([])}, ValueError, "from 1 to .* examples, got .* = 0"),
    "an endless source": ({"data": Source(range(2**40))}, ValueError, "from 1 to .* examples"),
    "a source of None": (
        {"data": Source([None])},
        TypeError,
        r"retain_data\[0\] must hold numbers",
    ),
    "a source with a hole": (
        {"data": Source([X[0], None])},
        ValueError,
        r"retain_data\[1\] must be structured like",
    ),
    "a source of words": ({"data": Source(["one"])}, TypeError, "must hold numbers, got dtype <U3"),
    "a source of keys": ({"data": Source([jax.random.key(0)])}, TypeError, "must hold numbers"),
    "a source of lists": ({"data": Source([{"x": [1.0, 2.0]}])}, TypeError, "with_format"),
    "a masked source": (
        {"data": Source([np.ma.ones(2)])},
        TypeError,
        r"retain_data\[0\] must hold numbers",
    ),
    "a stream of nothing": ({"data": stream([])}, ValueError, "at least one batch"),
    "a short batch": ({"data": stream([{"x": X[:3], "y": Y[:3]}])}, ValueError, "batch_size=4 .*3"),
    "another batch size": (
        {"data": stream([{"x": X[:4], "y": Y[:4]}]), "batch_size": 8},
        ValueError,
        "batch_size must be the stream's, 4, got 8",
    ),
    "no loader": ({"data": stream(lambda epoch: epoch)}, TypeError, r"loader\(0\) must return"),
    "a path": ({"data": "data.npz"}, TypeError, "retain_data must be an array .* 'data.npz'"),
    "a Path": ({"data": pathlib.Path("a.npz")}, TypeError, "retain_data must be an array"),
    "sparse": (data(scipy.sparse.csr_matrix(X)), TypeError, r"\['x'\] must be .*toarray"),
    "JAX's sparse": (
        data(sparse.BCOO.fromdense(X)),
        TypeError,
        r"\['x'\] must be an array .* BCOO",
    ),
    "masked": (data(np.ma.masked_less(X, 0)), TypeError, r"\['x'\] must not be a masked array"),
    "objects": (data(X.astype(object)), TypeError, r"\['x'\] must hold numbers, got dtype object"),
    "strings": (data(X.astype(str)), TypeError, r"\['x'\] must hold numbers, got dtype <U"),
    "dates": (
        data(Y.astype("M8[s]")),
        TypeError,
        r"\['x'\] must hold numbers|\['x'\] cannot be made",
    ),
    "long doubles": (data(Y.astype(np.longdouble)), TypeError, r"\['x'\] must hold numbers"),
    "a frame": (data(pd.DataFrame(X)), TypeError, r"\['x'\] must .* DataFrame.*to_numpy"),
    "a record": (
        data(np.zeros(24, [("a", float)])),
        TypeError,
        r"\['x'\] (must hold|cannot be made)",
    ),
    "lists": (data([1.0, 2.0]), ValueError, "leading axis"),
    "int64 beyond int32": (data(X, LARGE), ValueError, r"\['y'\] holds 1099511627799, .* int32"),
    "uint64": (data(X, LARGE.astype(np.uint64)), ValueError, r"\['y'\] holds .* uint32"),
    "negative": (data(X, -LARGE), ValueError, r"\['y'\] holds -1099511627799"),
    "float64 beyond float32": (
        data(X, Y.astype(float) * 1e300),
        ValueError,
        r"\['y'\] holds .* float32",
    ),
    "a scalar": (data(3.0), ValueError, "leading axis"),
    "lengths that differ": (data(X[:5]), ValueError, "one leading axis length"),
    # ------------------------------------------------------------------ parameters
    "no params": ({"params": None}, ValueError, "params must have at least one array"),
    "strings for params": (
        {"params": ["a", "b"]},
        TypeError,
        r"params\[0\] must be an array .* 'a'",
    ),
    "a function for params": ({"params": loss_fn}, TypeError, "params must be an array"),
    "a path for params": ({"params": "params.npz"}, TypeError, "params must be an array"),
    "complex params": ({"params": {"w": jnp.ones(3, complex)}}, ValueError, "complex64"),
    "a key in params": ({"params": PARAMS | {"k": jax.random.key(0)}}, TypeError, "PRNG key"),
    "masked params": ({"params": np.ma.ones(3)}, TypeError, "params must not be a masked array"),
    "frozen by name": ({"frozen": ["b"]}, ValueError, "frozen must be structured like params"),
    "frozen by words": ({"frozen": {"w": "no", "b": "yes"}}, TypeError, "frozen must hold True"),
    "frozen by numbers": ({"frozen": {"w": 0, "b": 1}}, TypeError, "frozen must hold True"),
    "a function for center": ({"center": loss_fn}, TypeError, "center must be an array"),
    "a complex center": (
        {"center": {"w": jnp.ones(3) * 1j, "b": 0.0}},
        TypeError,
        r"center\['w'\] must hold real numbers, got complex64",
    ),
    "words for center": ({"center": {"w": "a", "b": 0.0}}, TypeError, r"center\['w'\] must be"),
    "a center with NaN": (
        {"center": {"w": jnp.full(3, jnp.nan), "b": 0.0}},
        ValueError,
        "center must be finite",
    ),
    # ------------------------------------------------------------------ losses
    "no loss": ({"loss": None}, TypeError, "loss_fn must be a function"),
    "a number for a loss": ({"loss": 3.0}, TypeError, "loss_fn must be a function, .* got 3.0"),
    "a vector": (
        {"loss": lambda p, b: b["x"][0] * p["b"]},
        TypeError,
        r"loss_fn must .* shape \(3,\)",
    ),
    "a triple": ({"loss": lambda p, b: (p["b"], b, 0)}, TypeError, "loss_fn must return .* tuple"),
    "an int": ({"loss": lambda p, b: 3}, TypeError, "loss_fn must return .* type int"),
    "an int array": ({"loss": lambda p, b: jnp.array(3)}, TypeError, "loss_fn must .* int32"),
    "a complex loss": ({"loss": lambda p, b: p["b"] * 1j}, TypeError, "loss_fn .* complex64"),
    "nothing": ({"loss": lambda p, b: None}, TypeError, "loss_fn must return .* got None"),
    "words": ({"loss": lambda p, b: "low"}, TypeError, "loss_fn must return .* type str"),
    "a triple after the noise": (
        {"finetune": cu.Finetune(optax.sgd(0.1), 1, lambda p, b: (p["b"], 0, 0))},
        TypeError,
        "finetune loss_fn must return .* a tuple",
    ),
    # ------------------------------------------------------------------ optimizers
    "an optimizer alone": ({"finetune": optax.sgd(0.1)}, TypeError, "finetune must be"),
    "a list": ({"finetune": [optax.sgd(0.1), 3]}, TypeError, "finetune must be .* type list"),
    "steps first": ({"finetune": (3, optax.sgd(0.1))}, TypeError, "the first of finetune must be"),
    "no call": ({"finetune": (optax.sgd, 3)}, TypeError, "the first of finetune must be"),
    "no steps": ({"finetune": (optax.sgd(0.1), None)}, TypeError, "finetune steps must be"),
    "a rate": ({"finetune": (0.1, 3)}, TypeError, "the first of finetune .* got 0.1"),
    "half an optimizer": (
        {"mechanism": WITH_MEMORY, "before_clip": optax.sgd},
        TypeError,
        "before_clip must be an Optax transform",
    ),
    # ------------------------------------------------------------------ numbers and switches
    "a true batch": (
        {"batch_size": True},
        TypeError,
        "batch_size must be a whole number, got True",
    ),
    "half a batch": ({"batch_size": 2.5}, TypeError, "batch_size must be a whole number, got 2.5"),
    "a word for a switch": ({"per_example": "yes"}, TypeError, "per_example must be True or False"),
    "a number for a switch": ({"per_example": 1}, TypeError, "per_example must be True or False"),
    "a word for the bar": ({"progress": "no"}, TypeError, "progress must be True or False"),
    "a word for a stop": ({"stop_after": "3"}, TypeError, "stop_after must be a whole number"),
    "a true stop": ({"stop_after": True}, TypeError, "stop_after must be a whole number"),
    "half a microbatch": (
        {"per_example": True, "microbatch_size": 2.5},
        TypeError,
        "microbatch_size must be a whole number",
    ),
    "an uneven microbatch": (
        {"per_example": True, "microbatch_size": 3},
        ValueError,
        "microbatch_size must divide",
    ),
    "no interval": ({"evaluate_every": 0}, ValueError, "evaluate_every must be at least 1"),
    "half an interval": ({"evaluate_every": 0.5}, TypeError, "evaluate_every must be"),
    "half an example": ({"forget_size": 1.5}, TypeError, "forget_size must be a whole number"),
    "words for delta": ({"delta": "1e-5"}, TypeError, "delta must be one real number"),
    "no delta": ({"delta": None}, TypeError, "delta must be one real number"),
    "words for noise": ({"noise_scale": "large"}, TypeError, "noise_scale must be"),
    "words for epsilon": (
        {"noise_scale": None, "epsilon": "1"},
        TypeError,
        "epsilon must be one real number",
    ),
    "options of another kind": (
        {"options": {"frozen": None}},
        TypeError,
        "options must be .* dict",
    ),
    "an accountant of another kind": ({"accountant": 3}, ValueError, "accountant must be one of"),
    # ------------------------------------------------------------------ functions and states
    "no evaluation": ({"evaluate": 3}, TypeError, "evaluate must be a function"),
    "a dict of evaluations": (
        {"evaluate": {"a": loss_fn}},
        TypeError,
        "evaluate must be a function",
    ),
    "a state for a function": ({"recompute_state": {}}, TypeError, "recompute_state must be"),
    "a number to resume": ({"resume": 3}, TypeError, "resume must be the state .* got 3"),
    "a path to resume": ({"resume": "a.private.npz"}, TypeError, "resume must .*load_state"),
    "a result to resume": ({"resume": (1, 2)}, TypeError, "resume must be the state"),
    "a mechanism's class": ({"mechanism": cu.GradientClipping}, TypeError, "mechanism must be"),
    "a name for a mechanism": ({"mechanism": "sgd"}, TypeError, "mechanism must be"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_arguments_are_named_before_any_step(name, monkeypatch):
    changes, kind, words = ODD[name]

    def started(*args, **kwargs):
        raise AssertionError("a step was taken")

    monkeypatch.setattr("certunlearn.unlearning.running.run_noisy_steps", started)
    with pytest.raises(kind, match=words) as caught:
        run(**changes)
    assert type(caught.value) is kind
    # The sentence is this package's own, and it quotes no array.
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_odd_fine_tuning_is_refused_when_it_is_made():
    for arguments, words in (
        ((optax.sgd(0.1), 3, 3), "finetune loss_fn must be a function, .* got 3"),
        ((optax.sgd, 3), "finetune optimizer must be an Optax transform .* type function"),
        ((0.1, 3), "finetune optimizer must be an Optax transform .* got 0.1"),
        ((optax.sgd(0.1), None), "finetune steps must be a whole number"),
        ((optax.sgd(0.1), 1.5), "finetune steps must be a whole number"),
    ):
        with pytest.raises(TypeError, match=words):
            cu.Finetune(*arguments)
    with pytest.raises(ValueError, match="finetune steps must be at least 1"):
        cu.Finetune(optax.sgd(0.1), 0)


def test_a_loss_of_ones_own_that_fails_keeps_its_error_and_says_where():
    with pytest.raises(KeyError, match="label") as caught:
        run(loss=lambda params, batch: jnp.mean(batch["label"]))
    assert "loss_fn raised this on a batch of 8; no step was run" in caught.value.__notes__


@pytest.mark.parametrize(
    "x",
    [
        np.asfortranarray(X),
        X.astype(np.float64),
        X.astype(">f4"),
        pd.DataFrame(X).to_numpy(),
        jnp.asarray(X),
        np.round(X).astype(np.int64),
        X > 0,
        X.astype(np.float16),
    ],
    ids=["fortran", "float64", "big-endian", "to_numpy", "jax", "small int64", "bool", "float16"],
)
def test_arrays_of_all_kinds_of_numbers_are_taken(x):
    taken = inputs.arrays("retain_data", {"x": x})["x"]
    assert isinstance(taken, jax.Array)
    np.testing.assert_allclose(np.asarray(taken, np.float64), np.asarray(x, np.float64), rtol=1e-7)


def test_a_series_and_infinite_numbers_are_taken():
    taken = inputs.arrays("d", {"s": pd.Series([1.0, 2.0]), "i": np.array([np.inf, 1.0])})
    assert taken["s"].tolist() == [1.0, 2.0]
    assert taken["i"].tolist() == [np.inf, 1.0]
    assert inputs.arrays("d", np.zeros(0, np.int64)).dtype == jnp.int32
    largest = np.array([-(2**31), 2**31 - 1])
    assert inputs.arrays("d", largest).tolist() == largest.tolist()


def test_a_learning_rate_that_warms_up_from_zero_runs():
    warm = optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 6)
    mechanism = cu.GradientClipping(init_radius=1.0, clip_norm=0.5, learning_rate=warm, steps=6)
    result = run(mechanism, noise_scale=[1.0] * 6)
    assert cu.verify(result.certificate, result.params)


def test_strict_promotion_of_types_runs():
    with jax.numpy_dtype_promotion("strict"):
        result = run(finetune=(optax.sgd(0.1), 1), center=PARAMS)
    assert cu.verify(result.certificate, result.params)


def test_a_frozen_leaf_may_be_narrow():
    params = PARAMS | {"base": jnp.full((3, 3), 0.5, jnp.bfloat16)}

    def loss(params, batch):
        return loss_fn(params, batch | {"x": batch["x"] @ params["base"].astype(jnp.float32)})

    frozen = {"w": False, "b": False, "base": True}
    result = run(params=params, loss=loss, frozen=frozen, finetune=(optax.sgd(0.1), 1))
    assert result.params["base"].dtype == jnp.bfloat16
    assert cu.verify(result.certificate, result.params)
