import itertools
import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from system_helpers import (
    CLIPPING,
    DESCENT,
    DESCENT_TO_DELETE,
    FAR,
    OUTPUT,
    PRIVATE,
    REWIND,
    SGD,
    clipped,
    exact,
)

import certunlearn as cu
from certunlearn import accounting
from certunlearn.accounting import _gaussian
from certunlearn.accounting._taut_string import gdp_mu, gdp_mu_curve


@pytest.mark.parametrize(("reference", "distance"), [("retrained", 3.0), ("center", 1.5)])
@pytest.mark.parametrize(("epsilon", "delta"), [(0.1, 1e-3), (1.0, 1e-5), (12.0, 1e-9)])
def test_output_perturbation_is_the_exact_gaussian(reference, distance, epsilon, delta):
    m = cu.OutputPerturbation(init_radius=1.5, reference=reference)
    sigma = cu.noise_scale(m, epsilon=epsilon, delta=delta)
    with mpmath.workdps(60):
        truth = float(exact(mpmath.mpf(epsilon), mpmath.mpf(distance) / mpmath.mpf(sigma)))
    assert truth == pytest.approx(delta, rel=1e-9)
    for name in ("interpolation", "product"):
        found = cu.epsilon(m, noise_scale=sigma, delta=delta, accountant=name)
        assert found == pytest.approx(epsilon, rel=1e-8)
    attacked = cu.epsilon_lower_bound(m, noise_scale=sigma, delta=delta)
    assert attacked == pytest.approx(epsilon, rel=1e-3)
    assert attacked <= epsilon * (1 + 1e-9)


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-10])
def test_the_classical_formula_is_looser_where_it_holds_and_refused_where_not(delta):
    for epsilon in (0.05, 0.5, 1.0):
        claim = {"epsilon": epsilon, "delta": delta}
        classical = cu.noise_scale(OUTPUT, **claim, accountant="closed-form")
        textbook = 3.0 * math.sqrt(2 * math.log(1.25 / delta)) / epsilon
        assert classical == pytest.approx(textbook, rel=1e-12)
        assert cu.noise_scale(OUTPUT, **claim) < classical
        for function, expected in ((cu.epsilon, "epsilon"), (cu.delta, "delta")):
            given = {"delta": delta} if function is cu.epsilon else {"epsilon": epsilon}
            back = function(OUTPUT, noise_scale=classical, **given, accountant="closed-form")
            assert back == pytest.approx(claim[expected], rel=1e-9)
    with pytest.raises(ValueError, match="unsound"):
        cu.noise_scale(OUTPUT, epsilon=15.0, delta=delta, accountant="closed-form")


def test_no_delta_is_above_one():
    for noise, epsilon in ((1.0, 0.1), (0.1, 0.0), (3.0, 0.5)):
        assert cu.delta(OUTPUT, noise_scale=noise, epsilon=epsilon, accountant="closed-form") <= 1


# Strongly convex losses


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.39])
@pytest.mark.parametrize("steps", [1, 9])
def test_noisy_sgd_is_the_closed_form_of_constant_contraction(rate, steps):
    m = cu.ProjectedNoisySGD(**(DESCENT | {"learning_rate": rate, "steps": steps}), **FAR)
    c = max(abs(1 - rate), abs(1 - 5 * rate))
    mu = c**steps * 2.0 / (0.7 * math.sqrt(sum(c ** (2 * j) for j in range(steps))))
    assert accounting.mu(m, noise_scale=0.7) == pytest.approx(mu, rel=1e-12)
    epsilon = cu.epsilon(m, noise_scale=0.7, delta=1e-5)
    with mpmath.workdps(60):
        assert float(exact(mpmath.mpf(epsilon), mpmath.mpf(mu))) == pytest.approx(1e-5, rel=1e-8)


def test_a_ball_caps_the_distance():
    near = cu.ProjectedNoisySGD(**FAR, **DESCENT, radius=0.25)
    assert near.start_distance == 0.5
    assert cu.ProjectedNoisySGD(**FAR, **DESCENT, radius=4.0).start_distance == 2.0
    assert accounting.mu(near, noise_scale=1.0) == pytest.approx(
        accounting.mu(SGD, noise_scale=1.0) / 4, rel=1e-12
    )


