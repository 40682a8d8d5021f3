"""The steps of this package's mechanisms as functions of their numbers, which may be traced.

A rule is a pytree. Its leaves are the numbers of the steps; all else is its structure. So a
compiled step can take them as arguments, and serves other numbers without being compiled again.

On a device every number is what it would be as a constant: the nearest one of the arithmetic's
precision. So all that a bound rests on is the same. A learning rate times a clipped gradient has
two roundings, for which the strict clip leaves five (`transforms.clip_by_global_norm`). Radii and
clip norms are lowered on the device by more than their rounding (`_numerics.norms`). Differences,
such as 1 less a contraction, are taken here in float64. Noise is rounded up
(`schedules.NoiseTable`).
"""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import numpy as np
import optax
from chex import ArrayTree

from certunlearn import transforms
from certunlearn._numerics import checks, norms, schedules
from certunlearn._numerics.checks import PerStep, ScalarOrSchedule
from certunlearn.mechanisms import base

# Where the projection stands in a step.
NOWHERE, BEFORE_NOISE, AFTER_NOISE = "nowhere", "before noise", "after noise"


class Rule(Protocol):
    """What `Mechanism.step_rule` returns: a pytree whose leaves are the numbers of the steps."""

    def transforms(
        self, noise: optax.GradientTransformation, center: ArrayTree | None
    ) -> tuple[optax.GradientTransformation, ...]:
        """As `Mechanism.step_transforms`; numbers and centre may be traced."""
        ...


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["clip_norm", "factor", "learning_rate", "weight_decay", "radius"],
    meta_fields=["projection", "zeroes"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRule:
    """x <- project(x - learning_rate * (factor * clip(g) + weight_decay * (x - c))), and noise.

    Each number is a float, a float64 array `[steps]`, or traced; None leaves its part out.

    Attributes:
      clip_norm: of the strict clip.
      factor: of the clipped gradient, 0 or 1; an array.
      learning_rate: None for steps of noise alone.
      weight_decay: toward the centre.
      radius: of the ball that is projected on.
      projection: `NOWHERE`, `BEFORE_NOISE` or `AFTER_NOISE`.
      zeroes: whether gradients that are not finite become zero first. The clip does that, too.
    """

    clip_norm: Any = None
    factor: Any = None
    learning_rate: Any = None
    weight_decay: Any = None
    radius: Any = None
    projection: str = NOWHERE
    zeroes: bool = True

    @classmethod
    def of(
        cls,
        *,
        learning_rate: ScalarOrSchedule,
        clip_norm: ScalarOrSchedule | None = None,
        weight_decay: ScalarOrSchedule = 0.0,
        radius: float | None = None,
        projection: str = NOWHERE,
        zeroes: bool = True,
    ) -> "StepRule":
        """The rule of fields that `Mechanism` checked.

        Raises:
          ValueError: if a step is so short that float32 rounds it by more than a share of itself.
        """
        if clip_norm is not None:
            check_products(learning_rate, clip_norm)
        # Without decay the centre plays no part, and parameters are not needed.
        decay = checks.known(weight_decay)
        return cls(
            clip_norm=None if clip_norm is None else numbers(checks.known(clip_norm)),
            learning_rate=numbers(checks.known(learning_rate)),
            weight_decay=numbers(decay) if np.any(decay) else None,
            radius=radius,
            projection=projection,
            zeroes=zeroes,
        )

    def update(self, center: ArrayTree | None) -> optax.GradientTransformation:
        """One update before its noise."""
        if self.learning_rate is None:
            return optax.set_to_zero()
        parts = []
        if self.clip_norm is not None:
            clip_norm = schedules.scalar_or_lookup(self.clip_norm)
            parts.append(transforms.clip_by_global_norm(clip_norm))
        if self.factor is not None:
            parts.append(optax.scale_by_schedule(schedules.Lookup(self.factor)))
        if self.weight_decay is not None:
            decay = schedules.scalar_or_lookup(self.weight_decay)
            parts.append(transforms.decay_toward(decay, center))
        parts.append(optax.scale_by_learning_rate(schedules.scalar_or_lookup(self.learning_rate)))
        if self.projection == BEFORE_NOISE:
            parts.append(transforms.project_onto_ball(self.radius, center))
        return optax.chain(*parts)

    def transforms(
        self, noise: optax.GradientTransformation, center: ArrayTree | None
    ) -> tuple[optax.GradientTransformation, ...]:
        """All of a step."""
        return self.around(self.update(center), noise, center)

    def around(
        self,
        update: optax.GradientTransformation,
        noise: optax.GradientTransformation,
        center: ArrayTree | None,
    ) -> tuple[optax.GradientTransformation, ...]:
        """All of a step with this update, which may be that of a subclass of the mechanism."""
        if self.projection == AFTER_NOISE:
            project = transforms.project_onto_ball(self.radius, center)
            noise = transforms.noise_then_projection(noise, project)
        zeroes = (transforms.zero_nonfinite(),) if self.zeroes else ()
        return (*zeroes, update, noise)


class ByRule(base.Mechanism):
    """A mechanism that is run by its rule."""

    def step_rule(self) -> StepRule:
        """The rule."""
        raise NotImplementedError

    def update(self, center: ArrayTree | None) -> optax.GradientTransformation:
        """One update before its noise, as the class says."""
        return self.step_rule().update(center)

    def step_transforms(
        self, noise: optax.GradientTransformation, center: ArrayTree | None
    ) -> tuple[optax.GradientTransformation, ...]:
        """The transforms of one step in order, the noise among them, as the class says."""
        return self.step_rule().around(self.update(center), noise, center)


def rule_of(mechanism: base.Mechanism) -> Rule | None:
    """The mechanism's rule; None if it has none, or a subclass has an update of its own."""
    for cls in type(mechanism).__mro__:
        if "step_rule" in vars(cls):
            return mechanism.step_rule()
        if "update" in vars(cls) or "step_transforms" in vars(cls):
            return None
    return None


def numbers(value: PerStep | np.ndarray) -> float | np.ndarray:
    """A Python float, or `[steps]` numbers as one float64 array.

    A Python float takes the precision of what it meets; a NumPy one would not.
    """
    array = np.asarray(value, np.float64)
    return array if array.ndim else float(array)


def check_products(learning_rate: ScalarOrSchedule, clip_norm: ScalarOrSchedule) -> None:
    """Refuses steps so short that float32 rounds them by more than a share of their length."""
    products = np.atleast_1d(np.multiply(checks.known(learning_rate), checks.known(clip_norm)))
    wrong = (products != 0) & (products < norms.SMALLEST_NORM * (1 - 1e-6))
    if np.any(wrong):
        raise ValueError(
            f"learning_rate * clip_norm must be 0 or at least {norms.SMALLEST_NORM:g}, where "
            f"float32 arithmetic does not underflow, got {products[wrong][0]:g}"
        )
