"""The demo's linear heads on public features: one that is exact, and a certified minimiser."""

import functools
import time
from typing import Any

import jax
import numpy as np

from certunlearn import convex, exact
from certunlearn.demo import data as data_lib
from certunlearn.demo import network
from certunlearn.mechanisms import PerturbedMinimizer
from certunlearn.solvers import minimize
from certunlearn.unlearning import unlearn

_WIDTH = 128  # features
_RIDGE_L2 = 1e-4
_SOFTMAX_L2 = 1e-4
_GRADIENT_NORM = 1e-6


def random_features(seed: int, sets: dict[str, data_lib.Examples]) -> dict[str, data_lib.Examples]:
    """Rectified random projections of each image, of norm 1: they depend on no other data."""
    pixels = sets["retain"]["x"].shape[1]
    weights = np.random.default_rng(seed).normal(size=(pixels, _WIDTH))

    def of(examples: data_lib.Examples) -> data_lib.Examples:
        hidden = np.maximum(examples["x"] @ weights, 0)
        length = np.maximum(np.linalg.norm(hidden, axis=1, keepdims=True), 1e-12)
        # Slightly below norm 1, so that rounding to float32 does not lift a row above it.
        return {"x": (hidden / length * (1 - 1e-6)).astype(np.float32), "y": examples["y"]}

    return {name: of(examples) for name, examples in sets.items()}


def rows(
    made: dict[str, data_lib.Examples], epsilon: float, delta: float, key: Any
) -> list[dict[str, Any]]:
    """What the two heads are after the deletion, as fields of rows.

    Args:
      made: public features of norm 1 at most and labels, of retain, forget and test set.
      epsilon: of the certified minimiser.
      delta: of the certified minimiser.
      key: of its noise.

    Returns:
      The fields. Seconds are those of the deletion alone: heads, sums and features were there.
    """
    retain, forget = made["retain"], made["forget"]
    loss = convex.logistic_regression(1.0, _SOFTMAX_L2, network.CLASSES)
    everything = tuple(np.concatenate([retain[name], forget[name]]) for name in ("x", "y"))
    kept = retain["x"], retain["y"]
    solved = functools.partial(minimize, loss, tolerance=_GRADIENT_NORM)
    start = solved(loss.init(retain["x"].shape[1]), everything).params
    stats = exact.collect(*everything, feature_norm=1.0, classes=network.CLASSES)

    begin = time.perf_counter()
    stats = exact.remove(stats, forget["x"], forget["y"])
    head = jax.block_until_ready(exact.ridge(stats, l2=_RIDGE_L2))
    exact_seconds = time.perf_counter() - begin

    mechanism = PerturbedMinimizer(
        gradient_norm=_GRADIENT_NORM, strong_convexity=loss.strong_convexity
    )
    begin = time.perf_counter()
    result = unlearn(
        loss,
        start,
        kept,
        mechanism,
        epsilon=epsilon,
        delta=delta,
        batch_size=len(retain["y"]),
        key=key,
        progress=False,
    )
    jax.block_until_ready(result.params)
    minimizer_seconds = time.perf_counter() - begin

    measured = {}
    never = solved(start, kept).params  # the minimiser without the forget set
    for name, params, reference in (("exact", head, never), ("noisy", result.params, head)):
        evaluate = network.evaluator(network.LinearHead(), made["test"], retain, forget, reference)
        measured[name] = evaluate(params)
    claim = result.certificate.epsilon, result.certificate.delta
    return [
        {"name": "linear: exact head", "steps": 0, "certified": (0, 0), "seconds": exact_seconds}
        | measured["exact"],
        {"name": "linear: certified minimiser", "steps": 1, "certified": claim}
        | {"seconds": minimizer_seconds}
        | measured["noisy"],
    ]
