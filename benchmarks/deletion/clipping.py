"""Gradient clipping from the public centre, the same run from the centre itself, and what follows.

After the noisy steps both are fine-tuned on retain data by averaged SGD, up to the target accuracy.
"""

import math
from typing import Any

import jax
import numpy as np

import certunlearn as cu
from benchmarks.deletion import costs, deletions, retraining
from benchmarks.deletion.deletions import Request
from benchmarks.deletion.features import Split
from benchmarks.deletion.retraining import Public, Reached, Setting

RADII = (1.0, 0.1, 0.01)  # of the ball around the centre
LEARNING_RATE, STEPS, BATCH_SIZE = 1.0, 4, 1000
STARTS = ("gradient clipping", "the same run from the centre")


def noisy(
    start: np.ndarray, center: np.ndarray, radius: float, asked: Request, seed: int
) -> tuple[np.ndarray, cu.Certificate]:
    """The head after the noisy steps, and the certificate."""
    mechanism = cu.GradientClipping(
        init_radius=radius, clip_norm=radius, learning_rate=LEARNING_RATE, steps=STEPS
    )
    loss = cu.convex.logistic_regression(
        feature_norm=1.0, l2=deletions.L2_OF_SOFTMAX, classes=center.shape[1]
    )
    result = cu.unlearn(
        loss.loss_fn,
        start.astype(np.float32),
        (asked.retain.x, asked.retain.y),
        mechanism,
        epsilon=deletions.EPSILON,
        delta=deletions.DELTA,
        center=center,
        batch_size=min(BATCH_SIZE, len(asked.retain.y)),
        key=jax.random.key(seed),
        options=cu.Options(forget_size=asked.size),
        progress=False,
    )
    return np.asarray(result.params), result.certificate


def finetuned(
    head: np.ndarray, asked: Request, split: Split, public: Public, setting: Setting, target: float,
    test_target: float,
) -> Reached:  # fmt: skip
    """Averaged SGD on retain data up to the target; the noisy steps are counted."""
    problem = retraining.problem_of(asked.retain, split.classes, head, public.inverse)
    d, outputs = head.shape
    each = costs.gradient(min(BATCH_SIZE, len(asked.retain.y)), d, outputs)
    each += costs.elementwise(d, outputs, 8)
    spent = costs.Cost(STEPS * each.examples, STEPS * each.flops)
    family = retraining.Family("softmax", "averaged SGD", "public head")
    start = problem._replace(spent=spent)
    if test_target > 1:  # while tuning
        run = retraining.points(family, setting, start)
        return retraining.Watched(run).until(split, target)
    return retraining.reach(
        lambda: retraining.points(family, setting, start), split, target, test_target
    )


def tuned(
    split: Split, public: Public, trained: np.ndarray, target: float, seed: int, every: int = 1
) -> tuple[float, Setting]:
    """The radius, and the setting of fine-tuning, that reach the target soonest."""
    center = public.heads["softmax"]
    everything = Request("none", 0, split.train.take(np.s_[:0]), split.train)
    best = (math.inf, RADII[0], retraining.grid("softmax", "averaged SGD")[0])
    for radius in RADII[::every]:
        head, _ = noisy(trained, center, radius, everything, seed)
        for setting in retraining.grid("softmax", "averaged SGD")[::every]:
            found = finetuned(head, everything, split, public, setting, target, math.inf)
            best = min(best, (found.cost.flops, radius, setting), key=lambda each: each[0])
    return best[1:]


def rows(
    split: Split,
    public: Public,
    asked: Request,
    trained: np.ndarray,
    chosen: tuple[float, Setting],
    wanted: dict[str, float],
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Both runs, up to the accuracy of the exact head on held-out rows."""
    center = public.heads["softmax"]
    found = {}
    for i, (name, start) in enumerate(zip(STARTS, (trained, center), strict=True)):
        # Noise of its own: with the same noise the two would differ by what it is there to hide.
        head, certificate = noisy(start, center, chosen[0], asked, 2 * seed + i)
        reached = finetuned(
            head, asked, split, public, chosen[1], wanted["validation"], wanted["test"]
        )
        found[name] = {
            "examples": reached.cost.examples,
            "flops": reached.cost.flops,
            "flops_by_test": reached.test_cost.flops,
            "validation": reached.validation,
            "test": reached.test,
            "epsilon": certificate.epsilon if i == 0 else 0.0,
            "delta": certificate.delta if i == 0 else 0.0,
        }
    return found
