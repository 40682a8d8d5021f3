"""Membership inference: can the losses tell forgotten examples from ones never seen?

Whether a loss is low depends on the example's difficulty more than on membership. So the attack
compares it with the loss of a reference model that never saw the example (difficulty calibration,
Watson et al. 2022): plain thresholds see next to nothing in networks that generalise well.
"""

import math

import numpy as np
from sklearn.metrics import roc_auc_score


def calibrated(losses: np.ndarray, reference_losses: np.ndarray) -> np.ndarray:
    """Log ratio of each example's loss to a reference model's: the attack's score.

    >>> calibrated(np.array([1.0, 0.0]), np.array([1.0, 0.0]))
    array([0., 0.])
    """
    least = np.finfo(np.float32).tiny
    return np.log(np.maximum(losses, least)) - np.log(np.maximum(reference_losses, least))


def auc(forget_losses: np.ndarray, test_losses: np.ndarray) -> float:
    """Area under the ROC curve of the attack that calls an example a member if its loss is low.

    The losses may be calibrated ones.

    0.5 is chance: the model treats forgotten examples like ones that it never saw.

    >>> auc(np.array([0.1, 0.2]), np.array([0.3, 0.4]))
    1.0
    """
    member = np.concatenate([np.ones(len(forget_losses)), np.zeros(len(test_losses))])
    return float(roc_auc_score(member, -np.concatenate([forget_losses, test_losses])))


def chance_error(forget: int, test: int) -> float:
    """Standard deviation of that area for a model that saw neither set.

    >>> round(chance_error(100, 400), 3)
    0.032
    """
    return math.sqrt((forget + test + 1) / (12 * forget * test))
