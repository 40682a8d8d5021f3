"""The bounds of private training that hold at any delta, against sums and integrals in mpmath."""

import math
from itertools import pairwise

import mpmath
import numpy as np
import pytest

from certunlearn.accounting import _gaussian
from certunlearn.accounting._subsampled import profile, renyi

PAIRS = [(1.0, 0.01, 1), (4.0, 0.00033, 1), (1.0, 0.01, 3), (0.6, 0.3, 2), (3.0, 0.9, 4)]


class Exact:
    """The pair P and Q of `dp_sgd` in mpmath."""

    def __init__(self, sigma, rate, deletions):
        self.sigma, self.most = mpmath.mpf(sigma), deletions
        rate = mpmath.mpf(rate)
        self.weights = [
            mpmath.binomial(deletions, i) * rate**i * (1 - rate) ** (deletions - i)
            for i in range(deletions + 1)
        ]

    def ratio(self, x):
        return sum(
            w * mpmath.exp((i * x - mpmath.mpf(i * i) / 2) / self.sigma**2)
            for i, w in enumerate(self.weights)
        )

    def mean(self, function, high):
        """Expectation under Q of a function of dP / dQ."""
        points = mpmath.linspace(-25 * self.sigma, high + 25 * self.sigma, 30)
        density = lambda x: mpmath.npdf(x, 0, self.sigma)  # noqa: E731
        return mpmath.quad(lambda x: density(x) * function(self.ratio(x)), points)

    def delta(self, epsilon):
        """The larger of the two divergences of one step."""
        level = mpmath.exp(epsilon)
        found = []
        for target in (level, 1 / level):
            if target <= self.weights[0]:  # the ratio is never so small
                continue
            low, high = -60 * self.sigma, self.most + 60 * self.sigma**2 + 60 * self.sigma
            for _ in range(150):
                middle = (low + high) / 2
                low, high = (middle, high) if self.ratio(middle) < target else (low, middle)
            sign = 1 if target == level else -1  # P gains above x, Q below
            p = sum(
                w * mpmath.ncdf(sign * (i - low) / self.sigma) for i, w in enumerate(self.weights)
            )
            q = mpmath.ncdf(-sign * low / self.sigma)
            found.append(p - level * q if sign == 1 else q - level * p)
        return max(found)


@pytest.mark.parametrize("order", [2, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("sigma", "rate", "deletions"), PAIRS)
def test_moments_are_at_least_the_integrals_in_both_directions(sigma, rate, deletions, order):
    with mpmath.workdps(30):
        exact = Exact(sigma, rate, deletions)
        forward = exact.mean(lambda f: f**order, order * deletions)
        backward = exact.mean(lambda f: f ** (1 - order), deletions)
        found = renyi.log_moment(sigma, rate, deletions, order)
        truth = mpmath.log(max(forward, backward))
        assert truth <= found <= float(truth) * 1.01
        above = renyi._backward(sigma, rate, deletions, order)
        assert backward - 1 <= above
        assert order == 40 or above <= float(backward - 1) * 1.02


def test_a_tiny_rate_keeps_its_digits():
    found = renyi.log_moment(2.0, 1e-6, 1, 2)
    assert math.log1p(1e-12 * math.expm1(0.25)) <= found <= 1e-12 * math.expm1(0.25) + 1e-13


def test_one_example_is_dp_accountings_renyi_accountant():
    dp = pytest.importorskip("dp_accounting")
    orders = [order for order in renyi._orders() if order < 600]
    for sigma, rate, steps, delta in [(4, 0.00033, 10_000, 1e-15), (50, 0.01, 10_000, 1e-12)]:
        accountant = dp.rdp.RdpAccountant(orders)
        event = dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(sigma))
        accountant.compose(dp.SelfComposedDpEvent(event, steps))
        expected = accountant.get_epsilon(delta)
        assert renyi.epsilon(sigma, rate, steps, 1, delta) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("sigma", "rate", "deletions"), PAIRS)
def test_no_bound_is_below_the_true_divergence_of_one_step(sigma, rate, deletions):
    run = (sigma, rate, 1, deletions)
    small = 0
    with mpmath.workdps(60):
        exact = Exact(sigma, rate, deletions)
        for epsilon in (0.01, 0.3, 1.0, 3.0, 8.0, 20.0, 40.0, 60.0):
            truth = exact.delta(epsilon)
            if truth < 1e-290:
                continue
            for bound in (renyi.delta, profile._told, profile.delta):
                assert truth <= bound(*run, epsilon)
            small += truth < 1e-16  # where the tables have no digits
            assert profile.epsilon(*run, float(truth)) >= epsilon * (1 - 1e-12)
    assert small


