import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from coupling_helpers import (
    by_attack,
    by_interpolation,
    by_interpolation_noise,
    game,
    solve,
    uncapped,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import certunlearn as cu
from certunlearn.accounting import _gaussian
from certunlearn.accounting._reflection import blocks, node_tables, solution
from certunlearn.certificates import issuing

VECTORS = json.loads((Path(__file__).parent.parent / "vectors/accounting.json").read_text())


@pytest.mark.parametrize("distance", [0.3, 2.0, 6.0])
@pytest.mark.parametrize("merged", [False, True])
def test_no_shift_is_the_exact_gaussian_from_above(distance, merged):
    exact = float(_gaussian.epsilon(distance / 2, 1e-5))
    found = uncapped(game(distance, 1.0, 0.0, 1.0, 4), 1e-5, merged=merged)
    assert exact <= found <= exact * 1.03


@pytest.mark.slow
def test_no_shift_lies_within_the_bracket():
    exact = float(_gaussian.epsilon(1.0, 1e-5))
    low, high = solution.bracket(game(2.0, 1.0, 0.0, 1.0, 4), 1e-5, 0.02)
    assert 0.98 * high <= low <= exact <= high


def test_one_step_is_the_gaussian_of_its_separation():
    steps = game(2.0, 0.5, 0.5, 1.5)
    assert solution.epsilon(steps, 1e-5) == pytest.approx(by_interpolation(steps, 1e-5), rel=1e-12)
    assert solution.delta(steps, 1.0) == pytest.approx(float(_gaussian.delta(1.0, 1.0)), rel=1e-12)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=[pytest.mark.slow] if row["steps"] > 4 else [])
        for row in VECTORS["coupling"]
        if row["steps"] != 16  # the game of 4 steps again
    ],
)
def test_vectors(row):
    names = ("initial_distance", "contraction", "shift", "noise_scale", "steps")
    steps = game(*(row[name] for name in names))
    found = solution.epsilon(steps, row["delta"])
    assert row["attack"] - 1e-4 <= found <= row["coupling_prototype"] * 1.03


def test_a_known_answer_with_contraction():
    # Published beside the attack: contraction, where the mirror's place matters most.
    steps = game(0.5, 0.9, 0.2, 0.4, 4)
    assert by_attack(steps, 1e-5) <= solution.epsilon(steps, 1e-5) <= 4.23 * 1.03


# Schedules in which a missing conversion of units, or a wrong separation, would show.
GAMES = [
    game(1.0, 1.0, 0.3, [0.5, 2.0, 0.7]),
    game(1.0, [1.0, 0.6, 0.9, 0.8], [0.1, 0.9, 0.2, 0.5], [1.5, 0.6, 1.2, 0.8]),
    game(3.0, [0.3, 1.0, 0.5], [0.5, 0.05, 0.5], [1.0, 1.0, 0.4]),
    game(0.05, 1.0, 0.1, 1.0, 3),
    game(2.0, [0.9, 0.0, 0.9, 0.7], 0.5, 1.0),
]


@pytest.mark.parametrize(
    "steps",
    [
        *(GAMES[0], pytest.param(GAMES[1], marks=pytest.mark.slow)),  # takes seconds
        *GAMES[2:],
    ],
)
@pytest.mark.parametrize("delta", [1e-2, 1e-6])
def test_between_attack_and_interpolation_and_close_to_the_attack(steps, delta):
    least = by_attack(steps, delta)
    assert least <= uncapped(steps, delta) <= by_interpolation(steps, delta) * 1.01
    # Where a step forgets everything, mirrors alone are known to leave a gap.
    gap = 1.2 if np.any(steps.contraction == 0) else 1.12
    assert least <= solution.epsilon(steps, delta) <= least * gap


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(
    each=st.lists(
        st.tuples(st.floats(0.3, 1), st.floats(-2, 0), st.floats(-0.4, 0.4)), min_size=2, max_size=7
    ),
    distance=st.floats(-1, 0.6),
    delta=st.floats(-7, -2),
)
def test_never_below_the_attack_on_random_games(each, distance, delta):
    contraction, shift, noise = np.array(each).T
    steps, delta = game(10**distance, contraction, 10**shift, 10**noise), 10**delta
    least = by_attack(steps, delta)
    for options in ({"length": 1}, {"length": 1, "merged": True}, {"length": 2}, {"length": 3}):
        assert least <= uncapped(steps, delta, **options)


def test_one_start_is_one_law():
    assert solution.epsilon(game(0.0, 1.0, 0.4, 1.0, 3), 1e-5) == 0
    assert solution.delta(game(0.0, 1.0, 0.4, 1.0, 3), 0.0) == 0


