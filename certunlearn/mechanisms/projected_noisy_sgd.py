"""Noisy SGD on strongly convex losses, projected onto a ball."""

import dataclasses
import math
from typing import Self

import numpy as np

from certunlearn._numerics import checks
from certunlearn._numerics.checks import ScalarOrSchedule
from certunlearn.mechanisms import base, sentences, step_rules
from certunlearn.mechanisms.contracting import Contracting
from certunlearn.mechanisms.step_rules import StepRule


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectedNoisySGD(Contracting):
    """Noisy SGD on strongly convex losses (Chien et al. 2024; full batch: Chourasia & Shah 2023).

    From the trained parameters, for each step

        x <- project(x - learning_rate_t * g_t + noise_t)

    onto the ball of `radius` around the centre, if there is one. Gradients are not clipped: that
    they contract is what the certificate rests on.

    Args:
      initial_distance: how far apart training with and without the forget set ends, in parameter
        units: from `convex.stability_distance`, or tracked along the actual training.
      learning_rate: gamma, at most 2 / smoothness: a number, `[steps]` numbers or a schedule, maybe
        0 at some steps.
      strong_convexity: m > 0 of every batch's loss, the L2 term included.
      smoothness: L, likewise.
      steps: T, number of noisy steps.
      radius: R, of the ball that noisy iterates (and the start) are projected on; None for none.
        Starts are then at most 2 R apart too (`start_distance`).
      past_steps: steps of earlier requests, as `next` counts them; so for the next two. 0 for a
        first request.
      past_factor: product of the contractions of those steps; 1 for a first request.
      past_drift: how far those steps lead two runs apart whose gradients differ by 1, in units of
        the learning rate; 0 for a first request.
      past_radius: largest `radius` of earlier requests; None if there were none, or one had none.

    Raises:
      TypeError: if an argument is not a number (or numbers).
      ValueError: if an argument is out of range.

    Guarantee:
      None by itself. With no shift the loss m/2 |x|^2 (or L/2 |x|^2) on both data does all that the
      separation allows, so interpolation, mu = c^T D / (sigma sqrt(1 + c^2 + ... + c^(2T-2))), is
      exact for this class of losses.

    >>> m = ProjectedNoisySGD(
    ...     initial_distance=0.5, learning_rate=0.1, strong_convexity=1.0, smoothness=4.0, steps=10
    ... )
    >>> m.separation(0, 0.5)
    0.45
    """

    initial_distance: float
    learning_rate: ScalarOrSchedule
    strong_convexity: float
    smoothness: float
    steps: int
    radius: float | None = None
    past_steps: int = 0
    past_factor: float = 1.0
    past_drift: float = 0.0
    past_radius: float | None = None

    def __post_init__(self) -> None:
        """Checks every argument and evaluates schedules."""
        self._check()
        for name in ("radius", "past_radius"):
            value = getattr(self, name)
            if value is not None:
                base.set_fields(self, **{name: checks.positive(name, value)})
        if self.past_radius is not None and not self.past_steps:
            raise ValueError(f"past_radius must be None without past_steps, got {self.past_radius}")

    @property
    def start_distance(self) -> float:
        """The initial distance, or the diameter of the ball that starts are projected on."""
        return min(self.initial_distance, self.diameter)

    @property
    def reach(self) -> float:
        """Largest distance from the centre of all parameters, those of earlier requests too."""
        past = (self.past_radius,) if self.past_steps else ()
        return max(math.inf if radius is None else radius for radius in (self.radius, *past))

    def next(self, *, stability_distance: float, gradient_difference: float) -> Self:
        """The mechanism for the next request, served from the state that this one left.

        `convex.next_request` works out both numbers for a loss with known constants, and checks
        that they hold wherever the runs go; use it where you can.

        Derivation. The reference of this request and that of the next both train, then take the
        steps of all requests so far: on what this request retains, and on what the next one
        retains. Training ends at most `stability_distance` apart, and each of *all* these steps
        makes d into at most c d + gamma * gradient_difference, with its own gamma and c. So the two
        references end at most

            past_factor * stability_distance + past_drift * gradient_difference

        apart, with past_factor the product of all c so far and past_drift the sum of all gamma so
        far, each times the later c. The state that this request leaves is at most `final_distance`
        from its reference. The next request starts at most the sum of both from its own.

        Args:
          stability_distance: how far apart training with and without the new deletions ends; see
            `convex.stability_distance`.
          gradient_difference: the most that the new deletions change a step's gradient, at every
            point that one of the two references passes through: 2 k G / n with full batches of n
            examples, of which k go, if G bounds gradients *there* (see
            `convex.gradient_difference`).

        Raises:
          ValueError: if an argument is not positive.
        """
        found = self._next(stability_distance, gradient_difference)
        reach = self.reach if math.isfinite(self.reach) else None
        return dataclasses.replace(found, past_radius=reach)

    @property
    def contraction(self) -> np.ndarray:
        """float64 `[steps]`: max(|1 - gamma m|, |1 - gamma L|)."""
        return self.factors

    @property
    def diameter(self) -> float:
        """Largest distance of two points that a step can end at."""
        return np.inf if self.radius is None else 2.0 * self.radius

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What a certificate for this mechanism rests on, in sentences."""
        if self.radius is None:
            return self._assumptions()
        start = f"The run started within {self.radius!r} of the centre (L2 norm, parameter units)."
        return self._assumptions(start, sentences.CENTER)

    @property
    def uses_center(self) -> bool:  # type: ignore[override]
        """Whether there is a ball to project on."""
        return self.radius is not None

    @property
    def start_radius(self) -> float | None:  # type: ignore[override]
        """Radius of the ball, if there is one."""
        return self.radius

    def largest_norm(self, *, center_norm: float, trained_norm: float) -> float:
        """Within the balls of all requests."""
        del trained_norm
        return self.reach + center_norm

    def step_rule(self) -> StepRule:
        """A step, noise, and then the projection, if there is one."""
        projection = step_rules.NOWHERE if self.radius is None else step_rules.AFTER_NOISE
        return StepRule.of(
            learning_rate=self.learning_rate, radius=self.radius, projection=projection
        )
