import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from certunlearn.accounting import _gaussian, _taut_string
from certunlearn.accounting._attack import best_loss

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "accounting.json").read_text())


def normal(x, sigma):
    return np.exp(-0.5 * (x / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))


def play_by_panels(distance, c, s, sigma, thresholds, epsilon, reach=11.0):
    """delta of given thresholds: each density by Gauss-Legendre panels that end at the cuts."""
    nodes, weights = np.polynomial.legendre.leggauss(12)

    def panels(cut, width, size):
        low = np.linspace(-width, cut, math.ceil((cut + width) / size) + 1)
        edges = np.append(low, np.linspace(cut, width, math.ceil((width - cut) / size) + 1)[1:])
        half = np.diff(edges)[:, None] / 2
        x = (edges[:-1, None] + half) + half * nodes
        return x.ravel(), (half * weights).ravel()

    points, masses = np.array([[distance / 2], [-distance / 2]]), np.ones((2, 1))
    spread, mean = 0.0, distance / 2
    for t in range(len(s)):
        mean, spread = c[t] * mean + s[t] / 2, math.hypot(c[t] * spread, sigma[t])
        size = 0.4 * min([*sigma[t : t + 2], spread * 3 / reach])
        x, w = panels(thresholds[t + 1], mean + reach * spread, size)
        pushed = c[t] * points + np.where(points > thresholds[t], s[t], -s[t]) / 2
        if t == 0:
            rows = [
                m @ normal(x - p[:, None], sigma[t]) for p, m in zip(pushed, masses, strict=True)
            ]
        else:
            rows = masses @ normal(x - pushed[0][:, None], sigma[t])
        points, masses = np.stack([x, x]), np.stack(rows) * w
    p, q = masses[:, x > thresholds[-1]].sum(axis=1)
    return p - math.exp(epsilon) * q


@pytest.mark.parametrize("row", VECTORS["coupling"])
def test_vectors(row):
    steps = np.ones(row["steps"])
    got = best_loss.epsilon(
        row["initial_distance"],
        row["contraction"] * steps,
        row["shift"] * steps,
        row["noise_scale"] * steps,
        row["delta"],
    )
    assert 0.99 * row["attack"] <= got <= row["coupling_prototype"] <= row["interpolation"]
    assert got == pytest.approx(row["attack"], rel=2e-3)


# What is known from above (by a coupling) and from below.
KNOWN = [
    (0.9, 0.5, 0.2, 0.4, 4, 4.23, 4.10),
    (0.9, 0.5, 0.2, 0.4, 12, 2.63, 2.34),
    (0.9, 0.5, 0.2, 0.4, 25, 1.80, 1.32),
    (0.97, 1.0, 0.04, 0.15, 40, 6.45, 5.45),
]


@pytest.mark.parametrize(("c", "distance", "s", "sigma", "steps", "above", "below"), KNOWN)
def test_known_answers_with_contraction(c, distance, s, sigma, steps, above, below):
    got = best_loss.epsilon(distance, np.full(steps, c), s, sigma, 1e-5)
    assert got == pytest.approx(below, abs=0.0051)
    assert got < above


@pytest.mark.parametrize(
    ("nominal", "steps", "below"),
    [(1, 64, 0.516), (1, 256, 0.512), (4, 16, 2.44), (8, 4, 5.92), (8, 16, 5.45)],
)
def test_known_answers_without_weight_decay(nominal, steps, below):
    sigma = 4 / (math.sqrt(steps) * _gaussian.mu(nominal, 1e-5))
    got = best_loss.epsilon(2.0, np.ones(steps), 2 / steps, sigma, 1e-5)
    assert got == pytest.approx(below, rel=0.003)


