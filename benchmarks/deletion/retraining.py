"""The yardstick: the cheapest retraining to an accuracy, tuned with one budget for every family.

A family is a loss, a solver and a start. Its settings are tried on private training rows; the
evaluation of held-out private rows decides, never the test set. A family costs what its cheapest
setting takes to the first evaluation at which it reaches the target.
"""

import functools
import itertools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.deletion import costs, solvers
from benchmarks.deletion.costs import Cost
from benchmarks.deletion.features import Rows, Split
from benchmarks.deletion.solvers import Points, Problem

Setting = dict[str, Any]
_RATES = {
    "softmax": (4.0, 8.0, 16.0, 32.0, 64.0, 128.0),
    "squares": (0.1, 0.25, 0.5, 1.0, 1.5, 2.0),
}
_ADAM_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_SHARES = (1, 0.75, 0.5, 0.35, 0.25, 0.125)  # of the rows
_BATCHES = (32, 128, 512)
WORTHLESS = 12.0
STARTS = ("zero", "public head", "class sums")
DAMPING = 1e-4  # of the public curvature


class Family(NamedTuple):
    """One way to retrain, to be tuned."""

    loss: str
    solver: str
    start: str

    def __str__(self) -> str:
        """In words."""
        return f"{self.loss}, {self.solver}, from {self.start}"


Tuned = dict[Family, tuple[Setting, "Reached"]]


class Reached(NamedTuple):
    """The first evaluation at which an accuracy was reached; costs are infinite if none did.

    Attributes:
      cost: up to there.
      seconds: of this one run up to there, evaluations left out.
      point: the number of evaluations it took.
      validation: accuracy on held-out private rows there.
      test: accuracy on the test set there.
      test_cost: cost of reaching a given accuracy on the *test* set, for comparison.
    """

    cost: Cost
    seconds: float
    point: int
    validation: float
    test: float
    test_cost: Cost


NEVER = Cost(math.inf, math.inf)


def grid(loss: str, solver: str) -> list[Setting]:
    """The 36 settings that are tried of every solver."""
    names: dict[str, tuple[Any, ...]]
    if solver == "SGD":
        names = {"batch": _BATCHES, "rate": _RATES[loss], "momentum": (0, 0.9)}
    elif solver == "averaged SGD":
        names = {"batch": _BATCHES, "rate": _RATES[loss], "decay": (0, 0.01), "average": (True,)}
    elif solver == "Adam":
        names = {"batch": _BATCHES, "rate": _ADAM_RATES, "decay": (0, 0.01), "adam": (True,)}
    elif solver == "SGD in public curvature":
        scale = 4 if loss == "softmax" else 1
        rates = tuple(scale * rate for rate in (0.03, 0.1, 0.2, 0.4, 0.7, 1.0))
        names = {"batch": (128, 512, 2048), "rate": rates, "decay": (0, 0.1), "curved": (True,)}
    elif solver == "L-BFGS":
        names = {"share": _SHARES, "l2": (0, 1e-5, 1e-4), "memory": (5, 20)}
    elif solver == "Newton and CG":
        names = {
            "share": _SHARES,
            "l2": (1e-5, 1e-4, 1e-3),
            "public": (False, True),
            "inner": (20,) if loss == "squares" else (5,),
        }
    else:
        names = {"share": _SHARES, "l2": (0, 1e-6, 1e-5, 1e-4, 3e-4, 1e-3)}
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*names.values())]


SOLVERS: dict[str, Callable[[Problem, str, Setting], Points]] = {
    "SGD": solvers.steps,
    "averaged SGD": solvers.steps,
    "Adam": solvers.steps,
    "SGD in public curvature": solvers.steps,
    "L-BFGS": solvers.lbfgs,
    "Newton and CG": solvers.newton,
    "direct": solvers.direct,
}
FAMILIES = [
    Family(loss, solver, start)
    for loss, solver, start in itertools.product(("softmax", "squares"), SOLVERS, STARTS)
    if solver != "direct" or (loss, start) == ("squares", "zero")
]


class Public(NamedTuple):
    """What a retrainer may take from public data, worked out once and for all.

    Attributes:
      inverse: float32, of the mean of x x^T over the public rows, and `DAMPING`.
      heads: the public head for each loss.
    """

    inverse: np.ndarray
    heads: dict[str, np.ndarray]


def public_knowledge(split: Split) -> Public:
    """The public curvature, and heads for the few public rows with labels of the private task."""
    x = split.public.x.astype(np.float64)
    gram = x.T @ x / len(x)
    inverse = np.linalg.inv(gram + DAMPING * np.eye(len(gram))).astype(np.float32)
    few = problem_of(split.few, split.classes, None, inverse)
    heads = {}
    for loss in ("squares", "softmax"):
        *_, (heads[loss], _) = solvers.lbfgs(few, loss, {"share": 1, "l2": 1e-3, "memory": 20})
    return Public(inverse, heads)


def problem_of(rows: Rows, classes: int, start: np.ndarray | None, inverse: np.ndarray) -> Problem:
    """Training on these rows from a start that costs nothing."""
    return Problem(rows, solvers.one_hot(rows.y, classes), start, costs.NOTHING, inverse)


