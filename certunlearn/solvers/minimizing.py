"""Minimisation of convex losses to a gradient norm that is verified, by any of several solvers."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from chex import ArrayTree

from certunlearn._numerics import checks
from certunlearn.models.loss import ConvexLoss
from certunlearn.solvers import kept_factors
from certunlearn.solvers.data_blocks import Data
from certunlearn.solvers.data_passes import Evaluation, Objective, flatten, objective
from certunlearn.solvers.kept_factors import Curvature

METHODS = ("newton", "lbfgs", "descent")

# Pairs of steps and of differences of gradients that are remembered.
_MEMORY = 20
# A step is taken if the slope along it is at most this share of the first, and the value no higher.
_LARGEST_SLOPE = 0.8
# A step whose slope is still this steep is made longer.
_STEEP = 0.9
_TRIALS = 30
# Values err by rounding, relative to their magnitude.
_VALUE_ROUNDING = 1e-11
# A first factor that takes as long as so few passes is made at once.
_CHEAP = 10.0
# Steps whose progress decides about a new factor: a share of what it costs in passes, within these.
_LEAST_WINDOW, _MOST_WINDOW, _WINDOW_SHARE = 1, 25, 0.125


class Minimized(NamedTuple):
    """Where a solver stopped. All of it is private, like the data.

    Attributes:
      params: float64 NumPy arrays, of the shapes of the start.
      gradient_norm: an upper bound on the objective's exact gradient norm at `params`, at most the
        tolerance.
      passes: how often all data were read, for gradients and for factors of the Hessian.
      curvature: the last factor, to give to the next request; None if there is none.
      factorizations: how many of the passes were for factors, which take longer than gradients.
    """

    params: ArrayTree
    gradient_norm: float
    passes: int
    curvature: Curvature | None
    factorizations: int


def minimize(
    loss: ConvexLoss,
    params: ArrayTree,
    data: Data,
    *,
    tolerance: float,
    method: str = "newton",
    curvature: Curvature | None = None,
    max_passes: int = 10_000,
    allowance: float | None = None,
) -> Minimized:
    """Minimises the objective to a gradient norm of at most `tolerance`, verified in float64.

    The result is within tolerance / m of the minimiser: m ||w - w_R|| <= ||grad F_R(w)||.

    Args:
      loss: a `ConvexLoss`. It holds the L2 term.
      params: where to start: finite arrays of the loss's shape. The nearer to the minimiser, the
        fewer passes.
      data: all examples: one batch as the loss takes it, such as `(features, targets)`, whose
        arrays may be spread over devices; or a list or other iterable of batches, or a function
        that starts a new pass over them. Every pass must give the same examples, in any order.
      tolerance: the gradient norm to reach, L2 term included.
      method: "newton": steps with a factor of the Hessian, improved by differences of gradients as
        L-BFGS does it. The factor is `curvature`, as long as steps with it progress; a new one is
        computed where that is likely to save time: none on easy problems, nor where it would be
        too large, see `factorize`.
        "lbfgs": the same without new factors. "descent": steps of 2 / (m + L) along the gradient.
      curvature: a factor kept from an earlier request or a training, see `factorize`.
      max_passes: give up after so many passes over the data.
      allowance: of a loss that is not one of a linear model, such as that of a `Linearized`: what
        its gradient in float64 may err by, relative to G + L ||params||; it is added to the bound.

    Returns:
      A `Minimized`, all of it private.

    Raises:
      ValueError: if the tolerance is not reached; then nothing is returned, and the message says
        which norm was reached and what to do. Also if an argument is out of range.

    Guarantee:
      `gradient_norm` is at least the exact gradient norm at the returned float64 numbers, of linear
      models with output losses of this package, as `convex.gradient_norm` proves. No solver is
      trusted: the bound is computed afresh, from the data, at the very numbers returned. For other
      losses it rests on `allowance`.
      *Of networks* no bound on rounding is proved here, as `apply_fn` may be anything. In float64,
      errors of a network are of the order of the number of its operations in sequence times 1e-16,
      so 1e-12 is ample for small ones; compare with a wider format to be sure. Where one output
      has few parameters, `Linearized.features` computes tangent features once, and a linear loss on
      them has a proved bound.

    Source:
      Nocedal & Wright (2006), Numerical optimization, section 7.2 (L-BFGS with a given first
      matrix); Hager & Zhang (2005), A new conjugate gradient method (the test of slopes).

    >>> from certunlearn import convex
    >>> loss = convex.logistic_regression(feature_norm=1.0, l2=0.1)
    >>> data = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([1, 0])
    >>> out = minimize(loss, np.zeros(2), data, tolerance=1e-10)
    >>> out.gradient_norm <= 1e-10, convex.gradient_norm(loss, out.params, data) < 1e-10
    (True, True)
    """
    target = checks.positive("tolerance", tolerance)
    method = checks.choice("method", method, METHODS)
    most = checks.positive_int("max_passes", max_passes)
    aim = objective(loss, params, data, allowance)
    flat = flatten(params)
    if not np.all(np.isfinite(flat)):
        raise ValueError("params must be finite, got a NaN or an infinity")
    kept_factors.check_curvature(curvature, flat.size)
    run = _Run(aim, flat, target, most, curvature)
    if method == "descent":
        reason = run.descend(2 / (loss.strong_convexity + loss.smoothness))
    else:
        factors = method == "newton" and kept_factors.is_factorable(loss, flat.size)
        reason = run.newton(new_factors=factors)
    if reason is not None:
        raise ValueError(
            f"tolerance {target:.3g} must be reached, got gradient norm {run.here.bound:.3g} "
            f"after {run.passes} passes: {reason}"
        )
    return Minimized(
        aim.tree(run.flat), run.here.bound, run.passes, run.curvature, run.factorizations
    )


class _Run:
    """Where a solver is, and what it has used."""

    def __init__(
        self,
        aim: Objective,
        flat: np.ndarray,
        target: float,
        most: int,
        curvature: Curvature | None,
    ) -> None:
        self.aim, self.flat, self.target, self.most = aim, flat, target, most
        self.curvature, self.factorizations = curvature, 0
        self.passes = 1
        self.here = aim.at(flat, check=True)
        self._pairs: list[tuple[np.ndarray, np.ndarray]] = []
        # Passes and bounds at the points since the last factor.
        self._trail: list[tuple[int, float]] = [(self.passes, self.here.bound)]

    def descend(self, rate: float) -> str | None:
        """Steps along the gradient; None, or why the tolerance is not reached."""
        while (reason := self._stop()) == "":
            self.flat = self.flat - rate * self.here.gradient
            self.here = self._at(self.flat)
        return reason

    def newton(self, *, new_factors: bool) -> str | None:
        """Quasi-Newton steps; None, or why the tolerance is not reached."""
        while (reason := self._stop()) == "":
            if new_factors and self._factor_is_due():
                self._refactor()
            if self._step() or self.passes >= self.most:
                continue
            if self._pairs:
                self._pairs = []
            elif new_factors and len(self._trail) > 1:
                self._refactor()
            else:
                return "float64 comes no closer from here: raise tolerance, or start elsewhere"
        return reason

    def _stop(self) -> str | None:
        """None at the tolerance, "" to go on, or why not."""
        here = self.here
        if here.bound <= self.target:
            return None
        if not math.isfinite(here.bound):
            return "start where the gradient is finite, and give finite data"
        if here.rounding >= self.target:
            return (
                f"rounding alone may hide {here.rounding:.3g}: raise tolerance"
                if self.aim.allowance is None
                else f"the allowance alone is {here.rounding:.3g}: raise tolerance or lower it"
            )
        if self.passes >= self.most:
            return "raise max_passes, or start nearer to the minimiser"
        return ""

    def _at(self, flat: np.ndarray) -> Evaluation:
        self.passes += 1
        there = self.aim.at(flat)
        if there.rows != self.here.rows:
            raise ValueError(
                f"data must give the same examples in every pass, got {there.rows} after "
                f"{self.here.rows}"
            )
        return there

    def _factor_is_due(self) -> bool:
        """Whether a new factor is likely to take less time than the steps that are left."""
        cost = kept_factors.cost_in_passes(self.aim.loss, self.flat.size, self.here.rows)
        if self.curvature is None and cost <= _CHEAP:
            return True
        window = int(min(max(_LEAST_WINDOW, _WINDOW_SHARE * cost), _MOST_WINDOW))
        if len(self._trail) <= window:
            return False
        passes, bound = self._trail[-1 - window]
        gained = math.log(bound / self.here.bound) / (self.passes - passes)
        left = math.log(self.here.bound / self.target)
        return left > gained * (2 * cost + 4)

    def _refactor(self) -> None:
        self.curvature = kept_factors.factored(self.aim, self.flat)
        self.passes, self.factorizations = self.passes + 1, self.factorizations + 1
        self._pairs, self._trail = [], [(self.passes, self.here.bound)]

    def _step(self) -> bool:
        """One step, if the line search finds one."""
        direction = -_two_loops(self.here.gradient, self._pairs, self._first_metric())
        slope = float(direction @ self.here.gradient)
        if not slope < 0:
            return False
        found = self._search(direction, slope)
        if found is None:
            return False
        flat, there = found
        step, change = flat - self.flat, there.gradient - self.here.gradient
        if float(step @ change) > 0:
            self._pairs = [*self._pairs[1 - _MEMORY :], (step, change)]
        self.flat, self.here = flat, there
        self._trail.append((self.passes, there.bound))
        return True

    def _first_metric(self) -> Callable[[np.ndarray], np.ndarray]:
        if self.curvature is not None:
            return self.curvature.solve
        loss = self.aim.loss
        scale = 2 / (loss.strong_convexity + loss.smoothness)
        if self._pairs:
            step, change = self._pairs[-1]
            scale = float(step @ change) / float(change @ change)
        return lambda vector: scale * vector

    def _search(self, direction: np.ndarray, slope: float) -> tuple[np.ndarray, Evaluation] | None:
        """A point along the direction where the slope is small and the value no higher."""
        highest = self.here.value + _VALUE_ROUNDING * abs(self.here.value)
        low, low_slope, high, size = 0.0, slope, math.inf, 1.0
        best = None
        for _ in range(_TRIALS):
            if self.passes >= self.most:
                return best
            flat = self.flat + size * direction
            there = self._at(flat)
            if there.bound <= self.target:
                return flat, there
            at = float(there.gradient @ direction)
            fine = math.isfinite(there.bound) and there.value <= highest
            if fine and at <= -_LARGEST_SLOPE * slope:
                best = flat, there
                if at >= _STEEP * slope:
                    return best
                low, low_slope = size, at
                size = 4 * size if math.isinf(high) else (size + high) / 2
                continue
            if best is not None:
                return best
            high = size
            share = -low_slope / (at - low_slope) if math.isfinite(at) and at > 0 else 0.1
            size = low + (high - low) * min(max(share, 0.1), 0.9)
        return best


def _two_loops(
    gradient: np.ndarray,
    pairs: list[tuple[np.ndarray, np.ndarray]],
    metric: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """The inverse of the L-BFGS matrix times the gradient."""
    vector, shares = gradient.copy(), []
    for step, change in reversed(pairs):
        share = float(step @ vector) / float(step @ change)
        shares.append(share)
        vector -= share * change
    vector = metric(vector)
    for (step, change), share in zip(pairs, reversed(shares), strict=True):
        vector += (share - float(change @ vector) / float(step @ change)) * step
    return vector