@pytest.mark.slow
def test_merging_costs_but_stays_between():
    steps = game(1.0, 0.95, 0.2, 1.0, 6)
    apart, killed, merged = (
        uncapped(steps, 1e-4, **options)
        for options in ({"length": 1}, {"length": 1, "merged": True}, {"length": 2})
    )
    assert by_attack(steps, 1e-4) < apart < killed < merged < by_interpolation(steps, 1e-4)


@pytest.mark.slow
def test_the_noise_scale_does_not_depend_on_the_unit_of_length():
    """In a small unit a noise of 1 is of no use, which says nothing of the noise in search."""
    near, far = (game(2.0 * unit, 1.0, 0.5 * unit, 1.0, 3) for unit in (1.0, 1e4))
    found = solution.noise_scale(near, 1.0, 1e-5)
    assert found < 0.9 * by_interpolation_noise(near)
    assert solution.noise_scale(far, 1.0, 1e-5) == pytest.approx(1e4 * found, rel=1e-3)


@pytest.mark.slow
def test_noise_is_not_used_while_the_two_are_too_far_apart_to_meet():
    """Strong contraction from afar: the runs have all but met, which tables for afar would hide."""
    steps = game(2000.0, 0.8, 0.01, 1.0, 80)
    found = blocks.blocks(steps)
    assert found.noise.tolist() == [1.0] * 67
    assert found.contraction.prod() == pytest.approx(0.8**80)
    assert by_attack(steps, 1e-5) <= solution.epsilon(steps, 1e-5) < 0.1
    # Never all of it.
    assert len(blocks.blocks(game(2000.0, 1.0, 0.01, 1.0, 3)).noise) == 1


def test_blocks_of_steps():
    steps = game(1.0, [1.0, 0.5, 0.5, 0.8], [0.1, 0.2, 0.3, 0.4], [1.0, 0.0, 2.0, 0.5])
    apart = blocks.blocks(steps, 1)
    # The step without noise is folded into the next: 0.5 * 0.2 + 0.3.
    assert apart.contraction.tolist() == [1.0, 0.25, 0.8]
    assert apart.shift == pytest.approx([0.1, 0.4, 0.4])
    assert apart.noise.tolist() == [1.0, 2.0, 0.5]
    assert apart.merged.tolist() == [False, False, False]
    two = blocks.blocks(steps, 2)
    assert two.contraction == pytest.approx([1.0, 0.2])
    assert two.shift == pytest.approx([0.1, 0.8 * 0.4 + 0.4])
    assert two.noise == pytest.approx([1.0, math.hypot(0.8 * 2.0, 0.5)])
    assert two.merged.tolist() == [False, True]
    # What follows the last noise is post-processing.
    ended = blocks.blocks(game(1.0, 1.0, 0.1, [1.0, 0.0]))
    assert ended.noise.tolist() == [1.0]


def killed_process(distance, contraction, shift, noise, count, epsilon, fixed):
    """The recursion with theta = 0, simulated: alive weight at the end, and its error.

    `fixed`: the mirror stays through the noise of two steps, whose shifts come first.
    """
    rng = np.random.default_rng(0)
    size = 2_000_000
    weight, distance, level = np.ones(size), np.full(size, distance), np.full(size, epsilon)
    if fixed:
        noise *= math.hypot(contraction, 1)
        shift += contraction * shift
        contraction, count = contraction**2, count // 2
    for _ in range(count):
        rho = (contraction * distance + shift) / noise
        y = rho / 2 + rng.normal(size=size) - level / rho
        weight = np.where(y > 0, -np.expm1(-rho * np.maximum(y, 0)) * weight, 0)
        distance, level = 2 * np.maximum(y, 0) * noise, 2 * np.maximum(y, 0) * level / rho
    return weight.mean(), weight.std() / math.sqrt(size)


@pytest.mark.parametrize(
    ("merged", "length"), [pytest.param(False, 1, marks=pytest.mark.slow), (True, 1), (True, 2)]
)
def test_the_recursion_is_the_killed_process(monkeypatch, merged, length):
    """Two Gaussians' difference simulated step by step, with the plain mirror (theta = 0)."""
    monkeypatch.setattr(node_tables, "THETAS", np.zeros(8))
    simulated, error = killed_process(1.0, 0.9, 0.3, 0.8, 4, 0.4, fixed=length == 2)

    def found(steps):
        solved = solve(steps, 1e-2, length=length, merged=merged, columns=128)
        return float(node_tables.profile(solved, np.array([0.4]))[0])

    assert simulated - 4 * error < found(game(1.0, 0.9, 0.3, 0.8, 4)) < simulated * 1.03
    # A wrong shift or a wrong contraction would be told apart.
    for wrong in (game(1.0, 0.9, 0.24, 0.8, 4), game(1.0, 0.8, 0.3, 0.8, 4)):
        assert found(wrong) < simulated - 4 * error


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True])
def test_the_optimistic_side_is_below_and_finer_tables_close_the_gap(merged):
    steps = game(2.0, 0.95, 0.4, 2.0, 5)
    widths = []
    for gap, columns in ((0.25, 48), (0.12, 128)):
        run = blocks.blocks(steps, 1)._replace(merged=np.full(5, merged))
        resolution = node_tables.Resolution(gap, columns, False)
        above = node_tables.solve(run, 1e-5, resolution)
        below = node_tables.solve(run, 1e-5, resolution, above.policies, optimistic=True)
        widths.append([solution._epsilon(x, 1e-5, 9.0) for x in (below, above)])
    (low, high), (finer_low, finer_high) = widths
    assert low < finer_high < high
    assert finer_low < finer_high
    assert finer_high - finer_low < 0.5 * (high - low)


