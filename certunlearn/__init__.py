"""Certified machine unlearning for JAX: make a trained model provably forget."""

import importlib.metadata

from certunlearn import convex
from certunlearn.accounting import (
    available,
    best_steps,
    delta,
    epsilon,
    epsilon_bracket,
    epsilon_curve,
    epsilon_lower_bound,
    noise_scale,
    total_variation,
)
from certunlearn.accounting.interpolation import gdp_mu
from certunlearn.batches import batch_indices
from certunlearn.certificates import Certificate, certify
from certunlearn.files import load_params, params_digest, save_params
from certunlearn.gradients import clipped_value_and_grad
from certunlearn.history import PrivateHistory, UnlearningState, load_state, save_state
from certunlearn.interrupts import UnlearningFailed, UnlearningInterrupted
from certunlearn.keys import Keys, split_key, system_keys
from certunlearn.mechanisms import (
    DPSGD,
    DescentToDelete,
    GradientClipping,
    ModelClipping,
    OutputPerturbation,
    ProjectedNoisySGD,
    RewindToDelete,
)
from certunlearn.model_state import recompute_statistics
from certunlearn.optimizer import noisy_sgd
from certunlearn.tangent import Linearized, linearized
from certunlearn.transforms import (
    add_gaussian_noise,
    clip_by_global_norm,
    clip_params,
    decay_toward,
    project_onto_ball,
)
from certunlearn.unlearning import UnlearningResult, unlearn
from certunlearn.verification import Verification, verify

__version__ = importlib.metadata.version("certunlearn")

__all__ = [
    "DPSGD",
    "Certificate",
    "DescentToDelete",
    "GradientClipping",
    "Keys",
    "Linearized",
    "ModelClipping",
    "OutputPerturbation",
    "PrivateHistory",
    "ProjectedNoisySGD",
    "RewindToDelete",
    "UnlearningFailed",
    "UnlearningInterrupted",
    "UnlearningResult",
    "UnlearningState",
    "Verification",
    "add_gaussian_noise",
    "available",
    "batch_indices",
    "best_steps",
    "certify",
    "clip_by_global_norm",
    "clip_params",
    "clipped_value_and_grad",
    "convex",
    "decay_toward",
    "delta",
    "epsilon",
    "epsilon_bracket",
    "epsilon_curve",
    "epsilon_lower_bound",
    "gdp_mu",
    "linearized",
    "load_params",
    "load_state",
    "noise_scale",
    "noisy_sgd",
    "params_digest",
    "project_onto_ball",
    "recompute_statistics",
    "save_params",
    "save_state",
    "split_key",
    "system_keys",
    "total_variation",
    "unlearn",
    "verify",
]
