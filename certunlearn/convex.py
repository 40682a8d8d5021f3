"""Convex losses with known constants, how far deletions move their minimiser, and training.

One step of gradient descent brings two runs closer, and training with or without a few examples
ends at nearly the same place. Both facts need constants that are *proved*, not estimated: each loss
states its own, for features of bounded norm, which `clip_features` makes true. Everything here
raises TypeError or ValueError if an argument is of the wrong type or out of range.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from certunlearn import checks, norms
from certunlearn.mechanisms.convex import contraction


class Trained(NamedTuple):
    """Where gradient descent stopped, a bound on the gradient norm there, and the steps taken."""

    params: jax.Array
    gradient_norm: float
    steps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvexLoss:
    """A strongly convex, smooth loss of a linear model; its constants are taken at their word.

    Args:
      loss_fn: `loss_fn(params, (features [B, d], targets))`: the mean over the batch's examples,
        plus `l2 / 2 * ||params||^2`.
      strong_convexity, smoothness: m and L of every batch's loss, 0 < m <= L.
      gradient_bound: G > 0, of every single example's gradient norm *without* the L2 term.
      l2: weight of the L2 term, positive.
      feature_norm: B, the largest L2 norm of an example's features.
      outputs: parameters are `[d, outputs]`; None: `[d]`.
      check_targets: called with all targets, raises ValueError if they break the constants.
    """

    loss_fn: Callable[[jax.Array, Any], jax.Array]
    strong_convexity: float
    smoothness: float
    gradient_bound: float
    l2: float
    feature_norm: float
    outputs: int | None = None
    check_targets: Callable[[Any], None] | None = None

    def __post_init__(self) -> None:
        """Checks every constant."""
        if not callable(self.loss_fn):
            raise TypeError(f"loss_fn must be callable, got {self.loss_fn!r}")
        contraction(1.0, self.strong_convexity, self.smoothness)  # checks both
        for name in ("gradient_bound", "l2", "feature_norm"):
            checks.positive(name, getattr(self, name))

    def init(self, num_features: int, dtype: Any = jnp.float32) -> jax.Array:
        """Zeros of shape `[num_features]`, or `[num_features, outputs]`."""
        width = checks.positive_int("num_features", num_features)
        return jnp.zeros((width,) if self.outputs is None else (width, self.outputs), dtype)

    def check_data(self, data: Any) -> None:
        """Raises ValueError if concrete `data` break the bounds that the constants rest on."""
        features, targets = (np.asarray(part) for part in data)
        if features.ndim != 2 or len(features) == 0 or targets.shape[:1] != features.shape[:1]:
            shapes = f"shapes {features.shape} and {targets.shape}"
            raise ValueError(f"data must be (features [n, d], targets [n, ...]), got {shapes}")
        lengths = np.linalg.norm(features.astype(np.float64), axis=1)
        rule = f"features must have norm at most feature_norm = {self.feature_norm} (clip_features)"
        _require(lengths <= self.feature_norm * (1 + 1e-12), rule, lengths)  # a hair for rounding
        if self.check_targets is not None:
            self.check_targets(targets)


def clip_features(features: Any, radius: float) -> jax.Array:
    """Scales the rows that are too long down to L2 norm `radius`; the others stay as they are.

    Args:
      features: real numbers `[n, d]`; what is returned is float32 or their own wider dtype.
      radius: B, the largest norm, between 1e-30 and 1e30.

    Guarantee:
      Every row's norm is at most `radius`, in exact arithmetic on the returned numbers, see
      `norms.clip_tree`. A row with a NaN or an infinity becomes zeros. Rows do not mix.

    >>> print(clip_features(jnp.array([[3.0, 4.0], [jnp.nan, 0.5]]), 1.0).round(3))
    [[0.6 0.8]
     [0.  0. ]]
    """
    norms.check_norm("radius", radius)
    if np.ndim(features) != 2:
        raise ValueError(f"features must be of shape [n, d], got {np.shape(features)}")
    return jax.vmap(lambda row: norms.clip_tree(row, radius).tree)(jnp.asarray(features))


def logistic_regression(feature_norm: float, l2: float, classes: int | None = None) -> ConvexLoss:
    """Logistic regression (two classes) or softmax regression, with an L2 term.

    Args:
      feature_norm: B, the largest L2 norm of an example's features. There is no intercept: for
        one, append a constant feature before clipping.
      l2: weight of the L2 term, positive.
      classes: None or 2: params `[d]`, labels 0 and 1. k >= 3: params `[d, k]`, labels 0 to k - 1.

    Guarantee:
      For all parameters: m = l2; L = l2 + B^2/4 and G = B for two classes, L = l2 + B^2/2 and
      G = sqrt(2) B for more. All are attained or approached.
      *Two classes.* The gradient is (s - y) x and the Hessian s (1 - s) x x^T, s in (0, 1) the
      sigmoid of the logit: |s - y| < 1, 0 < s (1 - s) <= 1/4 and ||x x^T|| = ||x||^2 <= B^2.
      *More.* The gradient is x (p - e_y)^T, of norm ||x|| ||p - e_y||, and ||p - e_y||^2 =
      (1 - p_y)^2 + sum_{j != y} p_j^2 <= 2 (1 - p_y)^2 <= 2. The Hessian is the Kronecker product
      of x x^T and diag(p) - p p^T. For any v, v^T (diag(p) - p p^T) v is the variance of v_j when
      j has law p: at least 0, and at most (max v - min v)^2 / 4 (Popoviciu), which is at most
      ||v||^2 / 2 as (a - b)^2 <= 2 (a^2 + b^2). The L2 term adds l2 to every eigenvalue.

    >>> loss = logistic_regression(feature_norm=2.0, l2=0.1)
    >>> loss.strong_convexity, loss.smoothness, loss.gradient_bound
    (0.1, 1.1, 2.0)
    """
    bound, l2 = checks.positive("feature_norm", feature_norm), checks.positive("l2", l2)
    count = 2 if classes is None else checks.positive_int("classes", classes)
    if count < 2:
        raise ValueError(f"classes must be at least 2, got {count}")
    binary = count == 2
    rule = f"targets must be labels from 0 to {count - 1}"
    return ConvexLoss(
        loss_fn=functools.partial(_mean_loss, _logistic if binary else _softmax, l2=l2),
        strong_convexity=l2,
        smoothness=l2 + bound**2 / (4 if binary else 2),
        gradient_bound=bound if binary else math.sqrt(2) * bound,
        l2=l2,
        feature_norm=bound,
        outputs=None if binary else count,
        check_targets=lambda y: _require(np.isin(y, np.arange(count)), rule, y),
    )


def ridge_regression(
    feature_norm: float, target_norm: float, l2: float, radius: float | None = None
) -> ConvexLoss:
    """Least squares, 1/2 (x^T w - y)^2 averaged over the examples, with an L2 term; params `[d]`.

    Args:
      feature_norm: B, the largest L2 norm of an example's features.
      target_norm: Y, the largest magnitude of a target, in the targets' own precision.
      l2: weight of the L2 term, positive.
      radius: where G is to hold; None: `target_norm / sqrt(l2)`. Half of that still holds every
        minimiser, see below; anything smaller must be known to.

    Guarantee:
      m = l2 and L = l2 + B^2 for all parameters, as an example's Hessian is x x^T.
      G = (B radius + Y) B *only* where ||params|| <= radius: the gradient is x (x^T w - y), of norm
      at most B (B ||w|| + Y). It has no bound for all w; `stability_distance` needs none.
      Every minimiser w* of the objective F, over any data within the bounds, has norm at most
      Y / sqrt(l2), as l2/2 ||w*||^2 <= F(w*) <= F(0) <= Y^2 / 2. Half of that holds too: with A and
      b the features and targets over sqrt(n), ||b|| <= Y and w* = (A^T A + l2)^-1 A^T b, of norm at
      most max_s s / (s^2 + l2) ||b|| <= ||b|| / (2 sqrt(l2)) over the singular values s of A.

    >>> loss = ridge_regression(feature_norm=1.0, target_norm=2.0, l2=0.25)
    >>> loss.smoothness, loss.gradient_bound  # the bound where ||params|| <= 4
    (1.25, 6.0)
    """
    bound, l2 = checks.positive("feature_norm", feature_norm), checks.positive("l2", l2)
    target = checks.positive("target_norm", target_norm)
    radius = target / math.sqrt(l2) if radius is None else checks.positive("radius", radius)
    rule = f"targets must be of magnitude at most target_norm = {target!r}"
    return ConvexLoss(
        loss_fn=functools.partial(_mean_loss, _squares, l2=l2),
        strong_convexity=l2,
        smoothness=l2 + bound**2,
        gradient_bound=(bound * radius + target) * bound,
        l2=l2,
        feature_norm=bound,
        check_targets=lambda y: _require(np.abs(y) <= target, rule, y),
    )


def stability_distance(
    loss: ConvexLoss,
    *,
    size: int,
    deletions: int,
    gradient_norm: float,
) -> float:
    """How far the trained model can be from the model trained without the deleted examples.

    Args:
      loss: the loss that both minimise.
      size: n, the number of examples before the deletion.
      deletions: k, how many are deleted; fewer than `size`.
      gradient_norm: of the objective on its own data (L2 term included), the most with which either
        training stops: the tolerance that both are run to, not what one of them reached. Zero
        claims exact minimisation.

    Returns:
      2 k G / (m n) + 2 gradient_norm / m, in parameter units.

    Guarantee:
      It is at least ||w - w'||, w and w' the trained and the retrained model, if the gradient norm
      bounds both; G need hold only at w_D, the minimiser on all data. Let F_D, F_R and F_K be the
      objective on all, the remaining and the deleted examples: F_D = (1 - k/n) F_R + k/n F_K, so
      grad F_R = grad F_D + (k/n) (grad F_R - grad F_K). In the bracket, a difference of two means
      of example gradients, the L2 terms cancel: its norm is at most 2 G. At w_D, where
      grad F_D = 0, that leaves ||grad F_R(w_D)|| <= 2 k G / n. Strong convexity gives
      m ||v - w_R|| <= ||grad F_R(v)|| for all v, w_R the minimiser of F_R: with v = w_D,
      ||w_D - w_R|| <= 2 k G / (m n), which linear losses attain; with v = w', the last term; and
      likewise for w and w_D. The triangle inequality adds the three.

    Source:
      Neel, Roth & Sharifi-Malvajerdi (2021), Descent-to-Delete, for the first term.

    >>> loss = logistic_regression(feature_norm=1.0, l2=0.5)
    >>> stability_distance(loss, size=1000, deletions=5, gradient_norm=1e-3)
    0.024
    """
    if not 0 <= checks.real("gradient_norm", gradient_norm) < math.inf:
        raise ValueError(f"gradient_norm must be at least 0 and finite, got {gradient_norm!r}")
    shift = gradient_difference(loss, size=size, deletions=deletions)
    return float(shift + 2 * gradient_norm) / loss.strong_convexity


def gradient_difference(loss: ConvexLoss, *, size: int, deletions: int) -> float:
    """How much k of n examples can change the gradient of the objective, where G holds: 2 k G / n.

    >>> loss = logistic_regression(feature_norm=1.0, l2=0.5)
    >>> gradient_difference(loss, size=1000, deletions=5)
    0.01
    """
    if checks.positive_int("deletions", deletions) >= checks.positive_int("size", size):
        raise ValueError(f"deletions must be fewer than size {size}, got {deletions}")
    return float(2 * deletions * loss.gradient_bound / size)


def training_distance(
    loss: ConvexLoss, *, size: int, deletions: int, learning_rate: float, steps: int
) -> float:
    """How far apart full-batch gradient descent ends with and without the deleted examples.

    From the same start and for as many steps, however far from the minimum: D_0 = 0 and D_{t+1} <=
    c D_t + learning_rate * gradient_difference, c the contraction of a step.

    Args:
      loss: the loss that both descend.
      size: n, the number of examples before the deletion.
      deletions: k, how many are deleted; fewer than `size`.
      learning_rate: gamma of every step, at most 2 / smoothness.
      steps: how many steps both take.

    Guarantee:
      A step maps points at distance r to points at distance at most c r on the same data, and other
      data move the result by gamma times the difference of the gradients. G must hold on the way.

    >>> loss = logistic_regression(feature_norm=1.0, l2=0.5)
    >>> round(training_distance(loss, size=1000, deletions=5, learning_rate=1.0, steps=2), 6)
    0.015
    """
    factor = float(contraction(learning_rate, loss.strong_convexity, loss.smoothness))
    if factor > 1:
        raise ValueError(
            f"learning_rate must be at most 2 / smoothness = {2 / loss.smoothness:g}, got "
            f"{learning_rate!r}"
        )
    count = checks.positive_int("steps", steps)
    each = learning_rate * gradient_difference(loss, size=size, deletions=deletions)
    return each * (count if factor == 1 else (1 - factor**count) / (1 - factor))


def gradient_norm(loss: ConvexLoss, params: Any, data: Any) -> float:
    """An upper bound on the objective's gradient norm, L2 term included. Private, like the data.

    Args:
      loss: the loss, whose bounds `data` must keep.
      params: concrete parameters, `[d]` or `[d, outputs]`.
      data: `(features [n, d], targets)`, all training examples.

    Raises:
      ValueError: if shapes disagree, `data` break a bound, or the gradient is not finite.

    Guarantee:
      At least the exact gradient norm at the given numbers, for the losses of this module. As large
      terms cancel in it, errors of float32 (or of accelerators' narrower products) would swamp a
      trained model's gradient. Hence float64, here only, and 2 (n + p + 64) u (G + L ||params||) on
      top, u = 2^-53 and p the number of parameters: to first order logits err by p u B ||params||,
      moving gradients by at most p u L ||params||; residuals by another (p + 20) u, times B; the
      mean by n u times an example's gradient, at most G + L ||params||; the L2 term by 3 u.

    >>> loss = logistic_regression(feature_norm=1.0, l2=1.0)
    >>> round(gradient_norm(loss, jnp.array([0.0]), (jnp.array([[1.0]]), jnp.array([1]))), 6)
    0.5
    """
    params = _prepare(loss, params, data)
    with jax.enable_x64(True):
        bound = float(_gradient(loss, params, tuple(data))[1])
    if not math.isfinite(bound):
        raise ValueError("params must give a finite gradient, got one that is not")
    return bound


def gradient_descent(
    loss: ConvexLoss,
    params: Any,
    data: Any,
    *,
    learning_rate: float | None = None,
    tolerance: float,
    max_steps: int,
) -> Trained:
    """Full-batch gradient descent until the gradient norm is at most `tolerance`.

    Args:
      loss, params, data: as for `gradient_norm`; `loss.init(d)` is a place to start.
      learning_rate: gamma, below 2 / L; None: 2 / (m + L), the fastest that is safe to promise.
      tolerance: the gradient norm to reach, see `gradient_norm`; positive.
      max_steps: give up after these. About L / (2 m) log(first gradient norm / tolerance) needed.

    Returns:
      A `Trained`, its gradient norm at most `tolerance` and an upper bound at its very parameters,
      which keep their dtype (float32 or wider). Gradients are float64.

    Raises:
      ValueError: if `tolerance` is not reached, or `data` break a bound.

    >>> loss = ridge_regression(feature_norm=1.0, target_norm=1.0, l2=1.0)
    >>> data = jnp.array([[1.0], [-1.0]]), jnp.array([1.0, -1.0])
    >>> out = gradient_descent(loss, loss.init(1), data, tolerance=1e-6, max_steps=99)
    >>> print(out.params.round(5))
    [0.5]
    """
    target = checks.positive("tolerance", tolerance)
    max_steps = checks.positive_int("max_steps", max_steps)
    low, high = loss.strong_convexity, loss.smoothness
    rate = 2 / (low + high) if learning_rate is None else learning_rate
    if contraction(rate, low, high) >= 1:
        raise ValueError(f"learning_rate must be below 2 / smoothness = {2 / high:g}, got {rate!r}")
    params = _prepare(loss, params, data)
    with jax.enable_x64(True):
        out, _, bound, count, moved = _descend(loss, params, tuple(data), rate, target, max_steps)
        norm, steps = float(bound), int(count)
    if not norm <= target:
        remedy = "raise max_steps" if moved else f"{out.dtype} parameters come no closer"
        raise ValueError(
            f"tolerance must be reached, got gradient norm {norm:.3g} after {steps} steps: {remedy}"
        )
    return Trained(out, norm, steps)


@functools.partial(jax.jit, static_argnames="loss")
def _gradient(loss: ConvexLoss, params: jax.Array, data: Any) -> tuple[jax.Array, jax.Array]:
    """The gradient in float64, and a bound on its exact norm."""
    wide = params.astype(jnp.float64)
    grad = jax.grad(loss.loss_fn)(wide, (data[0].astype(jnp.float64), data[1]))
    rounding = (len(data[0]) + params.size + 64) * float(jnp.finfo(jnp.float64).eps)
    largest = loss.gradient_bound + loss.smoothness * norms.norm_bound(wide)
    return grad, norms.norm_bound(grad) + rounding * largest


@functools.partial(jax.jit, static_argnames="loss")
def _descend(
    loss: ConvexLoss, params: jax.Array, data: Any, rate: Any, target: Any, max_steps: Any
) -> tuple[jax.Array, ...]:
    def step(state: Any) -> Any:
        old, grad, _, steps, _ = state
        new = (old.astype(jnp.float64) - rate * grad).astype(old.dtype)
        # Standing still, all further steps would be the same.
        return new, *_gradient(loss, new, data), steps + 1, jnp.any(new != old)

    start = (params, *_gradient(loss, params, data), jnp.zeros((), jnp.int64), jnp.array(True))
    unfinished = lambda s: (s[2] > target) & (s[3] < max_steps) & s[4]  # noqa: E731
    return jax.lax.while_loop(unfinished, step, start)


def _prepare(loss: ConvexLoss, params: Any, data: Any) -> jax.Array:
    """Checked parameters, float32 or wider."""
    loss.check_data(data)
    params = jnp.asarray(params)
    expected = loss.init(np.shape(data[0])[1]).shape
    if params.shape != expected:
        raise ValueError(f"params must be of shape {expected}, got {params.shape}")
    return params.astype(jnp.promote_types(params.dtype, jnp.float32))


def _mean_loss(each: Callable, params: jax.Array, batch: Any, *, l2: float) -> jax.Array:
    # Full precision: accelerators may otherwise multiply in 10 or 8 bits, off the constants.
    outputs = jnp.matmul(batch[0], params, precision="highest")
    targets = jnp.asarray(batch[1])
    shape = outputs.shape[:1] if each is _softmax else outputs.shape
    if targets.shape != shape:  # broadcasting [n] against [n, 1] would pair all with all
        raise ValueError(f"targets must be of shape {shape}, got {targets.shape}")
    return jnp.mean(each(outputs, targets)) + l2 / 2 * jnp.sum(jnp.square(params))


def _logistic(logits: jax.Array, labels: jax.Array) -> jax.Array:
    # Cast first: with unsigned labels 1 - 2 y would wrap around.
    return jax.nn.softplus((1 - 2 * labels.astype(logits.dtype)) * logits)


def _softmax(logits: jax.Array, labels: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(logits, labels[:, None].astype(jnp.int32), axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - chosen


def _squares(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.square(outputs - targets) / 2


def _require(kept: np.ndarray, rule: str, values: np.ndarray) -> None:
    if not np.all(kept):
        raise ValueError(f"{rule}, got {values[~kept].item(0)!r} in row {int(np.argmin(kept))}")
