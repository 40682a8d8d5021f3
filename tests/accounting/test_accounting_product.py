"""The product bound of model clipping: its definition, attacks that attain it, and its limits."""

import itertools
import math

import mpmath
import numpy as np
import pytest
from scipy.special import ndtr
from system_helpers import CLIPPING, PRIVATE, SGD, clipped, exact

import certunlearn as cu
from certunlearn.accounting import _gaussian, product


def product_delta(epsilon, ratios):
    """The product of contraction coefficients, from its definition, in 400 digits."""
    with mpmath.workdps(400):
        epsilon, found = mpmath.mpf(epsilon), mpmath.mpf(1)
        for ratio in ratios:
            later = mpmath.log(1 + (mpmath.exp(epsilon) - 1) / found)
            found *= exact(later, mpmath.mpf(ratio))
        return float(found)


@pytest.mark.parametrize("epsilon", [0.0, 0.01, 1.0, 8.0])
@pytest.mark.parametrize(
    ("model_radius", "sigma", "init_noise"),
    [
        (0.5, [2.0], 0.0),
        (0.5, [1.0, 3.0, 0.7], 0.0),
        (2.0, [1.0] * 12, 0.0),
        (0.5, [1.0, 3.0, 0.7], 1.3),
        (0.1, [1.0] * 4, 0.5),
    ],
)
def test_the_product_is_what_its_definition_gives(epsilon, model_radius, sigma, init_noise):
    m = clipped(model_radius, len(sigma), init_noise_scale=init_noise)
    # Two starts in a ball of radius 1.
    ratios = ([2 / init_noise] if init_noise else []) + [2 * model_radius / s for s in sigma]
    got = cu.delta(m, noise_scale=sigma, epsilon=epsilon, accountant="product")
    expected = product_delta(epsilon, ratios)
    assert got == pytest.approx(expected, rel=1e-9)
    assert got >= expected  # rounded up at every step


@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-12])
@pytest.mark.parametrize("sigma", [0.4, 3.0])
def test_one_step_of_model_clipping_is_the_exact_gaussian(sigma, delta):
    found = cu.epsilon(clipped(0.5, 1), noise_scale=sigma, delta=delta, accountant="product")
    with mpmath.workdps(60):
        assert float(exact(mpmath.mpf(found), mpmath.mpf(1) / sigma)) == pytest.approx(delta)


ATTACKED = [
    (model_radius, steps, init_noise, delta)
    for model_radius, steps, init_noise in [
        (0.5, 1, 0.0),
        (0.5, 2, 0.0),
        (1.5, 4, 0.0),
        (3.0, 9, 0.0),
        (0.7, 1, 0.8),
        (1.2, 3, 2.0),
    ]
    for delta in (1e-5, 1e-2)
]


@pytest.mark.parametrize(("model_radius", "steps", "init_noise", "delta"), ATTACKED)
def test_the_best_attack_attains_the_product_bound(model_radius, steps, init_noise, delta):
    m = clipped(model_radius, steps, init_noise_scale=init_noise)
    lower = cu.epsilon_lower_bound(m, noise_scale=1.0, delta=delta)
    upper = cu.epsilon(m, noise_scale=1.0, delta=delta, accountant="product")
    assert lower <= upper
    assert upper == pytest.approx(lower, rel=1e-4, abs=1e-6)
    if (steps, delta) != (2, 1e-2):  # where nothing is left to find
        assert lower > 0.05


@pytest.mark.parametrize("init_noise", [0.0, 1.5])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0])
def test_two_played_runs_reach_and_do_not_beat_the_product_bound(init_noise, epsilon):
    radius, sigma = 0.8, (1.0, 1.4)
    x, width = np.linspace(-14, 14, 4001, retstep=True)

    def bell(mean, scale):
        return np.exp(-(((x - mean) / scale) ** 2) / 2) * (width / scale / math.sqrt(2 * math.pi))

    def step(mass, threshold, scale):
        """The state moves to radius or -radius, whichever side of the threshold it is on."""
        up = mass[x > threshold].sum()
        return up * bell(radius, scale) + (1 - up) * bell(-radius, scale)

    if init_noise:
        starts, first = (bell(1.0, init_noise), bell(-1.0, init_noise)), np.linspace(-1, 3, 41)
    else:
        starts, first = ((x == x[-1]) * 1.0, (x == x[0]) * 1.0), [0.0]
    best = 0.0
    for one in first:
        middle = [step(mass, one, sigma[0]) for mass in starts]
        for two in np.linspace(-1, 3, 81):
            p, q = (step(mass, two, sigma[1]) for mass in middle)
            best = max(best, np.maximum(p - math.exp(epsilon) * q, 0).sum())
    m = clipped(radius, 2, init_noise_scale=init_noise)
    bound = cu.delta(m, noise_scale=sigma, epsilon=epsilon, accountant="product")
    assert 0.99 * bound <= best <= bound * (1 + 1e-9)