def begin(family: Family, rows: Rows, classes: int, public: Public) -> Problem:
    """The family's problem; the start by class sums is worked out, and paid for, here."""
    problem = problem_of(rows, classes, None, public.inverse)
    if family.start == "public head":
        return problem._replace(start=public.heads[family.loss])
    if family.start == "class sums":
        head, cost = solvers.class_sums(problem)
        scale = np.float32(solvers.SOFTMAX_SCALE if family.loss == "softmax" else 1)
        return problem._replace(start=scale * head, spent=cost)
    return problem


def in_public_curvature(family: Family, setting: Setting) -> bool:
    """Whether it rests on features of public rows having about the private rows' curvature."""
    return bool(family.start == "class sums" or setting.get("curved") or setting.get("public"))


def points(family: Family, setting: Setting, problem: Problem) -> Points:
    """Heads and costs from the start on: what costs nothing but the start comes first."""
    if problem.start is not None:
        yield problem.start, problem.spent
    yield from SOLVERS[family.solver](problem, family.loss, setting)


def accuracy(head: np.ndarray, rows: Rows) -> float:
    """The share of rows whose class has the largest output."""
    return float(np.mean(np.argmax(rows.x @ head, axis=1) == rows.y))


class Watched:
    """A run that is evaluated as it goes, up to so many operations."""

    def __init__(self, run: Points, most: float = math.inf) -> None:
        """Does not begin yet."""
        self._run, self._most, self._over = run, most, False
        self._point, self._seconds = 0, 0.0
        self._head, self._cost = np.zeros(0), NEVER
        self._validation = -1.0

    def _advance(self, split: Split) -> None:
        begun = time.perf_counter()
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            head, cost = next(self._run, (None, NEVER))
        self._seconds += time.perf_counter() - begun
        if head is None or cost.flops > self._most or not np.isfinite(head).all():
            self._over = True  # the last: rates that are too large diverge
            return
        self._head, self._cost, self._point = head, cost, self._point + 1
        self._validation = accuracy(head, split.validation)

    def until(self, split: Split, target: float) -> Reached:
        """Goes on until the accuracy on held-out rows is reached; the test set plays no part."""
        while self._validation < target and not self._over:
            self._advance(split)
        if self._validation < target:
            return Reached(NEVER, math.inf, 0, math.nan, math.nan, NEVER)
        test = accuracy(self._head, split.test)
        return Reached(self._cost, self._seconds, self._point, self._validation, test, NEVER)

    def until_by_test(self, split: Split, target: float) -> Cost:
        """Goes on until the accuracy is reached on the test set: for comparison only."""
        while not self._over:
            if self._point and accuracy(self._head, split.test) >= target:
                return self._cost
            self._advance(split)
        return NEVER


def reach(
    run: Callable[[], Points],
    split: Split,
    target: float,
    test_target: float,
    most: float = math.inf,
) -> Reached:
    """The first evaluation with an accuracy on held-out rows; and, apart, one with one on test."""
    found = Watched(run()).until(split, target)
    return found._replace(test_cost=Watched(run()).until_by_test(split, test_target))


def tune(
    split: Split, public: Public, targets: dict[str, float], every: int = 1
) -> dict[str, Tuned]:
    """For each target, every family's cheapest setting in operations, of those that reach it.

    A family that takes over `WORTHLESS` times the operations of the cheapest so far is left out.
    Of the settings only each `every`-th is tried: more than 1 is for a run of seconds.
    """
    best: dict[str, Tuned] = {name: {} for name in targets}
    least = dict.fromkeys(targets, math.inf)
    for family in FAMILIES:
        print(f"tuning: {family}", flush=True)
        problem = begin(family, split.train, split.classes, public)
        for setting in grid(family.loss, family.solver)[::every]:
            most = {
                name: found[family][1].cost.flops if family in found else WORTHLESS * least[name]
                for name, found in best.items()
            }
            run = Watched(points(family, setting, problem), max(most.values()))
            # The easiest first: the run goes on from there.
            for name in sorted(targets, key=lambda name: targets[name]):
                found = run.until(split, targets[name])
                if found.cost.flops < most[name]:
                    best[name][family] = setting, found
                    least[name] = min(least[name], found.cost.flops)
    return best


class Yardstick(NamedTuple):
    """One family's retraining after a request, and how to run it again without evaluating."""

    family: Family
    setting: Setting
    reached: Reached
    run: Callable[[], object]


def yardsticks(
    split: Split, public: Public, retain: Rows, best: Tuned, target: float, test_target: float
) -> list[Yardstick]:
    """Every family with its tuned setting, on the rows that remain, up to the target."""
    found = []
    for family, (setting, _) in best.items():
        problem = begin(family, retain, split.classes, public)
        points_of = functools.partial(points, family, setting, problem)
        reached = reach(points_of, split, target, test_target)
        run = functools.partial(_again, family, setting, problem, public, reached.point)
        found.append(Yardstick(family, setting, reached, run))
    return found


def _again(
    family: Family, setting: Setting, problem: Problem, public: Public, point: int
) -> np.ndarray:
    """The run up to an evaluation, without evaluating; class sums are summed up again."""
    if family.start == "class sums":
        head, spent = solvers.class_sums(problem)
        scale = np.float32(solvers.SOFTMAX_SCALE if family.loss == "softmax" else 1)
        problem = problem._replace(start=scale * head, spent=spent)
    head = problem.begin()
    for head, _ in itertools.islice(points(family, setting, problem), point):  # noqa: B007
        pass
    return head
