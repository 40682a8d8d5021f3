"""Every accountant and the attack, for every kind of plain numbers that `Separations` may hold."""

import dataclasses
import math

import numpy as np
import pytest
from coupling_helpers import by_attack, game, uncapped
from scipy import integrate
from scipy.special import ndtr

import certunlearn as cu
from certunlearn import accounting
from certunlearn.accounting import _gaussian, product
from certunlearn.accounting._attack import best_loss

DELTA = 1e-5


def stated(contraction, shift, distance=2.0, **rest):
    steps = rest.pop("steps", 0)
    return cu.Separations(
        initial_distance=distance, contraction=contraction, shift=shift, steps=steps, **rest
    )


KINDS = {
    "growing": stated(1.3, 0.2, steps=3),
    "growing and shrinking": stated([1.4, 0.6, 1.2], [0.1, 0.3, 0.2]),
    "a reset": stated([0.9, 0.0, 0.9, 1.0], [0.1, 0.8, 0.1, 0.2]),
    "a reset at the end": stated([0.9, 1.0, 0.0], [0.1, 0.2, 0.9]),
    "resets only": stated(0.0, 0.8, steps=3),
    "a reset to one point": stated([1.0, 0.0, 1.0], [0.2, 0.0, 0.5]),
    "noise at some": stated(0.9, 0.2, steps=5, noisy=[True, False, False, True, False]),
    "noise at the first": stated(0.9, 0.0, steps=3, noisy=[True, False, False]),
    "a reset without noise": stated([1.0, 0.0, 1.1], [0.2, 0.7, 0.1], noisy=[True, False, True]),
    "no shift": stated([0.8, 1.3, 1.0], 0.0),
    "no distance": stated(1.0, 0.5, distance=0.0, steps=3),
    "nothing": stated(1.0, 0.0, distance=0.0, steps=2),
    "noise on the starts": stated(0.95, 0.2, steps=3, init_noise_scale=0.7),
    "from the center": stated(0.95, 0.2, steps=3, reference="center"),
    "with memory": stated(0.95, 0.2, steps=3, memoryless=False),
    "with memory, growing": stated(1.2, 0.2, steps=3, memoryless=False),
    "within a ball": stated(1.1, 0.2, distance=5.0, steps=3, diameter=1.0),
    "noise at some, within a ball": stated(
        1.1, 0.2, steps=4, diameter=0.8, noisy=[True, False, True, True]
    ),
}


# Those that take seconds with any noise.
LONG = (
    *("growing", "growing and shrinking", "a reset", "a reset at the end"),
    *("within a ball", "noise at some, within a ball"),
    *("no shift", "resets only", "noise on the starts", "from the center"),
)
# Of those the ones for which coupling is asked for its noise, too, which takes as long as the rest.
SOUGHT = ("growing", "a reset", "noise at some, within a ball")


@pytest.mark.parametrize(
    ("name", "noise"),
    [
        *(pytest.param(name, 0.8, marks=pytest.mark.slow) for name in KINDS),
        *((name, 2.5) for name in KINDS if name not in LONG),
    ],
)
def test_no_accountant_certifies_less_than_the_attack_reaches(name, noise):
    m = KINDS[name]
    claim = {"noise_scale": noise, "delta": DELTA}
    # A diameter is more than the attack knows of; another below respects it.
    assert m.attackable == math.isinf(m.diameter)
    reached = cu.epsilon_lower_bound(m, **claim) if m.attackable else 0.0
    names = accounting.supported_names(m)
    assert "interpolation" in names
    assert ("coupling" in names) == m.memoryless
    bounded = name in ("resets only", "a reset without noise") or not m.attackable
    assert ("product" in names) == bounded
    for each in names:
        found = cu.epsilon(m, **claim, accountant=each)
        assert reached <= found < math.inf, each
        back = cu.delta(m, noise_scale=noise, epsilon=found, accountant=each)
        assert back <= DELTA * (1 + 1e-6), each
        curve = cu.epsilon_curve(m, **claim, accountant=each)
        assert curve[-1] == pytest.approx(found, rel=1e-6), each
        if each == "coupling" and name in set(LONG) - set(SOUGHT):
            continue
        sigma = cu.noise_scale(m, epsilon=1.0, delta=DELTA, accountant=each)
        assert 0 < sigma < math.inf
        assert cu.epsilon(m, noise_scale=sigma, delta=DELTA, accountant=each) <= 1
    least = cu.epsilon(m, **claim)
    assert reached <= least <= cu.epsilon(m, **claim, accountant="interpolation")


