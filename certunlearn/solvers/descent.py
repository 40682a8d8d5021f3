"""Full-batch gradient descent on losses of linear models, in float64, with gradient bounds."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from chex import ArrayTree
from jax.typing import ArrayLike

from certunlearn._numerics import checks, norms
from certunlearn._numerics.curvature import contraction
from certunlearn.models.loss import ConvexLoss
from certunlearn.solvers.data_blocks import Data
from certunlearn.solvers.data_passes import flatten, objective


class DataDependentSteps(int):
    """A number of steps that the data decided: the same training on other data takes another."""


class Trained(NamedTuple):
    """Where gradient descent stopped. All three are private, like the data.

    Attributes:
      params: the parameters, in the dtype of the start (float32 or wider).
      gradient_norm: an upper bound on the objective's gradient norm at `params`.
      steps: the number of steps taken; `DataDependentSteps` if they went to a tolerance.
    """

    params: jax.Array
    gradient_norm: float
    steps: int


def gradient_norm(
    loss: ConvexLoss, params: ArrayTree, data: Data, *, allowance: float | None = None
) -> float:
    """An upper bound on the objective's gradient norm, L2 term included. Private, like the data.

    Args:
      loss: a loss of a linear model, whose bounds `data` must keep; or another, with an allowance.
      params: concrete parameters, `[d]` or `[d, outputs]`, or a tree, in any dtype.
      data: all training examples, `(features [n, d], targets)`, or batches of them, as for
        `solvers.minimize`.
      allowance: of a loss that is not one of a linear model: what its gradient in float64 may err
        by, relative to G + L ||params||. It is added to the bound, which rests on it.

    Raises:
      ValueError: if shapes disagree, `data` break a bound, the gradient is not finite, or the loss
        is not one of a linear model and there is no allowance.

    Guarantee:
      At least the exact gradient norm at the given numbers, for the losses of `models`. As large
      terms cancel in it, errors of float32 (or of accelerators' narrower products) would be larger
      than a trained model's gradient. Hence it is computed in float64, and
      2 (r + b + d + o + 64) u (G + L ||params||) is added, u = 2^-53, o the number of outputs, b
      the number of blocks that the data are cut into and r the rows of the longest: to first order
      an example's logits err by d u B ||params||, moving gradients by at most d u L ||params||;
      residuals by another (o + 20) u, times G + L ||params||; the scales of rows of norm B by
      (d / 2 + 3) u, in logits and in gradients; sums within a block, in any order, by r u times an
      example's gradient, at most G + L ||params||, and sums over blocks by b u times that; the L2
      term by 3 u.

    >>> from certunlearn import convex
    >>> loss = convex.logistic_regression(feature_norm=1.0, l2=1.0)
    >>> round(gradient_norm(loss, jnp.array([0.0]), (jnp.array([[1.0]]), jnp.array([1]))), 6)
    0.5
    """
    aim = objective(loss, params, data, allowance)
    bound = aim.at(flatten(params), check=True).bound
    if not math.isfinite(bound):
        raise ValueError("params must give a finite gradient, got one that is not")
    return bound


def gradient_descent(
    loss: ConvexLoss,
    params: ArrayLike,
    data: Sequence[ArrayLike],
    *,
    learning_rate: float | None = None,
    tolerance: float | None = None,
    max_steps: int | None = None,
    steps: int | None = None,
) -> Trained:
    """Full-batch gradient descent, to a gradient norm of `tolerance` or for `steps` steps.

    Give `tolerance` and `max_steps`, for `stability_distance`, or `steps`, a number that does not
    depend on the data, for `training_distance`.

    Args:
      loss, params, data: as for `gradient_norm`; `loss.init(d)` is a place to start.
      learning_rate: gamma, below 2 / L; None: 2 / (m + L), the fastest that is safe to promise.
      tolerance: the gradient norm to reach, see `gradient_norm`; positive.
      max_steps: give up after these. About L / (2 m) log(first gradient norm / tolerance) needed.
      steps: take so many steps instead, wherever they lead.

    Returns:
      A `Trained`. Its gradient norm is an upper bound at its very parameters, and at most
      `tolerance`, if there is one. Gradients are float64; parameters keep their dtype (float32 or
      wider).

    Raises:
      ValueError: if `tolerance` is not reached, `data` break a bound, both `steps` and `tolerance`
        are given, or neither, or the loss is not one of a linear model.

    >>> from certunlearn import convex
    >>> loss = convex.ridge_regression(feature_norm=1.0, target_norm=1.0, l2=1.0)
    >>> data = jnp.array([[1.0], [-1.0]]), jnp.array([1.0, -1.0])
    >>> out = gradient_descent(loss, loss.init(1), data, tolerance=1e-6, max_steps=99)
    >>> print(out.params.round(5))
    [0.5]
    """
    if (steps is None) == (tolerance is None) or (tolerance is None) != (max_steps is None):
        raise ValueError(
            "give either tolerance and max_steps, or steps, got "
            f"tolerance={checks.shown(tolerance)}, max_steps={checks.shown(max_steps)} and "
            f"steps={checks.shown(steps)}"
        )
    if steps is None:
        target = checks.positive("tolerance", tolerance)
        most = checks.steps("max_steps", max_steps)
    else:
        target, most = -1.0, checks.steps("steps", steps)  # no gradient norm is below zero
    low, high = loss.strong_convexity, loss.smoothness
    rate = 2 / (low + high) if learning_rate is None else learning_rate
    if contraction(rate, low, high) >= 1:
        raise ValueError(f"learning_rate must be below 2 / smoothness = {2 / high:g}, got {rate!r}")
    params = _prepare(loss, params, data)
    with jax.enable_x64(True):
        out, _, bound, count, moved = _descend(loss, params, tuple(data), rate, target, most)
        norm, taken = float(bound), int(count)
    if steps is not None:
        if not math.isfinite(norm):
            raise ValueError("params must give finite gradients on the way, got one that is not")
        return Trained(out, norm, most)
    if not norm <= target:
        remedy = "raise max_steps" if moved else f"{out.dtype} parameters come no closer"
        raise ValueError(
            f"tolerance must be reached, got gradient norm {norm:.3g} after {taken} steps: {remedy}"
        )
    return Trained(out, norm, DataDependentSteps(taken))


@functools.partial(jax.jit, static_argnames="loss")
def _gradient(
    loss: ConvexLoss, params: jax.Array, data: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    """The gradient in float64, and a bound on its exact norm."""
    wide = params.astype(jnp.float64)
    grad = jax.grad(loss.loss_fn)(wide, (data[0].astype(jnp.float64), data[1]))
    rounding = (len(data[0]) + params.size + 64) * float(jnp.finfo(jnp.float64).eps)
    largest = loss.gradient_bound + loss.smoothness * norms.norm_bound(wide)
    return grad, norms.norm_bound(grad) + rounding * largest


@functools.partial(jax.jit, static_argnames="loss")
def _descend(
    loss: ConvexLoss,
    params: jax.Array,
    data: tuple[jax.Array, ...],
    rate: float,
    target: float,
    max_steps: int,
) -> tuple[jax.Array, ...]:
    def step(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        old, grad, _, steps, _ = state
        new = (old.astype(jnp.float64) - rate * grad).astype(old.dtype)
        # If the parameters stay the same, so will all further steps.
        return new, *_gradient(loss, new, data), steps + 1, jnp.any(new != old)

    start = (params, *_gradient(loss, params, data), jnp.zeros((), jnp.int64), jnp.array(True))
    unfinished = lambda s: (s[2] > target) & (s[3] < max_steps) & s[4]  # noqa: E731
    return jax.lax.while_loop(unfinished, step, start)


def _prepare(loss: ConvexLoss, params: ArrayLike, data: Sequence[ArrayLike]) -> jax.Array:
    """Checked parameters, float32 or wider."""
    loss.require_linear(
        "the rounding of gradients is bounded for linear models only. Descend with Optax for a "
        "number of steps fixed beforehand and use training_distance, or measure the gradient norm "
        "yourself, add what rounding may hide, and use stability_distance"
    )
    loss.check_data(data)
    params = jnp.asarray(checks.numbers("params", params))
    expected = loss.init(np.shape(data[0])[1]).shape
    if params.shape != expected:
        raise ValueError(f"params must be of shape {expected}, got {params.shape}")
    return params if params.dtype == jnp.float64 else params.astype(jnp.float32)
