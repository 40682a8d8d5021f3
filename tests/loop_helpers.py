"""What the tests of the loop share: a small linear model and one call of `unlearn`."""

import contextlib
import dataclasses
import signal

import jax
import jax.numpy as jnp
import numpy as np

import certunlearn as cu

SIZE, BATCH = 24, 8
DATA = {
    "x": np.random.default_rng(0).normal(size=(SIZE, 3)).astype(np.float32),
    "y": np.random.default_rng(1).normal(size=SIZE).astype(np.float32),
}
PARAMS = {"w": jnp.array([3.0, -4.0, 1.0]), "b": jnp.array(0.5)}
CLIPPED = {"init_radius": 1.0, "clip_norm": 0.5, "learning_rate": 0.1, "steps": 6}
MECHANISM = cu.GradientClipping(**CLIPPED)
WITH_MEMORY = cu.GradientClipping(**CLIPPED, memoryless=False)
CONVEX = {
    "initial_distance": 0.5,
    "learning_rate": 0.5,
    "strong_convexity": 0.1,
    "smoothness": 1.1,
    "steps": 6,
}


def loss_fn(params, batch):
    return jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2)


def arguments(**changes):
    """Keyword arguments of `unlearn`: those that are fields of `Options` go into one."""
    names = [field.name for field in dataclasses.fields(cu.Options)]
    rarer = {name: changes.pop(name) for name in names if name in changes}
    return changes | ({"options": cu.Options(**rarer)} if rarer else {})


def request(key, **changes):
    """Keyword arguments of `unlearn`, with an accountant that takes no time."""
    options = {
        "noise_scale": 1.0,
        "delta": 1e-5,
        "batch_size": BATCH,
        "accountant": "interpolation",
        "progress": False,
        "key": None if key is None or "resume" in changes else jax.random.key(key),
    }
    return arguments(**(options | changes))


def run(mechanism=MECHANISM, params=PARAMS, data=DATA, loss=loss_fn, key=7, **changes):
    """`unlearn` of a small model."""
    return cu.unlearn(loss, params, data, mechanism, **request(key, **changes))


def same(a, b):
    """Whether two trees hold the same numbers, bit for bit."""
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


class Notes:
    """What a loss notes down. Unlike lists, no two are equal, so no two runs share their steps."""

    def __init__(self):
        self.seen = []

    def append(self, value):
        self.seen.append(value)


@contextlib.contextmanager
def handler(number, value):
    """A signal's handler for a while, whatever it was: tests may run where it is ignored."""
    before = signal.signal(number, value)
    try:
        yield
    finally:
        signal.signal(number, before)
