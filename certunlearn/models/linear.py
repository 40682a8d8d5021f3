"""What the convex losses of linear models share: bounded features, weights, the mean.

The losses are in `models.classification` and `models.regression`. Each states its constants, with
their proof, for features of bounded norm. `clip_features` bounds the norm; `append_intercept` adds
an intercept. Everything here raises TypeError or ValueError if an argument is of the wrong type or
out of range.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from certunlearn._numerics import checks, norms, parallel
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


def append_intercept(
    features: ArrayLike, value: float = 1.0, *, regularized: bool = True
) -> jax.Array:
    """Appends a constant feature, whose parameter acts as an intercept.

    Args:
      features: real numbers `[n, d]`, clipped before this.
      value: v, the constant; positive and public.
      regularized: True. An intercept that is not regularised is refused.

    Returns:
      `[n, d + 1]`, float32 or wider. With B the bound on the norm of `features`, the new one is
      sqrt(B^2 + v^2) = `math.hypot(B, v)`: pass that as `feature_norm` of the loss.

    Raises:
      ValueError: if `regularized` is False.

    Guarantee:
      The intercept is b = v w[-1], so the L2 term holds l2/2 (b / v)^2: all constants of the loss
      hold, with the new norm. A larger v regularises the intercept less and makes L and G larger.
      *Why not without:* the curvature of the objective along an unregularised intercept is the mean
      of the examples' curvatures, and that mean has no positive lower bound: of confident logistic
      outputs it tends to 0. Then m = 0, minimisers need not exist, and one deletion may move the
      intercept arbitrarily far.

    >>> print(append_intercept(jnp.array([[3.0, 4.0]]), value=2.0))
    [[3. 4. 2.]]
    """
    value = checks.positive("value", value)
    if not checks.flag("regularized", regularized):
        raise ValueError(
            "regularized must be True, got False: without its L2 term the objective is not "
            "strongly convex along the intercept, so nothing bounds how far a deletion moves it. "
            "A larger value regularises it less: its L2 term is l2/2 (intercept / value)^2"
        )
    features = checks.numbers("features", features)
    if np.ndim(features) != 2:
        raise ValueError(f"features must be of shape [n, d], got {np.shape(features)}")
    features = jnp.asarray(features)
    dtype = jnp.promote_types(features.dtype, jnp.float32)
    column = jnp.full((len(features), 1), value, dtype)
    return jnp.concatenate([features.astype(dtype), column], axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """An example's loss as a function of its outputs z = x^T w, and what is proved of it.

    Attributes:
      each: `each(outputs, targets) -> [n]`, convex in the outputs.
      curvature: bound on the largest eigenvalue of its Hessian in z, for all z.
      slope: bound on the norm of its gradient in z, for all params of norm at most `radius`.
      labels: whether targets are `[n]`, also where outputs are `[n, k]`.
      check_targets: as `ConvexLoss` has it.
      outputs, radius, solution_norm: as `ConvexLoss` has them.
    """

    each: Callable[[jax.Array, jax.Array], jax.Array]
    curvature: float
    slope: float
    labels: bool
    check_targets: Callable[[np.ndarray], None]
    outputs: int | None = None
    radius: float = math.inf
    solution_norm: float = math.inf


def linear_loss(link: Link, *, bound: float, l2: float, largest_weight: float | None) -> ConvexLoss:
    """The loss of a linear model with an L2 term, and its constants.

    Guarantee:
      With z = W^T x, an example's gradient is x (grad each)^T, of norm ||x|| ||grad each||, and its
      Hessian is the Kronecker product of x x^T and the Hessian of `each`, with eigenvalues between
      0 and ||x||^2 times the largest of that. A weight between 0 and `largest_weight` multiplies
      both. Means over n keep the bounds, and the L2 term adds l2 to every eigenvalue. So m = l2,
      L = l2 + W B^2 curvature and G = W B slope, with W the largest weight, or 1.
    """
    weight = largest_of(largest_weight)
    output_loss = functools.partial(_output_loss, link.each, link.labels, largest_weight)
    return ConvexLoss(
        loss_fn=functools.partial(_mean_loss, output_loss, l2=l2, bound=bound),
        strong_convexity=l2,
        smoothness=l2 + weight * (bound**2 * link.curvature),
        gradient_bound=weight * (bound * link.slope),
        l2=l2,
        feature_norm=bound,
        outputs=link.outputs,
        check_targets=link.check_targets,
        radius=link.radius,
        solution_norm=link.solution_norm,
        output_loss=output_loss,
        largest_weight=None if largest_weight is None else weight,
    )


def largest_of(largest_weight: float | None) -> float:
    """The checked largest weight of an example: 1 without weights."""
    return 1.0 if largest_weight is None else checks.positive("largest_weight", largest_weight)


def least_radius(radius: float | None, solution_norm: float, formula: str) -> float:
    """The radius, or twice the largest norm of a minimiser; ValueError if it is below that norm."""
    if radius is None:
        return 2 * solution_norm
    radius = checks.positive("radius", radius)
    if radius < solution_norm:
        raise ValueError(
            f"radius must be at least {formula} = {solution_norm!r}, the largest norm of a "
            f"minimiser, got {radius!r}"
        )
    return radius


def row_scales(features: jax.Array, bound: float) -> jax.Array:
    """What brings longer rows down to norm `bound`, so that the constants hold for any."""
    lengths = jnp.sqrt(jnp.sum(jnp.square(features), axis=-1))
    return bound / jnp.maximum(lengths, bound)


def _output_loss(
    each: Callable[[jax.Array, jax.Array], jax.Array],
    labels: bool,
    largest_weight: float | None,
    outputs: jax.Array,
    targets: jax.Array,
    weights: jax.Array | None,
) -> jax.Array:
    shape = outputs.shape[:1] if labels else outputs.shape
    if targets.shape != shape:  # broadcasting [n] against [n, 1] would pair all with all
        raise ValueError(f"targets must be of shape {shape}, got {targets.shape}")
    example_losses = each(outputs, targets.astype(outputs.dtype))
    if largest_weight is None:
        return example_losses
    if weights is None or weights.shape != outputs.shape[:1]:
        got = "none" if weights is None else f"shape {weights.shape}"
        raise ValueError(
            f"weights of shape {outputs.shape[:1]} must follow features and targets, got {got}"
        )
    return jnp.clip(weights.astype(outputs.dtype), 0, largest_weight) * example_losses


def _mean_loss(
    output_loss: Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array],
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
    scales = row_scales(features, bound)
    outputs = outputs * scales.reshape(scales.shape + (1,) * (outputs.ndim - scales.ndim))
    weights = jnp.asarray(batch[2]) if len(batch) > 2 else None
    example_losses = output_loss(outputs, jnp.asarray(batch[1]), weights)
    return jnp.mean(example_losses) + l2 / 2 * jnp.sum(jnp.square(params.astype(dtype)))
