"""Optax gradient transformations: clip, decay, project, noise. They take numbers, no guarantees."""

from certunlearn.transforms.clip_decay_noise import (
    AddGaussianNoiseState,
    ClipByGlobalNormState,
    DecayTowardState,
    add_gaussian_noise,
    clip_by_global_norm,
    decay_toward,
)
from certunlearn.transforms.combining import (
    ZeroNonfiniteState,
    noise_on_start,
    noise_then_projection,
    zero_nonfinite,
)
from certunlearn.transforms.gradients import ClipStats, clipped_value_and_grad
from certunlearn.transforms.projection import clip_params, project_onto_ball

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
