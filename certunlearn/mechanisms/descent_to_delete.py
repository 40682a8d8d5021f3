"""Descent-to-delete: gradient descent on strongly convex losses, then one Gaussian."""

import dataclasses
from typing import Self

from certunlearn._numerics import checks
from certunlearn._numerics.checks import ScalarOrSchedule
from certunlearn.mechanisms import base, pairs, sentences
from certunlearn.mechanisms.contracting import Contracting


@dataclasses.dataclass(frozen=True, kw_only=True)
class DescentToDelete(Contracting, pairs.StepsThenNoise):
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
        `mechanisms.rounding`; 0 for a first request.
      rounding_share: how much more distance the noise covers, as a share of what is left, for the
        rounding of the steps without noise; `mechanisms.rounding` says when more is needed.

    Raises:
      TypeError: if an argument is not a number (or numbers).
      ValueError: if an argument is out of range.

    Guarantee:
      None by itself. The noise covers the distance that is left, c^T D and a share more for
      rounding (`mechanisms.rounding`), by the exact Gaussian mechanism. Neel et al. state their
      noise for full-batch descent from a perfectly solved start; here any batches do, and D counts
      what training left unsolved.

    >>> m = DescentToDelete(
    ...     initial_distance=0.5, learning_rate=0.1, strong_convexity=1.0, smoothness=4.0, steps=10
    ... )
    >>> round(m.final_distance, 4)
    0.1743
    """

    initial_distance: float
    learning_rate: ScalarOrSchedule
    strong_convexity: float
    smoothness: float
    steps: int
    past_steps: int = 0
    past_factor: float = 1.0
    past_drift: float = 0.0
    past_error: float = 0.0
    rounding_share: float = pairs.ROUNDING_SHARE

    def __post_init__(self) -> None:
        """Checks every argument and evaluates schedules."""
        self._check()
        error = checks.real("past_error", self.past_error)
        if not 0 <= error <= self.past_steps:
            raise ValueError(
                f"past_error must be between 0 and past_steps={self.past_steps}, got {error!r}"
            )
        base.set_fields(self, past_error=error)
        pairs.check_rounding_share(self)

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
        return self._assumptions(sentences.ON_THE_WAY)

    def largest_norm(self, *, center_norm: float, trained_norm: float) -> float:
        """No farther than where training ended: descent on the same data only comes nearer."""
        del center_norm
        return trained_norm
