"""Minimising a strongly convex objective to a fixed tolerance, then one Gaussian."""

import dataclasses
import math

import numpy as np
import optax
from chex import ArrayTree

from certunlearn._numerics import checks
from certunlearn.mechanisms import base, pairs, sentences

_REFERENCES = (base.MINIMIZER, "retrained")
_FIXED = (
    "The objective, the tolerance of the gradient norm, the strong convexity and the noise were "
    "fixed before any request, without looking at the trained model, at the run or at the data "
    "that may be deleted."
)
_PRIVATE = (
    "Only the released parameters leave. Private are the solver's passes and time, the gradient "
    "norm that it reached, whether an attempt failed to reach the tolerance, and the parameters "
    "without noise."
)
_FRESH = (
    "The noise is fresh: its key is secret and is never used again, for a second attempt either, "
    "and nothing that led to the parameters before the noise depends on it."
)
_REAL = (
    "The noise is exactly Gaussian. It was added in float64 to the parameters whose gradient norm "
    "was verified, and only the sum was rounded to the released precision."
)
_POST = "What follows the noise uses the released parameters and retain data only."


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerturbedMinimizer(pairs.LastNoisy):
    """Minimises the objective on the retain data to a fixed tolerance, then adds one Gaussian.

        find w with ||grad F_R(w)|| <= gradient_norm, by any solver from any start
        release w + N(0, noise_scale^2 I)

    Args:
      gradient_norm: tau, the L2 norm of the objective's gradient on the retain data, every term
        included, that is reached before the noise. Fix it before any request.
      strong_convexity: m, of the objective on any retain data; that of the loss, or less.
      reference: `"minimizer"`, the exact minimiser on the retain data with the same noise, or
        `"retrained"`, any other run on the retain data that stops by the same rule, which doubles
        the distance.

    Raises:
      TypeError: if a number is none.
      ValueError: if an argument is out of range, or gradient_norm / strong_convexity beyond
        float64.

    Guarantee:
      None by itself. ||w - w_R|| <= gradient_norm / m, w_R the minimiser, as m ||w - w_R|| <=
      ||grad F_R(w) - grad F_R(w_R)||. So the release and w_R + N(0, noise_scale^2 I) are two
      Gaussians at most so far apart. What does not enter: how many examples were deleted, which,
      how they were chosen (adaptive requests are covered), the trained model, the solver, earlier
      requests, and any bound on gradients. Of one Gaussian the accountant `"interpolation"` is
      exact. `unlearn` refuses to add the noise unless it has verified the gradient norm.

    Source:
      Strong convexity, and Balle & Wang (2018); proved in docs/theory/minimizer.md.

    >>> m = PerturbedMinimizer(gradient_norm=1e-4, strong_convexity=0.01)
    >>> m.initial_distance, m.steps
    (0.01, 1)
    """

    gradient_norm: float
    strong_convexity: float
    reference: str = base.MINIMIZER

    steps = 1
    # A loss of m / 2 ||w - c||^2 has its points of gradient norm tau at the distance tau / m.
    attackable = True

    def __post_init__(self) -> None:
        """Checks every argument."""
        for name in ("gradient_norm", "strong_convexity"):
            value = checks.positive(name, base.field_values(self)[name])
            base.set_fields(self, **{name: value})
        checks.choice("reference", self.reference, _REFERENCES)
        if not 0 < self.initial_distance < math.inf:
            raise ValueError(
                "gradient_norm / strong_convexity must be positive and fit a float64, got "
                f"{self.gradient_norm!r} / {self.strong_convexity!r}"
            )

    @property
    def initial_distance(self) -> float:  # type: ignore[override]
        """Largest distance of the point that is found and its reference, in parameter units."""
        distance = self.gradient_norm / self.strong_convexity
        return distance * (1.0 if self.reference == base.MINIMIZER else 2.0)

    @property
    def solve_to(self) -> float:  # type: ignore[override]
        """The gradient norm to be reached and verified before the noise."""
        return self.gradient_norm

    @property
    def contraction(self) -> np.ndarray:
        """float64 `[1]`: 1."""
        return np.ones(1)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What a certificate for this mechanism rests on, in sentences."""
        return (
            _compared(self.reference),
            "Before the noise the gradient of the objective on the retain data, every term "
            f"included, had an L2 norm of at most {self.gradient_norm!r} (parameter units).",
            "On any data the objective is strongly convex with constant at least "
            f"{self.strong_convexity!r} in all parameters that the certificate covers: none of "
            "them, and no intercept, is left without its part of the quadratic term.",
            "The objective is a function of the parameters and the retain data: nothing in it, "
            "such as a teacher, a prior mean or a weight, was made from the forget set.",
            sentences.PUBLIC_MAP,
            sentences.PUBLIC,
            _FIXED,
            _PRIVATE,
            _POST,
            _FRESH,
            _REAL,
        )

    @property
    def sequence(self) -> str:
        """What holds for the union of deletions after several requests, in words."""
        return (
            "Nothing accumulates. Each request is served from whatever model there is, with the "
            "same certificate for the union of all deletions so far, also where requests were "
            "chosen by looking at earlier releases: given all that was released and requested "
            "before, the release is as close as certified to its reference on the data that "
            "remains. Each release has fresh noise, and releases compose: what several say "
            "together of an example, from its deletion on, has the root of the sum of their mu^2. "
            f"{sentences.UNION}"
        )

    def update(self, center: ArrayTree | None) -> optax.GradientTransformation:
        """No step."""
        del center
        return optax.set_to_zero()

    def step_transforms(
        self, noise: optax.GradientTransformation, center: ArrayTree | None
    ) -> tuple[optax.GradientTransformation, ...]:
        """Zero whatever the gradient is, and noise."""
        return self.update(center), noise

    def loss_problem(self, strong_convexity: float) -> str | None:
        """Whether the loss is less convex than what the distance rests on."""
        if strong_convexity >= self.strong_convexity:
            return None
        return (
            f"strong_convexity must be at most the loss's, {strong_convexity!r}, got "
            f"{self.strong_convexity!r}: points of a small gradient could be farther apart"
        )

    def check_run(self, run: base.PlannedRun) -> None:
        """Also refuses batches of a part of the data where nothing takes them."""
        if run.centered:
            raise ValueError(
                "center must be None for PerturbedMinimizer: its guarantee holds from any start, "
                "and nothing is projected"
            )
        if run.per_example:
            raise ValueError(
                "per_example must be False for PerturbedMinimizer, which minimises the objective "
                "as it is: no gradient is clipped"
            )
        if run.batch_size != run.size and not run.finetuned:
            raise ValueError(
                f"batch_size must be None or all {run.size} examples for PerturbedMinimizer "
                f"without finetune, got {run.batch_size}: it is the objective on all of them that "
                "is minimised"
            )


def _compared(reference: str) -> str:
    if reference == base.MINIMIZER:
        return sentences.compared(reference)
    return (
        "The guarantee compares the released parameters with those of any other run on the retain "
        "data that reaches the same tolerance by any solver from any start, such as from a model "
        "trained without the forget set."
    )
