"""Ways to train a head, each a generator of (head, cost so far) at the points of evaluation.

Written in NumPy: on a CPU, steps as small as a head's take it less time than XLA. Rows come in
random order, so that batches are slices.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg

from benchmarks.deletion import costs
from benchmarks.deletion.costs import Cost
from benchmarks.deletion.features import Rows

GROWTH = 1.2  # of the number of steps, from one evaluation to the next
MOST_PASSES = 3  # of stochastic solvers
MOST_ITERATIONS = 60  # of the others
SOFTMAX_SCALE = 3.0  # of a least-squares head that softmax starts from

Points = Iterator[tuple[np.ndarray, Cost]]


class Problem(NamedTuple):
    """What a solver may use.

    Attributes:
      rows: what to train on, in random order.
      wanted: float32 `[n, outputs]`, 1 for the label's class and 0 for others.
      start: the head to start from; None for zeros.
      spent: what the start cost.
      inverse: float32 `[d, d]`, of the public curvature: it is there before any deletion.
    """

    rows: Rows
    wanted: np.ndarray
    start: np.ndarray | None
    spent: Cost
    inverse: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, features, outputs."""
        return (*self.rows.x.shape, self.wanted.shape[1])

    def begin(self) -> np.ndarray:
        """A copy of the start."""
        zeros = np.zeros(self.shape[1:], np.float32)
        return zeros if self.start is None else self.start.copy()


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    """Float32 `[n, classes]`."""
    return np.eye(classes, dtype=np.float32)[labels]


