"""`ConvexLoss`: a strongly convex, smooth loss with known constants, of any model.

Linear models (`models.linear`) and networks linearised at public weights (`models.tangent`) both
return it. What follows from the constants holds for both: how far deletions move the minimiser, and
what a step of gradient descent does to distances.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from certunlearn._numerics import checks
from certunlearn._numerics.curvature import contraction

# Float64 may compute the norm of a row above the bound that the row itself keeps, by this share.
_NORM_ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvexLoss:
    """A strongly convex, smooth loss. Its constants are taken on trust.

    A loss of a linear model has a `feature_norm`: it can make its own start (`init`) and check data
    (`check_data`), and `gradient_descent` trains it. A loss of another model has none and refuses
    these.

    Args:
      loss_fn: `loss_fn(params, batch)`: the mean over the batch's examples, plus
        `l2 / 2 * ||params||^2`. A linear model's batch is `(features [B, d], targets)`.
      strong_convexity, smoothness: m and L of every batch's loss, 0 < m <= L.
      gradient_bound: G > 0, of every single example's gradient norm *without* the L2 term, at all
        parameters of norm at most `radius`.
      l2: weight of the L2 term, positive. The loss holds this term: use no other weight decay.
      feature_norm: B, the largest L2 norm of an example's features; None if the model is not
        linear in features.
      outputs: of a linear model: parameters are `[d, outputs]`; None: `[d]`.
      check_targets: of a linear model: called with all targets, raises ValueError if they break the
        constants.
      radius: where G holds; infinity for everywhere. m and L hold everywhere.
      solution_norm: the largest norm of a minimiser, on any data; at most `radius`, as G must hold
        there. Needed only if `radius` is finite.

    Raises:
      TypeError: if `loss_fn` is not callable, or a constant is not a number.
      ValueError: if a constant is out of range, or `outputs` or `check_targets` are given without
        `feature_norm`.

    >>> loss = ConvexLoss(
    ...     loss_fn=lambda w, batch: jnp.mean(batch[0] @ w) + 0.25 * jnp.sum(w**2),
    ...     strong_convexity=0.5, smoothness=0.5, gradient_bound=1.0, l2=0.5, feature_norm=1.0,
    ... )
    >>> loss.init(3).shape
    (3,)
    """

    loss_fn: Callable[..., jax.Array]
    strong_convexity: float
    smoothness: float
    gradient_bound: float
    l2: float
    feature_norm: float | None = None
    outputs: int | None = None
    check_targets: Callable[[np.ndarray], None] | None = None
    radius: float = math.inf
    solution_norm: float = math.inf

    def __post_init__(self) -> None:
        """Checks every constant."""
        if not callable(self.loss_fn):
            raise TypeError(f"loss_fn must be callable, got {checks.shown(self.loss_fn)}")
        contraction(1.0, self.strong_convexity, self.smoothness)  # checks both
        checks.positive("gradient_bound", self.gradient_bound)
        checks.positive("l2", self.l2)
        if self.feature_norm is not None:
            checks.positive("feature_norm", self.feature_norm)
        elif self.outputs is not None or self.check_targets is not None:
            raise ValueError(
                "feature_norm must be given with outputs or check_targets, which belong to linear "
                "models, got None"
            )
        if self.radius != math.inf:
            largest = checks.positive("radius", self.radius)
            least = checks.real("solution_norm", self.solution_norm)
            if not 0 <= least <= largest:
                raise ValueError(
                    f"radius must be at least solution_norm={least!r}, as the gradient bound must "
                    f"hold where minimisers are, got {largest!r}"
                )

    def init(self, num_features: int, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """Zeros of shape `[num_features]`, or `[num_features, outputs]`.

        Raises:
          ValueError: if the loss is not one of a linear model.
        """
        self.require_linear("start from Linearized.zeros() instead")
        width = checks.positive_int("num_features", num_features)
        return jnp.zeros((width,) if self.outputs is None else (width, self.outputs), dtype)

    def check_data(self, data: Sequence[ArrayLike]) -> None:
        """Refuses concrete `data` that break the bounds that the constants rest on.

        Args:
          data: `(features [n, d], targets [n, ...])`.

        Raises:
          TypeError: if `data` are not two arrays of numbers.
          ValueError: if their shapes disagree, they break a bound, or the loss is not one of a
            linear model.
        """
        feature_norm = self.require_linear(
            "what Linearized.scales returns for the inputs keeps the bounds"
        )
        if not (isinstance(data, tuple | list) and len(data) == 2):
            raise TypeError(
                f"data must be (features [n, d], targets [n, ...]), got {checks.shown(data)}"
            )
        features = np.asarray(checks.numbers("features", data[0]))
        targets = np.asarray(checks.numbers("targets", data[1]))
        if features.ndim != 2 or len(features) == 0 or targets.shape[:1] != features.shape[:1]:
            shapes = f"shapes {features.shape} and {targets.shape}"
            raise ValueError(f"data must be (features [n, d], targets [n, ...]), got {shapes}")
        lengths = np.linalg.norm(features.astype(np.float64), axis=1)
        rule = f"features must have norm at most feature_norm = {feature_norm} (clip_features)"
        require(lengths <= feature_norm * (1 + _NORM_ROUNDING), rule, lengths)
        if self.check_targets is not None:
            self.check_targets(targets)

    def require_linear(self, remedy: str) -> float:
        """The feature norm, or ValueError with what to do instead."""
        if self.feature_norm is None:
            raise ValueError(
                f"loss must be one of a linear model, with a feature_norm, got None: {remedy}"
            )
        return self.feature_norm


def logistic(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Each example's cross entropy of two classes: outputs are the log odds of a label above 0."""
    return jax.nn.softplus(jnp.where(labels > 0, -outputs, outputs))


def softmax(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Each example's cross entropy `[n]`, of outputs `[n, classes]` and labels `[n]`.

    A label that is no class has the loss log(sum exp(outputs)).
    """
    chosen = jnp.arange(outputs.shape[1], dtype=outputs.dtype) == labels[:, None]
    return jax.nn.logsumexp(outputs, axis=1) - jnp.sum(jnp.where(chosen, outputs, 0), axis=1)


def require(kept: np.ndarray, rule: str, values: np.ndarray) -> None:
    """Raises ValueError with the rule and the first value that breaks it."""
    if not np.all(kept):
        raise ValueError(f"{rule}, got {values[~kept].item(0)!r} in row {int(np.argmin(kept))}")
