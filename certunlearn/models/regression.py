"""Convex losses of linear regressions: least squares, Huber, quantiles and counts.

Each states its constants, with their proof. Everything here raises TypeError or ValueError if an
argument is of the wrong type or out of range. Weights are public, see `models.classification`.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from certunlearn._numerics import checks
from certunlearn.models import loss as losses
from certunlearn.models.linear import Link, largest_of, least_radius, linear_loss
from certunlearn.models.loss import ConvexLoss


def ridge_regression(
    feature_norm: float,
    target_norm: float,
    l2: float,
    radius: float | None = None,
    *,
    outputs: int | None = None,
    largest_weight: float | None = None,
) -> ConvexLoss:
    """Least squares, 1/2 ||x^T w - y||^2 averaged over the examples, with an L2 term.

    Args:
      feature_norm: B, the largest L2 norm of an example's features.
      target_norm: Y, the largest magnitude of a target, in the targets' own precision; of targets
        `[n, outputs]`, the largest L2 norm of a row.
      l2: weight of the L2 term, positive.
      radius: where G is to hold; None: `target_norm sqrt(W / l2)`, twice the largest norm of a
        minimiser; at least that norm.
      outputs: None: params `[d]`, targets `[n]`. o: params `[d, o]`, targets `[n, o]`.
      largest_weight: W, as for `logistic_regression`; None: 1, and batches have no weights.

    Guarantee:
      m = l2 and L = l2 + W B^2 for all parameters, as an example's Hessian is x x^T, once for each
      output; as with `logistic_regression`, for all finite data: the loss scales longer features
      and longer targets down, and clips weights.
      G = W (B radius + Y) B *only* where ||params|| <= radius: the gradient is x (x^T w - y), of
      norm at most B (B ||w|| + Y). It has no bound for all w; `stability_distance` needs none.
      Every minimiser has norm at most Y sqrt(W / l2) / 2: there l2 w is the mean of weighted
      x (y - z)^T, so l2 ||w||^2 is the mean of weighted z^T (y - z) <= ||y||^2 / 4 <= Y^2 / 4. Data
      with z = y / 2 everywhere attain it.

    >>> loss = ridge_regression(feature_norm=1.0, target_norm=2.0, l2=0.25)
    >>> loss.smoothness, loss.gradient_bound  # the bound where ||params|| <= 4
    (1.25, 6.0)
    """
    bound, l2 = checks.positive("feature_norm", feature_norm), checks.positive("l2", l2)
    target = checks.positive("target_norm", target_norm)
    width = None if outputs is None else checks.positive_int("outputs", outputs)
    solution_norm = target * math.sqrt(largest_of(largest_weight)) / (2 * math.sqrt(l2))
    formula = "target_norm / (2 sqrt(l2))" + ("" if largest_weight is None else " sqrt(W)")
    radius = least_radius(radius, solution_norm, formula)
    rule = f"targets must be of magnitude at most target_norm = {target!r}"

    def check_targets(targets: np.ndarray) -> None:
        lengths = np.abs(targets) if width is None else np.linalg.norm(targets, axis=-1)
        # Float64 may round the norm of a row up.
        losses.require(lengths <= target * (1 if width is None else 1 + 1e-12), rule, lengths)

    link = Link(
        each=functools.partial(_squares, largest=target),
        curvature=1.0,
        slope=bound * radius + target,
        labels=False,
        check_targets=check_targets,
        outputs=width,
        radius=radius,
        solution_norm=solution_norm,
    )
    return linear_loss(link, bound=bound, l2=l2, largest_weight=largest_weight)


def huber_regression(
    feature_norm: float, l2: float, threshold: float, *, largest_weight: float | None = None
) -> ConvexLoss:
    """Huber's robust regression: squares of small residuals, magnitudes of large ones.

    An example's loss is r^2 / 2 for |r| <= t and t |r| - t^2 / 2 beyond, r = y - x^T w; params
    `[d]`.

    Args:
      feature_norm, l2, largest_weight: B, l2 and W, as for `logistic_regression`.
      threshold: t, the residual from which on the loss is linear.

    Guarantee:
      For all parameters and all finite targets, which need no bound: m = l2, L = l2 + W B^2 and
      G = W B t. The derivative in the output is r clipped to [-t, t], of slope 0 or 1.

    Source:
      Huber (1964), Robust estimation of a location parameter.

    >>> loss = huber_regression(feature_norm=2.0, l2=0.1, threshold=0.5)
    >>> loss.smoothness, loss.gradient_bound
    (4.1, 1.0)
    """
    bound, l2 = checks.positive("feature_norm", feature_norm), checks.positive("l2", l2)
    threshold = checks.positive("threshold", threshold)
    link = Link(
        each=functools.partial(_huber, threshold=threshold),
        curvature=1.0,
        slope=threshold,
        labels=False,
        check_targets=_check_finite,
    )
    return linear_loss(link, bound=bound, l2=l2, largest_weight=largest_weight)


def quantile_regression(
    feature_norm: float,
    l2: float,
    quantile: float,
    width: float,
    *,
    largest_weight: float | None = None,
) -> ConvexLoss:
    """Quantile regression with a smoothed kink: the mean pinball loss of y - x^T w + width U.

    U is uniform on [-1, 1]. The pinball loss of r is q r for r > 0 and (q - 1) r otherwise. The
    mean equals it for |r| >= width; within, it is q r + (width - r)^2 / (4 width); params `[d]`.

    Args:
      feature_norm, l2, largest_weight: B, l2 and W, as for `logistic_regression`.
      quantile: q, strictly between 0 and 1.
      width: h, half the width of the smoothed kink, in units of the targets.

    Guarantee:
      For all parameters and all finite targets, which need no bound: m = l2,
      L = l2 + W B^2 / (2 h) and G = W B max(q, 1 - q). The derivative in r rises from q - 1 at -h
      to q at h, linearly, so with slope 1 / (2 h), and is constant outside. Without smoothing the
      loss has a kink, and no L.

    Source:
      Fernandes, Guerre & Horta (2021), Smoothing quantile regressions.

    >>> loss = quantile_regression(feature_norm=1.0, l2=0.1, quantile=0.9, width=0.25)
    >>> loss.smoothness, loss.gradient_bound
    (2.1, 0.9)
    """
    bound, l2 = checks.positive("feature_norm", feature_norm), checks.positive("l2", l2)
    quantile = checks.open_unit("quantile", quantile)
    width = checks.positive("width", width)
    link = Link(
        each=functools.partial(_smooth_pinball, quantile=quantile, width=width),
        curvature=1 / (2 * width),
        slope=max(quantile, 1 - quantile),
        labels=False,
        check_targets=_check_finite,
    )
    return linear_loss(link, bound=bound, l2=l2, largest_weight=largest_weight)


def poisson_regression(
    feature_norm: float,
    l2: float,
    largest_rate: float,
    *,
    largest_weight: float | None = None,
) -> ConvexLoss:
    """Poisson regression of counts, with rates exp(x^T w) up to a largest rate; params `[d]`.

    An example's loss is exp(z) - y z while z <= log R, and R (1 + z - log R) - y z beyond: the
    negative log likelihood of y, continued along its tangent.

    Args:
      feature_norm, l2, largest_weight: B, l2 and W, as for `logistic_regression`.
      largest_rate: R, a public number. Targets are between 0 and R.

    Guarantee:
      For all parameters: m = l2, L = l2 + W B^2 R and G = W B R. The derivative in the output z is
      min(exp(z), R) - y, with slope at most R, and between -R and R as both terms are between 0 and
      R. The plain exponential has neither bound; where all fitted rates are below R, the minimiser
      is that of plain Poisson regression, as the losses and their gradients agree there and both
      objectives are strictly convex. Targets beyond [0, R] are clipped.

    >>> loss = poisson_regression(feature_norm=1.0, l2=0.5, largest_rate=8.0)
    >>> loss.smoothness, loss.gradient_bound
    (8.5, 8.0)
    """
    bound, l2 = checks.positive("feature_norm", feature_norm), checks.positive("l2", l2)
    largest = checks.positive("largest_rate", largest_rate)
    rule = f"targets must be between 0 and largest_rate = {largest!r}"
    link = Link(
        each=functools.partial(_capped_poisson, largest=largest),
        curvature=largest,
        slope=largest,
        labels=False,
        check_targets=lambda y: losses.require((y >= 0) & (y <= largest), rule, y),
    )
    return linear_loss(link, bound=bound, l2=l2, largest_weight=largest_weight)


def _check_finite(targets: np.ndarray) -> None:
    losses.require(np.isfinite(targets), "targets must be finite", targets)


def _squares(outputs: jax.Array, targets: jax.Array, *, largest: float) -> jax.Array:
    if outputs.ndim == 1:
        return jnp.square(outputs - jnp.clip(targets, -largest, largest)) / 2
    lengths = jnp.sqrt(jnp.sum(jnp.square(targets), axis=1, keepdims=True))
    targets = targets * (largest / jnp.maximum(lengths, largest))
    return jnp.sum(jnp.square(outputs - targets), axis=1) / 2


def _huber(outputs: jax.Array, targets: jax.Array, *, threshold: float) -> jax.Array:
    residuals = targets - outputs
    inner = jnp.clip(residuals, -threshold, threshold)
    return inner * (residuals - inner / 2)


def _smooth_pinball(
    outputs: jax.Array, targets: jax.Array, *, quantile: float, width: float
) -> jax.Array:
    residuals = targets - outputs
    inner = jnp.clip(residuals, -width, width)
    below = jnp.maximum(-width - residuals, 0)
    return quantile * residuals + jnp.square(width - inner) / (4 * width) + below


def _capped_poisson(outputs: jax.Array, targets: jax.Array, *, largest: float) -> jax.Array:
    cap = math.log(largest)
    below = jnp.minimum(outputs, cap)
    return jnp.exp(below) + largest * (outputs - below) - jnp.clip(targets, 0, largest) * outputs