def misfit(loss: str, z: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Derivative of each example's loss by its outputs; overwrites the outputs."""
    if loss == "squares":
        z -= 2 * wanted
        z += 1
        return z
    z -= z.max(axis=1, keepdims=True)
    np.exp(z, out=z)
    z /= z.sum(axis=1, keepdims=True)
    z -= wanted
    return z


def mean_loss(loss: str, z: np.ndarray, wanted: np.ndarray) -> float:
    """The mean loss of these outputs."""
    if loss == "squares":
        return float(np.mean(np.sum((z - 2 * wanted + 1) ** 2, axis=1))) / 2
    top = z.max(axis=1)
    logarithm = top + np.log(np.sum(np.exp(z - top[:, None]), axis=1))
    return float(np.mean(logarithm - np.sum(z * wanted, axis=1)))


def evaluated(steps: int) -> set[int]:
    """Numbers of steps after which to evaluate, ever farther apart."""
    found, count = set(), 1
    while count <= steps:
        found.add(count)
        count = max(count + 1, int(count * GROWTH))
    return found


def steps(problem: Problem, loss: str, setting: dict[str, Any]) -> Points:
    """Stochastic gradient steps: plain, with momentum, averaged, Adam, or in public curvature."""
    n, d, outputs = problem.shape
    x, wanted, size = problem.rows.x, problem.wanted, setting["batch"]
    rate, momentum, average = setting["rate"], setting.get("momentum", 0), setting.get("average")
    adam, curved = setting.get("adam"), setting.get("curved")
    head, cost = problem.begin(), problem.spent
    first, second, total = (np.zeros_like(head) for _ in range(3))
    operations = 2 + 2 * bool(momentum) + 2 * bool(average) + 12 * bool(adam)
    each = costs.gradient(size, d, outputs) + costs.elementwise(d, outputs, operations)
    if curved:
        each += costs.product(d, outputs)
    whole = n // size
    points = evaluated(MOST_PASSES * whole)
    for count in range(1, MOST_PASSES * whole + 1):
        at = slice((count - 1) % whole * size, (count - 1) % whole * size + size)
        batch = x[at]
        gradient = batch.T @ misfit(loss, batch @ head, wanted[at]) / np.float32(size)
        if curved:
            gradient = problem.inverse @ gradient
        if momentum:
            first *= momentum
            first += gradient
            gradient = first
        if adam:
            first += 0.1 * (gradient - first)
            second += 0.01 * (gradient**2 - second)
            gradient = (first / (1 - 0.9**count)) / (np.sqrt(second / (1 - 0.99**count)) + 1e-8)
        head -= np.float32(rate / (1 + setting.get("decay", 0) * count)) * gradient
        total += head if average else 0
        cost += each
        if count in points:
            yield (total / np.float32(count) if average else head), cost


def lbfgs(problem: Problem, loss: str, setting: dict[str, Any]) -> Points:
    """L-BFGS on a part of the rows; steps are halved until they gain enough (Armijo)."""
    n, d, outputs = problem.shape
    size, l2, memory = int(n * setting["share"]), np.float32(setting["l2"]), setting["memory"]
    x, wanted = problem.rows.x[:size], problem.wanted[:size]

    def value_and_gradient(head: np.ndarray) -> tuple[float, np.ndarray]:
        z = x @ head
        value = mean_loss(loss, z, wanted) + float(l2) / 2 * float(np.sum(head**2))
        return value, x.T @ misfit(loss, z, wanted) / np.float32(size) + l2 * head

    one = costs.gradient(size, d, outputs)
    own = costs.elementwise(d, outputs, 8 * memory + 12)
    head, cost = problem.begin(), problem.spent + one
    value, gradient = value_and_gradient(head)
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    for _ in range(MOST_ITERATIONS):
        ahead = -_two_loops(gradient, pairs)
        slope, length = float(np.sum(ahead * gradient)), 1.0
        if not pairs:  # of the first step the scale is unknown: that of the loss's curvature
            length = 4.0 if loss == "softmax" else 1.0
        while True:
            moved = head + np.float32(length) * ahead
            found, there = value_and_gradient(moved)
            cost += one
            if found <= value + 1e-4 * length * slope or length < 1e-6:
                break
            length /= 2
        step, change = moved - head, there - gradient
        if not np.sum(step * change) > 1e-12 * np.sum(step**2):
            return  # float32 comes no nearer
        pairs = [*pairs, (step, change)][-memory:]
        head, value, gradient = moved, found, there
        cost += own
        yield head, cost


def _two_loops(gradient: np.ndarray, pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The inverse curvature that the latest steps show, times the gradient."""
    found, weights = gradient.copy(), []
    for step, change in reversed(pairs):
        weights.append(np.sum(step * found) / np.sum(step * change))
        found -= weights[-1] * change
    if pairs:
        step, change = pairs[-1]
        found *= np.sum(step * change) / np.sum(change**2)
    for (step, change), weight in zip(pairs, reversed(weights), strict=True):
        found += (weight - np.sum(change * found) / np.sum(step * change)) * step
    return found


def newton(problem: Problem, loss: str, setting: dict[str, Any]) -> Points:
    """Newton steps by conjugate gradients on a part of the rows; for squares, plain CG."""
    n, d, outputs = problem.shape
    size = int(n * setting["share"])
    x, wanted, l2 = problem.rows.x[:size], problem.wanted[:size], np.float32(setting["l2"])
    public = setting["public"]
    one = costs.gradient(size, d, outputs)
    each = one + costs.elementwise(d, outputs, 12)
    if public:
        each += costs.product(d, outputs)

    def precondition(right: np.ndarray) -> np.ndarray:
        return problem.inverse @ right if public else right

    head, cost = problem.begin(), problem.spent
    for _ in range(MOST_ITERATIONS // setting["inner"]):
        z = x @ head
        p = misfit(loss, z, wanted)
        residual = -(x.T @ p / size + l2 * head)
        probability = p + wanted
        cost += one

        def curved(v: np.ndarray, probability: np.ndarray = probability) -> np.ndarray:
            u = x @ v
            if loss == "softmax":
                u = probability * (u - np.sum(probability * u, axis=1, keepdims=True))
            return x.T @ u / size + l2 * v

        ahead = precondition(residual)
        square = first = np.sum(residual * ahead)
        for _ in range(setting["inner"]):
            if not square > 1e-12 * first:  # float32 comes no nearer
                break
            curvature = curved(ahead)
            length = square / np.sum(ahead * curvature)
            head = head + length * ahead
            residual = residual - length * curvature
            conditioned = precondition(residual)
            square, old = np.sum(residual * conditioned), square
            ahead = conditioned + square / old * ahead
            cost += each
            yield head, cost


def direct(problem: Problem, loss: str, setting: dict[str, Any]) -> Points:
    """Normal equations of a part of the rows, solved by Cholesky; least squares only."""
    n, d, outputs = problem.shape
    size = int(n * setting["share"])
    x, wanted = problem.rows.x[:size], problem.wanted[:size]
    gram = scipy.linalg.blas.ssyrk(1.0 / size, x.T, lower=True).astype(np.float64)
    gram[np.diag_indices(d)] += setting["l2"]
    right = x.T @ (2 * wanted - 1) / size
    try:
        factor = scipy.linalg.cho_factor(gram, lower=True)
    except np.linalg.LinAlgError:  # features that are 0 in all rows, without an L2 term
        return
    head = scipy.linalg.cho_solve(factor, right)
    yield head.astype(np.float32), costs.direct(size, d, outputs)


def class_sums(problem: Problem) -> tuple[np.ndarray, Cost]:
    """One step from zeros in public curvature: sums over classes, then one product."""
    n, d, outputs = problem.shape
    sums = problem.rows.x.T @ problem.wanted
    right = 2 * sums - sums.sum(axis=1, keepdims=True)
    head = problem.inverse @ (right / np.float32(n))
    return head, costs.class_sums(n, d) + costs.product(d, outputs)
