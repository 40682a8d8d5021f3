"""Strongly convex losses, whose gradient steps contract: noise at every step, or at the end."""

import dataclasses
import math
from typing import Any, Self

import numpy as np

from certunlearn import checks
from certunlearn.mechanisms import base

_SEQUENCE = (
    "Each request is served from the state that the one before left (before a noise that is added "
    "at the end only: `history.before_noise`), with `next`: its initial distance is what the "
    "contraction has left of the one before, what the reference does otherwise on its data in all "
    "steps so far, and the new deletions'. The certificate is then for the union of all deletions "
    "so far, and for the last release alone: what several releases say together it does not cover. "
    "If a request depends on earlier releases, what remains true is conditional: given the "
    "requests and the noise of earlier ones, the release is as close as certified to the same "
    "procedure on the same remaining data; which examples were deleted may itself tell of them."
)


def contraction(learning_rate: Any, strong_convexity: float, smoothness: float) -> Any:
    """The factor by which a step of gradient descent brings two points closer, at most.

    Args:
      learning_rate: gamma: a positive number, or numbers, of which some may be 0.
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
    several = np.ndim(learning_rate) > 0
    gamma = np.asarray(
        checks.per_step(
            "learning_rate", learning_rate, np.size(learning_rate), zero_allowed=several
        )
    )
    low = checks.positive("strong_convexity", strong_convexity)
    high = checks.positive("smoothness", smoothness)
    _check_curvature(low, high)
    return _factors(gamma, low, high)


def _factors(gamma: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.maximum(np.abs(1 - gamma * low), np.abs(1 - gamma * high))


def _check_curvature(low: float, high: float) -> None:
    if high < low:
        raise ValueError(f"smoothness must be at least strong_convexity {low!r}, got {high!r}")


class _Contracting:
    """Fields and checks that both methods share; see them."""

    steps: Any
    initial_distance: Any
    learning_rate: Any
    strong_convexity: Any
    smoothness: Any
    past_steps: Any
    past_factor: Any
    past_drift: Any
    start_distance: Any

    def _check(self) -> None:
        base.set_fields(
            self,
            steps=checks.steps("steps", self.steps),
            initial_distance=checks.positive("initial_distance", self.initial_distance),
            smoothness=checks.positive("smoothness", self.smoothness),
            strong_convexity=checks.positive("strong_convexity", self.strong_convexity),
        )
        base.learning_rates(self)
        _check_curvature(self.strong_convexity, self.smoothness)
        largest = float(np.max(self.learning_rate))
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
        rates = np.broadcast_to(self.learning_rate, (self.steps,))
        return _factors(rates, self.strong_convexity, self.smoothness)

    @property
    def final_distance(self) -> float:
        """What the steps leave of the initial distance, without noise or with the same."""
        return float(np.prod(self.factors) * self.start_distance)

    def _next(self, stability_distance: float, gradient_difference: float) -> Any:
        """What both methods do; see `ProjectedNoisySGD.next`."""
        stability = checks.positive("stability_distance", stability_distance)
        difference = checks.positive("gradient_difference", gradient_difference)
        rates = np.broadcast_to(self.learning_rate, (self.steps,))
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
    learning_rate: Any
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
        return self._assumptions(start, base.CENTER)

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
      past_steps: as for `ProjectedNoisySGD`, and so are the next two.
      past_factor: product of the contractions of the steps of earlier requests.
      past_drift: how far those lead two runs apart whose gradients differ by 1.
      past_error: how far those lead two runs apart that differ by 1 more at each step, for
        `certunlearn.rounding`; 0 for a first request.
      rounding_share: how much more distance the noise covers, as a share of what is left, for the
        rounding of the steps without noise; `certunlearn.rounding` says when more is needed.

    Raises:
      TypeError: if an argument is not a number (or numbers).
      ValueError: if an argument is out of range.

    Guarantee:
      None by itself. The noise covers the distance that is left, c^T D and a share more for
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
    past_steps: int = 0
    past_factor: float = 1.0
    past_drift: float = 0.0
    past_error: float = 0.0
    rounding_share: float = base.ROUNDING_SHARE

    def __post_init__(self) -> None:
        """Checks every argument and evaluates schedules."""
        self._check()
        error = checks.real("past_error", self.past_error)
        if not 0 <= error <= self.past_steps:
            raise ValueError(
                f"past_error must be between 0 and past_steps={self.past_steps}, got {error!r}"
            )
        base.set_fields(self, past_error=error)
        base.check_rounding_share(self)

    def next(self, *, stability_distance: float, gradient_difference: float) -> Self:
        """As for `ProjectedNoisySGD`; the reserve for rounding is carried on with the distance."""
        found = self._next(stability_distance, gradient_difference)
        error = self.past_error
        for c in self.factors.tolist():
            error = c * error + 1
        distance = found.initial_distance + self.rounding_share * self.final_distance
        return dataclasses.replace(found, initial_distance=distance, past_error=error)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What a certificate for this mechanism rests on, in sentences."""
        return self._assumptions(base.ON_THE_WAY)

    @property
    def sequence(self) -> str:
        """What holds for the union of deletions after several requests, in words."""
        return _SEQUENCE
