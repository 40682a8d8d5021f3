"""What a method costs: example gradients, floating-point operations, seconds.

A multiplication and an addition count as two operations, whole numbers like floating-point ones.
Evaluations on validation data are not counted, of no method.
"""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np


class Cost(NamedTuple):
    """What was computed.

    Attributes:
      examples: gradients of one example's loss, or products of one example with a vector and back.
      flops: all operations, those of updates and solves included.
    """

    examples: float
    flops: float

    def __add__(self, other: "Cost") -> "Cost":  # type: ignore[override]
        """Both costs together."""
        return Cost(self.examples + other.examples, self.flops + other.flops)


NOTHING = Cost(0, 0)


def gradient(rows: int, features: int, outputs: int) -> Cost:
    """The mean gradient of these rows: outputs, their misfit, and a product with the features."""
    return Cost(rows, rows * outputs * (4 * features + 6))


def class_sums(rows: int, features: int) -> Cost:
    """The features' sum over each class, which is the gradient at zeros: additions alone."""
    return Cost(rows, rows * features)


def product(features: int, outputs: int) -> Cost:
    """A square matrix times a head."""
    return Cost(0, 2 * features**2 * outputs)


def elementwise(features: int, outputs: int, operations: int) -> Cost:
    """So many operations for each number of a head."""
    return Cost(0, operations * features * outputs)


def direct(rows: int, features: int, outputs: int) -> Cost:
    """The Gram matrix's lower half, its Cholesky factor, and two triangular solves."""
    gram = rows * features * (features + 1 + 2 * outputs)
    return Cost(rows, gram + features**3 / 3 + 2 * features**2 * outputs)


def timed(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Median wall and processor seconds of each run, in turn, in one process, after one warm run.

    All runs are repeated `rounds` times, one after the other, so that whatever else the machine
    does meets all of them alike. Processor seconds are those of all threads.
    """
    for run in runs.values():
        jax.block_until_ready(run())
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            wall, processor = time.perf_counter(), time.process_time()
            jax.block_until_ready(run())
            found[name].append((time.perf_counter() - wall, time.process_time() - processor))
    medians = {name: np.median(times, axis=0) for name, times in found.items()}
    return {n: {"wall": float(w), "processor": float(p)} for n, (w, p) in medians.items()}
