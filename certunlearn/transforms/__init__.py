"""Optax gradient transformations: clip, decay, project, noise.

They take numbers. Guarantees about whole runs are made by `mechanisms` and `accounting`.
"""

from certunlearn.transforms.clipping import ClipByGlobalNormState, clip_by_global_norm
from certunlearn.transforms.decay import DecayTowardState, decay_toward
from certunlearn.transforms.finite_gradients import ZeroNonfiniteState, zero_nonfinite
from certunlearn.transforms.gaussian_noise import (
    AddGaussianNoiseState,
    add_gaussian_noise,
    noise_on_start,
)
from certunlearn.transforms.gradients import ClipStats, clipped_value_and_grad
from certunlearn.transforms.projection import (
    clip_params,
    noise_then_projection,
    project_onto_ball,
)

__all__ = [
    "AddGaussianNoiseState",
    "ClipByGlobalNormState",
    "ClipStats",
    "DecayTowardState",
    "ZeroNonfiniteState",
    "add_gaussian_noise",
    "clip_by_global_norm",
    "clip_params",
    "clipped_value_and_grad",
    "decay_toward",
    "noise_on_start",
    "noise_then_projection",
    "project_onto_ball",
    "zero_nonfinite",
]
