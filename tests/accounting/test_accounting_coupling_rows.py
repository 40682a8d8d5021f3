"""One step of the coupling recursion: all mass is counted, and chords are on the safe side."""

from typing import NamedTuple

import jax
import numpy as np
import pytest
from scipy import special

from certunlearn.accounting import _gaussian
from certunlearn.accounting._reflection import kernel, node_rows, node_tables


def step_of(separation, end, window, tail, levels, merged):
    """A step from one separation, all by the mirror in the middle, and the time of its lookout."""
    nodes = node_rows.make_nodes(end, 0.1)
    table = node_tables.Table(nodes, np.ones(len(nodes)), np.ones((len(nodes), 8)))
    window = window or len(nodes)
    rows = node_rows.make_rows(
        np.array([separation]), nodes, len(nodes), window, tail, merged, False
    )
    rows = rows._replace(levels=levels[None], thetas=np.zeros((1, len(levels))))
    target = node_tables._target(table, len(nodes))
    return kernel.operator(rows, target, window, 2 * tail, merged, False), nodes, rows


def mass(separation, end, window, tail, levels, merged):
    """What a step makes of a table of ones: delta of its Gaussians; and the rest, and the time."""
    step, nodes, rows = step_of(separation, end, window, tail, levels, merged)
    return step(np.ones((2, len(nodes), 8))), step.rest, float(rows.time[0])


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("top", [pytest.param(0.0, marks=pytest.mark.slow), 5.0])
def test_all_mass_is_accounted_for_where_the_table_ends_early(merged, top):
    levels = np.linspace(0, top, 8)
    exact = _gaussian.delta(levels, 2.5)
    for window in (None, 16):  # the second is cut on both sides
        found, rest, _ = mass(2.5, 3.0, window, 0.1, levels, merged)
        assert rest[0] > 0.1
        assert np.all(exact <= found)
        assert window == 16 or np.all(found < exact * 1.1)


@pytest.mark.parametrize("merged", [False, True])
def test_where_l_is_high_windows_are_where_the_noise_leads(merged):
    # Two at a time share a window; the first does not reach down to 0, where its second leads.
    levels = np.array([0.0, 750.0, 250.0, 250.0, 500.0, 500.0, 750.0, 750.0])
    exact = _gaussian.delta(levels, 30.0)
    found, _, time = mass(30.0, 50.0, 120, 6.0, levels, merged)
    assert np.all(exact <= found)
    # Pairs alive when nodes are looked out for.
    alive = _gaussian.delta(levels, 30.0 / time**0.5)
    assert alive[-1] < 1e-20
    assert np.all(found < alive * 1.1 + 1e-12)


@pytest.mark.parametrize("merged", [pytest.param(False, marks=pytest.mark.slow), True])
def test_no_error_is_large_beside_a_small_delta(merged):
    levels = np.linspace(0, 40, 8)
    exact = _gaussian.delta(levels, 2.0)
    assert exact[-1] < 1e-80
    found, rest, time = mass(2.0, 60.0, None, 20.0, levels, merged)
    assert np.all(exact <= found)
    assert np.all(found < 1.1 * _gaussian.delta(levels, 2.0 / time**0.5))
    assert np.all(rest < 1e-100 * exact)


class Pairs(NamedTuple):
    """One row of pairs by one mirror: weights in units of the tilted density, and the gain in L."""

    nodes: np.ndarray
    weight: np.ndarray
    gain: np.ndarray
    time: float
    slope: float
    star: float


def pairs(separation, theta, level, gap):
    nodes = node_rows.make_nodes(separation + 12, gap)
    rows = node_rows.make_rows(
        np.array([separation]), nodes, len(nodes), len(nodes), 6.0, False, False
    )
    time, slope = float(rows.time[0]), (1 - theta) * level / separation
    rows = rows._replace(levels=np.array([[level]]), thetas=np.array([[theta]]))
    with jax.enable_x64(True):
        row = kernel.Rows(*(jax.numpy.asarray(field[0]) for field in rows))
        compiled = jax.jit(kernel._paired, static_argnums=4)
        found = compiled(row, np.array([slope]), nodes, len(nodes) - 1, False)
    weight, line = (np.asarray(part)[0] for part in found[:2])
    star = 2 * theta * level * time / separation
    gain = line - level - slope * (nodes - separation)
    return Pairs(nodes, weight, gain, time, slope, star)


@pytest.mark.parametrize("separation", [1.0, 8.0, 30.0])
def test_between_nodes_the_gain_in_l_is_never_above_its_formula(separation):
    found = pairs(separation, 0.3, 2.0 * separation, 0.15)
    nodes, star = found.nodes, found.star
    between = np.linspace(nodes[np.searchsorted(nodes, star)], nodes[-1], 20_001)[1:]
    rate = separation / (2 * found.time)
    exact = np.log(np.expm1(-rate * (between + star)) / np.expm1(-rate * (between - star)))
    assert np.all(np.interp(between, nodes, found.gain) <= exact + 1e-12)
    assert found.gain.max() > 0.01 or separation == 30


