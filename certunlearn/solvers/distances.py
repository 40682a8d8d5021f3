"""How far deletions move the minimiser of a convex loss, and the training that leads there."""

import math

from certunlearn._numerics import checks
from certunlearn._numerics.curvature import contraction
from certunlearn.mechanisms.contracting import Contracting, check_contracting
from certunlearn.models.loss import ConvexLoss
from certunlearn.solvers.descent import DataDependentSteps


def stability_distance(
    loss: ConvexLoss,
    *,
    size: int,
    deletions: int,
    gradient_norm: float,
) -> float:
    """How far the trained model can be from the model trained without the deleted examples.

    Args:
      loss: the loss that both minimise, of a linear or a linearised model.
      size: n, the number of examples before the deletion.
      deletions: k, how many are deleted; fewer than `size`.
      gradient_norm: the largest gradient norm, L2 term included, with which either training stops
        on its own data. It is the tolerance of both trainings, and not what one of them reached.
        Zero claims exact minimisation.

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

    >>> from certunlearn.convex import logistic_regression
    >>> loss = logistic_regression(feature_norm=1.0, l2=0.5)
    >>> stability_distance(loss, size=1000, deletions=5, gradient_norm=1e-3)
    0.024
    """
    if not 0 <= checks.real("gradient_norm", gradient_norm) < math.inf:
        raise ValueError(f"gradient_norm must be at least 0 and finite, got {gradient_norm!r}")
    # G holds at minimisers, which is all that the derivation needs.
    shift = _largest_difference(loss, size, deletions)
    return float(shift + 2 * gradient_norm) / loss.strong_convexity


def gradient_difference(
    loss: ConvexLoss, *, size: int, deletions: int, radius: float | None = None
) -> float:
    """How much k of n examples can change the gradient of the objective: 2 k G / n.

    Args:
      loss: the loss.
      size: n, the number of examples before the deletion.
      deletions: k, how many are deleted; fewer than `size`.
      radius: the largest norm of the parameters that it is to hold at. Needed if the loss's
        gradient bound holds within a ball only, as that of `ridge_regression`.

    Raises:
      ValueError: if the loss's gradient bound does not reach as far.

    >>> from certunlearn.convex import logistic_regression
    >>> loss = logistic_regression(feature_norm=1.0, l2=0.5)
    >>> gradient_difference(loss, size=1000, deletions=5)
    0.01
    """
    _check_reach(loss, radius, "pass radius, the largest norm of the parameters")
    return _largest_difference(loss, size, deletions)


def _largest_difference(loss: ConvexLoss, size: int, deletions: int) -> float:
    if checks.positive_int("deletions", deletions) >= checks.positive_int("size", size):
        raise ValueError(f"deletions must be fewer than size {size}, got {deletions}")
    return float(2 * deletions * loss.gradient_bound / size)


def _check_reach(loss: ConvexLoss, reach: float | None, remedy: str) -> None:
    """Refuses parameters of norm `reach` if G holds only for parameters of smaller norm."""
    if not math.isfinite(loss.radius):
        return
    if reach is None or checks.real("radius", reach) > loss.radius * (1 + 1e-12):
        got = "" if reach is None else f", and not up to {reach:.6g}"
        raise ValueError(
            f"loss has a gradient bound that holds for parameters of norm at most {loss.radius:.6g}"
            f"{got}: {remedy}"
        )


