"""Requests to delete, and what the library's systems do about them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

import certunlearn as cu
from benchmarks.deletion import costs, counting
from benchmarks.deletion.costs import Cost
from benchmarks.deletion.features import Rows, Split

EPSILON, DELTA = 1.0, 1e-5
L2_OF_SOFTMAX = 1e-5
NOISE = 0.05  # standard deviation of each weight's noise for the perturbed minimiser


class Request(NamedTuple):
    """Rows to forget, and those that stay, in random order."""

    kind: str
    size: int
    forget: Rows
    retain: Rows


class Deleted(NamedTuple):
    """What one system did about a request.

    Attributes:
      head: the released head.
      cost: what it took, preparation that any request shares left out.
      epsilon: of the certificate.
      delta: likewise.
      run: does it once more, for timing; None if it is not timed.
    """

    head: np.ndarray
    cost: Cost
    epsilon: float
    delta: float
    run: Callable[[], object] | None = None


def request(split: Split, kind: str, size: int, seed: int) -> Request:
    """Rows to forget: any at random, or rows of one class, which the seed chooses."""
    rng = np.random.default_rng([seed, 1, size])
    rows = split.train
    from_class = rng.integers(split.classes)
    candidates = np.arange(len(rows.y)) if kind == "random" else np.where(rows.y == from_class)[0]
    chosen = rng.permutation(candidates)[:size]
    stays = np.ones(len(rows.y), bool)
    stays[chosen] = False
    return Request(kind, size, rows.take(chosen), rows.take(np.where(stays)[0]))


# Exact heads.


class ExactStart(NamedTuple):
    """What the exact system has before a request: sums, and what `keep` makes of them."""

    stats: cu.exact.Statistics
    kept: cu.exact.Kept
    l2: float


def collect(rows: Rows, classes: int) -> cu.exact.Statistics:
    """The sums over rows."""
    return cu.exact.collect(rows.x, rows.y, feature_norm=1.0, classes=classes)


def exact_start(split: Split, l2: float) -> ExactStart:
    """Trains the exact head, once."""
    stats = collect(split.train, split.classes)
    return ExactStart(stats, cu.exact.keep(stats, l2), l2)


def exact(start: ExactStart, asked: Request, classes: int) -> dict[str, Deleted]:
    """The exact head after a request, by three routes.

    Raises:
      AssertionError: if the routes' bits differ.
    """
    d, k = asked.forget.x.shape[1], asked.size
    forget = asked.forget

    def fast() -> np.ndarray:
        return cu.exact.ridge(cu.exact.remove(start.kept, forget.x, forget.y))

    def fresh() -> np.ndarray:
        return cu.exact.ridge(cu.exact.remove(start.stats, forget.x, forget.y), start.l2)

    def anew() -> np.ndarray:
        return cu.exact.ridge(collect(asked.retain, classes), start.l2)

    runs = {"exact, fast": fast, "exact, fresh": fresh, "exact, anew": anew}
    stats = cu.exact.remove(start.stats, forget.x, forget.y)
    found = {}
    for name, run in runs.items():
        head = run()
        certificate = cu.exact.certify(stats, head)
        rows = len(asked.retain.y) if run is anew else k
        cost = Cost(rows, counting.operations(run, rows, d, classes))
        found[name] = Deleted(head, cost, certificate.epsilon, certificate.delta, run)
    bits = {np.asarray(each.head).tobytes() for each in found.values()}
    assert len(bits) == 1, f"{asked.kind}, {asked.size}: the routes' bits differ"
    return found


def chain(start: ExactStart, split: Split, requests: int, size: int, seed: int) -> int:
    """A chain of requests, each served from what the last left: how many had the bits of a fresh
    training on what remains.
    """
    order = np.random.default_rng([seed, 2]).permutation(len(split.train.y))
    kept, equal = start.kept, 0
    for i in range(requests):
        forget = split.train.take(order[i * size : (i + 1) * size])
        kept = cu.exact.remove(kept, forget.x, forget.y)
        anew = cu.exact.ridge(
            collect(split.train.take(order[(i + 1) * size :]), split.classes), start.l2
        )
        equal += cu.exact.ridge(kept).tobytes() == anew.tobytes()
    return equal


# The perturbed minimiser.


class Minimiser(NamedTuple):
    """The softmax head's objective, its minimiser on all rows, and the factor kept from there."""

    loss: cu.convex.ConvexLoss
    head: np.ndarray
    curvature: Any
    passes: int


def minimiser(split: Split, tolerance: float) -> Minimiser:
    """Trains the softmax head to a tolerance, and factors the Hessian there."""
    loss = cu.convex.logistic_regression(feature_norm=1.0, l2=L2_OF_SOFTMAX, classes=split.classes)
    data = (split.train.x, split.train.y)
    start = np.zeros((split.train.x.shape[1], split.classes))
    with jax.enable_x64(True):
        found = cu.solvers.minimize(loss, start, data, tolerance=tolerance)
        curvature = cu.solvers.factorize(loss, found.params, data)
    return Minimiser(loss, np.asarray(found.params), curvature, found.passes)


def tolerance() -> float:
    """The gradient norm at which the noise is `NOISE`."""
    unit = cu.PerturbedMinimizer(gradient_norm=1.0, strong_convexity=1.0)
    scale = cu.noise_scale(unit, epsilon=EPSILON, delta=DELTA, accountant="interpolation")
    return NOISE / scale * L2_OF_SOFTMAX


def perturbed(trained: Minimiser, asked: Request) -> Deleted:
    """`PerturbedMinimizer` from the old minimiser, with the factor kept from before."""
    mechanism = cu.PerturbedMinimizer(gradient_norm=tolerance(), strong_convexity=L2_OF_SOFTMAX)
    passes = []

    def solve(loss: Any, params: Any, data: Any, tolerance: float) -> Any:
        found = cu.solvers.minimize(
            loss, params, data, tolerance=tolerance, curvature=trained.curvature
        )
        passes.append(found.passes)
        return found.params

    def run() -> Any:
        return cu.unlearn(
            trained.loss,
            np.asarray(trained.head, np.float32),
            (asked.retain.x, asked.retain.y),
            mechanism,
            epsilon=EPSILON,
            delta=DELTA,
            options=cu.Options(solver=solve, forget_size=asked.size),
            progress=False,
        )

    result = run()
    n, d = asked.retain.x.shape
    outputs = trained.head.shape[1]
    one = costs.gradient(n, d, outputs)
    # One more pass verifies the gradient norm.
    count = passes[0] + 1
    own = costs.elementwise(d, outputs, 2 * d * outputs).flops
    cost = Cost(count * one.examples, count * (one.flops + own))
    certificate = result.certificate
    return Deleted(np.asarray(result.params), cost, certificate.epsilon, certificate.delta, run)
