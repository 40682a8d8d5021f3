"""Strongly convex losses, whose gradient steps contract: noise at every step, or at the end."""

import dataclasses
from typing import Any, Self

import numpy as np

from certunlearn import checks
from certunlearn.mechanisms import base

_SEQUENCE = (
    "Each request is served from the state that the one before left (before a noise that is added "
    "at the end only: `history.before_noise`), with `next`: its initial distance is what the "
    "contraction has left of the one before, what the reference does otherwise on its data in the "
    "meantime, and the new deletions'. The certificate is then for the union of all deletions so "
    "far, and for the last release alone: what several releases say together it does not cover."
)


def contraction(learning_rate: Any, strong_convexity: float, smoothness: float) -> Any:
    """The factor by which a step of gradient descent brings two points closer, at most.

    Args:
      learning_rate: gamma, positive: a number or numbers.
      strong_convexity: m > 0 of every batch's loss.
      smoothness: L of every batch's loss, at least m.

    Returns:
      max(|1 - gamma m|, |1 - gamma L|), below 1 if and only if gamma < 2 / L.

    Raises:
      TypeError: if an argument is not a number.
      ValueError: if one is out of range.

    Guarantee:
      It bounds ||T(x) - T(y)|| / ||x - y|| for T(x) = x - gamma grad F(x), F the same batch's loss:
      T(x) - T(y) = (1 - gamma H) (x - y), where H, the mean Hessian between x and y, is symmetric
      with eigenvalues in [m, L]. Quadratics attain it.

    >>> float(contraction(learning_rate=1.0, strong_convexity=0.25, smoothness=1.5))
    0.75
    """
    gamma = np.asarray(checks.per_step("learning_rate", learning_rate, np.size(learning_rate)))
    low = checks.positive("strong_convexity", strong_convexity)
    high = checks.positive("smoothness", smoothness)
    if high < low:
        raise ValueError(f"smoothness must be at least strong_convexity {low!r}, got {high!r}")
    return np.maximum(np.abs(1 - gamma * low), np.abs(1 - gamma * high))


