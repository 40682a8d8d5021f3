import builtins
import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from certunlearn.accounting import _gaussian
from certunlearn.accounting._subsampled import profile

dp = pytest.importorskip("dp_accounting")

RUNS = [(1.0, 0.01, 1000), (2.0, 0.1, 100), (0.7, 0.001, 5000)]


@pytest.mark.parametrize(("sigma", "rate", "steps"), RUNS)
def test_one_example_is_dp_accountings_own_number(sigma, rate, steps):
    accountant = dp.pld.PLDAccountant()  # add or remove one; interval 1e-4
    event = dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(sigma))
    accountant.compose(dp.SelfComposedDpEvent(event, steps))
    for epsilon in (0.0, 0.3, 1.0):
        expected = float(accountant.get_delta(epsilon))
        got = profile.delta(sigma, rate, steps, 1, epsilon)
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-11)
    expected = accountant.get_epsilon(1e-5)
    assert profile.epsilon(sigma, rate, steps, 1, 1e-5) == pytest.approx(expected, rel=1e-5)


def test_a_mixture_is_dp_accountings_own_number():
    # Theirs inverts losses by bisection: slow, so on a coarse grid and for few steps.
    accountant = dp.pld.PLDAccountant(value_discretization_interval=3e-3)
    weights = stats.binom.pmf(range(4), 3, 0.2)
    event = dp.dp_event.MixtureOfGaussiansDpEvent(3.0, range(4), weights)
    accountant.compose(dp.SelfComposedDpEvent(event, 20))
    for epsilon in (0.0, 0.5, 2.0):
        expected = float(accountant.get_delta(epsilon))
        got = profile.delta(3.0, 0.2, 20, 3, epsilon)
        assert 0.9 * expected <= got <= expected * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize("deletions", [1, 3])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_everyone_in_every_step_is_the_exact_gaussian(deletions, epsilon):
    exact = float(_gaussian.delta(epsilon, deletions * math.sqrt(100) / 20.0))
    assert profile.delta(20.0, 1.0, 100, deletions, epsilon) == exact
    nearly = profile.delta(20.0, 1 - 1e-9, 100, deletions, epsilon)  # by composition
    assert exact * (1 - 1e-8) <= nearly <= exact * (1 + 1e-4)


def true_divergences(sigma, rate, deletions, epsilon):
    """Of the mixture from the Gaussian and back, by summing over a line."""
    x = np.linspace(-14 * sigma, deletions + 14 * sigma, 400_001)
    weights = stats.binom.pmf(range(deletions + 1), deletions, rate)
    p = sum(w * stats.norm.pdf(x, i, sigma) for i, w in enumerate(weights))
    q = stats.norm.pdf(x, 0, sigma)
    gain = lambda a, b: float(np.maximum(a - np.exp(epsilon) * b, 0).sum() * (x[1] - x[0]))  # noqa: E731
    return gain(p, q), gain(q, p)


@pytest.mark.parametrize("deletions", [1, 2, 4])
@pytest.mark.parametrize(("sigma", "rate"), [(1.0, 0.01), (0.6, 0.3), (3.0, 0.9)])
def test_one_step_is_the_true_divergence_from_above(sigma, rate, deletions):
    for epsilon in (0.0, 0.01, 0.1, 0.7, 2.5):
        true = max(true_divergences(sigma, rate, deletions, epsilon))
        got = profile.delta(sigma, rate, 1, deletions, epsilon)
        assert true * (1 - 1e-8) <= got <= true * (1 + 1e-4) + 2e-14


def test_each_direction_of_one_step():
    loss = np.array([-0.5, -0.1, 0.0, 0.05, 1.0, 4.0])
    log_weight = stats.binom.logpmf([1, 2], 2, 0.3)
    remove, add = profile._profiles(loss, 0.8, log_weight, 2 * math.log1p(-0.3), 0.0)
    for i, epsilon in enumerate(loss):
        assert remove[i] == pytest.approx(true_divergences(0.8, 0.3, 2, epsilon)[0], abs=1e-9)
        assert add[i] == pytest.approx(true_divergences(0.8, 0.3, 2, -epsilon)[1], abs=1e-9)


