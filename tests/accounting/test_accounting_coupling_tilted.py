"""Tilted pairs: no mass is lost or used twice, and bounds are above the attack and near it."""

import numpy as np
import pytest
from coupling_helpers import at_nominal, by_attack, by_interpolation_noise, game, solve
from numpy.polynomial.legendre import leggauss

from certunlearn.accounting import _gaussian
from certunlearn.accounting._reflection import blocks, node_rows, node_tables, solution, tilted

SLOW = pytest.mark.slow


def step_of(separation, optimistic=False):
    nodes = node_rows.make_nodes(separation + 14, 0.1)
    return tilted.Step(separation, 0.995, len(nodes), nodes, optimistic)


def weigh(step, levels, theta, bend):
    cuts = tilted.cut(step, theta * levels, np.full(len(levels), bend))
    return cuts, *tilted.weights(step, cuts, np.arange(len(levels)), levels)


@pytest.mark.parametrize("separation", [0.05, 1.0, 8.0])
@pytest.mark.parametrize("bend", [0.0, 0.06])
def test_all_positive_mass_is_counted_and_no_negative_mass_is_used_twice(separation, bend):
    levels = np.linspace(0.3, 5, 8) * separation
    step = step_of(separation)
    positive = _gaussian.delta(levels, separation / step.time**0.5)
    negative = positive + np.expm1(levels)
    for theta in (0.2, 0.6, 1.0):
        _, weight, line, rest = weigh(step, levels, theta, bend)
        counted = weight.sum(axis=1) + rest
        assert np.all(positive <= counted)
        assert np.all(counted < 1.03 * positive + 1e-6)
        assert np.all(line >= 0)
        # A weight times e^L is the negative mass that it is paired with.
        used = (weight * np.exp(line)).sum(axis=1)
        assert np.all(used < 1.03 * negative)
        if theta == 0.6 and bend == 0:
            assert np.all(used > 0.97 * negative)


def exact_cells(step, cuts, level):
    """L at the ends of each cell, and weights there, by fine quadrature of the definition."""
    points, weights = leggauss(20)
    points, weights = (points + 1) / 2, weights / 2
    rho, t, h = step.rho, step.time, np.diff(step.nodes)

    def density(v):
        return np.exp(-(v**2) / (2 * t)) / np.sqrt(2 * np.pi * t)

    def signed(v):
        return density(v - rho / 2) - np.exp(level) * density(v + rho / 2)

    star = level * t / rho
    used = int(cuts.used[0])
    starts = cuts.starts[0, : used + 1]
    ends = step.nodes[: used + 1] - starts
    dx, dy, h = np.diff(starts), np.diff(ends), h[:used]
    slope = (level - cuts.tilt[0]) / rho - cuts.bend[0, :used]
    x, y = dx[:, None] * points, dy[:, None] * points
    positive = signed(star + starts[:-1, None] + x) * weights * dx[:, None]
    negative = -signed(star - ends[:-1, None] - y) * weights * dy[:, None]
    tilted_negative = negative * np.exp(-slope[:, None] * y)
    tilted_positive = positive * np.exp(slope[:, None] * x)
    low = np.log(tilted_negative.sum(axis=1) / tilted_positive.sum(axis=1))
    pairs = (
        positive[:, :, None] * (tilted_negative / tilted_negative.sum(1, keepdims=True))[:, None]
    )
    u = (x[:, :, None] + y[:, None]) / h[:, None, None]
    a = (slope * h / 2)[:, None, None]
    up = (pairs * np.exp(-a * (1 - u)) * np.sinh(a * u) / np.sinh(a)).sum(axis=(1, 2))
    down = (pairs * np.exp(a * u) * np.sinh(a * (1 - u)) / np.sinh(a)).sum(axis=(1, 2))
    return low, low + slope * h, up, down


@pytest.mark.parametrize("separation", [0.7, 4.0])
@pytest.mark.parametrize(("theta", "bend"), [(0.3, 0.0), (0.7, 0.05)])
def test_cells_are_those_of_the_definition(separation, theta, bend):
    level = np.array([1.3 * separation])
    at_nodes = {}
    for optimistic in (False, True):
        step = step_of(separation, optimistic)
        cuts, weight, line, _ = weigh(step, level, theta, bend)
        low, high, up, down = exact_cells(step, cuts, level[0])
        ends = np.array([np.append(low, np.inf), np.append(np.inf, high)])
        if optimistic:
            ends = np.where(np.isfinite(ends), ends, -np.inf)
        exact = ends.max(axis=0) if optimistic else ends.min(axis=0)
        weights = np.append(down, 0) + np.append(0, up)
        # Cells where L is negative end the list.
        count = 1 + np.flatnonzero(weight[0] > 0)[-1]
        assert count > 50
        inner = slice(1, count - 1)
        np.testing.assert_allclose(line[0, inner], np.maximum(exact, 0)[inner], atol=1e-6)
        at_nodes[optimistic] = weight[0, inner] / weights[inner]
    assert np.all(at_nodes[False] >= 1)
    assert np.all(at_nodes[False] < 1.05)
    # The other side goes without the time that the way to a node takes: of that below a hundredth.
    assert np.all(at_nodes[True] <= 1.01)
    assert np.all(at_nodes[True] > 0.95)


