import json
from pathlib import Path

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from certunlearn.accounting import _gaussian

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "accounting.json").read_text())


def exact_delta(epsilon, mu):
    """The textbook formula, with digits enough that its cancellation leaves sixty."""
    with mpmath.workdps(460):
        epsilon, mu = mpmath.mpf(epsilon), mpmath.mpf(mu)
        a, b = epsilon / mu - mu / 2, epsilon / mu + mu / 2
        upper = lambda x: mpmath.erfc(x / mpmath.sqrt(2)) / 2  # noqa: E731
        return upper(a) - mpmath.exp(epsilon) * upper(b)


GRID = [
    (float(mu * (u + mu / 2)), float(mu))
    for mu in (1e-6, 3e-5, 1e-3, 0.03, 0.3, 0.999, 1.001, 3.0, 30.0, 300.0, 1e3)
    for u in (-min(0.4 * mu, 3.0), 0.0, 0.7, 4.0, 12.0, 19.9, 20.5, 28.0, 36.5)
]


@pytest.mark.parametrize(("epsilon", "mu"), GRID)
def test_exact_to_1e_9_against_sixty_digits_in_all_three_directions(epsilon, mu):
    delta = exact_delta(epsilon, mu)
    assert delta > mpmath.mpf("1e-300")
    assert abs(mpmath.mpf(float(_gaussian.delta(epsilon, mu))) / delta - 1) < 1e-10
    if delta < 1 - 1e-6:  # nearer to one a float64 delta itself holds too few digits
        assert float(_gaussian.epsilon(mu, float(delta))) == pytest.approx(epsilon, rel=1e-9)
        assert _gaussian.mu(epsilon, float(delta)) == pytest.approx(mu, rel=1e-9)


@pytest.mark.parametrize("row", VECTORS["gaussian"])
def test_vectors(row):
    got = float(_gaussian.delta(row["epsilon"], row["mu"]))
    assert got == pytest.approx(row["delta"], rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-6, 1e3), st.floats(-290.0, -0.4))
def test_inverses_are_on_the_safe_side_and_tight(mu, log10_delta):
    delta = 10.0**log10_delta
    epsilon = float(_gaussian.epsilon(mu, delta))
    assert _gaussian.log_delta(epsilon, mu) <= np.log(delta) + 1e-15
    if epsilon > 0:
        assert _gaussian.log_delta(epsilon * (1 - 1e-9), mu) > np.log(delta)
        largest = _gaussian.mu(epsilon, delta)
        assert _gaussian.log_delta(epsilon, largest) <= np.log(delta) + 1e-15
        assert _gaussian.log_delta(epsilon, largest * (1 + 1e-9)) > np.log(delta)


def test_limits():
    assert _gaussian.delta(0.0, 2.0) == pytest.approx(float(_gaussian.total_variation(2.0)))
    assert _gaussian.delta(1.0, 0.0) == 0
    assert _gaussian.delta(1.0, np.inf) == 1
    assert _gaussian.epsilon(0.0, 1e-5) == 0
    assert _gaussian.epsilon(np.inf, 1e-5) == np.inf
    assert _gaussian.epsilon(1e-6, 1e-5) == 0  # delta alone covers the total variation
    np.testing.assert_allclose(
        _gaussian.epsilon([0.5, 1.0], 1e-5),
        [float(_gaussian.epsilon(m, 1e-5)) for m in (0.5, 1.0)],
        rtol=1e-11,
    )


def test_the_renyi_shortcut_is_far_off():
    # The divergence of order alpha is alpha * mu^2 / 2. Holding it at mu^2 / 2 while optimising
    # over alpha reports about 1 where more than 6.5 is true.
    delta, mu = 1e-5, np.sqrt(2.0)
    alpha = np.geomspace(1.01, 1e6, 2000)
    wrong = np.min(mu**2 / 2 + np.log(1 / delta) / (alpha - 1))
    right = np.min(alpha * mu**2 / 2 + np.log(1 / delta) / (alpha - 1))
    true = float(_gaussian.epsilon(mu, delta))
    assert wrong < 1.01
    assert 6.5 < true < right