def test_after_a_step_without_much_noise_the_ball_helps_again():
    # The last step's noise alone counts for much: it is as if the run started there, in the ball.
    m = cu.ProjectedNoisySGD(**(DESCENT | {"steps": 2, "learning_rate": 1e-9}), **FAR, radius=1.0)
    assert accounting.mu(m, noise_scale=[1e-6, 1.0]) == pytest.approx(2.0, rel=1e-6)
    assert accounting.mu(m, noise_scale=[1.0, 1.0]) == pytest.approx(2 / math.sqrt(2), rel=1e-6)


@pytest.mark.parametrize("curvature", [1.0, 5.0])
@pytest.mark.slow
def test_two_quadratic_runs_reach_and_do_not_beat_the_certificate(curvature):
    # Coordinates are runs of their own; the loss is curvature / 2 x^2, the worst at this rate.
    rate = 0.1 if curvature == 1 else 0.39
    m = cu.ProjectedNoisySGD(**(DESCENT | {"learning_rate": rate}), **FAR)
    runs, epsilon = 200_000, 0.5
    sigma = cu.noise_scale(m, epsilon=epsilon, delta=0.1)
    ends = []
    for side, key in ((1.0, 1), (-1.0, 2)):
        params = jnp.full(runs, side * m.initial_distance / 2)
        tx = cu.noisy_sgd(m, sigma, key=jax.random.key(key))
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(m.steps):
            updates, state = update(curvature * params, state, params)
            params = params + updates
        ends.append(np.asarray(params, np.float64))
    plus, minus = ends if ends[0].mean() > ends[1].mean() else ends[::-1]
    # The ratio of two Gaussians of one spread is e^epsilon at epsilon / mu, in units of the spread.
    spread = math.sqrt((np.var(plus) + np.var(minus)) / 2)
    mu = (plus.mean() - minus.mean()) / spread
    cut = (plus.mean() + minus.mean()) / 2 + spread * epsilon / mu
    measured = np.mean(plus > cut) - math.exp(epsilon) * np.mean(minus > cut)
    error = 4 * math.sqrt(0.25 * (1 + math.exp(2 * epsilon)) / runs)
    assert abs(measured - 0.1) <= error
    assert cu.delta(m, noise_scale=0.9 * sigma, epsilon=epsilon) > 0.1 + 2 * error  # would be seen


def test_a_step_that_forgets_everything_needs_hardly_any_noise():
    flat = {"learning_rate": 1.0, "strong_convexity": 1.0, "smoothness": 1.0, "steps": 1}
    m = cu.ProjectedNoisySGD(**FAR, **flat)
    long = cu.DescentToDelete(**FAR, **(DESCENT | {"steps": 10_000}))
    for mechanism in (m, long):
        assert cu.epsilon(mechanism, noise_scale=1e-3, delta=1e-5) == 0
        sigma = cu.noise_scale(mechanism, epsilon=1.0, delta=1e-5)
        assert 0 <= sigma < 1e-9


# Diameters


def draw(rng, steps):
    return rng.uniform(0.6, 1, steps), rng.uniform(0, 0.3, steps), rng.uniform(0.3, 3, steps)


@pytest.mark.parametrize("seed", range(15))
def test_a_diameter_is_a_start_after_any_step(seed):
    rng = np.random.default_rng(seed)
    steps, distance, diameter = int(rng.integers(1, 21)), rng.uniform(1, 9), rng.uniform(0.1, 3)
    arrays = draw(rng, steps)
    curve = gdp_mu_curve(distance, *arrays, diameter=diameter)
    best = np.inf
    for stop in range(1, steps + 1):
        for start in range(stop):
            parts = (a[start:stop] for a in arrays)
            near = diameter if start else distance
            best = min(best, gdp_mu(near, *parts, memoryless=False))
        assert curve[stop - 1] == pytest.approx(best, rel=1e-12)
    assert gdp_mu(distance, *arrays, diameter=diameter) == curve[-1]


@pytest.mark.parametrize("seed", range(4))
def test_a_diameter_only_helps_and_less_so_the_larger_it_is(seed):
    rng = np.random.default_rng(seed)
    arrays = draw(rng, 300)
    curves = [gdp_mu_curve(5.0, *arrays, diameter=d) for d in (0.1, 0.5, 2.0, 100.0, np.inf)]
    without = gdp_mu_curve(5.0, *arrays)
    for small, large in itertools.pairwise(curves):
        assert np.all(small <= large * (1 + 1e-12))
    np.testing.assert_array_equal(curves[-1], without)
    assert curves[0][1] < 0.9 * without[1]


