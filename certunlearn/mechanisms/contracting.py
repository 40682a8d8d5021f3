"""Strongly convex losses, whose gradient steps contract: noise at every step, or at the end."""

import dataclasses
import math
from typing import Self

import numpy as np

from certunlearn._numerics import checks, curvature
from certunlearn._numerics.checks import ScalarOrSchedule
from certunlearn.mechanisms import base, pairs, sentences
from certunlearn.mechanisms.step_rules import StepRule

SERVED_FROM_STATE = (
    "Each request is served from the state that the one before left (before a noise that is added "
    "at the end only: `history.before_noise`), with `next`: its initial distance is what the "
    "contraction has left of the one before, what the reference does otherwise on its data in all "
    "steps so far, and the new deletions'. The certificate is then for the union of all deletions "
    "so far, and for the last release alone: what several releases say together it does not cover. "
    "If a request depends on earlier releases, what remains true is conditional: given the "
    "requests and the noise of earlier ones, the release is as close as certified to the same "
    "procedure on the same remaining data; which examples were deleted may itself tell of them."
)


class Contracting(pairs.PairOfRuns):
    """Fields and checks that both methods share; see them."""

    initial_distance: float
    learning_rate: ScalarOrSchedule
    strong_convexity: float
    smoothness: float
    past_steps: int
    past_factor: float
    past_drift: float

    def _check(self) -> None:
        base.set_fields(
            self,
            steps=checks.steps("steps", self.steps),
            initial_distance=checks.positive("initial_distance", self.initial_distance),
            smoothness=checks.positive("smoothness", self.smoothness),
            strong_convexity=checks.positive("strong_convexity", self.strong_convexity),
        )
        base.check_learning_rate(self)
        curvature.check_curvature(self.strong_convexity, self.smoothness)
        largest = float(np.max(checks.known(self.learning_rate)))
        if largest > 2 / self.smoothness:
            raise ValueError(
                f"learning_rate must be at most 2 / smoothness = {2 / self.smoothness:g}, beyond "
                f"which steps drive the two apart, got {largest!r}"
            )
        self._check_past()

    def _check_past(self) -> None:
        count = checks.optional_count("past_steps", self.past_steps) or 0
        factor = checks.real("past_factor", self.past_factor)
        drift = checks.real("past_drift", self.past_drift)
        if not 0 <= factor <= 1:
            raise ValueError(f"past_factor must be between 0 and 1, got {factor!r}")
        if not (math.isfinite(drift) and drift >= 0):
            raise ValueError(f"past_drift must be at least 0 and finite, got {drift!r}")
        if count == 0 and (factor, drift) != (1.0, 0.0):
            raise ValueError(
                f"past_factor and past_drift must be 1 and 0 without past_steps, got {factor!r} "
                f"and {drift!r}"
            )
        base.set_fields(self, past_steps=count, past_factor=factor, past_drift=drift)

    @property
    def factors(self) -> np.ndarray:
        """float64 `[steps]`: max(|1 - gamma m|, |1 - gamma L|)."""
        rates = np.broadcast_to(checks.known(self.learning_rate), (self.steps,))
        return curvature.factors(rates, self.strong_convexity, self.smoothness)

    @property
    def final_distance(self) -> float:
        """What the steps leave of the initial distance, without noise or with the same."""
        return float(np.prod(self.factors) * self.start_distance)

    def _next(self, stability_distance: float, gradient_difference: float) -> Self:
        """What both methods do; see `ProjectedNoisySGD.next`."""
        stability = checks.positive("stability_distance", stability_distance)
        difference = checks.positive("gradient_difference", gradient_difference)
        rates = np.broadcast_to(checks.known(self.learning_rate), (self.steps,))
        factor, drift = self.past_factor * float(np.prod(self.factors)), self.past_drift
        for c, rate in zip(self.factors.tolist(), rates.tolist(), strict=True):
            drift = c * drift + rate
        return dataclasses.replace(
            self,  # type: ignore[type-var]
            initial_distance=self.final_distance + factor * stability + drift * difference,
            past_steps=self.past_steps + self.steps,
            past_factor=factor,
            past_drift=drift,
        )

    def _assumptions(self, *more: str) -> tuple[str, ...]:
        distance = self.initial_distance
        start = (
            "Training with and without the forget set ends at most "
            f"{distance!r} apart (L2 norm, parameter units)."
        )
        if self.past_steps:
            start = (
                f"What training and the {self.past_steps} steps of earlier requests left, and what "
                "they leave on the data without the forget set, is at most "
                f"{distance!r} apart (L2 norm, parameter units)."
            )
        return (
            "The guarantee compares the released parameters with the same procedure, training "
            "included, on the data without the forget set.",
            start,
            f"The loss of every batch, its L2 term included, is {self.strong_convexity!r}-strongly "
            f"convex and {self.smoothness!r}-smooth in the parameters.",
            *more,
            sentences.PUBLIC,
            sentences.NO_MEMORY,
            *sentences.RUN,
        )

    @property
    def sequence(self) -> str:
        """What holds for the union of deletions after several requests, in words."""
        return SERVED_FROM_STATE

    def next(self, *, stability_distance: float, gradient_difference: float) -> Self:
        """The mechanism for the next request, served from the state that this one left."""
        raise NotImplementedError

    def largest_norm(self, *, center_norm: float, trained_norm: float) -> float:
        """The largest norm that parameters of one reference can have in all requests so far.

        Args:
          center_norm: norm of the centre of the ball that is projected on, if there is one.
          trained_norm: the largest norm of trained parameters.
        """
        raise NotImplementedError

    def step_rule(self) -> StepRule:
        """A step down the gradient, which is not clipped."""
        return StepRule.of(learning_rate=self.learning_rate)


def check_contracting(mechanism: object) -> Contracting:
    """The mechanism, or TypeError if its steps do not contract by the curvature of a loss."""
    if not isinstance(mechanism, Contracting):
        raise TypeError(
            f"mechanism must be ProjectedNoisySGD or DescentToDelete, got {checks.shown(mechanism)}"
        )
    return mechanism