@pytest.mark.parametrize("steps", [1, 3, 20])
@pytest.mark.parametrize("mu", [0.05, 1.0, 5.0, 18.0])
@pytest.mark.parametrize("delta", [1e-8, 1e-5, 1e-2])
def test_no_shift_is_the_exact_gaussian(steps, mu, delta):
    c = np.linspace(0.8, 1.1, steps)
    weights = np.array([np.prod(c[t + 1 :]) for t in range(steps)])
    distance = mu * math.sqrt(np.sum(weights**2)) / np.prod(c)
    exact = float(_gaussian.epsilon(mu, delta))
    got = best_loss.epsilon(distance, c, 0.0, 1.0, delta)
    assert exact * (1 - 1e-6) - 1e-9 <= got <= exact
    at = float(_gaussian.delta(exact, mu)) if exact else delta
    assert best_loss.delta(distance, c, 0.0, 1.0, exact) <= at


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 4.0])
def test_one_step_is_the_gaussian_of_its_separation(epsilon):
    exact = float(_gaussian.delta(epsilon, (0.9 * 1.5 + 0.7) / 0.8))
    got = best_loss.delta(1.5, [0.9], [0.7], [0.8], epsilon)
    assert exact * (1 - 1e-6) <= got <= exact


SCHEDULES = [
    (0.5, [0.9] * 5, [0.2] * 5, [0.4] * 5),
    (2.0, [1.0, 0.7, 1.2, 0.3], [0.5, 2.0, 0.1, 1.0], [0.5, 1.0, 0.3, 0.6]),
    (1.0, [1.0, 0.0, 0.9, 1.0], [0.3, 1.5, 0.0, 0.8], [0.5, 0.5, 0.7, 0.4]),
    (0.3, [1.0] * 3, [2.0] * 3, [0.3] * 3),
]


@pytest.mark.parametrize("game", SCHEDULES)
@pytest.mark.parametrize("epsilon", [0.2, 2.5, 12.0])
def test_the_value_is_that_of_its_policy_by_another_quadrature(game, epsilon):
    found = best_loss.attack(*game, epsilon)
    other = play_by_panels(*game, found.thresholds, epsilon)
    assert found.delta <= max(other, 0.0)
    assert found.delta == pytest.approx(other, rel=2e-7, abs=1e-15)
    assert best_loss.delta(*game, epsilon) == found.delta


@pytest.mark.parametrize("game", SCHEDULES)
def test_no_other_thresholds_are_better(game):
    found = best_loss.attack(*game, 1.0)
    rng = np.random.default_rng(3)
    for size in (0.1, 1.0):
        moved = found.thresholds + size * rng.normal(size=len(found.thresholds))
        moved = np.clip(moved, -4.0, 4.0)
        assert play_by_panels(*game, moved, 1.0) <= found.delta * (1 + 1e-6)


@pytest.mark.parametrize(
    ("game", "epsilon"),
    [
        ((1.0, np.full(40, 0.97), 0.04, 0.15), 5.45),
        ((2.0, np.ones(100), 0.02, 0.75), 1.0),
        ((2.0, np.ones(3), 3.0, 0.2), 280.0),
        ((2.0, np.linspace(1, 0.5, 30), 0.1, np.geomspace(3.0, 0.03, 30)), 4.0),
    ],
)
def test_a_finer_grid_changes_nothing(game, epsilon):
    values = [best_loss.delta(*game, epsilon, nodes=nodes) for nodes in (best_loss.NODES, 12.0)]
    assert values[0] == pytest.approx(values[1], rel=5e-8)