@pytest.mark.parametrize(
    ("name", "mu"),
    [  # where no shift gives a choice, shifted interpolation is the truth
        ("no shift", 2 * 1.04 / math.sqrt(1.3**2 + 1 + 1)),
        ("noise at the first", 2 * 0.9),
        ("a reset to one point", 0.0),
        ("nothing", 0.0),
    ],
)
def test_known_answers(name, mu):
    m = KINDS[name]
    assert accounting.mu(m, noise_scale=1.0) == pytest.approx(mu, rel=1e-12)
    exact = float(_gaussian.epsilon(mu, DELTA))
    for each in ("interpolation", "coupling"):
        found = cu.epsilon(m, noise_scale=1.0, delta=DELTA, accountant=each)
        assert exact * (1 - 1e-9) <= found <= exact * 1.001
    reached = cu.epsilon_lower_bound(m, noise_scale=1.0, delta=DELTA)
    assert exact * (1 - 2e-3) <= reached <= exact


def test_two_runs_from_one_point_are_one_run_without_memory():
    m = KINDS["no distance"]
    assert cu.epsilon(m, noise_scale=1.0, delta=DELTA, accountant="coupling") == 0
    assert cu.epsilon_lower_bound(m, noise_scale=1.0, delta=DELTA) == 0
    # With memory they are not: the shift may remember what the starting points do not show.
    m = dataclasses.replace(m, memoryless=False)
    assert accounting.mu(m, noise_scale=1.0) == pytest.approx(1.5 / math.sqrt(3))


@pytest.mark.parametrize("shift", [0.3, 0.8, 2.0])
def test_where_steps_forget_everything_the_product_is_the_truth(shift):
    m = stated(0.0, shift, steps=3)
    claim = {"noise_scale": 1.0, "delta": DELTA}
    reached = cu.epsilon_lower_bound(m, **claim)
    found = cu.epsilon(m, **claim, accountant="product")
    assert reached <= found <= reached + 2e-3
    assert found <= cu.epsilon(m, **claim, accountant="coupling") * (1 + 1e-9)


def two_noises(distance, first, second, delta):
    """Coupling's epsilon of two noises by its definition: mirrors at z*, one integral."""
    (c1, s1, n1), (c2, s2, n2) = first, second
    rho = (c1 * distance + s1) / n1

    def bound(epsilon):
        star = epsilon / rho
        density = lambda x: math.exp(-x * x / 2) / math.sqrt(2 * math.pi)  # noqa: E731

        def integrand(y):
            mass = density(star + y - rho / 2) - math.exp(epsilon) * density(star + y + rho / 2)
            apart = (c2 * 2 * y * n1 + s2) / n2
            return mass * float(_gaussian.delta(2 * y * epsilon / rho, apart))

        return integrate.quad(integrand, 0, 12 + rho, epsabs=1e-13, limit=400)[0]

    low, high = 0.0, 60.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if bound(middle) <= delta else (middle, high)
    return high


@pytest.mark.parametrize("second", [(1.5, 0.2, 1.0), (1.2, 0.0, 0.7), (0.0, 0.6, 1.0)])
@pytest.mark.parametrize("first", [(1.3, 0.1, 1.0), (0.0, 1.4, 0.8), (0.9, 0.1, 1.2)])
def test_growth_and_resets_are_the_integral_by_quadrature(first, second):
    steps = game(2.0, *zip(first, second, strict=True))
    mirrors = two_noises(2.0, first, second, 1e-4)
    found = uncapped(steps, 1e-4)
    assert by_attack(steps, 1e-4) <= found <= mirrors * 1.03


