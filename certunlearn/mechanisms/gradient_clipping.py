"""Noisy SGD with clipped gradients: the mechanism of Koloskova et al. (ICML 2025)."""

import dataclasses

import numpy as np

from certunlearn._numerics import checks
from certunlearn._numerics.checks import PerStep, ScalarOrSchedule
from certunlearn.mechanisms import base, pairs, published
from certunlearn.mechanisms.step_rules import StepRule


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientClipping(pairs.FromBall):
    """Noisy SGD on the retain data with clipped gradients (Koloskova et al., ICML 2025).

    The trained parameters are projected onto a ball of radius `init_radius` around a public centre
    c, then for t = 0, ..., steps - 1

        x <- x - learning_rate_t * (clip(g_t, clip_norm_t) + weight_decay_t * (x - c)) + noise_t

    with independent Gaussian noise of standard deviation `noise_scale_t` in every coordinate.

    Args:
      init_radius: C0, radius of the ball of starts, in parameter units.
      clip_norm: C1, largest global L2 norm of a step's gradient: a number, `[steps]` numbers or an
        Optax schedule, which is evaluated here.
      learning_rate: gamma, likewise; a schedule may be 0 at some steps, which then only add noise.
      weight_decay: lambda >= 0, likewise; `learning_rate * weight_decay` must be at most 1.
      steps: T, number of noisy steps.
      reference: what the result is indistinguishable from. `"retrained"`: the same procedure
        started from a model trained without the forget set; two starts are at most
        `2 * init_radius` apart. `"center"`: the same procedure started from the centre itself, at
        distance `init_radius`.
      memoryless: True for plain SGD: each update is a function of the step number, the current
        parameters and randomness independent of the noise. Must be False if anything else carries
        over from step to step (momentum, Adam, running averages) or if the gradient depends on
        the trained model (teachers, masks or penalties computed from it).

    Raises:
      TypeError: if an argument is not a number (or numbers).
      ValueError: if an argument is out of range or a schedule has the wrong length.

    Guarantee:
      None by itself: it states what the optimizer does. The separation holds for *any* loss and
      any batches, since two clipped gradients differ by at most `2 * clip_norm`.

    >>> m = GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=100)
    >>> m.initial_distance, m.separation(0, 2.0)
    (2.0, 2.2)
    """

    init_radius: float
    clip_norm: ScalarOrSchedule
    learning_rate: ScalarOrSchedule
    weight_decay: ScalarOrSchedule = 0.0
    steps: int
    reference: str = "retrained"
    memoryless: bool = True

    attackable = True
    takes_before_clip = True

    def __post_init__(self) -> None:
        """Checks every argument and evaluates schedules."""
        base.set_fields(
            self,
            steps=checks.steps("steps", self.steps),
            init_radius=checks.positive("init_radius", self.init_radius),
        )
        base.per_step(self, "clip_norm")
        base.check_learning_rate(self)
        base.per_step(self, "weight_decay", zero_allowed=True)
        checks.choice("reference", self.reference, base.REFERENCES)
        base.set_fields(self, memoryless=checks.flag("memoryless", self.memoryless))
        pairs.check_decay(self.learning_rate, self.weight_decay)

    @property
    def contraction(self) -> np.ndarray:
        """float64 `[steps]`: c_t = 1 - learning_rate_t * weight_decay_t, in [0, 1]."""
        return pairs.decayed(self.steps, self.learning_rate, self.weight_decay)

    @property
    def shift(self) -> np.ndarray:
        """float64 `[steps]`: s_t = 2 * learning_rate_t * clip_norm_t, in parameter units."""
        return pairs.clipped_shift(self.steps, self.learning_rate, self.clip_norm)

    def published_noise(self) -> published.PublishedNoise:
        """The formulas of Koloskova et al."""
        return published.of_gradient_clipping(
            self.init_radius,
            checks.known(self.clip_norm),
            checks.known(self.learning_rate),
            checks.known(self.weight_decay),
        )

    def step_rule(self) -> StepRule:
        """Clip, decay toward the centre, step; the clip sees to gradients that are not finite."""
        return StepRule.of(
            clip_norm=self.clip_norm,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            zeroes=False,
        )

    def example_clip_norm(self) -> PerStep:
        """The clip norm: a mean of gradients that each keep it keeps it, too."""
        return checks.known(self.clip_norm)