def test_simulation():
    """Four million runs on either side reach what the policy is said to reach."""
    rng = np.random.default_rng(0)
    distance, epsilon, count = 0.5, 1.0, 4_000_000
    c, s, sigma = np.linspace(1.0, 0.8, 8), np.linspace(0.3, 0.1, 8), np.linspace(0.5, 0.3, 8)
    found = best_loss.attack(distance, c, s, sigma, epsilon)
    accepted = []
    for start in (distance / 2, -distance / 2):
        x = np.full(count, start)
        for t in range(8):
            x = c[t] * x + np.where(x > found.thresholds[t], s[t], -s[t]) / 2
            x += sigma[t] * rng.standard_normal(count)
        accepted.append(np.mean(x > found.thresholds[-1]))
    p, q = accepted
    error = math.sqrt((p * (1 - p) + math.exp(2 * epsilon) * q * (1 - q)) / count)
    assert 0.005 < found.delta < 0.2
    assert abs(p - math.exp(epsilon) * q - found.delta) < 4 * error
    assert error < 0.01 * found.delta
    spacing = found.grid[1] - found.grid[0]
    assert found.densities.sum(axis=1) * spacing == pytest.approx([1, 1], abs=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_policy_iteration_from_any_policy_ends_no_higher(seed):
    """Arbitrary displacements, on a grid, from a random start: threshold policies come out."""
    distance, s, sigma, steps, epsilon = 1.0, 0.5, 0.6, 5, 2.0
    x = np.linspace(-9, 9, 301)
    displacements = np.linspace(-s / 2, s / 2, 5)
    kernels = [normal(x[:, None] - x - u, sigma) * (x[1] - x[0]) for u in displacements]
    rng = np.random.default_rng(seed)
    choices = rng.integers(0, 5, size=(steps, len(x)))
    reached = 0.0
    for _ in range(12):
        pairs = [np.stack([normal(x - m, sigma) for m in (0.75, -0.75)], axis=1)]
        for choice in choices[1:]:
            moved = [k @ (pairs[-1] * (choice == i)[:, None]) for i, k in enumerate(kernels)]
            pairs.append(np.sum(moved, axis=0))
        excess = [pair @ [1, -math.exp(epsilon)] for pair in pairs]
        accepts = (excess[-1] > 0).astype(float)
        reached = max(reached, excess[-1] @ accepts * (x[1] - x[0]))
        for t in reversed(range(1, steps)):
            ahead = np.stack([k.T @ accepts for k in kernels])
            choices[t] = np.where(excess[t - 1] > 0, ahead.argmax(axis=0), ahead.argmin(axis=0))
            accepts = ahead[choices[t], np.arange(len(x))]
    best = best_loss.delta(distance, np.ones(steps), s, sigma, epsilon)
    assert reached == pytest.approx(best, rel=1e-3)


schedules = st.integers(1, 12).flatmap(
    lambda steps: st.tuples(
        st.floats(0.01, 10),
        *(
            st.lists(values, min_size=steps, max_size=steps)
            for values in (
                st.floats(0, 1.2),
                st.one_of(st.just(0.0), st.floats(1e-3, 2)),
                st.one_of(st.just(0.0), st.floats(0.02, 3)),
            )
        ),
    )
)


@settings(max_examples=40, deadline=None)
@given(schedules, st.floats(-8, -0.5).map(lambda x: 10.0**x))
def test_between_plain_lower_bounds_and_interpolation(game, delta):
    got = best_loss.epsilon(*game, delta)
    above = float(_gaussian.epsilon(_taut_string.gdp_mu(*game), delta))
    distance, *arrays = game
    c, _, sigma = np.array(arrays)
    if not np.any(sigma):
        assert got in (0.0, math.inf)
        return
    assert got <= above
    # An adversary who never moves anything leaves a Gaussian of the noise's total.
    weights = np.array([np.prod(c[t + 1 :]) for t in range(len(c))])
    total = math.sqrt(np.sum((weights * sigma) ** 2))
    if total > 1e-3 * np.max(sigma):
        idle = float(_gaussian.epsilon(distance * np.prod(c) / total, delta))
        assert got >= min(idle, best_loss.MAX_EPSILON) * (1 - 1e-4) - 1e-5
    if 0 < got < best_loss.MAX_EPSILON:
        assert best_loss.delta(*game, got) >= delta * (1 - 1e-6)


def test_units_do_not_matter():
    game = (0.5, [0.9, 0.8, 1.0], [0.2, 0.3, 0.1], [0.4, 0.3, 0.5])
    scaled = (game[0] * 1e-6, game[1], *(np.array(a) * 1e-6 for a in game[2:]))
    assert best_loss.epsilon(*scaled, 1e-5) == pytest.approx(
        best_loss.epsilon(*game, 1e-5), rel=1e-9
    )


def test_noiseless_steps_are_folded():
    given_, folded = (
        (1.0, [0.9, 0.8, 0.5, 0.7], [0.2, 0.3, 0.1, 0.4], [0.5, 0.0, 0.6, 0.0]),
        (1.0, [0.9, 0.4], [0.2, 0.25], [0.5, 0.6]),
    )
    found, other = best_loss.attack(*given_, 1.0), best_loss.attack(*folded, 1.0)
    assert found.delta == other.delta
    follow = [other.thresholds[1] * 0.8, other.thresholds[2], other.thresholds[2] * 0.7]
    assert found.thresholds[2:] == pytest.approx(follow, rel=1e-12)


def test_smaller_noise_than_a_grid_can_resolve():
    values = [best_loss.delta(1.0, [1, 1, 1], 0.5, [1, tiny, 1], 1.0) for tiny in (1e-2, 1e-9, 0.0)]
    assert values[0] <= values[1] <= values[2]
    assert values[1] == pytest.approx(values[2], rel=1e-3)


def test_degenerate_games():
    assert best_loss.epsilon(1.0, [1.0], [0.1], [0.0], 1e-5) == math.inf
    assert best_loss.delta(1.0, [1.0], [0.1], [0.0], 5.0) == 1.0
    for same in [(0.0, [1.0], [0.1], [1.0]), (1.0, [1, 0], [0.1, 0], [1, 0])]:
        assert best_loss.epsilon(*same, 1e-5) == best_loss.delta(*same, 0.0) == 0.0
    assert best_loss.epsilon(1.0, [1, 0], [0.1, 0.1], [1, 0], 1e-5) > 4  # the policy keeps the bit
    assert best_loss.epsilon(1.0, [1, 0], [0.1, 0.0], [1, 1], 1e-5) == 0.0
    assert best_loss.epsilon(100.0, [1.0, 1.0], 0.1, 0.01, 1e-5) == best_loss.MAX_EPSILON
    assert best_loss.delta(100.0, [1.0], 0.1, 0.01, 301.0) == 0.0
    assert best_loss.epsilon(1.0, [1.0], [0.0], [10.0], 0.5) == 0.0  # delta covers everything


def test_a_delta_near_the_end_of_float64():
    exact = float(_gaussian.epsilon(2.0, 1e-310))
    assert 0.9 * exact < best_loss.epsilon(2.0, [1.0], [0.0], [1.0], 1e-310) <= exact


def test_at_epsilon_zero_everything_is_pushed_from_the_middle():
    found = best_loss.attack(1.0, [1.0, 1.0], [0.5, 0.5], [1.0, 1.0], 0.0)
    assert found.thresholds == pytest.approx([0, 0, 0], abs=1e-8)
    assert found.delta == best_loss.delta(1.0, [1.0, 1.0], [0.5, 0.5], [1.0, 1.0], 0)


def test_many_steps_stay_below_interpolation_and_cheap():
    sigma = 4 / (math.sqrt(1000) * _gaussian.mu(1.0, 1e-5))
    got = best_loss.epsilon(2.0, np.ones(1000), 2 / 1000, sigma, 1e-5)
    assert got == pytest.approx(0.511, abs=0.001)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"delta": 0.0}, ValueError, "delta must be strictly between 0 and 1, got 0.0"),
        ({"rounds": 0}, ValueError, "rounds must be at least 1"),
        ({"noise_scale": [-1.0]}, ValueError, "noise_scale must be finite and at least 0"),
        ({"shift": [1.0, 2.0]}, ValueError, "one common length"),
        ({"contraction": "x"}, TypeError, "contraction must be numbers"),
    ],
)
def test_errors(change, error, message):
    arguments = {
        "initial_distance": 1.0,
        "contraction": [1.0],
        "shift": [1.0],
        "noise_scale": [1.0],
        "delta": 0.1,
    }
    with pytest.raises(error, match=message):
        best_loss.epsilon(**{**arguments, **change})


@pytest.mark.parametrize("epsilon", [-1.0, math.nan, math.inf, 1e3])
def test_attack_refuses_epsilon_out_of_range(epsilon):
    with pytest.raises(ValueError, match="epsilon must be from 0 to 300"):
        best_loss.attack(1.0, [1.0], [1.0], [1.0], epsilon)


def test_attack_refuses_what_cannot_be_played():
    with pytest.raises(ValueError, match="told apart"):
        best_loss.attack(0.0, [1.0], [1.0], [1.0], 1.0)
    with pytest.raises(ValueError, match="nodes must be at least 2"):
        best_loss.attack(1.0, [1.0], [1.0], [1.0], 1.0, nodes=1)
