"""Convex losses of linear models: logistic, softmax and ridge regression.

Each loss states its constants, with their proof, for features of bounded norm. `clip_features`
bounds the norm. Everything here raises TypeError or ValueError if an argument is of the wrong type
or out of range.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from certunlearn._numerics import checks, norms, parallel
from certunlearn.models import loss as losses
from certunlearn.models.loss import ConvexLoss


def clip_features(features: ArrayLike, radius: float) -> jax.Array:
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
    features = checks.numbers("features", features)
    if np.ndim(features) != 2:
        raise ValueError(f"features must be of shape [n, d], got {np.shape(features)}")
    parallel.check_whole("features", features)
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
      G = sqrt(2) B for more. All are attained or approached. They hold for all finite data, as the
      loss scales longer features down to norm B and knows no other labels: of two classes, those
      above 0 are class 1; of more, a label that is no class has the loss log(sum exp(outputs)), of
      gradient x p^T.
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
        loss_fn=functools.partial(
            _mean_loss, losses.logistic if binary else losses.softmax, l2=l2, bound=bound
        ),
        strong_convexity=l2,
        smoothness=l2 + bound**2 / (4 if binary else 2),
        gradient_bound=bound if binary else math.sqrt(2) * bound,
        l2=l2,
        feature_norm=bound,
        outputs=None if binary else count,
        check_targets=lambda y: losses.require(np.isin(y, np.arange(count)), rule, y),
    )


def ridge_regression(
    feature_norm: float, target_norm: float, l2: float, radius: float | None = None
) -> ConvexLoss:
    """Least squares, 1/2 (x^T w - y)^2 averaged over the examples, with an L2 term; params `[d]`.

    Args:
      feature_norm: B, the largest L2 norm of an example's features.
      target_norm: Y, the largest magnitude of a target, in the targets' own precision.
      l2: weight of the L2 term, positive.
      radius: where G is to hold; None: `target_norm / sqrt(l2)`, twice the largest norm of a
        minimiser; at least that norm.

    Guarantee:
      m = l2 and L = l2 + B^2 for all parameters, as an example's Hessian is x x^T; as with
      `logistic_regression`, for all finite data: the loss scales longer features down, and clips
      targets to [-Y, Y].
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
    solution_norm = target / (2 * math.sqrt(l2))
    if radius < solution_norm:
        raise ValueError(
            f"radius must be at least target_norm / (2 sqrt(l2)) = {solution_norm!r}, the largest "
            f"norm of a minimiser, got {radius!r}"
        )
    rule = f"targets must be of magnitude at most target_norm = {target!r}"
    return ConvexLoss(
        loss_fn=functools.partial(
            _mean_loss, functools.partial(_squares, largest=target), l2=l2, bound=bound
        ),
        strong_convexity=l2,
        smoothness=l2 + bound**2,
        gradient_bound=(bound * radius + target) * bound,
        l2=l2,
        feature_norm=bound,
        check_targets=lambda y: losses.require(np.abs(y) <= target, rule, y),
        radius=radius,
        solution_norm=solution_norm,
    )


def _mean_loss(
    each: Callable[[jax.Array, jax.Array], jax.Array],
    params: ArrayLike,
    batch: Sequence[ArrayLike],
    *,
    l2: float,
    bound: float,
) -> jax.Array:
    features, params = jnp.asarray(batch[0]), jnp.asarray(params)
    with jax.numpy_dtype_promotion("standard"):  # code bases may forbid mixed types elsewhere
        dtype = jnp.promote_types(features.dtype, params.dtype)
    features = features.astype(dtype)
    # Full precision: accelerators may otherwise multiply in 10 or 8 bits, off the constants.
    outputs = jnp.matmul(features, params.astype(dtype), precision="highest")
    # As if longer features had been scaled down, so that the constants hold for any.
    lengths = jnp.sqrt(jnp.sum(jnp.square(features), axis=-1))
    scales = bound / jnp.maximum(lengths, bound)
    outputs = outputs * scales.reshape(scales.shape + (1,) * (outputs.ndim - scales.ndim))
    targets = jnp.asarray(batch[1])
    shape = outputs.shape[:1] if each is losses.softmax else outputs.shape
    if targets.shape != shape:  # broadcasting [n] against [n, 1] would pair all with all
        raise ValueError(f"targets must be of shape {shape}, got {targets.shape}")
    example_losses = each(outputs, targets.astype(dtype))
    return jnp.mean(example_losses) + l2 / 2 * jnp.sum(jnp.square(params.astype(dtype)))


def _squares(outputs: jax.Array, targets: jax.Array, *, largest: float) -> jax.Array:
    return jnp.square(outputs - jnp.clip(targets, -largest, largest)) / 2
