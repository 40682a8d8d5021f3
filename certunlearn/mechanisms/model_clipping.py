"""Model clipping: what is bounded is the updated model, not the gradient."""

import dataclasses

import jax
import numpy as np
from chex import ArrayTree

from certunlearn import transforms
from certunlearn._numerics import checks
from certunlearn._numerics.checks import PerStep, ScalarOrSchedule
from certunlearn.mechanisms import base, pairs, step_rules
from certunlearn.mechanisms.step_rules import StepRule


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelClipping(pairs.FromBall):
    """Noisy SGD whose updated model is projected onto a ball (Koloskova et al., ICML 2025).

    The trained parameters are projected onto a ball of radius `init_radius` around a public centre
    c, with Gaussian noise of `init_noise_scale` if that is positive. Then for each step t

        x <- project(x - learning_rate_t * (g_t + weight_decay_t * (x - c))) + noise_t

    onto the ball of radius `model_radius` around c, with no clip of the gradient: two updated
    models are at most `2 * model_radius` apart, whatever came before. With `clip_norm` the noise
    comes before the projection, and the gradient is clipped:

        x <- project(x - learning_rate_t * (clip(g_t) + weight_decay_t * (x - c)) + noise_t)

    Args:
      init_radius: C0, radius of the ball of starts, in parameter units.
      model_radius: C2, radius of the ball of models, likewise.
      learning_rate: gamma: a number, `[steps]` numbers or an Optax schedule, maybe 0 at some steps.
      weight_decay: lambda >= 0, likewise; `learning_rate * weight_decay` must be at most 1.
      steps: T, number of noisy steps.
      init_noise_scale: standard deviation of the noise on the starts, in parameter units.
      clip_norm: C1, largest norm of a gradient, for the second form; a number, numbers or a
        schedule.
      reference: `"retrained"` or `"center"`, as for `GradientClipping`.

    Raises:
      TypeError: if an argument is not a number (or numbers).
      ValueError: if an argument is out of range, or `init_noise_scale` comes with `clip_norm`.

    Guarantee:
      None by itself. The separation holds for any loss and any batches. In the first form it does
      not depend on what came before, so that the `"product"` accountant is as good as any.

    >>> m = ModelClipping(init_radius=1.0, model_radius=0.5, learning_rate=0.1, steps=10)
    >>> m.initial_distance, m.separation(0, 7.0)
    (2.0, 1.0)
    """

    init_radius: float
    model_radius: float
    learning_rate: ScalarOrSchedule
    weight_decay: ScalarOrSchedule = 0.0
    steps: int
    init_noise_scale: float = 0.0
    clip_norm: ScalarOrSchedule | None = None
    reference: str = "retrained"

    def __post_init__(self) -> None:
        """Checks every argument and evaluates schedules."""
        noise = checks.per_step("init_noise_scale", self.init_noise_scale, 1, zero_allowed=True)
        base.set_fields(
            self,
            steps=checks.steps("steps", self.steps),
            init_radius=checks.positive("init_radius", self.init_radius),
            model_radius=checks.positive("model_radius", self.model_radius),
            init_noise_scale=checks.real("init_noise_scale", noise),
        )
        base.check_learning_rate(self)
        base.per_step(self, "weight_decay", zero_allowed=True)
        if self.clip_norm is not None:
            base.per_step(self, "clip_norm")
            if self.init_noise_scale:
                raise ValueError(
                    f"init_noise_scale must be 0 with clip_norm, got {self.init_noise_scale!r}: "
                    "noise on the start would go unused"
                )
        checks.choice("reference", self.reference, base.REFERENCES)
        pairs.check_decay(self.learning_rate, self.weight_decay)

    @property
    def contraction(self) -> np.ndarray:
        """float64 `[steps]`: 0, or 1 - learning_rate_t * weight_decay_t with `clip_norm`."""
        if self.clip_norm is None:
            return np.zeros(self.steps)
        return pairs.decayed(self.steps, self.learning_rate, self.weight_decay)

    @property
    def shift(self) -> np.ndarray:
        """float64 `[steps]`: 2 * model_radius, or 2 * learning_rate_t * clip_norm_t."""
        if self.clip_norm is None:
            return np.full(self.steps, 2.0 * self.model_radius)
        return pairs.clipped_shift(self.steps, self.learning_rate, self.clip_norm)

    @property
    def diameter(self) -> float:
        """Largest distance of two points that a step can end at."""
        return np.inf if self.clip_norm is None else 2.0 * self.model_radius

    @property
    def attackable(self) -> bool:  # type: ignore[override]
        """Whether attacks are lower bounds: they know nothing of a projection after the noise."""
        return self.clip_norm is None

    def total_noise_scale(self, noise_scale: float) -> None:
        """Not known: projections change noise."""
        del noise_scale

    def start(self, params: ArrayTree, center: ArrayTree | None, key: jax.Array) -> ArrayTree:
        """The projected parameters, with noise if the mechanism says so."""
        started = super().start(params, center, key)
        if self.init_noise_scale == 0:
            return started
        return transforms.noise_on_start(started, self.init_noise_scale, key)

    def step_rule(self) -> StepRule:
        """Decay and step, projection, noise; or clip, decay and step, noise, projection."""
        clipped = self.clip_norm is not None
        return StepRule.of(
            clip_norm=self.clip_norm,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            radius=self.model_radius,
            projection=step_rules.AFTER_NOISE if clipped else step_rules.BEFORE_NOISE,
            zeroes=not clipped,
        )

    def example_clip_norm(self) -> PerStep | None:
        """The clip norm of the second form."""
        return None if self.clip_norm is None else checks.known(self.clip_norm)
