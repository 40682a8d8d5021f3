"""Certified machine unlearning for JAX: make a trained model provably forget."""

from certunlearn import (
    _version,
    accounting,
    advice,
    certificates,
    convex,
    exact,
    solvers,
    transforms,
    unlearning,
)
from certunlearn._numerics.batches import batch_indices
from certunlearn._numerics.random_keys import split_key
from certunlearn.accounting import (
    delta,
    epsilon,
    epsilon_bracket,
    epsilon_curve,
    epsilon_lower_bound,
    gdp_mu,
    noise_scale,
    supported_accountants,
)
from certunlearn.advice import advise
from certunlearn.certificates import Certificate, certify, verify
from certunlearn.mechanisms import (
    DPSGD,
    DescentToDelete,
    GradientClipping,
    Mechanism,
    ModelClipping,
    OutputPerturbation,
    PerturbedMinimizer,
    ProjectedNoisySGD,
    Retraining,
    RewindToDelete,
    Separations,
    noisy_sgd,
)
from certunlearn.transforms import clip_by_global_norm, clip_params, clipped_value_and_grad
from certunlearn.unlearning import Finetune, Options, unlearn

__version__ = _version.__version__

__all__ = [
    "DPSGD",
    "Certificate",
    "DescentToDelete",
    "Finetune",
    "GradientClipping",
    "Mechanism",
    "ModelClipping",
    "Options",
    "OutputPerturbation",
    "PerturbedMinimizer",
    "ProjectedNoisySGD",
    "Retraining",
    "RewindToDelete",
    "Separations",
    "accounting",
    "advice",
    "advise",
    "batch_indices",
    "certificates",
    "certify",
    "clip_by_global_norm",
    "clip_params",
    "clipped_value_and_grad",
    "convex",
    "delta",
    "epsilon",
    "epsilon_bracket",
    "epsilon_curve",
    "epsilon_lower_bound",
    "exact",
    "gdp_mu",
    "noise_scale",
    "noisy_sgd",
    "solvers",
    "split_key",
    "supported_accountants",
    "transforms",
    "unlearn",
    "unlearning",
    "verify",
]


def __dir__() -> list[str]:
    return __all__