@pytest.mark.slow
@pytest.mark.parametrize("dimension", [2, 8])
def test_no_random_policy_in_more_dimensions_beats_the_bound(dimension):
    """Bounded displacements by random networks of the state, as an adversary's loss might make.

    A Monte-Carlo estimate of delta for the best event of a family, whose direction a first half of
    the draws chooses and the second half measures.
    """
    steps, epsilon, size = game(1.0, 0.95, 0.3, 0.7, 5), 0.8, 200_000
    bound = solution.delta(steps, epsilon, 1e-2)
    rng = np.random.default_rng(dimension)
    best = 0.0
    for trial in range(4):
        weights = [rng.normal(size=(dimension, 16)), rng.normal(size=(16, dimension))]
        outward = trial % 2 == 0

        def displaced(x, weights=weights, outward=outward):
            u = np.tanh(x @ weights[0]) @ weights[1]
            if outward:
                u = u * 0.3 + 10 * np.sign(x[:, :1]) * np.eye(dimension)[0]
            return 0.95 * x + 0.15 * u / np.linalg.norm(u, axis=1, keepdims=True)

        ends = []
        for sign in (1, -1):
            x = np.zeros((size, dimension))
            x[:, 0] = sign * 0.5
            for _ in range(5):
                x = displaced(x) + 0.7 * rng.normal(size=x.shape)
            ends.append(x)
        chosen = [end[: size // 2].mean(axis=0) for end in ends]
        axis = chosen[0] - chosen[1]
        first, second = (np.sort(end[size // 2 :] @ axis) for end in ends)
        cuts = np.quantile(first, np.linspace(0.02, 0.98, 49))
        p, q = (1 - np.searchsorted(end, cuts) / len(end) for end in (first, second))
        error = math.sqrt((1 + math.exp(2 * epsilon)) / 4 / (size // 2))
        best = max(best, float((p - math.exp(epsilon) * q).max()) - 5 * error)
    assert 0.6 * bound < best < bound  # strong enough to tell something, and below


@pytest.mark.slow
def test_a_thousand_steps_with_strong_contraction():
    steps = game(0.5, 0.7, 0.1, 0.058, 1000)
    found = solution.epsilon(steps, 1e-5)
    assert by_attack(steps, 1e-5) <= found < 0.04 * by_interpolation(steps, 1e-5)


@pytest.mark.slow
def test_more_steps_cost_no_more_time_and_lose_no_gain():
    ratios = []
    for count in (64, 10_000):
        steps = game(2.0, 1.0, 2.0 / count, 20.0 / math.sqrt(count), count)
        ratios.append(solution.epsilon(steps, 1e-5) / by_interpolation(steps, 1e-5))
    assert ratios[1] == pytest.approx(ratios[0], rel=0.03)


@pytest.mark.slow
def test_noise_of_very_different_sizes_and_far_starts_are_harmless():
    for steps in (
        game(1.0, 1.0, 0.1, [3.0, 1e-3, 1.0]),
        game(1.0, 1.0, 0.1, [1e-3, 3.0]),
        game(500.0, [0.1, 0.1, 0.1], 0.1, 1.0),
        game(1e-6, 0.9, 1e-6, 1.0, 3),
    ):
        found = solution.epsilon(steps, 1e-5)
        assert 0 <= by_attack(steps, 1e-5) <= found <= by_interpolation(steps, 1e-5)


def test_a_smaller_separation_is_never_worse():
    """The bound at a distance holds for all smaller ones, though it is not monotone itself.

    After little noise come a reset and much: the second step's start hardly matters.
    """
    for distance in (0.5, 1.0, 2.0):
        farther = solution.epsilon(game(2.0, [1.0, 0.05], [0.2, 1.0], [0.3, 1.0]), 1e-4)
        assert by_attack(game(distance, [1.0, 0.05], [0.2, 1.0], [0.3, 1.0]), 1e-4) <= farther


@pytest.mark.slow
def test_monotone_in_every_parameter():
    base = {"distance": 1.0, "contraction": 0.9, "shift": 0.2, "noise": 1.0}
    epsilon = solution.epsilon(game(**base, steps=3), 1e-4)
    for change, sign in (
        ({"distance": 1.2}, 1),
        ({"contraction": 1.0}, 1),
        ({"shift": 0.3}, 1),
        ({"noise": 1.2}, -1),
    ):
        other = solution.epsilon(game(**{**base, **change}, steps=3), 1e-4)
        assert sign * (other - epsilon) > 0.01
    assert solution.epsilon(game(**base, steps=4), 1e-4) < epsilon
    assert solution.epsilon(game(**base, steps=3), 1e-5) > epsilon


MECHANISM = cu.GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.25, steps=3)
TARGET = {"epsilon": 1.0, "delta": 1e-5}


def test_noise_scale_is_the_inverse_and_less_than_interpolation_asks_for():
    sigma = cu.noise_scale(MECHANISM, **TARGET, accountant="coupling")
    epsilon = cu.epsilon(MECHANISM, noise_scale=sigma, delta=1e-5, accountant="coupling")
    assert 0.99 < epsilon <= 1
    assert sigma < 0.76 * cu.noise_scale(MECHANISM, **TARGET, accountant="interpolation")
    assert cu.epsilon_lower_bound(MECHANISM, noise_scale=sigma, delta=1e-5) > 0.97
    claim = {"noise_scale": sigma, "accountant": "coupling"}
    assert cu.delta(MECHANISM, epsilon=1.0, **claim) <= 1e-5
    curve = cu.epsilon_curve(MECHANISM, delta=1e-5, **claim)
    assert curve[0] == math.inf
    assert np.all(np.diff(curve[1:]) <= 0)
    assert curve[-1] == pytest.approx(epsilon, rel=1e-9)
    limit = cu.accounting.total_variation(MECHANISM, **claim)
    plain = cu.accounting.total_variation(MECHANISM, noise_scale=sigma, accountant="interpolation")
    assert 0.05 < limit < 0.107 < plain


def test_certificates_by_coupling_verify_and_catch_a_smaller_epsilon():
    params = {"w": np.ones(3, np.float32)}
    claim = {"noise_scale": 6.0, "delta": 1e-5, "accountant": "coupling"}
    issued = cu.certify(MECHANISM, params=params, steps_run=MECHANISM.steps, **claim)
    plain = cu.epsilon(MECHANISM, noise_scale=6.0, delta=1e-5, accountant="interpolation")
    assert issued.epsilon < plain
    assert cu.verify(issued, params)
    record = vars(issued) | {"epsilon": issued.epsilon * 0.999}
    record["record_digest"] = issuing.record_digest(record)
    assert "epsilon is recorded as" in cu.verify(cu.Certificate(**record)).problems[0]
    # What coarser tables proved is as true.
    record = vars(issued) | {"epsilon": issued.epsilon * 1.01}
    record["record_digest"] = issuing.record_digest(record)
    assert cu.verify(cu.Certificate(**record), params)


def test_memory_is_refused():
    stateful = cu.GradientClipping(
        init_radius=1.0, clip_norm=1.0, learning_rate=0.25, steps=3, memoryless=False
    )
    with pytest.raises(ValueError, match="need not stay together"):
        cu.epsilon(stateful, noise_scale=6.0, delta=1e-5, accountant="coupling")
    with pytest.raises(ValueError, match="need not stay together"):
        cu.epsilon_bracket(stateful, noise_scale=6.0, delta=1e-5)


@pytest.mark.slow
def test_the_bracket_is_as_narrow_as_asked_for_and_its_upper_end_is_certified():
    claim = {"noise_scale": 6.0, "delta": 1e-5}
    low, high = cu.epsilon_bracket(MECHANISM, **claim)
    assert 0.98 * high <= low < high <= cu.epsilon(MECHANISM, **claim, accountant="coupling")
    assert cu.epsilon_lower_bound(MECHANISM, **claim) < high
    half = (high - low) / high / 2
    finer_low, finer_high = cu.epsilon_bracket(MECHANISM, **claim, tolerance=half)
    assert (1 - half) * finer_high <= finer_low < finer_high < high
    with pytest.raises(ValueError, match="tolerance"):
        cu.epsilon_bracket(MECHANISM, **claim, tolerance=0.0)


def test_nothing_leaks_into_jax_settings():
    cu.epsilon(MECHANISM, noise_scale=6.0, delta=1e-5, accountant="coupling")
    assert jax.numpy.ones(1).dtype == np.float32
