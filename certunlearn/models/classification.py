"""Convex losses of linear classifiers: logistic, softmax, squared hinge and least squares.

Each states its constants, with their proof. Everything here raises TypeError or ValueError if an
argument is of the wrong type or out of range.

Weights are public. Weights by class and by example multiply an example's loss; the mean stays one
over the n examples, whatever their weights, so that deletions change it as they change any mean. A
weight may depend on its own row and on public knowledge, never on other rows: weights that balance
the classes of the private data are not public.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from certunlearn._numerics import checks
from certunlearn.models import loss as losses
from certunlearn.models.linear import Link, largest_of, least_radius, linear_loss
from certunlearn.models.loss import ConvexLoss


def logistic_regression(
    feature_norm: float,
    l2: float,
    classes: int | None = None,
    *,
    class_weights: Sequence[float] | None = None,
    largest_weight: float | None = None,
) -> ConvexLoss:
    """Logistic regression (two classes) or softmax regression, with an L2 term.

    Args:
      feature_norm: B, the largest L2 norm of an example's features. There is no intercept: see
        `append_intercept` for one.
      l2: weight of the L2 term, positive.
      classes: None or 2: params `[d]`, labels 0 and 1. k >= 3: params `[d, k]`, labels 0 to k - 1.
      class_weights: a public number of at least 0 for each class; None: 1 for all.
      largest_weight: batches are `(features, targets, weights)`, with public weights between 0 and
        this number; None: batches have no weights.

    Guarantee:
      For all parameters, with W = 1 (or the largest class weight times `largest_weight`): m = l2;
      L = l2 + W B^2/4 and G = W B for two classes, L = l2 + W B^2/2 and G = sqrt(2) W B for more.
      All are attained or approached. They hold for all finite data, as the loss scales longer
      features down to norm B, clips weights, and knows no other labels: of two classes, those above
      0 are class 1; of more, a label that is no class has the loss log(sum exp(outputs)), of
      gradient x p^T (and loss 0 with class weights).
      *Two classes.* The gradient is (s - y) x and the Hessian s (1 - s) x x^T, s in (0, 1) the
      sigmoid of the logit: |s - y| < 1, 0 < s (1 - s) <= 1/4 and ||x x^T|| = ||x||^2 <= B^2.
      *More.* The gradient is x (p - e_y)^T, of norm ||x|| ||p - e_y||, and ||p - e_y||^2 =
      (1 - p_y)^2 + sum_{j != y} p_j^2 <= 2 (1 - p_y)^2 <= 2. The Hessian is the Kronecker product
      of x x^T and diag(p) - p p^T. For any v, v^T (diag(p) - p p^T) v is the variance of v_j when
      j has law p: at least 0, and at most (max v - min v)^2 / 4 (Popoviciu), which is at most
      ||v||^2 / 2 as (a - b)^2 <= 2 (a^2 + b^2). The L2 term adds l2 to every eigenvalue.
      Weights multiply an example's gradient and Hessian.

    >>> loss = logistic_regression(feature_norm=2.0, l2=0.1)
    >>> loss.strong_convexity, loss.smoothness, loss.gradient_bound
    (0.1, 1.1, 2.0)
    """
    bound, l2 = checks.positive("feature_norm", feature_norm), checks.positive("l2", l2)
    count = _classes(classes)
    binary = count == 2
    each, weight = _weighted(losses.logistic if binary else losses.softmax, class_weights, count)
    link = Link(
        each=each,
        curvature=weight / (4 if binary else 2),
        slope=weight * (1.0 if binary else math.sqrt(2)),
        labels=True,
        check_targets=_check_labels(count),
        outputs=None if binary else count,
    )
    return linear_loss(link, bound=bound, l2=l2, largest_weight=largest_weight)


def squared_hinge(
    feature_norm: float,
    l2: float,
    *,
    radius: float | None = None,
    class_weights: Sequence[float] | None = None,
    largest_weight: float | None = None,
) -> ConvexLoss:
    """The squared hinge loss of two classes, 1/2 max(0, 1 - s z)^2 with s = +1 or -1; params `[d]`.

    Args:
      feature_norm, l2, class_weights, largest_weight: as for `logistic_regression`. Labels are 0
        and 1; s is +1 for those above 0.
      radius: where G is to hold; None: `sqrt(W / l2)`, twice the largest norm of a minimiser; at
        least that norm.

    Guarantee:
      With W = 1 (or the largest class weight times `largest_weight`): m = l2 and L = l2 + W B^2 for
      all parameters, as the derivative in z, -s max(0, 1 - s z), has slope 0 or 1. It is of
      magnitude at most 1 + |z|, so G = W B (1 + B radius) where ||params|| <= radius; it has no
      bound for all.
      Every minimiser w has norm at most sqrt(W / l2) / 2: there l2 w is the mean of weighted
      s x max(0, 1 - s z), so l2 ||w||^2 is the mean of weighted t max(0, 1 - t) with t = s z, and
      t max(0, 1 - t) <= 1/4 for every t. Data with t = 1/2 everywhere attain it.

    >>> loss = squared_hinge(feature_norm=1.0, l2=0.25)
    >>> loss.smoothness, loss.gradient_bound  # the bound where ||params|| <= 2
    (1.25, 3.0)
    """
    bound, l2 = checks.positive("feature_norm", feature_norm), checks.positive("l2", l2)
    each, weight = _weighted(_squared_hinges, class_weights, 2)
    total = weight * largest_of(largest_weight)
    solution_norm = math.sqrt(total / l2) / 2
    radius = least_radius(radius, solution_norm, "sqrt(weight / l2) / 2")
    link = Link(
        each=each,
        curvature=weight,
        slope=weight * (1 + bound * radius),
        labels=True,
        check_targets=_check_labels(2),
        radius=radius,
        solution_norm=solution_norm,
    )
    return linear_loss(link, bound=bound, l2=l2, largest_weight=largest_weight)


def ridge_classification(
    feature_norm: float,
    l2: float,
    classes: int | None = None,
    *,
    radius: float | None = None,
    class_weights: Sequence[float] | None = None,
    largest_weight: float | None = None,
) -> ConvexLoss:
    """Least squares on targets +1 for the row's class and -1 for the others, with an L2 term.

    Args:
      feature_norm, l2, classes, class_weights, largest_weight: as for `logistic_regression`; params
        `[d]` of two classes (+1 for class 1), `[d, k]` of more.
      radius: where G is to hold; None: `sqrt(W o / l2)` with o the number of outputs, twice the
        largest norm of a minimiser; at least that norm.

    Guarantee:
      As for `ridge_regression` with targets of norm Y = sqrt(o), as each of the o outputs has +1 or
      -1: m = l2 and L = l2 + W B^2 for all parameters, G = W B (B radius + sqrt(o)) where
      ||params|| <= radius. A label that is no class has -1 everywhere (and loss 0 with class
      weights).

    >>> loss = ridge_classification(feature_norm=1.0, l2=0.25, classes=4)
    >>> loss.smoothness, loss.gradient_bound, loss.radius
    (1.25, 6.0, 4.0)
    """
    bound, l2 = checks.positive("feature_norm", feature_norm), checks.positive("l2", l2)
    count = _classes(classes)
    outputs = None if count == 2 else count
    each, weight = _weighted(_one_against_all, class_weights, count)
    total = weight * largest_of(largest_weight)
    size = math.sqrt(outputs or 1)
    solution_norm = size * math.sqrt(total / l2) / 2
    radius = least_radius(radius, solution_norm, "sqrt(weight outputs / l2) / 2")
    link = Link(
        each=each,
        curvature=weight,
        slope=weight * (bound * radius + size),
        labels=True,
        check_targets=_check_labels(count),
        outputs=outputs,
        radius=radius,
        solution_norm=solution_norm,
    )
    return linear_loss(link, bound=bound, l2=l2, largest_weight=largest_weight)


def _classes(classes: int | None) -> int:
    count = 2 if classes is None else checks.positive_int("classes", classes)
    if count < 2:
        raise ValueError(f"classes must be at least 2, got {count}")
    return count


def _check_labels(count: int) -> Callable[[np.ndarray], None]:
    rule = f"targets must be labels from 0 to {count - 1}"
    return lambda y: losses.require(np.isin(y, np.arange(count)), rule, y)


def _weighted(
    each: Callable[[jax.Array, jax.Array], jax.Array],
    class_weights: Sequence[float] | None,
    count: int,
) -> tuple[Callable[[jax.Array, jax.Array], jax.Array], float]:
    """`each` times the weights of the classes, and the largest of them."""
    if class_weights is None:
        return each, 1.0
    if isinstance(class_weights, str | dict) or np.shape(class_weights) != (count,):
        raise ValueError(
            f"class_weights must be {count} public numbers, one for each class, got "
            f"{checks.shown(class_weights)}"
        )
    weights = tuple(checks.real("class_weights", weight) for weight in class_weights)
    if not all(0 <= weight < math.inf for weight in weights) or max(weights) == 0:
        raise ValueError(
            f"class_weights must be finite, at least 0 and not all 0, got {checks.shown(weights)}"
        )
    return functools.partial(_times_class_weights, each, weights), max(weights)


def _times_class_weights(
    each: Callable[[jax.Array, jax.Array], jax.Array],
    weights: tuple[float, ...],
    outputs: jax.Array,
    labels: jax.Array,
) -> jax.Array:
    table = jnp.asarray(weights, outputs.dtype)
    if len(weights) == 2:  # any label above 0 is class 1
        return jnp.where(labels > 0, table[1], table[0]) * each(outputs, labels)
    chosen = jnp.arange(len(weights), dtype=labels.dtype) == labels[:, None]
    return jnp.sum(jnp.where(chosen, table, 0), axis=1) * each(outputs, labels)


def _squared_hinges(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    margins = jnp.where(labels > 0, outputs, -outputs)
    return jnp.square(jnp.maximum(1 - margins, 0)) / 2


def _one_against_all(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    if outputs.ndim == 1:
        return jnp.square(outputs - jnp.where(labels > 0, 1, -1)) / 2
    chosen = jnp.arange(outputs.shape[1], dtype=labels.dtype) == labels[:, None]
    return jnp.sum(jnp.square(outputs - jnp.where(chosen, 1, -1)), axis=1) / 2