def test_composed_the_bound_is_above_the_tables():
    run = (1.0, 0.02, 300, 2)
    for epsilon in (1.0, 3.0, 6.0):
        tabled = float(profile._losses(*run).get_delta_for_epsilon(epsilon))
        assert tabled > 1e-11
        assert tabled < renyi.delta(*run, epsilon) < 1e3 * tabled


def test_with_everyone_the_bound_is_the_gaussians():
    """At a rate of nearly 1 the moments are those of two Gaussians: a (a - 1) mu^2 / 2."""
    found = renyi.log_moment(20.0, 1 - 1e-12, 3, 10)
    assert found == pytest.approx(10 * 9 / 2 * (3 / 20) ** 2, rel=5e-3)


# No cliffs


def test_epsilon_has_no_cliff_in_delta():
    deltas = np.geomspace(1e-30, 1e-4, 105)
    found = [profile.epsilon(4.0, 0.00033, 10_000, 1, d) for d in deltas.tolist()]
    assert all(a >= b for a, b in pairwise(found))
    assert all(a < 2 * b for a, b in pairwise(found))
    below, above = (profile.epsilon(4.0, 0.00033, 10_000, 1, d) for d in (1e-11, 1.01e-11))
    assert above <= below < 2 * above


@pytest.mark.slow
def test_noise_has_no_cliff_in_delta():
    below, above = (profile.noise_multiplier(0.00033, 10_000, 1, 1.0, d) for d in (9e-12, 1.1e-11))
    assert above <= below < 1.5 * above
    assert profile.delta(below, 0.00033, 10_000, 1, 1.0) <= 9e-12
    assert profile.epsilon(below, 0.00033, 10_000, 1, 9e-12) <= 1


@pytest.mark.parametrize("deletions", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_epsilon_has_no_cliff_in_the_noise(deletions):
    """Tables end at 0.01; below it who is drawn shows."""
    sigmas = [0.03, 0.015, 0.0101, 0.0099, 0.005]
    found = [profile.epsilon(s, 0.01, 1000, deletions, 1e-5) for s in sigmas]
    assert all(a < b < 5 * a for a, b in pairwise(found))
    gaussians = float(_gaussian.epsilon(deletions * math.sqrt(1000) / 0.005, 1e-5))
    assert found[-1] < gaussians / 10


@pytest.mark.slow
def test_epsilon_has_no_cliff_in_steps_and_none_in_deletions():
    found = [profile.epsilon(400.0, 0.001, t, 1, 1e-5) for t in (990_000, 1_000_000, 1_000_001)]
    assert found[0] <= found[1] <= found[2] < 2 * found[1]
    found = [profile.epsilon(4000.0, 0.5, 10, k, 1e-5) for k in (1500, 1800, 2500)]
    assert found[0] < found[1] < found[2] < 5 * found[0]


def test_many_deletions_at_little_noise_are_no_error():
    found = profile.epsilon(0.01, 0.1, 10, 1000, 1e-5)  # cells of tables would be e^1000 wide
    assert 1e9 < found < float(_gaussian.epsilon(1000 * math.sqrt(10) / 0.01, 1e-5))
    assert profile.epsilon(1.0, 1e-9, 10, 10**9, 1e-5) < math.inf


# Large epsilons


@pytest.mark.parametrize(
    ("sigma", "rate", "steps"),
    [(0.1, 0.01, 1000), (0.02, 0.001, 10), (0.011, 0.5, 3), (0.004, 0.1, 20)],
)
def test_large_epsilons_are_finite_and_come_back(sigma, rate, steps):
    for delta in (1e-3, 1e-5, 1e-9):
        found = profile.epsilon(sigma, rate, steps, 1, delta)
        assert found < math.inf
        assert profile.delta(sigma, rate, steps, 1, found) <= delta * (1 + 1e-12)


@pytest.mark.parametrize("epsilon", [50.0, 1000.0])
def test_noise_for_large_epsilons_reaches_them(epsilon):
    sigma = profile.noise_multiplier(0.01, 1000, 1, epsilon, 1e-5)
    assert 0.9 * epsilon < profile.epsilon(sigma, 0.01, 1000, 1, 1e-5) <= epsilon


def test_a_delta_that_covers_being_drawn_at_all_needs_no_noise():
    assert profile.epsilon(1e-9, 1e-4, 10, 1, 1.01e-3) == 0
    assert profile.delta(1e-9, 1e-4, 10, 1, 0.0) == pytest.approx(1e-3, rel=1e-3)
    assert profile.epsilon(1e-9, 1e-4, 10, 1, 0.9e-3) > 1000
