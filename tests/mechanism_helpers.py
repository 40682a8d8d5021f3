"""What the tests of the mechanisms share."""

import numpy as np

DESCENT = {
    "initial_distance": 2.0,
    "learning_rate": 0.1,
    "strong_convexity": 0.5,
    "smoothness": 4.0,
    "steps": 4,
}

REWIND = {
    "learning_rate": 0.1,
    "smoothness": 2.0,
    "gradient_bound": 3.0,
    "training_learning_rate": 0.05,
    "trained_steps": 10,
    "steps": 4,
    "size": 100,
    "deletions": 5,
}


def length(rows):
    return np.linalg.norm(rows, axis=-1)
