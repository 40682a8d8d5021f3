"""Convex losses with known constants, their training, and how far deletions move the result.

One step of gradient descent brings two runs closer, and training with or without a few examples
ends at nearly the same place. Both facts need constants that are *proved*, not estimated. Each loss
is a `ConvexLoss` and states its constants. Those of linear models (`logistic_regression`,
`ridge_regression` and others) hold for features of bounded norm, which `clip_features` makes true;
`append_intercept` adds an intercept. Those of a network linearised at public weights (`linearized`)
hold for the scales that it computes. `certunlearn.solvers` minimises all of them.
Everything here raises TypeError or ValueError if an argument is of the wrong type or out of range.
"""

from certunlearn._numerics.curvature import contraction
from certunlearn.models.classification import (
    logistic_regression,
    ridge_classification,
    squared_hinge,
)
from certunlearn.models.linear import append_intercept, clip_features
from certunlearn.models.loss import ConvexLoss
from certunlearn.models.regression import (
    huber_regression,
    poisson_regression,
    quantile_regression,
    ridge_regression,
)
from certunlearn.models.scikit_learn import from_sklearn, to_sklearn
from certunlearn.models.tangent import Linearized, linearized
from certunlearn.solvers.descent import DataDependentSteps, Trained, gradient_descent, gradient_norm
from certunlearn.solvers.distances import (
    gradient_difference,
    next_request,
    stability_distance,
    training_distance,
)

__all__ = [
    "ConvexLoss",
    "DataDependentSteps",
    "Linearized",
    "Trained",
    "append_intercept",
    "clip_features",
    "contraction",
    "from_sklearn",
    "gradient_descent",
    "gradient_difference",
    "gradient_norm",
    "huber_regression",
    "linearized",
    "logistic_regression",
    "next_request",
    "poisson_regression",
    "quantile_regression",
    "ridge_classification",
    "ridge_regression",
    "squared_hinge",
    "stability_distance",
    "to_sklearn",
    "training_distance",
]
