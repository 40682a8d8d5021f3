"""What tests of the advice share: formulas that use nothing of the package."""

import math

import scipy.optimize
import scipy.stats


def mu_of(epsilon, delta):
    """The mu of a Gaussian pair with this guarantee, by SciPy's root-finding alone."""
    phi = scipy.stats.norm.cdf

    def excess(mu):
        return phi(-epsilon / mu + mu / 2) - math.exp(epsilon) * phi(-epsilon / mu - mu / 2) - delta

    return scipy.optimize.brentq(excess, 1e-3, 30, xtol=1e-14)