def next_request(
    mechanism: Contracting,
    loss: ConvexLoss,
    *,
    size: int,
    deletions: int,
    gradient_norm: float,
    center_norm: float = 0.0,
) -> Contracting:
    """`mechanism.next` with numbers that follow from the loss's constants.

    Args:
      mechanism: `ProjectedNoisySGD` or `DescentToDelete`, of the request before; its steps and
        those of all earlier requests took full batches.
      loss: the loss that all trainings and requests descend.
      size: n, the number of examples before the new deletion.
      deletions: k, how many are deleted now; fewer than `size`.
      gradient_norm: as for `stability_distance`.
      center_norm: norm of the centre of the ball that `ProjectedNoisySGD` projects on.

    Raises:
      TypeError: if the mechanism is another.
      ValueError: if its curvatures do not include those of the loss, or if the gradient bound holds
        within a ball only and parameters may leave it.

    Guarantee:
      The gradient bound is needed along one of the two references. With `ProjectedNoisySGD` both
      stay in the ball around the centre. With `DescentToDelete` the new request's reference is
      trained to within gradient_norm / m of its minimiser and its steps, on the same data, only
      come nearer (noise that was added at the end of a request is not in the state that is served).

    >>> from certunlearn.mechanisms import DescentToDelete
    >>> from certunlearn.convex import logistic_regression
    >>> loss = logistic_regression(feature_norm=1.0, l2=0.5)
    >>> first = DescentToDelete(
    ...     initial_distance=0.1, learning_rate=1.0, strong_convexity=0.5, smoothness=0.75, steps=4
    ... )
    >>> second = next_request(first, loss, size=995, deletions=5, gradient_norm=1e-3)
    >>> second.past_steps, round(second.initial_distance, 4)
    (4, 0.0266)
    """
    mechanism = check_contracting(mechanism)
    low, high = mechanism.strong_convexity, mechanism.smoothness
    if low > loss.strong_convexity or high < loss.smoothness:
        raise ValueError(
            f"mechanism must have curvatures that include the loss's, {loss.strong_convexity!r} to "
            f"{loss.smoothness!r}, got {low!r} to {high!r}"
        )
    stability = stability_distance(
        loss, size=size, deletions=deletions, gradient_norm=gradient_norm
    )
    reach = mechanism.largest_norm(
        center_norm=checks.real("center_norm", center_norm),
        trained_norm=loss.solution_norm + gradient_norm / loss.strong_convexity,
    )
    remedy = "make the loss with a larger radius, or keep parameters in a smaller ball"
    if math.isinf(reach):
        remedy = "noisy steps may leave that ball unless `radius` of all requests keeps them in"
    _check_reach(loss, reach, remedy)
    difference = _largest_difference(loss, size, deletions)
    return mechanism.next(stability_distance=stability, gradient_difference=difference)


def training_distance(
    loss: ConvexLoss,
    *,
    size: int,
    deletions: int,
    learning_rate: float,
    steps: int,
    start_norm: float | None = None,
) -> float:
    """How far apart full-batch gradient descent ends with and without the deleted examples.

    From the same start and for as many steps, however far from the minimum: D_0 = 0 and D_{t+1} <=
    c D_t + learning_rate * gradient_difference, c the contraction of a step.

    Args:
      loss: the loss that both descend.
      size: n, the number of examples before the deletion.
      deletions: k, how many are deleted; fewer than `size`.
      learning_rate: gamma of every step, at most 2 / smoothness.
      steps: how many steps both take, a number fixed beforehand: `gradient_descent(steps=...)`.
      start_norm: norm of the start, 0 for `loss.init`. Needed if the loss's gradient bound holds
        within a ball only.

    Raises:
      ValueError: if `steps` is the number that a training to a tolerance took, which training on
        other data would not take, or the gradient bound may not hold on the way.

    Guarantee:
      A step maps points at distance r to points at distance at most c r on the same data, and other
      data move the result by gamma times the difference of the gradients, at the points of one of
      the two trainings. These are never farther from the training's minimiser than the start is:
      of norm at most start_norm + 2 solution_norm. In exact arithmetic: train in float64, or add
      what `mechanisms.rounding` says.

    >>> from certunlearn.convex import logistic_regression
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
    if isinstance(steps, DataDependentSteps):
        raise ValueError(
            f"steps must be a number fixed beforehand, got the {int(steps)} steps that a training "
            "to a tolerance took: training on other data stops elsewhere. Train with "
            "gradient_descent(steps=...), or use stability_distance"
        )
    count = checks.steps("steps", steps)
    if start_norm is not None and not 0 <= checks.real("start_norm", start_norm) < math.inf:
        raise ValueError(f"start_norm must be at least 0 and finite, got {start_norm!r}")
    reach = None if start_norm is None else start_norm + 2 * loss.solution_norm
    _check_reach(loss, reach, "pass start_norm, of a start near enough to 0")
    each = learning_rate * _largest_difference(loss, size, deletions)
    return each * (count if factor == 1 else (1 - factor**count) / (1 - factor))
