"""From a mechanism and its noise to (epsilon, delta), and back. Pure float64 functions.

Every `noise_scale` here is a standard deviation, of the noise in each coordinate of a step, in
parameter units. `queries` holds what callers ask; `Accountant` is the base of every accountant, of
which each has a file; numerics are in private modules; docs/theory/ holds the longer proofs.
"""

from certunlearn.accounting._taut_string import gdp_mu
from certunlearn.accounting.accountant_base import Accountant
from certunlearn.accounting.coupling import COUPLED_MU, epsilon_bracket
from certunlearn.accounting.interpolation import best_steps, mu
from certunlearn.accounting.lower_bounds import (
    MOST_ATTACKED,
    affordable_lower_bound,
    epsilon_lower_bound,
)
from certunlearn.accounting.queries import (
    ACCOUNTANTS,
    delta,
    epsilon,
    epsilon_curve,
    least_epsilon,
    noise_scale,
    supported_accountants,
    supported_names,
    total_variation,
    unaffordable_reason,
)

__all__ = [
    "ACCOUNTANTS",
    "COUPLED_MU",
    "MOST_ATTACKED",
    "Accountant",
    "affordable_lower_bound",
    "best_steps",
    "delta",
    "epsilon",
    "epsilon_bracket",
    "epsilon_curve",
    "epsilon_lower_bound",
    "gdp_mu",
    "least_epsilon",
    "mu",
    "noise_scale",
    "supported_accountants",
    "supported_names",
    "total_variation",
    "unaffordable_reason",
]
