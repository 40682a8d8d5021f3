"""What an unlearning step may do: one file a method, and the optimizer that runs any of them.

`Mechanism` is the base of every method, of yours too; `Separations` is a method in plain numbers.
"""

from certunlearn.mechanisms.base import (
    REFERENCES,
    Mechanism,
    PlannedRun,
    check,
    checked_delta,
    checked_noise,
)
from certunlearn.mechanisms.descent_to_delete import DescentToDelete
from certunlearn.mechanisms.dp_training import DPSGD
from certunlearn.mechanisms.exact_head import ExactHead
from certunlearn.mechanisms.gradient_clipping import GradientClipping
from certunlearn.mechanisms.model_clipping import ModelClipping
from certunlearn.mechanisms.noisy_optimizer import Evidence, NoisySgdState, evidence, noisy_sgd
from certunlearn.mechanisms.output_perturbation import OutputPerturbation
from certunlearn.mechanisms.perturbed_minimizer import PerturbedMinimizer
from certunlearn.mechanisms.plain_separations import Separations
from certunlearn.mechanisms.projected_noisy_sgd import ProjectedNoisySGD
from certunlearn.mechanisms.published import PublishedNoise
from certunlearn.mechanisms.records import MECHANISMS, from_record, to_record
from certunlearn.mechanisms.retraining import Retraining
from certunlearn.mechanisms.rewind_to_delete import RewindToDelete

__all__ = [
    "DPSGD",
    "MECHANISMS",
    "REFERENCES",
    "DescentToDelete",
    "Evidence",
    "ExactHead",
    "GradientClipping",
    "Mechanism",
    "ModelClipping",
    "NoisySgdState",
    "OutputPerturbation",
    "PerturbedMinimizer",
    "PlannedRun",
    "ProjectedNoisySGD",
    "PublishedNoise",
    "Retraining",
    "RewindToDelete",
    "Separations",
    "check",
    "checked_delta",
    "checked_noise",
    "evidence",
    "from_record",
    "noisy_sgd",
    "to_record",
]