def test_model_clipping_with_a_clip_norm_uses_its_diameter():
    m = clipped(0.25, 5, 10.0, clip_norm=0.5, weight_decay=0.3)
    c, s = 1 - 0.1 * 0.3, 2 * 0.1 * 0.5
    for steps in (1, 2, 5):
        expected = gdp_mu(20.0, [c] * steps, s, 1.5, diameter=0.5)
        assert accounting.mu(m.first(steps), noise_scale=1.5) == pytest.approx(expected, rel=1e-12)
    # From any two points of the ball, four steps are left.
    powers = c ** np.arange(4)
    line = (0.5 * c**4 + s * powers.sum()) / math.sqrt((powers**2).sum())
    assert accounting.mu(m, noise_scale=1.5) <= line / 1.5 * (1 + 1e-12)
    assert accounting.mu(m.first(1), noise_scale=1.5) == pytest.approx((20 * c + s) / 1.5)


def test_the_best_number_of_steps_knows_the_diameter():
    m = clipped(0.25, 1, 10.0, clip_norm=0.5)
    mus = [
        accounting.mu(clipped(0.25, t, 10.0, clip_norm=0.5), noise_scale=1.0) for t in range(1, 60)
    ]
    assert cu.accounting.best_steps(m) == int(np.argmax(np.array(mus) <= min(mus) * (1 + 1e-9))) + 1


# Noise at the end only. What the noiseless steps leave, and a thousandth of it for their rounding.

RESERVED = 1.001


def test_descent_to_delete_is_the_exact_gaussian_at_what_the_steps_leave():
    left = 2.0 * 0.9**6
    assert DESCENT_TO_DELETE.final_distance == pytest.approx(left, rel=1e-12)
    left *= RESERVED
    sigma = cu.noise_scale(DESCENT_TO_DELETE, epsilon=1.0, delta=1e-5)
    assert sigma == pytest.approx(left / _gaussian.mu(1.0, 1e-5), rel=1e-9)
    with mpmath.workdps(60):
        assert float(exact(1, mpmath.mpf(left) / sigma)) == pytest.approx(1e-5, rel=1e-8)
    curve = cu.epsilon_curve(DESCENT_TO_DELETE, noise_scale=sigma, delta=1e-5)
    assert np.all(np.isinf(curve[:-1]))
    assert curve[-1] == pytest.approx(1.0)


def test_rewind_to_delete_is_the_exact_gaussian_at_what_the_recursion_gives():
    distance = 0.0
    for _ in range(20):
        distance = (1 + 0.05 * 1.5) * distance + 2 * 0.05 * 7 * 3.0 / 500
    assert REWIND.initial_distance == pytest.approx(distance, rel=1e-12)
    for rate in (0.1, 0.2, 0.1):
        distance *= 1 + rate * 1.5
    assert REWIND.final_distance == pytest.approx(distance, rel=1e-12)
    distance *= RESERVED
    for name in (None, "product"):
        sigma = cu.noise_scale(REWIND, epsilon=0.7, delta=1e-6, accountant=name)
        with mpmath.workdps(60):
            truth = float(exact(mpmath.mpf(0.7), mpmath.mpf(distance) / sigma))
        assert truth == pytest.approx(1e-6, rel=1e-7)


@pytest.mark.parametrize("m", [DESCENT_TO_DELETE, REWIND])
def test_coupling_gains_nothing_from_one_noise(m):
    sigma = cu.noise_scale(m, epsilon=1.0, delta=1e-5)
    found = cu.epsilon(m, noise_scale=sigma, delta=1e-5, accountant="coupling")
    assert 1 - 1e-9 <= found <= 1.02


# Differentially private training


