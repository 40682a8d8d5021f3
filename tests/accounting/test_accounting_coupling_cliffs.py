"""Inputs at which the coupling accountant was far from the attack, each held near it."""

import pytest
from coupling_helpers import at_nominal, by_attack

from certunlearn.accounting._reflection import solution


@pytest.mark.slow
@pytest.mark.parametrize(("delta", "most"), [(1e-15, 0.66), (1e-60, 0.75)])
def test_errors_scale_with_delta(delta, most):
    steps = at_nominal(2.0, 1.0, 0.5, 4, 1.0, delta)
    assert by_attack(steps, delta) <= solution.epsilon(steps, delta) <= most


@pytest.mark.slow
def test_levels_are_where_values_are_after_a_reset():
    contraction, shift = [1, 1, 1e-8, 1, 1, 1e-3, 1, 1], [0.05] * 8
    shift[3] = shift[6] = 3.0
    steps = at_nominal(2.0, contraction, shift, 8, 3.0, 1e-5)
    assert by_attack(steps, 1e-5) <= solution.epsilon(steps, 1e-5) <= 0.88
