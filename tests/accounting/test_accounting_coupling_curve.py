"""The curve of the coupling accountant: many numbers of steps from the tables of one solution."""

import math

import numpy as np
import pytest
from coupling_helpers import at_nominal, by_attack, game

from certunlearn.accounting._reflection import blocks, solution

# Tables for few blocks are finer, which shows where epsilon is nearly 0.
NEARLY_NONE = 2e-3


def stopped(steps, count):
    return solution.Steps(steps.distance, *(part[:count] for part in steps[1:]))


def check(steps, stops, least=0.999, most=1.02):
    """The curve, held against the attack and `epsilon` of the runs that stop at `stops`."""
    delta = 1e-5
    curve = solution.epsilon_curve(steps, delta)
    assert curve.shape == (len(steps.noise) + 1,)
    assert curve[0] == math.inf
    assert np.all(np.diff(curve[1:]) <= 0)
    for stop in stops:
        run = stopped(steps, stop)
        alone = solution.epsilon(run, delta)
        assert least * alone <= curve[stop] <= most * alone + NEARLY_NONE
        assert by_attack(run, delta) <= curve[stop]
    return curve


def test_every_number_of_few_steps():
    check(game(1.0, 0.9, 0.3, 1.5, 4), range(1, 5))


@pytest.mark.slow
def test_of_merged_blocks_every_one_is_read():
    steps = at_nominal(2.0, 1.0, 0.025, 80, 1.0, 1e-5)
    assert blocks.affordable_length(steps, 1e-5)[0] == 2
    curve = check(steps, (18, 55, 80))
    assert (curve[8:-1] / curve[9:]).max() < 1.1
    # In between: that of the block before.
    assert curve[55] == curve[54] > curve[56]


@pytest.mark.slow
def test_starts_are_as_far_apart_for_a_run_that_stops_sooner():
    """Where steps contract, the tables of the whole run alone would not reach so far."""
    curve = check(at_nominal(4.0, 0.8, 0.01, 20, 4.0, 1e-5), (13, 17))
    assert (curve[9:-1] / curve[10:]).max() < 2


@pytest.mark.slow
def test_far_starts_move_alike_first():
    curve = check(game(2000.0, 0.8, 0.01, 1.0, 80), (30, 80))
    assert curve[10] > 100 > curve[30]


@pytest.mark.slow
def test_the_first_steps_may_be_alike_and_others_not():
    steps = game(1.0, 1.0, 0.1, [1.0] * 8 + [0.5, 2.0, 0.7])
    assert blocks.alike(steps) == 8
    curve = check(steps, (5, 8, 11))
    assert curve[8] < 0.96 * curve[7]
    # The noise of the first step is 0: nothing is certified there.
    late = solution.epsilon_curve(game(1.0, 1.0, 0.1, [0.0, 1.0, 1.0]), 1e-5)
    assert late[:2].tolist() == [math.inf] * 2
    assert late[3] == solution.epsilon(game(1.0, 1.0, 0.1, [0.0, 1.0, 1.0]), 1e-5)


def test_nothing_to_hide_and_nothing_certified():
    assert solution.epsilon_curve(game(0.0, 1.0, 0.1, 1.0, 3), 1e-5).tolist() == [math.inf, 0, 0, 0]
    assert solution.epsilon_curve(game(1.0, 1.0, 0.1, 0.0, 2), 1e-5).tolist() == [math.inf] * 3


@pytest.mark.parametrize("distance", [1e160, 4e154])
def test_starts_so_far_apart_that_nothing_is_certified(distance):
    """At the second, the last steps alone bring the two to where interpolation says something."""
    curve = solution.epsilon_curve(game(distance, 0.5, 1.0, 1.0, 6), 1e-5)
    assert curve[0] == curve[1] == math.inf
    assert (curve[-1] < math.inf) == (distance < 1e155)
    assert not np.any(np.isnan(curve))