def test_private_training_is_dp_accountings_number():
    dp = pytest.importorskip("dp_accounting")
    sigma = 0.06  # 0.06 * 20 / (0.5 * 2) times the clip norm
    accountant = dp.pld.PLDAccountant()
    event = dp.PoissonSampledDpEvent(0.1, dp.GaussianDpEvent(1.2))
    accountant.compose(dp.SelfComposedDpEvent(event, 50))
    expected = accountant.get_epsilon(1e-5)
    for name in (None, "dp-accounting"):
        found = cu.epsilon(PRIVATE, noise_scale=sigma, delta=1e-5, accountant=name)
        assert found == pytest.approx(expected, rel=1e-4)
    truth = float(accountant.get_delta(2.0))
    assert cu.delta(PRIVATE, noise_scale=sigma, epsilon=2.0) == pytest.approx(truth, rel=1e-4)
    needed = cu.noise_scale(PRIVATE, epsilon=expected, delta=1e-5)
    assert needed == pytest.approx(sigma, rel=2e-3)
    assert cu.epsilon(PRIVATE, noise_scale=needed, delta=1e-5) <= expected
    assert accounting.mu(PRIVATE, noise_scale=sigma) is None
    with pytest.raises(ValueError, match="must be one number for DPSGD"):
        cu.epsilon(PRIVATE, noise_scale=np.linspace(0.1, 0.2, 50), delta=1e-5)


def test_private_training_on_everyone_is_the_exact_gaussian():
    m = cu.DPSGD(
        clip_norm=2.0, learning_rate=0.5, steps=4, sampling_rate=1.0, batch_size=20, deletions=3
    )
    sigma = cu.noise_scale(m, epsilon=1.0, delta=1e-5)
    with mpmath.workdps(60):  # three gradients of norm 2 / 20 * 0.5 in four steps
        truth = float(exact(1, 3 * 0.05 * 2 / mpmath.mpf(sigma)))
    assert truth == pytest.approx(1e-5, rel=1e-4)
    curve = cu.epsilon_curve(m, noise_scale=sigma, delta=1e-5)
    assert curve[0] == 0
    assert np.all(np.diff(curve) > 0)
    assert curve[-1] == cu.epsilon(m, noise_scale=sigma, delta=1e-5) <= 1


# What is available


def test_the_curve_of_private_training_is_never_below_epsilon():
    m = cu.DPSGD(
        clip_norm=1.0, learning_rate=1.0, steps=60, sampling_rate=1.0, batch_size=20, deletions=2
    )
    curve = cu.epsilon_curve(m, noise_scale=1.0, delta=1e-5)
    exact_curve = [float(_gaussian.epsilon(2 * math.sqrt(t) / 20, 1e-5)) for t in range(61)]
    assert curve.shape == (61,)
    assert curve[0] == 0
    assert np.all(curve >= np.array(exact_curve) * (1 - 1e-12))
    assert curve[-1] == pytest.approx(exact_curve[-1], rel=1e-9)
    assert np.all(curve[1:] <= 1.7 * np.array(exact_curve[1:]))


SEPARATIONS = ("interpolation", "coupling", "product")


@pytest.mark.parametrize(
    ("m", "names"),
    [
        (CLIPPING, ("interpolation", "closed-form", "coupling")),
        (
            cu.GradientClipping(
                init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=3, memoryless=False
            ),
            ("interpolation", "closed-form"),
        ),
        (clipped(), SEPARATIONS),
        (clipped(clip_norm=1.0), SEPARATIONS),
        (OUTPUT, ("interpolation", "closed-form", "coupling", "product")),
        (SGD, ("interpolation", "coupling")),
        (cu.ProjectedNoisySGD(**FAR, **DESCENT, radius=1.0), SEPARATIONS),
        (DESCENT_TO_DELETE, SEPARATIONS),
        (REWIND, SEPARATIONS),
        (PRIVATE, ("dp-accounting",)),
    ],
)
def test_available(m, names):
    available = cu.accounting.supported_names(m)
    assert available == names
    for name in set(accounting.ACCOUNTANTS) - set(available):
        with pytest.raises(ValueError, match=f"'{name}'"):
            cu.epsilon(m, noise_scale=1.0, delta=1e-5, accountant=name)


@pytest.mark.parametrize("m", [SGD, DESCENT_TO_DELETE, REWIND, PRIVATE, clipped(clip_norm=1.0)])
def test_no_attack_is_known_on_mechanisms_that_assume_something_of_the_loss(m):
    with pytest.raises(ValueError, match=f"knows no attack on {type(m).__name__}"):
        cu.epsilon_lower_bound(m, noise_scale=1.0, delta=1e-5)
    assert accounting.affordable_lower_bound(m, noise_scale=1.0, delta=1e-5) is None


def test_attacks_are_worked_out_where_they_are_known():
    for m in (clipped(), OUTPUT):
        found = accounting.affordable_lower_bound(m, noise_scale=1.0, delta=1e-5)
        assert found == cu.epsilon_lower_bound(m, noise_scale=1.0, delta=1e-5) > 0
