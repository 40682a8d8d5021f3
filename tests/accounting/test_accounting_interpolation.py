import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from certunlearn.accounting._taut_string import gdp_mu, gdp_mu_curve

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "accounting.json").read_text())


def hull_by_definition(distance, c, s, sigma, tau):
    """mu at stop time tau straight from the weights' definition, by all chords (cubic time)."""
    c, s, sigma = (np.asarray(a, float)[:tau] for a in (c, s, sigma))
    w = np.array([np.prod(c[t + 1 :]) for t in range(tau)])
    v = np.concatenate([[0], np.cumsum((w * sigma) ** 2)])
    big = np.concatenate([[0], distance * np.prod(c) + np.cumsum(w * s)])
    hull = [0]
    while hull[-1] < tau:  # the next corner is where the slope is least
        i = hull[-1]
        slopes = (big[i + 1 :] - big[i]) / (v[i + 1 :] - v[i])
        hull.append(i + 1 + int(np.argmin(slopes)))
    return np.sqrt(sum((big[j] - big[i]) ** 2 / (v[j] - v[i]) for i, j in itertools.pairwise(hull)))


def quadratic_program(distance, c, s, sigma):
    """The least cost over what is closed at each step, by a general solver."""
    steps = len(c)

    def remaining(a):
        d, out = distance, []
        for t in range(steps):
            d = c[t] * d + s[t] - a[t]
            out.append(d)
        return np.array(out)

    start = np.zeros(steps)
    start[-1] = remaining(start)[-1]
    found = minimize(
        lambda a: np.sum((a / sigma) ** 2),
        start,
        jac=lambda a: 2 * a / sigma**2,
        bounds=[(0, None)] * steps,
        constraints=[
            {"type": "ineq", "fun": lambda a: remaining(a)[:-1]},
            {"type": "eq", "fun": lambda a: remaining(a)[-1]},
        ],
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-14},
    )
    assert found.success
    return np.sqrt(found.fun)


def draw(rng, steps, front_loaded=False):
    sigma = rng.uniform(0.5, 3, steps)
    if front_loaded:
        sigma = np.sort(sigma)[::-1] * np.geomspace(8, 1, steps)
    return rng.uniform(0.5, 2), rng.uniform(0.7, 1, steps), rng.uniform(0, 0.5, steps), sigma


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("front_loaded", [False, True])
def test_agrees_with_a_general_solver(seed, front_loaded):
    problem = draw(np.random.default_rng(seed), 7, front_loaded)
    assert gdp_mu(*problem, memoryless=False) == pytest.approx(
        quadratic_program(*problem), rel=1e-5
    )


@pytest.mark.parametrize("seed", range(20))
def test_one_hull_serves_every_prefix(seed):
    rng = np.random.default_rng(seed)
    problem = draw(rng, int(rng.integers(1, 40)), bool(seed % 2))
    curve = gdp_mu_curve(*problem, memoryless=False)
    expected = [hull_by_definition(*problem, tau) for tau in range(1, len(curve) + 1)]
    np.testing.assert_allclose(curve, expected, rtol=1e-11)
    assert gdp_mu(*problem, memoryless=True) == pytest.approx(min(expected))


def test_the_straight_line_is_not_enough_when_noise_comes_early():
    distance, c, s, sigma = 1.0, [1.0, 1.0], [0.0, 1.0], [10.0, 0.1]
    line = 2.0 / np.sqrt(100.01)  # lets the early noise pay for the later shift
    truth = np.sqrt((1 / 10) ** 2 + (1 / 0.1) ** 2)
    assert gdp_mu(distance, c, s, sigma, memoryless=False) == pytest.approx(truth)
    assert truth > 40 * line


@pytest.mark.parametrize("row", VECTORS["interpolation_schedule"])
def test_vectors(row):
    problem = [row[k] for k in ("initial_distance", "contraction", "shift", "noise_scale")]
    assert gdp_mu(*problem) == pytest.approx(row["mu_memoryless"], rel=1e-10)
    assert gdp_mu(*problem, memoryless=False) == pytest.approx(row["mu_with_state"], rel=1e-10)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 200), st.floats(0.2, 1.0), st.floats(0.01, 2), st.floats(0, 1), st.floats(0.1, 5)
)
def test_constant_steps_are_the_straight_line(steps, c, distance, shift, sigma):
    got = gdp_mu(distance, [c] * steps, [shift] * steps, [sigma] * steps, memoryless=False)
    powers = c ** np.arange(steps)
    line = (distance * c**steps + shift * powers.sum()) / (sigma * np.sqrt((powers**2).sum()))
    assert got == pytest.approx(line, rel=1e-11)


def test_tiny_weights_do_not_overflow_and_a_full_reset_forgets():
    steps = 20_000
    c = np.full(steps, 0.5)
    mu = gdp_mu(1e6, c, np.full(steps, 0.1), 1.0, memoryless=False)
    assert mu == pytest.approx(0.1 * 2 / np.sqrt(4 / 3), rel=1e-12)
    reset = gdp_mu(1e6, [1.0, 0.0, 1.0], [5.0, 0.25, 0.0], [1e-3, 1.0, 1.0], memoryless=False)
    assert reset == pytest.approx(0.25 / np.sqrt(2))


def test_noiseless_steps_are_folded_into_the_next():
    assert gdp_mu(1.0, [0.5, 1.0], [0.25, 0.5], [0.0, 2.0]) == pytest.approx(1.25 / 2)
    assert gdp_mu(1.0, [1.0, 1.0], [0.0, 0.5], [2.0, 0.0], memoryless=False) == np.inf
    assert gdp_mu(1.0, [1.0, 1.0], [0.0, 0.5], [2.0, 0.0], memoryless=True) == 0.5
    assert gdp_mu(0.0, [1.0], [0.0], [0.0]) == 0


def test_expanding_steps_are_allowed():
    assert gdp_mu(1.0, [1.5, 1.5], 0.0, [0.0, 1.0], memoryless=False) == pytest.approx(2.25)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"initial_distance": -1.0}, ValueError),
        ({"initial_distance": [1.0, 2.0]}, ValueError),
        ({"contraction": [-0.1, 1.0]}, ValueError),
        ({"shift": [np.nan, 1.0]}, ValueError),
        ({"noise_scale": [1.0, 1.0, 1.0]}, ValueError),
        ({"noise_scale": [[1.0, 1.0]]}, ValueError),
        ({"noise_scale": []}, ValueError),
        ({"shift": [0.1]}, ValueError),
        ({"shift": "x"}, TypeError),
    ],
)
def test_bad_input(change, error):
    good = {"initial_distance": 1.0, "contraction": [1.0] * 2, "shift": [0.1] * 2}
    with pytest.raises(error):
        gdp_mu(**({**good, "noise_scale": [1.0] * 2} | change))
