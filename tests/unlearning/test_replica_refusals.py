"""Runs that cannot be taken together are refused before one is used up."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from feed_helpers import Source
from loop_helpers import BATCH, DATA, MECHANISM, PARAMS, SIZE, loss_fn
from replica_helpers import ARRAYS, clipping, prepare

import certunlearn as cu
from certunlearn import unlearning

PROJECTED = cu.ModelClipping(
    init_radius=1.0, clip_norm=0.5, learning_rate=0.1, steps=6, model_radius=1.0
)


def flat(params, batch):
    return 0.0 * jnp.sum(params["w"]) + 0.0 * jnp.sum(batch["x"])


def doubled(params, batch):
    return 2 * loss_fn(params, batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(cu.Mechanism):
    """Without a rule: its length is a constant of the steps."""

    steps: int = 6
    length: float

    uses_center = True
    tolerates_nonfinite = True
    start_radius = 1.0

    def separations(self):
        return cu.Separations(
            initial_distance=2.0, contraction=1.0, shift=2 * self.length, steps=self.steps
        )

    def update(self, center):
        return optax.chain(cu.clip_by_global_norm(1.0), optax.scale(-self.length))


def solving(i):
    loss = cu.convex.logistic_regression(feature_norm=1.0, l2=0.1)
    mechanism = cu.PerturbedMinimizer(gradient_norm=1e-6, strong_convexity=0.1)
    data = (np.eye(2), np.arange(2))
    more = {"noise_scale": None, "epsilon": 1.0, "accountant": None, "batch_size": None}
    return prepare(mechanism, key=i, loss=loss, params=jnp.zeros(2), data=data, **more)


def retraining(i):
    more = {"noise_scale": None, "delta": None, "accountant": None}
    return prepare(cu.Retraining(), key=i, center=PARAMS, finetune=(optax.sgd(0.1), 2), **more)


def with_adam(i, decay=0.9):
    mechanism = clipping(i, memoryless=False)
    return prepare(mechanism, key=i, before_clip=optax.scale_by_adam(decay))


# For each what makes run number i, and what is said of the second.
REFUSED = {
    "equal keys": (
        lambda i: prepare(key=0),
        r"\[1\] must have a noise key of its own, got that of prepared\[0\]",
    ),
    "batch sizes": (
        lambda i: prepare(key=i, batch_size=4 * (i + 1)),
        r"\[1\] must have the batch_size of prepared\[0\], 4, got 8",
    ),
    "steps": (
        lambda i: prepare(clipping(i, steps=3 + i), key=i),
        r"\[1\] must have the step to stop after of prepared\[0\], 3, got 4",
    ),
    "examples": (
        lambda i: prepare(key=i, per_example=i == 1),
        r"the per_example of prepared\[0\], False, got True",
    ),
    "losses": (
        lambda i: prepare(key=i, loss=(loss_fn, doubled)[i]),
        "loss_fn, and which parameters are frozen",
    ),
    "frozen leaves": (
        lambda i: prepare(key=i, frozen={"w": False, "b": i == 1}),
        "loss_fn, and which parameters are frozen",
    ),
    "decay in one": (
        lambda i: prepare(clipping(i, weight_decay=0.1 * i), key=i),
        r"mechanism.weight_decay has float32\[\] where prepared\[0\] has none",
    ),
    "a table in one": (
        lambda i: prepare(key=i, noise_scale=1.0 if i else [1.0] * 6),
        r"noise_scale\[0\] has float32\[1\] where prepared\[0\] has float32\[6\]",
    ),
    "shapes": (
        lambda i: prepare(key=i, loss=flat, params={"w": jnp.zeros(3 + i)}),
        r"params\['w'\] has float32\[4\]",
    ),
    "a centre in one": (
        lambda i: prepare(clipping(i), key=i, center=PARAMS if i else None),
        r"center\['b'\] has float32\[\] where prepared\[0\] has none",
    ),
    "rules": (
        lambda i: prepare((MECHANISM, PROJECTED)[i], key=i),
        "mechanism.radius has",
    ),
    "constants": (
        lambda i: prepare(Constant(length=0.1 + i), key=i),
        "a mechanism without step_rule must be the same one",
    ),
    "a constant centre in one": (
        lambda i: prepare(Constant(length=0.1), key=i, center=PARAMS if i else None),
        "a mechanism without step_rule must be the same one, with one centre",
    ),
    "transforms": (lambda i: with_adam(i, 0.9 - 0.1 * i), "before_clip must be the same"),
    "data": (
        lambda i: prepare(key=i, data={name: leaf + i for name, leaf in ARRAYS.items()}),
        r"\[1\] must have the retain_data of prepared\[0\]",
    ),
    "sources": (lambda i: prepare(key=i, data=Source()), "must have the retain_data"),
    "streams": (
        lambda i: prepare(
            key=i, data=unlearning.Stream([ARRAYS], size=SIZE, batch_size=SIZE), batch_size=SIZE
        ),
        r"\[0\] must have retain data in arrays or a source of examples by index, got a stream",
    ),
    "solvers": (solving, "must have a mechanism that takes noisy steps on batches, got Perturbed"),
    "retraining": (retraining, "a mechanism that takes noisy steps on batches, got Retraining"),
    "evaluating": (lambda i: prepare(key=i, evaluate=print), r"must have Options\(evaluate=None\)"),
    "saving": (
        lambda i: prepare(key=i, save_every=2, save_to=print),
        r"must have Options\(save_every=None\), got 2",
    ),
}


FAST = ("equal keys", "batch sizes", "steps", "losses", "decay in one", "data", "saving")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in REFUSED]
)
def test_what_cannot_be_taken_together_is_refused_and_not_used_up(name):
    make, words = REFUSED[name]
    runs = [make(i) for i in range(2)]
    with pytest.raises(ValueError, match=words):
        unlearning.run_replicas(runs)
    for run in runs:
        run.start.take()


def test_lists_of_other_things_are_refused():
    with pytest.raises(ValueError, match="prepared must hold at least one run, got none"):
        unlearning.run_replicas([])
    run = prepare()
    with pytest.raises(TypeError, match="prepared must be a list of Prepared, got an object of"):
        unlearning.run_replicas(run)
    with pytest.raises(TypeError, match=r"prepared\[1\] must be what unlearning.prepare returns"):
        unlearning.run_replicas([run, MECHANISM])
    with pytest.raises(ValueError, match=r"prepared\[1\] must be a run of its own"):
        unlearning.run_replicas([run, run])
    unlearning.run_noisy_steps(run)
    with pytest.raises(RuntimeError, match="prepared was run already"):
        unlearning.run_replicas([prepare(key=1), run])


@pytest.mark.slow
def test_equal_data_losses_and_transforms_need_not_be_the_same_objects():
    def make(i):
        return prepare(
            clipping(i, memoryless=False),
            key=i,
            loss=lambda params, batch: loss_fn(params, batch),
            data={name: leaf.copy() for name, leaf in DATA.items()},
            before_clip=optax.scale_by_adam(),
            batch_size=BATCH,
        )

    runs = [make(i) for i in range(2)]
    assert runs[0].examples.feed.given["x"] is not runs[1].examples.feed.given["x"]
    assert len(unlearning.run_replicas(runs)) == 2


@pytest.mark.slow
def test_a_mechanism_without_rule_serves_all_if_it_is_equal():
    runs = [prepare(Constant(length=0.1), key=i) for i in range(2)]
    for mine, key in zip(unlearning.run_replicas(runs), range(2), strict=True):
        alone = unlearning.run_noisy_steps(prepare(Constant(length=0.1), key=key))
        np.testing.assert_allclose(mine.trainable["w"], alone.trainable["w"], rtol=1e-5)
