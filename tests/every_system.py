"""Every mechanism with a run of its own, small enough to be run often."""

import jax
import jax.numpy as jnp
import numpy as np
from loop_helpers import arguments

import certunlearn as cu

SIZE, DELETIONS = 60, 3
CONVEX = {
    "initial_distance": 0.5,
    "learning_rate": 0.5,
    "strong_convexity": 0.1,
    "smoothness": 1.1,
    "steps": 6,
}
BALLS = {"init_radius": 1.0, "model_radius": 0.5, "learning_rate": 0.1, "steps": 3}
SYSTEMS = {
    "model": cu.ModelClipping(**BALLS),
    "model with init noise": cu.ModelClipping(**BALLS, init_noise_scale=2.0),
    "model after noise": cu.ModelClipping(**BALLS, clip_norm=0.3, weight_decay=0.2),
    "output": cu.OutputPerturbation(init_radius=1.0, reference="center"),
    "projected": cu.ProjectedNoisySGD(**CONVEX, radius=2.0),
    "noisy": cu.ProjectedNoisySGD(**CONVEX),
    "descent": cu.DescentToDelete(**CONVEX),
    "rewind": cu.RewindToDelete(
        learning_rate=0.1,
        smoothness=1.0,
        gradient_bound=2.0,
        training_learning_rate=0.1,
        trained_steps=4,
        steps=5,
        size=SIZE + DELETIONS,
        deletions=DELETIONS,
    ),
    "dp": cu.DPSGD(
        clip_norm=0.5, learning_rate=0.3, steps=5, sampling_rate=0.2, batch_size=12, deletions=2
    ),
}
# Those that `run` cannot run with any loss: they need a `ConvexLoss`, or a public start.
OTHERS = {
    "minimizer": cu.PerturbedMinimizer(gradient_norm=1e-3, strong_convexity=0.1),
    "minimizers": cu.PerturbedMinimizer(
        gradient_norm=1e-3, strong_convexity=0.1, reference="retrained"
    ),
    "retraining": cu.Retraining(),
}
DATA = {
    "x": jnp.asarray(np.random.default_rng(0).normal(size=(SIZE, 3)), jnp.float32),
    "y": jnp.asarray(np.random.default_rng(1).normal(size=SIZE), jnp.float32),
}
PARAMS = {"w": jnp.array([3.0, -4.0, 1.0]), "b": jnp.array(0.5)}


def loss_fn(params, batch):
    error = batch["x"] @ params["w"] + params["b"] - batch["y"]
    return jnp.mean(jnp.sqrt(1 + error**2))


def no_loss(params, batch):
    return 0.0 * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params)) + 0 * jnp.sum(batch["y"])


def batch_size(mechanism):
    if isinstance(mechanism, cu.RewindToDelete):
        return SIZE
    return getattr(mechanism, "batch_size", 12)


def accountant(mechanism):
    names = cu.accounting.supported_names(mechanism)
    return "product" if isinstance(mechanism, cu.ModelClipping) else names[0]


def run(mechanism, params=PARAMS, data=DATA, loss=loss_fn, key=3, **changes):
    # The fast accountants; what is under test here is the same for all.
    options = {
        "epsilon": None if "noise_scale" in changes else 1.0,
        "delta": 1e-5,
        "batch_size": batch_size(mechanism),
        "accountant": accountant(mechanism),
        "progress": False,
    }
    key = jax.random.key(key)
    return cu.unlearn(loss, params, data, mechanism, key=key, **arguments(**(options | changes)))
