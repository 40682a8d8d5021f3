"""One step of the coupling recursion: all mass is counted, and chords are on the safe side."""

import jax
import numpy as np
import pytest

from certunlearn.accounting import _gaussian
from certunlearn.accounting._reflection import kernel, node_rows, node_tables


def mass(separation, end, window, tail, levels, merged):
    """What a step makes of a table of ones: delta of its Gaussians; and the rest, and the time."""
    nodes = node_rows.make_nodes(end, 0.1)
    table = node_tables.Table(nodes, np.ones(len(nodes)), np.ones((len(nodes), 8)))
    window = window or len(nodes)
    rows = node_rows.make_rows(
        np.array([separation]), nodes, len(nodes), window, tail, merged, False
    )
    rows = rows._replace(levels=levels[None], thetas=np.zeros((1, len(levels))))
    target = node_tables._target(table, len(nodes))
    step = kernel.operator(rows, target, window, 2 * tail, merged, False)
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


@pytest.mark.parametrize("separation", [1.0, 8.0, 30.0])
@pytest.mark.slow
def test_between_nodes_the_gain_in_l_is_never_above_its_formula(separation):
    nodes = node_rows.make_nodes(separation + 10, 0.15)
    rows = node_rows.make_rows(
        np.array([separation]), nodes, len(nodes), len(nodes), 4.0, False, False
    )
    level, theta, time = 2.0 * separation, 0.3, float(rows.time[0])
    rows = rows._replace(levels=np.array([[level]]), thetas=np.array([[theta]]))
    slope = (1 - theta) * level / separation
    with jax.enable_x64(True):
        row = kernel.Rows(*(jax.numpy.asarray(field[0]) for field in rows))
        found = kernel._paired(
            row, jax.numpy.array([slope]), jax.numpy.asarray(nodes), len(nodes) - 1, False
        )
    gain = np.asarray(found[1])[0] - level - slope * (nodes - separation)
    star = 2 * theta * level * time / separation
    between = np.linspace(nodes[np.searchsorted(nodes, star)], nodes[-1], 20_001)[1:]
    rate = separation / (2 * time)
    exact = np.log(np.expm1(-rate * (between + star)) / np.expm1(-rate * (between - star)))
    assert np.all(np.interp(between, nodes, gain) <= exact + 1e-12)
    assert gain.max() > 0.01 or separation == 30