class _Contracting:
    """Fields and checks that both methods share; see them."""

    steps: Any
    initial_distance: Any
    learning_rate: Any
    strong_convexity: Any
    smoothness: Any

    def _check(self) -> None:
        base.set_fields(
            self,
            steps=checks.positive_int("steps", self.steps),
            initial_distance=checks.positive("initial_distance", self.initial_distance),
            smoothness=checks.positive("smoothness", self.smoothness),
            strong_convexity=checks.positive("strong_convexity", self.strong_convexity),
        )
        base.per_step(self, "learning_rate")
        contraction(self.learning_rate, self.strong_convexity, self.smoothness)  # checks the pair
        largest = float(np.max(self.learning_rate))
        if largest > 2 / self.smoothness:
            raise ValueError(
                f"learning_rate must be at most 2 / smoothness = {2 / self.smoothness:g}, beyond "
                f"which steps drive the two apart, got {largest!r}"
            )

    @property
    def factors(self) -> np.ndarray:
        """float64 `[steps]`: max(|1 - gamma m|, |1 - gamma L|)."""
        rates = np.broadcast_to(self.learning_rate, (self.steps,))
        return contraction(rates, self.strong_convexity, self.smoothness)

    @property
    def final_distance(self) -> float:
        """What the steps leave of the initial distance, without noise or with the same."""
        return float(np.prod(self.factors) * self.initial_distance)

    def next(self, *, stability_distance: float, gradient_difference: float) -> Self:
        """The mechanism for the next request, served from the state that this one left.

        Derivation. The reference has trained on what the new request retains, and taken the steps
        of all earlier requests on it. Between it and the reference of this request lie the new
        deletions: training ends at most `stability_distance` apart, and each step since makes d
        into at most c d + gamma * gradient_difference, so that they are never farther apart than

            S = max(stability_distance, gamma * gradient_difference / (1 - c)).

        This request's steps start at most D + S apart, and differ by the new deletions too.

        Args:
          stability_distance: how far apart training with and without the new deletions ends; see
            `convex.stability_distance`.
          gradient_difference: largest difference that they make to a step's gradient: 2 k G / n
            with full batches of n examples, of which k go.

        Raises:
          ValueError: if an argument is not positive, or the steps do not contract.
        """
        stability = checks.positive("stability_distance", stability_distance)
        difference = checks.positive("gradient_difference", gradient_difference)
        rates = np.broadcast_to(self.learning_rate, (self.steps,))
        if np.any(self.factors >= 1):
            raise ValueError(
                f"learning_rate must be below 2 / smoothness = {2 / self.smoothness:g} for a "
                "sequence of requests, or differences would add up"
            )
        drift = float(np.max(rates * difference / (1 - self.factors)))
        distance = self.initial_distance + max(stability, drift)
        for c, rate in zip(self.factors.tolist(), rates.tolist(), strict=True):
            distance = c * distance + rate * difference
        found: Any = dataclasses.replace(self, initial_distance=distance)  # type: ignore[type-var]
        return found

    def _assumptions(self, *more: str) -> tuple[str, ...]:
        return (
            "The guarantee compares the released parameters with the same procedure, training "
            "included, on the data without the forget set.",
            f"Training with and without the forget set ends at most {self.initial_distance!r} "
            "apart (L2 norm, parameter units).",
            f"The loss of every batch, its L2 term included, is {self.strong_convexity!r}-strongly "
            f"convex and {self.smoothness!r}-smooth in the parameters.",
            *more,
            base.PUBLIC,
            base.NO_MEMORY,
            *base.RUN,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectedNoisySGD(_Contracting, base.Separations):
    """Noisy SGD on strongly convex losses (Chien et al. 2024; full batch: Chourasia & Shah 2023).

    From the trained parameters, for each step

        x <- project(x - learning_rate_t * g_t + noise_t)

    onto the ball of `radius` around the centre, if there is one. Gradients are not clipped: that
    they contract is what the certificate rests on.

    Args:
      initial_distance: how far apart training with and without the forget set ends, in parameter
        units: from `convex.stability_distance`, or tracked along the actual training.
      learning_rate: gamma, at most 2 / smoothness: a number, `[steps]` numbers or a schedule.
      strong_convexity: m > 0 of every batch's loss, the L2 term included.
      smoothness: L, likewise.
      steps: T, number of noisy steps.
      radius: R, of the ball that noisy iterates (and the start) are projected on; None for none.

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
    learning_rate: Any
    strong_convexity: float
    smoothness: float
    steps: int
    radius: float | None = None

    def __post_init__(self) -> None:
        """Checks every argument and evaluates schedules."""
        self._check()
        if self.radius is not None:
            radius = checks.positive("radius", self.radius)
            nearer = min(self.initial_distance, 2 * radius)
            base.set_fields(self, radius=radius, initial_distance=nearer)

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
        ball = () if self.radius is None else (base.CENTER,)
        return self._assumptions(*ball)

    @property
    def sequence(self) -> str:
        """What holds for the union of deletions after several requests, in words."""
        return _SEQUENCE


@dataclasses.dataclass(frozen=True, kw_only=True)
class DescentToDelete(_Contracting, base.StepsThenNoise):
    """Gradient descent on strongly convex losses, then one Gaussian (Neel et al. 2021).

    From the trained parameters, `steps` steps x <- x - learning_rate_t * g_t on retain data without
    noise, and noise after the last.

    Args:
      initial_distance: as for `ProjectedNoisySGD`, and so are the next four.
      learning_rate: gamma, at most 2 / smoothness.
      strong_convexity: m.
      smoothness: L.
      steps: T, number of steps.

    Raises:
      TypeError: if an argument is not a number (or numbers).
      ValueError: if an argument is out of range.

    Guarantee:
      None by itself. The noise covers the distance that is left, c^T D and a thousandth more for
      rounding (`certunlearn.rounding`), by the exact Gaussian mechanism. Neel et al. state their
      noise for full-batch descent from a perfectly solved start; here any batches do, and D counts
      what training left unsolved.

    >>> m = DescentToDelete(
    ...     initial_distance=0.5, learning_rate=0.1, strong_convexity=1.0, smoothness=4.0, steps=10
    ... )
    >>> round(m.final_distance, 4)
    0.1743
    """

    initial_distance: float
    learning_rate: Any
    strong_convexity: float
    smoothness: float
    steps: int

    def __post_init__(self) -> None:
        """Checks every argument and evaluates schedules."""
        self._check()

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What a certificate for this mechanism rests on, in sentences."""
        return self._assumptions(base.ON_THE_WAY)

    @property
    def sequence(self) -> str:
        """What holds for the union of deletions after several requests, in words."""
        return _SEQUENCE