GAMES = {
    "growth": (2.0, [1.1, 1.2, 1.3, 1.0], [0.1, 0.2, 0.1, 0.3], 1.0),
    "a reset": (2.0, [1.0, 0.9, 0.0, 1.0, 0.9], [0.1, 0.1, 1.5, 0.2, 0.1], 1.0),
    "a small reset": (2.0, [1.0, 0.9, 0.0, 1.0], [0.1, 0.1, 0.9, 0.7], 1.0),
    "a reset without noise": (2.0, [1.0, 0.0, 1.2, 1.0], [0.1, 0.9, 0.1, 0.2], [1, 0, 1, 1.0]),
    "a last shift in little noise": (1.0, [1.0, 1.0, 1.0], [0.0, 0.0, 1.5], [2.0, 1.0, 0.2]),
}


@pytest.mark.parametrize("name", GAMES)
@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_blocks_with_growth_and_resets_stay_above_the_attack(name, length):
    steps = game(*GAMES[name])
    assert by_attack(steps, 1e-4) <= uncapped(steps, 1e-4, length=length)


@pytest.mark.parametrize("name", GAMES)
def test_a_whole_run_in_one_block_is_one_gaussian_above_the_attack(name):
    steps = game(*GAMES[name])
    distance, variance = steps.distance, 0.0
    for c, s, sigma in zip(*steps[1:], strict=True):
        distance, variance = c * distance + s, c * c * variance + sigma**2
    one = float(_gaussian.epsilon(distance / math.sqrt(variance), 1e-4))
    assert uncapped(steps, 1e-4, length=9) == pytest.approx(one, rel=1e-3)
    assert by_attack(steps, 1e-4) <= one


@pytest.mark.slow
def test_starts_out_of_reach_do_not_matter_after_a_reset():
    tail = ([1.0, 0.9], [0.2, 0.3])
    far = game(1e5, [1.0, 0.0, *tail[0]], [0.1, 1.1, *tail[1]], 1.0)
    near = game(1.1, [1.0, *tail[0]], [0.0, *tail[1]], 1.0)
    found = uncapped(far, 1e-4)
    assert by_attack(far, 1e-4) <= found
    assert found == pytest.approx(uncapped(near, 1e-4), rel=0.01)


@pytest.mark.parametrize("growth", [1.0, 1.3])
@pytest.mark.parametrize("z", [0.5, 1.5, 2.5])
def test_an_attack_within_a_ball_stays_below_every_accountant(growth, z):
    # Pushed outwards, and clipped to the ball after the first noise.
    distance, shift, diameter, epsilon = 2.0, 0.4, 1.2, 0.5
    m = stated(growth, shift, distance=distance, steps=2, diameter=diameter)
    start, radius = (growth * distance + shift) / 2, diameter / 2

    def accepts(x):
        return ndtr(growth * x + shift / 2 * np.sign(x) - z)

    def probability(mean):
        inside = sum(
            integrate.quad(
                lambda x: float(accepts(x)) * math.exp(-((x - mean) ** 2) / 2), low, high
            )[0]
            for low, high in ((-radius, 0.0), (0.0, radius))
        )
        ends = ndtr(-radius - mean) * accepts(-radius) + ndtr(mean - radius) * accepts(radius)
        return inside / math.sqrt(2 * math.pi) + float(ends)

    reached = probability(start) - math.exp(epsilon) * probability(-start)
    for each in ("interpolation", "coupling", "product"):
        assert reached <= cu.delta(m, noise_scale=1.0, epsilon=epsilon, accountant=each)