def test_an_attack_on_many_steps_stays_below():
    # Counting how often the sum of all steps is large: Monte Carlo, three deviations aside.
    rng = np.random.default_rng(0)
    sigma, rate, steps, n = 1.0, 0.2, 20, 200_000
    noise = rng.normal(0, sigma * math.sqrt(steps), n)
    with_two = noise + rng.binomial(2 * steps, rate, n)
    for epsilon in (0.5, 2.0):
        gains = []
        for cut in np.linspace(0, 30, 31):
            hit, false = np.mean(with_two > cut), np.mean(noise > cut)
            slack = 3 * math.sqrt((hit + math.exp(2 * epsilon) * false) / n)
            gains.append(hit - math.exp(epsilon) * false - slack)
        assert 0 < max(gains) <= profile.delta(sigma, rate, steps, 2, epsilon)


@pytest.mark.parametrize("deletions", [2, 3])
@pytest.mark.parametrize("mu", [0.05, 0.5])
def test_group_privacy_between_the_truth_and_its_leading_term(mu, deletions):
    one_example = lambda epsilon: float(_gaussian.delta(epsilon, mu))  # noqa: E731
    for epsilon in (0.0, 0.1, 1.0, 2.0):
        share = epsilon / deletions
        one = one_example(share)
        group = profile.group_delta(one_example, deletions, epsilon)
        spelt_out = sum(math.exp(i * share) for i in range(deletions)) * one
        assert group == pytest.approx(min(1, spelt_out), rel=1e-12)
        leading = deletions * math.exp((deletions - 1) * share) * one
        truth = float(_gaussian.delta(epsilon, deletions * mu))
        assert truth <= group <= min(1, leading) * (1 + 1e-12)


@pytest.mark.parametrize("deletions", [2, 4])
def test_the_mixture_is_never_above_group_privacy(deletions):
    for epsilon in (0.0, 0.5, 2.0):
        group = profile.group_delta(
            lambda e: profile.delta(2.0, 0.05, 200, 1, e), deletions, epsilon
        )
        assert profile.delta(2.0, 0.05, 200, deletions, epsilon) <= group


def test_group_privacy_at_the_ends_of_float64():
    assert profile.group_delta(lambda e: 1e-3, 3, 5e-324) == 3e-3
    assert profile.group_delta(lambda e: 1e-300, 2, 5000.0) == 1
    assert profile.group_delta(lambda e: 0.0, 2, 5000.0) == 0
    assert profile.group_delta(lambda e: 0.25, 1, 5000.0) == pytest.approx(0.25)


@pytest.mark.parametrize("deletions", [1, 3])
@pytest.mark.parametrize(("sigma", "rate", "steps"), RUNS)
def test_delta_and_epsilon_invert_each_other(sigma, rate, steps, deletions):
    for target in (1e-8, 1e-5, 1e-3):
        epsilon = profile.epsilon(sigma, rate, steps, deletions, target)
        delta = profile.delta(sigma, rate, steps, deletions, epsilon)
        assert target * (1 - 1e-3) <= delta <= target * (1 + 1e-12)


@pytest.mark.slow
def test_monotone_in_everything():
    base = {"noise_multiplier": 1.5, "sampling_rate": 0.05, "steps": 50, "deletions": 2}
    worse = {
        "noise_multiplier": [3.0, 1.5, 1.0, 0.6],
        "sampling_rate": [1e-4, 0.01, 0.05, 0.5, 1.0],
        "steps": [1, 10, 50, 60],
        "deletions": [1, 2, 3, 5],
    }
    for name, values in worse.items():
        runs = [base | {name: value} for value in values]
        found = [(profile.delta(**r, epsilon=0.5), profile.epsilon(**r, delta=1e-6)) for r in runs]
        assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(found))
    deltas = [profile.delta(**base, epsilon=e) for e in (0.0, 0.5, 1.0, 3.0)]
    assert all(a > b for a, b in pairwise(deltas))
    epsilons = [profile.epsilon(**base, delta=d) for d in (1e-2, 1e-5, 1e-8)]
    assert all(a < b for a, b in pairwise(epsilons))
    sigmas = [profile.noise_multiplier(0.05, 50, 2, e, 1e-5) for e in (4.0, 1.0)]
    assert sigmas[0] < sigmas[1]


