"""Parts of updates that several mechanisms share."""

import numpy as np
import optax
from chex import ArrayTree

from certunlearn import transforms
from certunlearn._numerics import checks, norms, schedules
from certunlearn._numerics.checks import ScalarOrSchedule


def clip(clip_norm: ScalarOrSchedule | None) -> optax.GradientTransformation:
    """The strict clip."""
    return transforms.clip_by_global_norm(schedules.scalar_or_lookup(checks.known(clip_norm)))


def descent(
    learning_rate: ScalarOrSchedule,
    weight_decay: ScalarOrSchedule = 0.0,
    center: ArrayTree | None = None,
) -> tuple[optax.GradientTransformation, ...]:
    """A step down the gradient, with decay toward the centre."""
    step = optax.scale_by_learning_rate(schedules.scalar_or_lookup(checks.known(learning_rate)))
    # Without decay the centre plays no part, and parameters are not needed.
    decay = checks.known(weight_decay)
    if not np.any(decay):
        return (step,)
    return transforms.decay_toward(schedules.scalar_or_lookup(decay), center), step


def check_products(learning_rate: ScalarOrSchedule, clip_norm: ScalarOrSchedule | None) -> None:
    """Refuses steps so short that float32 rounds them by more than a share of their length."""
    products = np.atleast_1d(np.multiply(checks.known(learning_rate), checks.known(clip_norm)))
    wrong = (products != 0) & (products < norms.SMALLEST_NORM * (1 - 1e-6))
    if np.any(wrong):
        raise ValueError(
            f"learning_rate * clip_norm must be 0 or at least {norms.SMALLEST_NORM:g}, where "
            f"float32 arithmetic does not underflow, got {products[wrong][0]:g}"
        )
