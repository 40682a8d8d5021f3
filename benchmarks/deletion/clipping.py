"""Gradient clipping from the public centre, the same run from the centre itself, and what follows.

After the noisy steps both are fine-tuned on retain data, up to the target accuracy, in the way that
is cheapest from the public head.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

import certunlearn as cu
from benchmarks.deletion import costs, deletions, retraining
from benchmarks.deletion.deletions import Request
from benchmarks.deletion.features import Split
from benchmarks.deletion.retraining import Family, Public, Reached, Setting, Tuned

RADII = (1.0, 0.1, 0.01)  # of the ball around the centre
LEARNING_RATE, STEPS, BATCH_SIZE = 1.0, 4, 1000
STARTS = ("gradient clipping", "the same run from the centre")


class Chosen(NamedTuple):
    """What tuning chose: the ball's radius, and how to fine-tune."""

    init_radius: float
    family: Family
    setting: Setting


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
    head: np.ndarray, asked: Request, split: Split, public: Public, family: Family,
    setting: Setting, target: float, test_target: float,
) -> Reached:  # fmt: skip
    """Trains on retain data up to the target; the noisy steps are counted."""
    problem = retraining.problem_of(asked.retain, split.classes, head, public.inverse)
    d, outputs = head.shape
    each = costs.gradient(min(BATCH_SIZE, len(asked.retain.y)), d, outputs)
    each += costs.elementwise(d, outputs, 8)
    spent = costs.Cost(STEPS * each.examples, STEPS * each.flops)
    start = problem._replace(spent=spent)
    if test_target > 1:  # while tuning
        run = retraining.points(family, setting, start)
        return retraining.Watched(run).until(split, target)
    return retraining.reach(
        lambda: retraining.points(family, setting, start), split, target, test_target
    )


def tuned(
    split: Split, public: Public, trained: np.ndarray, best: Tuned, target: float, seed: int,
    every: int = 1,
) -> Chosen:  # fmt: skip
    """The radius, and the setting of fine-tuning, that reach the target soonest on all rows."""
    center = public.heads["softmax"]
    everything = Request("none", 0, split.train.take(np.s_[:0]), split.train)
    family = min(
        (each for each in best if (each.loss, each.start) == ("softmax", "public head")),
        key=lambda each: best[each][1].cost.flops,
        default=Family("softmax", "averaged SGD", "public head"),
    )
    settings = retraining.grid(family.loss, family.solver)[::every]
    found, least = Chosen(RADII[0], family, settings[0]), math.inf
    for radius in RADII[::every]:
        head, _ = noisy(trained, center, radius, everything, seed)
        for setting in settings:
            reached = finetuned(head, everything, split, public, family, setting, target, math.inf)
            if reached.cost.flops < least:
                found, least = Chosen(radius, family, setting), reached.cost.flops
    return found


def rows(
    split: Split,
    public: Public,
    asked: Request,
    trained: np.ndarray,
    chosen: Chosen,
    wanted: dict[str, float],
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Both runs, up to the accuracy of the exact head on held-out rows."""
    center = public.heads["softmax"]
    found = {}
    for i, (name, start) in enumerate(zip(STARTS, (trained, center), strict=True)):
        # Noise of its own: with the same noise the two would differ by what it is there to hide.
        head, certificate = noisy(start, center, chosen.init_radius, asked, 2 * seed + i)
        reached = finetuned(
            head,
            asked,
            split,
            public,
            chosen.family,
            chosen.setting,
            wanted["validation"],
            wanted["test"],
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
