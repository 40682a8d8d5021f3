"""Minimisation of convex losses to a verified gradient norm, by any solver."""

from certunlearn.solvers.kept_factors import Curvature, factorize
from certunlearn.solvers.minimizing import Minimized, minimize

__all__ = ["Curvature", "Minimized", "factorize", "minimize"]
