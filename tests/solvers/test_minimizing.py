"""Minimisation to a verified gradient norm: every solver reaches it, or returns nothing."""

import jax
import numpy as np
import pytest
from convex_helpers import LOSSES, draw_data, every_loss

from certunlearn import convex, solvers


@every_loss
@pytest.mark.parametrize("method", ["newton", "lbfgs", "descent"])
def test_every_solver_reaches_the_tolerance(name, method):
    loss, data = LOSSES[name], draw_data(name)
    out = solvers.minimize(loss, loss.init(4), data, tolerance=1e-8, method=method)
    assert out.gradient_norm <= 1e-8
    assert out.params.dtype == np.float64
    assert convex.gradient_norm(loss, out.params, data) <= 1e-8
    best = solvers.minimize(loss, out.params, data, tolerance=1e-12)
    assert np.linalg.norm(out.params - best.params) <= (1e-8 + 1e-12) / loss.strong_convexity
    assert not jax.config.jax_enable_x64
