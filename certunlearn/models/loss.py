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
from chex import ArrayTree
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
    these. Calling a loss, `loss(params, batch)`, is calling its `loss_fn`.

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
      output_loss: of a linear model: `output_loss(outputs, targets, weights) -> [n]`, each
        example's loss as a function of its outputs `[n]` or `[n, outputs]`; weights are None, or
        `[n]` with a `largest_weight`. `loss_fn` must be its mean, plus the L2 term. None: solvers
        differentiate `loss_fn` itself, which takes longer.
      largest_weight: of a linear model: batches are `(features, targets, weights)`, with weights
        `[n]` between 0 and this number. None: batches have no weights.

    Raises:
      TypeError: if `loss_fn` is not callable, or a constant is not a number.
      ValueError: if a constant is out of range, or `outputs`, `check_targets`, `output_loss` or
        `largest_weight` are given without `feature_norm`.

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
    output_loss: Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array] | None = None
    largest_weight: float | None = None

    def __call__(self, params: ArrayTree, batch: Sequence[ArrayTree]) -> jax.Array:
        """`loss_fn(params, batch)`: the loss of a batch, L2 term included."""
        return self.loss_fn(params, batch)

    def __post_init__(self) -> None:
        """Checks every constant."""
        if not callable(self.loss_fn):
            raise TypeError(f"loss_fn must be callable, got {checks.shown(self.loss_fn)}")
        contraction(1.0, self.strong_convexity, self.smoothness)  # checks both
        checks.positive("gradient_bound", self.gradient_bound)
        checks.positive("l2", self.l2)
        if self.feature_norm is not None:
            checks.positive("feature_norm", self.feature_norm)
        elif any(f is not None for f in (self.outputs, self.check_targets, self.output_loss)) or (
            self.largest_weight is not None
        ):
            raise ValueError(
                "feature_norm must be given with outputs, check_targets, output_loss or "
                "largest_weight, which belong to linear models, got None"
            )
        if self.largest_weight is not None:
            checks.positive("largest_weight", self.largest_weight)
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
          data: `(features [n, d], targets [n, ...])`, and weights `[n]` if the loss has them.

        Raises:
          TypeError: if `data` are not two arrays of numbers, or three.
          ValueError: if their shapes disagree, they break a bound, or the loss is not one of a
            linear model.
        """
        feature_norm = self.require_linear(
            "what Linearized.scales returns for the inputs keeps the bounds"
        )
        weighted = self.largest_weight is not None
        wanted = f"(features [n, d], targets [n, ...]{', weights [n]' if weighted else ''})"
        if not (isinstance(data, tuple | list) and len(data) == 2 + weighted):
            raise TypeError(f"data must be {wanted}, got {checks.shown(data)}")
        features = np.asarray(checks.numbers("features", data[0]))
        targets = np.asarray(checks.numbers("targets", data[1]))
        if features.ndim != 2 or len(features) == 0 or targets.shape[:1] != features.shape[:1]:
            shapes = f"shapes {features.shape} and {targets.shape}"
            raise ValueError(f"data must be {wanted}, got {shapes}")
        lengths = np.linalg.norm(features.astype(np.float64), axis=1)
        rule = f"features must have norm at most feature_norm = {feature_norm} (clip_features)"
        require(lengths <= feature_norm * (1 + _NORM_ROUNDING), rule, lengths)
        if self.check_targets is not None:
            self.check_targets(targets)
        if self.largest_weight is not None:
            weights = np.asarray(checks.numbers("weights", data[2]))
            if weights.shape != features.shape[:1]:
                raise ValueError(
                    f"weights must be of shape {features.shape[:1]}, got {weights.shape}"
                )
            rule = f"weights must be between 0 and largest_weight = {self.largest_weight!r}"
            require((weights >= 0) & (weights <= self.largest_weight), rule, weights)

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