@pytest.mark.parametrize(
    ("separation", "theta", "level"), [(1.0, 0.0, 1.0), (1.0, 0.4, 1.0), (4.0, 0.2, 6.0)]
)
def test_weights_of_nodes_are_the_pairs_that_run_to_them_and_not_much_more(
    separation, theta, level
):
    found = pairs(separation, theta, level, 0.3)
    nodes, t = found.nodes, found.time
    share, weights = np.polynomial.legendre.leggauss(40)
    share, weights = (share + 1) / 2, weights / 2
    exact = np.zeros(len(nodes))
    first = int(np.searchsorted(nodes, found.star))
    for i in range(first, len(nodes) - 1):
        h = nodes[i + 1] - nodes[i]
        distance = nodes[i] + h * share
        density = np.exp(-((distance - separation) ** 2) / (8 * t)) / np.sqrt(8 * np.pi * t)
        alive = density * -np.expm1(-separation / (2 * t) * (distance - found.star)) * h * weights
        # By the gain, a line from node to node, pairs are tilted towards where it is less.
        x = (found.gain[i + 1] - found.gain[i]) / 2
        exact[i] += np.sum(alive * (1 - share) * np.exp(x * share))
        exact[i + 1] += np.sum(alive * share * np.exp(-x * (1 - share)))
    weight = found.weight * np.exp(-((nodes - separation) ** 2) / (8 * t))
    assert np.all(weight >= exact * (1 - 1e-12))
    assert np.all(weight[first:] <= exact[first:] * 1.1)
    assert weight.sum() <= exact.sum() * 1.01


@pytest.mark.parametrize("geometric", [False, True])
def test_entries_weigh_a_level_and_the_next(geometric):
    rng = np.random.default_rng(3)
    low, high = rng.random((2, 5, 4))
    place = rng.integers(0, 19, (5, 4)).astype(np.int32)
    place[0, 0], place[0, 1] = 0, 18  # the first pair of levels, and the last
    values = rng.uniform(0.1, 1.0, 20)
    found = kernel.Entries(low, high, place).times(values, geometric)
    for state in range(5):
        parts = [
            a * values[p] ** (1 - b) * values[p + 1] ** b
            if geometric
            else a * values[p] + b * values[p + 1]
            for a, b, p in zip(low[state], high[state], place[state], strict=True)
        ]
        np.testing.assert_allclose(found[state], sum(parts), rtol=1e-13)


def test_mass_between_the_mirror_and_the_next_node_counts_at_its_least_l():
    separation, theta, columns, spacing = 3.0, 0.5, 40, 0.5
    nodes = node_rows.make_nodes(12.0, 0.2)
    rows = node_rows.make_rows(
        np.array([separation]), nodes, len(nodes), len(nodes), 6.0, False, False
    )
    time = float(rows.time[0])
    star = nodes[9] + 0.01  # where positive mass begins
    level = star * separation / (2 * theta * time)
    slope = (1 - theta) * level / separation
    least = level + slope * (star - separation)
    rows = rows._replace(levels=np.full((1, 8), level), thetas=np.full((1, 8), theta))
    top = np.full(len(nodes), spacing * (columns - 1))
    table = node_tables.Table(nodes, top, np.ones((len(nodes), columns)))
    target = node_tables._target(table, len(nodes))
    step = kernel.operator(rows, target, len(nodes), 12.0, False, False)
    # Worth 1 up to the last level below the least L, where no other mass stands.
    steps = np.arange(columns) * spacing
    values = np.broadcast_to(steps <= least, (2, len(nodes), columns))
    found = (step(values.astype(float)) - step.rest)[0]
    below = steps[steps <= least][-1]
    share = 1 - np.expm1(least - below) / np.expm1(spacing)
    between = np.linspace(star, nodes[10], 100_001)
    away = between - separation + 2 * slope * time
    density = np.exp(-(away**2) / (8 * time)) / np.sqrt(8 * np.pi * time)
    mass = density * -np.expm1(-separation / (2 * time) * (between - star))
    exact = np.trapezoid(mass, between)
    assert share > 0.1
    assert share * exact <= found <= 1.3 * share * exact


def test_between_two_levels_values_are_on_the_chord_in_e_to_the_l():
    spacing, columns = 0.1, 64
    lines = np.random.default_rng(4).uniform(0, spacing * (columns - 1), 100)
    with jax.enable_x64(True):
        node = kernel._Node(*map(jax.numpy.asarray, (spacing, 1 / np.expm1(spacing), 7)))
        compiled = jax.jit(kernel._entries, static_argnums=4)
        found = compiled(jax.numpy.full(100, 0.5), lines, node, columns, False)
    levels = np.arange(columns) * spacing
    values = np.append(np.full(7, np.nan), np.exp(-levels))  # level 0 stands at place 7
    for low, high, place, line in zip(*map(np.asarray, found), lines, strict=True):
        chord = np.interp(np.exp(line), np.exp(levels), np.exp(-levels)) / 2
        assert chord <= low * values[place] + high * values[place + 1] <= chord * (1 + 1e-5)


@pytest.mark.parametrize("merged", [False, True])
def test_nodes_that_may_be_missed_have_the_values_that_say_so(merged):
    levels = np.zeros(8)
    step, nodes, rows = step_of(3.0, 30.0, None, 6.0, levels, merged)
    near, time = int(rows.near[0]), float(rows.time[0])
    values = np.stack([np.zeros((len(nodes), 8)), np.ones((len(nodes), 8))])
    found = (step(values) - step.rest)[0]
    beyond = special.ndtr((3.0 - nodes[near] - np.array([0.1, 0.0])) / (2 * time**0.5))
    assert beyond[0] < found < beyond[1]