def test_separations_within_a_ball_by_hand():
    m = KINDS["noise at some, within a ball"]
    # 2 -> 2.4, noise; then at most 0.8 -> 1.08, without noise, which the ball cuts to 0.8 again.
    expected = [1.1 * 2.0 + 0.2, 1.08, 1.08, 1.08]
    np.testing.assert_allclose(product.largest_separations(m), expected, rtol=1e-12)
    claimed = cu.delta(m, noise_scale=1.0, epsilon=0.5, accountant="product")
    left = 1.0
    for apart in (2.4, 1.08, 1.08):
        level = math.log(1 + (math.exp(0.5) - 1) / left)
        left *= float(_gaussian.delta(level, apart))
    assert claimed == pytest.approx(left, rel=1e-9)


@pytest.mark.parametrize("c", [0.9, 1.2])
def test_runs_with_memory_that_are_always_pushed_apart_are_below(c):
    m = stated(c, [0.1, 0.2, 0.3], memoryless=False, noisy=[True, False, True])
    weights = np.array([c * c, c, 1.0])
    apart = 2.0 * c**3 + weights @ [0.1, 0.2, 0.3]
    mu = apart / math.sqrt(c**4 + 1)
    assert mu <= accounting.mu(m, noise_scale=1.0) * (1 + 1e-12)
    for refused in ("coupling", "product"):
        with pytest.raises(ValueError, match=f"'{refused}' needs"):
            cu.epsilon(m, noise_scale=1.0, delta=DELTA, accountant=refused)


# Distances beyond float64


@pytest.mark.parametrize("memoryless", [True, False])
@pytest.mark.parametrize("steps", [800, 900, 3000])
def test_growth_without_end_is_certified_as_what_it_is(memoryless, steps):
    m = stated(1.5, 0.0, steps=steps, memoryless=memoryless)
    mu = 2 / math.sqrt(0.8)  # 2 / sqrt(1.5^-2 + 1.5^-4 + ...)
    assert accounting.mu(m, noise_scale=1.0) == pytest.approx(mu, rel=1e-9)
    expected = float(_gaussian.epsilon(mu, DELTA))
    found = cu.epsilon(m, noise_scale=1.0, delta=DELTA, accountant="interpolation")
    assert found == pytest.approx(expected, rel=1e-9)


def test_growth_before_a_reset_is_forgotten_and_other_growth_is_no_guarantee():
    grown = [1.5] * 3000
    quiet = [False] * 2999
    reset = stated([*grown, 0.0], [0.0] * 3000 + [0.5], noisy=[True, *quiet, True])
    assert accounting.mu(dataclasses.replace(reset, memoryless=False), noise_scale=1.0) == 0.5
    assert accounting.mu(reset, noise_scale=1.0) == pytest.approx(0.5)
    late = stated(grown, 0.1, noisy=[*quiet, True])
    assert accounting.mu(late, noise_scale=1.0) == math.inf
    assert cu.epsilon(late, noise_scale=1.0, delta=DELTA, accountant="interpolation") == math.inf
    with pytest.raises(ValueError, match="no noise_scale is enough"):
        cu.noise_scale(late, epsilon=1.0, delta=DELTA, accountant="interpolation")
    for far in (reset, late):
        with pytest.raises(ValueError, match=r"grow by a factor of at most 1e\+100"):
            cu.epsilon(far, noise_scale=1.0, delta=DELTA, accountant="coupling")
    assert best_loss.epsilon(2.0, [1.5] * 3000, 0.1, 1.0, DELTA) == 0  # nothing is claimed
    # The first noise that counts comes after growth from one point.
    apart = [0.0] * 2999 + [0.7]
    m = stated(grown, apart, distance=0.0, noisy=[*quiet, True], memoryless=False)
    assert accounting.mu(m, noise_scale=1.0) == pytest.approx(0.7)


def test_what_is_not_a_number_proves_nothing():
    assert _gaussian.epsilon(np.array([math.nan]), DELTA).tolist() == [math.inf]
    assert _gaussian.delta(1.0, math.nan) == 1
    assert cu.gdp_mu(1e200, [1.0], [0.0], [1e200]) == math.inf


def test_more_steps_neither_help_nor_hurt_where_each_forgets():
    with pytest.raises(ValueError, match="needs a contraction above 0"):
        accounting.best_steps(stated(0.0, 0.5, steps=3))
