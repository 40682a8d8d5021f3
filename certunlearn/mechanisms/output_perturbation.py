"""Output perturbation: one Gaussian on the clipped model, the baseline that others must beat."""

import dataclasses

import numpy as np

from certunlearn._numerics import checks
from certunlearn.mechanisms import base, pairs, published, sentences
from certunlearn.mechanisms.step_rules import StepRule


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputPerturbation(pairs.LastNoisy, pairs.FromBall):
    """One Gaussian on the clipped model, and no step on the data before it.

    The trained parameters are projected onto a ball of radius `init_radius` around a public centre,
    and noise is added; what comes after (fine-tuning on retain data) is free.

    Args:
      init_radius: C0, radius of the ball, in parameter units.
      reference: `"retrained"` or `"center"`, as for `GradientClipping`.

    Raises:
      TypeError: if `init_radius` is not a number.
      ValueError: if an argument is out of range.

    Guarantee:
      None by itself. Two points of the ball are at most `2 * init_radius` apart, so the exact
      Gaussian mechanism (Balle & Wang 2018) is all there is to it.

    >>> OutputPerturbation(init_radius=1.0).initial_distance
    2.0
    """

    init_radius: float
    reference: str = "retrained"

    steps = 1
    attackable = True

    def __post_init__(self) -> None:
        """Checks every argument."""
        base.set_fields(self, init_radius=checks.positive("init_radius", self.init_radius))
        checks.choice("reference", self.reference, base.REFERENCES)

    @property
    def contraction(self) -> np.ndarray:
        """float64 `[1]`: 1."""
        return np.ones(1)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What a certificate for this mechanism rests on, in sentences."""
        return (
            sentences.compared(self.reference),
            self.start_sentence,
            sentences.CENTER,
            *sentences.RUN,
        )

    def published_noise(self) -> published.PublishedNoise:
        """The classical Gaussian mechanism."""
        return published.of_one_gaussian(self.start_distance)

    def step_rule(self) -> StepRule:
        """Zero whatever the gradient is, and noise."""
        return StepRule(zeroes=False)