@pytest.mark.parametrize("delta", [1e-2, 1e-6])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_product_is_never_above_interpolation(steps, delta):
    for model_radius, sigma in itertools.product((0.05, 0.5, 2.0), (0.7, 3.0)):
        m = clipped(model_radius, steps)
        values = [
            cu.epsilon(m, noise_scale=sigma, delta=delta, accountant=name)
            for name in ("product", "interpolation")
        ]
        assert values[0] <= values[1] * (1 + 1e-9)
        if steps > 1 and values[1] > 0:
            assert values[0] < 0.99 * values[1]


@pytest.mark.parametrize("init_noise", [0.0, 0.8])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_default_lies_between_the_attack_and_the_published_bound(steps, init_noise):
    m = clipped(0.5, steps, init_noise_scale=init_noise)
    arguments = {"noise_scale": 2.0, "delta": 1e-4}
    published = cu.epsilon(m, **arguments, accountant="product")
    default = cu.epsilon(m, **arguments)
    assert cu.epsilon_lower_bound(m, **arguments) <= default <= published * (1 + 1e-11)


@pytest.mark.parametrize("steps", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_default_asks_for_no_more_noise_than_is_published(steps):
    claim = {"epsilon": 0.5, "delta": 1e-4}
    published = cu.noise_scale(clipped(0.5, steps), **claim, accountant="product")
    assert cu.noise_scale(clipped(0.5, steps), **claim) <= published * (1 + 1e-11)


@pytest.mark.parametrize(
    "m", [clipped(0.5, 1), clipped(0.5, 6), clipped(3.0, 4, init_noise_scale=0.3)]
)
@pytest.mark.parametrize("epsilon", [1e-3, 0.5, 20.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-9])
def test_noise_scale_epsilon_and_delta_invert_each_other(m, epsilon, delta):
    by = {"accountant": "product"}
    sigma = cu.noise_scale(m, epsilon=epsilon, delta=delta, **by)
    found = cu.epsilon(m, noise_scale=sigma, delta=delta, **by)
    assert epsilon * (1 - 1e-8) <= found <= epsilon * (1 + 1e-12)
    assert cu.delta(m, noise_scale=sigma, epsilon=epsilon, **by) == pytest.approx(delta, rel=1e-8)
    assert cu.epsilon(m, noise_scale=0.999 * sigma, delta=delta, **by) > epsilon


def test_where_the_noise_on_the_start_is_enough_no_more_is_needed():
    m = clipped(1.0, 2, init_radius=1e-3, init_noise_scale=10.0)
    claim = {"epsilon": 1.0, "delta": 1e-3, "accountant": "product"}
    assert cu.noise_scale(m, **claim) < 1e-6


@pytest.mark.parametrize("init_noise", [0.0, 3.0])
def test_the_products_curve(init_noise):
    m = clipped(0.8, 6, init_noise_scale=init_noise)
    arguments = {"delta": 1e-5, "accountant": "product"}
    sigma = np.array([1.0, 3.0, 1.0, 2.0, 5.0, 1.0])
    curve = cu.epsilon_curve(m, noise_scale=sigma, **arguments)
    assert curve.shape == (7,)
    assert curve[0] == np.inf
    assert np.all(np.diff(curve[1:]) < 0)
    assert curve[-1] == cu.epsilon(m, noise_scale=sigma, **arguments)
    for steps in (1, 4):
        part = cu.epsilon(m.first(steps), noise_scale=sigma[:steps], **arguments)
        assert curve[steps] == pytest.approx(part, rel=1e-9)


@pytest.mark.slow
def test_the_products_curve_of_a_long_run_takes_little_memory(monkeypatch):
    # A number for each step and each epsilon would take 80 gigabytes. The steps that count are
    # fewer than by default, for time.
    monkeypatch.setattr(product, "_MOST_STEPS", 300)
    m = clipped(1.0, 100_000)
    arguments = {"noise_scale": 0.3, "delta": 1e-5, "accountant": "product"}
    curve = cu.epsilon_curve(m, **arguments)
    assert np.all(np.diff(curve[1:]) <= 0)
    assert 0 < curve[-1] == cu.epsilon(m, **arguments)
    for steps, looser in ((1, 1), (17, 1.1), (200, 1.3), (50_000, 1)):
        part = cu.epsilon(m.first(steps), **arguments)
        assert part * (1 - 1e-9) <= curve[steps] <= looser * part * (1 + 1e-9)


def test_the_product_grows_with_the_radius_and_falls_with_noise_and_steps():
    def epsilon(model_radius=0.5, sigma=1.0, steps=3, **rest):
        m = clipped(model_radius, steps, **rest)
        return cu.epsilon(m, noise_scale=sigma, delta=1e-6, accountant="product")

    rows = [
        [epsilon(model_radius=r) for r in (2.0, 1.0, 0.5, 0.25)],
        [epsilon(sigma=s) for s in (0.5, 1.0, 1.5, 2.0)],
        [epsilon(steps=t) for t in (1, 2, 4, 8)],
        [epsilon(), *(epsilon(init_noise_scale=s) for s in (0.3, 1.0, 3.0))],
    ]
    for values in rows:
        assert all(a > b > 0 for a, b in itertools.pairwise(values))


@pytest.mark.parametrize(
    ("m", "words"),
    [
        (CLIPPING, "needs models that are projected at every step"),
        (SGD, "needs models that are projected at every step"),
        (PRIVATE, "needs a mechanism with separations"),
    ],
)
def test_the_product_is_refused_where_models_are_not_projected(m, words):
    with pytest.raises(ValueError, match=words):
        cu.epsilon(m, noise_scale=1.0, delta=1e-5, accountant="product")
    with pytest.raises(ValueError, match=words):
        cu.noise_scale(m, epsilon=1.0, delta=1e-5, accountant="product")


@pytest.mark.parametrize("init_noise", [0.0, 1.0])
def test_extreme_values_of_the_product(init_noise):
    m, by = clipped(1.0, 3, init_noise_scale=init_noise), {"accountant": "product"}
    first = [2.0] if init_noise else []
    for sigma in (0.3, 1.0, 1e9, 1e100):
        got = cu.delta(m, noise_scale=sigma, epsilon=0.0, **by)
        assert got == pytest.approx(product_delta(0, [*first, *[2 / sigma] * 3]), rel=1e-9)
        assert cu.accounting.total_variation(m, noise_scale=sigma, **by) == got
    assert cu.epsilon(m, noise_scale=1e100, delta=1e-30, **by) == 0
    from_the_start = float(_gaussian.epsilon(2.0, 1e-30)) if init_noise else np.inf
    assert cu.epsilon(m, noise_scale=1e-9, delta=1e-30, **by) == pytest.approx(from_the_start)
    assert cu.delta(m, noise_scale=1e9, epsilon=1e5, **by) == 0
    found = cu.epsilon(m, noise_scale=1.0, delta=1e-30, **by)
    assert product_delta(found, [*first, *[2.0] * 3]) == pytest.approx(1e-30, rel=1e-6)


def play_in_a_ball(m, sigma, epsilon, nodes=401):
    """Delta of two one-dimensional runs of the form with a clip norm, by summing over a line.

    A step moves by the clipped gradient, away from the threshold where the likelihood ratio crosses
    e^epsilon, then come noise and the projection, which leaves atoms at both ends.
    """
    radius = m.model_radius
    x = np.linspace(-radius, radius, nodes)
    edges = (x[1:] + x[:-1]) / 2
    moves = m.shift / 2

    def land(points, scale):
        """Where noise and the projection take points: rows of chances."""
        below = ndtr((edges - np.reshape(points, (-1, 1))) / scale)
        ones = np.ones((len(below), 1))
        return np.diff(np.hstack([0 * ones, below, ones]), axis=1)

    start = m.init_radius * m.contraction[0] + moves[0]
    p, q = (land([point], sigma)[0] for point in (start, -start))
    for c, move in zip(m.contraction[1:], moves[1:], strict=True):
        # Likelihood ratios increase along the line, so one threshold says where P is likelier.
        chance = land(c * x + move * np.where(p > math.exp(epsilon) * q, 1, -1), sigma)
        p, q = p @ chance, q @ chance
    return float(np.maximum(p - math.exp(epsilon) * q, 0).sum())


@pytest.mark.parametrize("accountant", ["interpolation", "product", "coupling", None])
@pytest.mark.parametrize(
    ("init_radius", "model_radius", "steps"), [(0.5, 1.0, 2), (3.0, 0.3, 1), (3.0, 0.3, 2)]
)
def test_runs_with_a_clip_norm_do_not_beat_any_accountant(
    init_radius, model_radius, steps, accountant
):
    m = clipped(model_radius, steps, init_radius, clip_norm=0.5, weight_decay=0.5)
    for epsilon in (0.0, 0.1):
        played = play_in_a_ball(m, 1.0, epsilon)
        assert played > 1e-3
        bound = cu.delta(m, noise_scale=1.0, epsilon=epsilon, accountant=accountant)
        assert played <= 1.005 * bound  # the line's nodes


def test_the_play_in_a_ball_is_the_gaussian_where_the_ball_is_no_matter():
    m = clipped(30.0, 1, 1.0, clip_norm=0.5, weight_decay=0.5)
    bound = cu.delta(m, noise_scale=1.0, epsilon=0.4, accountant="interpolation")
    assert play_in_a_ball(m, 1.0, 0.4, nodes=40_001) == pytest.approx(bound, rel=1e-4)


# Output perturbation