@pytest.mark.parametrize(
    ("rate", "steps", "deletions"), [(0.01, 500, 1), (0.05, 100, 3), (0.5, 1, 2), (1.0, 50, 2)]
)
def test_noise_multiplier_meets_its_target_and_is_nearly_the_least(rate, steps, deletions):
    sigma = profile.noise_multiplier(rate, steps, deletions, 1.0, 1e-5)
    assert profile.delta(sigma, rate, steps, deletions, 1.0) <= 1e-5
    assert profile.delta(0.99 * sigma, rate, steps, deletions, 1.0) > 1e-5


def test_tiny_sampling_rates_keep_their_digits():
    # A grid of 1e-4 would report 0.0065: one step's loss is 1e-5.
    epsilon = profile.epsilon(1.0, 1e-5, 10_000, 1, 1e-5)
    mu = 1e-5 * math.sqrt(10_000 * math.expm1(1.0))  # its Gaussian limit
    assert epsilon == pytest.approx(float(_gaussian.epsilon(mu, 1e-5)), rel=0.05)
    assert profile.delta(1.0, 1e-9, 1, 1, 0.0) == pytest.approx(1e-9 * 0.382925, rel=1e-3)


def test_extremes():
    assert profile.epsilon(1.0, 1e-7, 1, 1, 1e-5) == 0  # delta covers being drawn
    assert profile.noise_multiplier(1e-7, 1, 1, 1.0, 1e-5) == pytest.approx(0.01)
    assert 0.86 < profile.delta(0.01, 0.1, 10, 2, 1.0) <= 1  # drawn is seen: 1 - 0.9^20 = 0.878
    assert math.isfinite(profile.epsilon(1.0, 0.1, 10, 1, 1e-30))  # below the FFT's digits


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"noise_multiplier": 0.0}, ValueError, "noise_multiplier must be positive"),
        ({"noise_multiplier": "1"}, TypeError, "noise_multiplier must be one real number"),
        ({"sampling_rate": 0.0}, ValueError, "sampling_rate must be above 0 and at most 1"),
        ({"sampling_rate": 1.5}, ValueError, "got 1.5"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"steps": 1.0}, TypeError, "steps must be a whole number"),
        ({"deletions": 0}, ValueError, "deletions must be at least 1"),
        ({"epsilon": -1.0}, ValueError, "epsilon must be finite and at least 0"),
        ({"epsilon": math.inf}, ValueError, "epsilon must be finite"),
    ],
)
def test_errors(change, error, message):
    good = {
        "noise_multiplier": 1.0,
        "sampling_rate": 0.1,
        "steps": 1,
        "deletions": 1,
        "epsilon": 1.0,
    }
    with pytest.raises(error, match=message):
        profile.delta(**(good | change))


def test_errors_of_the_inverses():
    with pytest.raises(ValueError, match="delta must be strictly between 0 and 1"):
        profile.epsilon(1.0, 0.1, 1, 1, 0.0)
    with pytest.raises(ValueError, match="epsilon must be positive"):
        profile.noise_multiplier(0.1, 1, 1, 0.0, 1e-5)


def test_without_dp_accounting_the_message_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("dp_accounting"):
            raise ModuleNotFoundError(name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "certunlearn\[dp\]"') as caught:
        profile.delta(1.2345, 0.1, 1, 1, 1.0)
    assert caught.value.name == "dp_accounting"
    assert profile.delta(1.2345, 1.0, 1, 1, 1.0) > 0  # the exact Gaussian needs nothing