@pytest.mark.parametrize("separation", [0.5, 2.0, 6.0])
def test_no_pair_has_a_negative_level(separation):
    """Where tilts are above L the line falls with the distance: cells end before it is below 0."""
    levels, step = np.linspace(0.2, 3, 6) * separation, step_of(separation)
    cuts, weight, line, rest = weigh(step, levels, 1.1, 0.06)
    slope = (levels - cuts.tilt) / step.rho
    exact = cuts.alpha + slope[:, None] * step.nodes
    below = (exact < 0) & (np.arange(len(step.nodes)) <= cuts.used[:, None])
    assert below.any()
    assert np.all(weight[below] == 0)
    np.testing.assert_array_equal(line[weight > 0], exact[weight > 0])
    # What those cells hold counts as 1.
    positive = _gaussian.delta(levels, separation / step.time**0.5)
    assert np.all(positive <= weight.sum(axis=1) + rest)


@pytest.mark.parametrize("lower", [False, True])
def test_lines_are_on_their_side_of_the_exponential(lower):
    exponent, u = np.linspace(-3, 3, 61)[:, None], np.linspace(0, 1, 41)
    start, rise = tilted._line(exponent, lower)
    over = start + rise * u - np.exp(exponent * u)
    assert np.all((over <= 1e-12) if lower else (over >= -1e-12))
    assert np.all(np.abs(over) <= exponent**2 / 8 * np.exp(np.abs(exponent)) + 1e-12)


def test_blocks_of_several_noises_have_mirrors_only():
    run = blocks.blocks(at_nominal(2.0, 0.5, 0.1, 8, 8.0, 1e-5), 2)
    assert run.several.all()
    solved = [
        node_tables.solve(run, 1e-5, node_tables.Resolution(0.15, 32, tilts))
        for tilts in (False, True)
    ]
    assert np.array_equal(solved[0].table.values, solved[1].table.values)


# Two steps, exact after the second: "tilted_two_steps" of the vectors.
@pytest.mark.parametrize(
    ("contraction", "attack", "quadrature"),
    [
        pytest.param(0.05, 6.1681, 6.1707, marks=SLOW),
        pytest.param(0.5, 7.7399, 7.7507, marks=SLOW),
        (1.0, 7.8086, 7.8198),
    ],
)
def test_two_steps_are_certified_within_a_hundredth_of_the_attack(contraction, attack, quadrature):
    steps = game(2.0, contraction, 0.1, 1.0, 2)
    mu = by_interpolation_noise(steps) * _gaussian.mu(1.0, 1e-5)
    steps = steps._replace(noise=steps.noise * mu / _gaussian.mu(8.0, 1e-5))
    found = solution._epsilon(solve(steps, 1e-5, tilted=True), 1e-5, 20.0)
    assert attack - 1e-4 <= found <= 1.009 * quadrature


@pytest.mark.slow
@pytest.mark.parametrize(
    ("contraction", "steps", "most"),
    [(0.05, 6, 1.05), (0.2, 6, 1.05), (0.5, 8, 1.05), (0.8, 15, 1.05), (0.9, 40, 1.08)],
)
def test_games_with_contraction_are_certified_near_the_attack(contraction, steps, most):
    steps = at_nominal(2.0, contraction, 0.1, steps, 8.0, 1e-5)
    attack = by_attack(steps, 1e-5)
    assert attack <= solution.epsilon(steps, 1e-5) <= most * attack


def random_game(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 7))
    contraction = rng.uniform(0, 1, count) * (rng.random(count) > 0.1)
    shift, noise = 10 ** rng.uniform(-2, 0, count), 10 ** rng.uniform(-0.4, 0.4, count)
    return game(10 ** rng.uniform(-1, 0.6), contraction, shift, noise), 10 ** rng.uniform(-7, -2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_never_below_the_attack_on_random_schedules(seed):
    steps, delta = random_game(seed)
    solved = solve(steps, delta, length=1, tilted=True)
    assert by_attack(steps, delta) <= solution._epsilon(solved, delta, 20.0)


@pytest.mark.slow
def test_the_optimistic_side_is_below():
    steps = at_nominal(2.0, 0.5, 0.1, 5, 4.0, 1e-5)
    low, high = solution.bracket(steps, 1e-5, 0.01)
    assert low < high < 1.06 * low
