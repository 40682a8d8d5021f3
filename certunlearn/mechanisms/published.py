"""Closed forms that were published for a method: what the closed-form accountant confirms."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from certunlearn._numerics.checks import PerStep


@dataclasses.dataclass(frozen=True)
class PublishedNoise:
    """A formula sigma = unit(steps) * spread(delta) / epsilon, sigma in parameter units.

    Attributes:
      unit: from a number of steps to sigma at epsilon = 1 and spread = 1.
      spread: what delta contributes.
      delta: the inverse of `spread`.
    """

    unit: Callable[[int], float]
    spread: Callable[[float], float]
    delta: Callable[[float], float]


def of_gradient_clipping(
    init_radius: float, clip_norm: PerStep, learning_rate: PerStep, weight_decay: PerStep
) -> PublishedNoise:
    """Koloskova et al. (ICML 2025), Theorem 1, constants as published.

    weight_decay = 0:  sigma^2 = 9 log(1/delta) (C0 + C1 gamma T)^2 / (eps^2 T)
    weight_decay > 0:  sigma^2 = 72 gamma lambda log(1/delta)
                                 (C0 (1 - gamma lambda)^T + C1 / lambda)^2 / eps^2
    """

    def unit(steps: int) -> float:
        c1 = constant("clip_norm", clip_norm)
        gamma = constant("learning_rate", learning_rate)
        decay = constant("weight_decay", weight_decay)
        if gamma * decay == 0:
            return 3 * (init_radius + c1 * gamma * steps) / math.sqrt(steps)
        decayed = init_radius * (1 - gamma * decay) ** steps + c1 / decay
        return math.sqrt(72 * gamma * decay) * decayed

    return PublishedNoise(
        unit,
        spread=lambda delta: math.sqrt(math.log(1 / delta)),
        delta=lambda spread: math.exp(-(spread**2)),
    )


def of_one_gaussian(distance: float) -> PublishedNoise:
    """The classical Gaussian mechanism: sigma = D sqrt(2 log(1.25/delta)) / eps.

    Dwork & Roth (2014), Theorem A.1; it fails for eps above about 1.
    """
    return PublishedNoise(
        lambda steps: distance,
        spread=lambda delta: math.sqrt(2 * math.log(1.25 / delta)),
        delta=lambda spread: min(1.0, 1.25 * math.exp(-(spread**2) / 2)),
    )


def constant(name: str, value: PerStep) -> float:
    """A number that is the same at every step, or ValueError."""
    values = np.unique(np.asarray(value, float))
    if len(values) > 1:
        raise ValueError(
            f"{name} must be one number for accountant='closed-form', got a schedule from "
            f"{values[0]:g} to {values[-1]:g}; use accountant='interpolation'"
        )
    return float(values[0])
