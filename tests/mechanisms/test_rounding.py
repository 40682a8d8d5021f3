"""Noise against the rounding of numbers: what is refused, and that the theorem's bound holds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bound_helpers import MODES, check_swallowed
from mechanism_helpers import DESCENT, REWIND, length

import certunlearn as cu
from certunlearn.mechanisms import pairs, rounding

FLOAT32 = np.float32


@functools.cache
def trained_model(features):
    """The README's problem: loss, data and the trained parameters."""
    x = cu.convex.clip_features(jax.random.normal(jax.random.key(0), (1000, features)), 1.0)
    y = (x[:, 0] > 0).astype(int)
    loss = cu.convex.logistic_regression(feature_norm=1.0, l2=0.1)
    trained = cu.convex.gradient_descent(
        loss, loss.init(features), (x, y), tolerance=1e-5, max_steps=1000
    )
    return loss, (x, y), trained.params


def logistic_problem(features, steps):
    """The same, and a mechanism of so many steps."""
    loss, data, trained = trained_model(features)
    mechanism = cu.DescentToDelete(
        initial_distance=cu.convex.stability_distance(
            loss, size=1000, deletions=3, gradient_norm=1e-5
        ),
        learning_rate=2 / (loss.strong_convexity + loss.smoothness),
        strong_convexity=loss.strong_convexity,
        smoothness=loss.smoothness,
        steps=steps,
    )
    return loss, data, trained, mechanism


def test_noise_below_the_spacing_is_refused_before_anything_runs():
    loss, (x, y), trained, mechanism = logistic_problem(20, 60)
    sigma = cu.noise_scale(mechanism, epsilon=1.0, delta=1e-5)
    assert sigma < 1e-15
    # Added to parameters near 1, such noise is none at all.
    noisy = np.asarray(trained) + FLOAT32(sigma) * FLOAT32(np.random.default_rng(0).normal(size=20))
    np.testing.assert_array_equal(noisy, trained)
    for leaf in (trained, np.asarray(trained, np.float64)):
        with pytest.raises(
            ValueError, match=r"noise_scale must be at least .* rounding would swal"
        ):
            rounding.check(mechanism, sigma, [leaf])
    options = {"epsilon": 1.0, "delta": 1e-5, "batch_size": 997, "progress": False}
    with pytest.raises(ValueError, match="rounding would swallow"):
        cu.unlearn(loss.loss_fn, trained, (x[3:], y[3:]), mechanism, **options)


@pytest.mark.slow
def test_few_steps_pass_more_need_float64_and_too_many_are_refused():
    _, _, trained, mechanism = logistic_problem(5, 5)
    sigma = cu.noise_scale(mechanism, epsilon=1.0, delta=1e-5)
    rounding.check(mechanism, sigma, [trained])
    _, _, trained, more = logistic_problem(5, 12)
    sigma = cu.noise_scale(more, epsilon=1.0, delta=1e-5)
    assert sigma > 4 * np.spacing(FLOAT32(2.0))  # not what is wrong here
    with pytest.raises(ValueError, match=r"steps=12 leave a distance of .* run fewer steps, "):
        rounding.check(more, sigma, [trained])
    rounding.check(more, sigma, [np.asarray(trained, np.float64)])
    # Or more noise: what the message asks for is enough, and is paid for.
    with pytest.raises(ValueError, match=r"declare rounding_share=0\.02\d?, or use float64"):
        rounding.check(more, sigma, [trained])
    paid = dataclasses.replace(more, rounding_share=0.03)
    rounding.check(paid, sigma, [trained])
    assert cu.noise_scale(paid, epsilon=1.0, delta=1e-5) == pytest.approx(sigma * 1.03 / 1.001)
    for share in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match="rounding_share must be between 0 and 1"):
            dataclasses.replace(more, rounding_share=share)


class Quadratic:
    """1/2 (w - b)^T H (w - b), curvatures from m to L, b between 0.6 and 0.9."""

    def __init__(self, seed, size, low, high):
        rng = np.random.default_rng(seed)
        turn = np.linalg.qr(rng.normal(size=(size, size)))[0]
        self.hessian = turn @ np.diag(np.linspace(low, high, size)) @ turn.T
        self.lowest = rng.uniform(0.6, 0.9, size=size)

    def gradient(self, w):
        return self.hessian @ (w.astype(np.float64) - self.lowest)


def before_noise(loss, start, rate, steps, dtype):
    """Rounded steps from `start`, up to the point that the last step adds its noise to."""
    w = start.astype(dtype)
    for step in range(steps):
        # One rounding for the product and one for the sum, of a gradient without error.
        move = (-np.float64(dtype(rate)) * loss.gradient(w)).astype(dtype)
        if step == steps - 1:
            return w.astype(np.float64) + move.astype(np.float64)
        w = w + move
    raise AssertionError("no steps")


@pytest.mark.parametrize("steps", [1, 3, 30, 80])
@pytest.mark.parametrize("size", [1, 40])
def test_rounded_runs_are_never_farther_apart_than_the_theorem_says(steps, size):
    low, high, rate = 0.5, 1.5, 0.9
    for seed in range(6):
        loss = Quadratic(seed, size, low, high)
        rng = np.random.default_rng(seed)
        start = loss.lowest + 0.02 * rng.normal(size=size)
        near = (start + 10.0 ** -rng.uniform(2, 7) * rng.normal(size=size)).astype(FLOAT32)
        start = start.astype(FLOAT32)
        distance = length(start.astype(np.float64) - near.astype(np.float64))
        m = cu.DescentToDelete(
            initial_distance=max(distance, 1e-30),
            learning_rate=rate,
            strong_convexity=low,
            smoothness=high,
            steps=steps,
        )
        ends = [before_noise(loss, w, rate, steps, FLOAT32) for w in (start, near)]
        assert np.max(np.abs(ends)) < 1
        bound = rounding.distance_before_noise(m, [start])
        assert length(ends[0] - ends[1]) <= bound
        exact = [
            before_noise(loss, w.astype(np.float64), rate, steps, np.float64) for w in (start, near)
        ]
        assert length(exact[0] - exact[1]) <= m.final_distance * (1 + 1e-6) + 1e-14


def test_rounding_stops_runs_from_coming_as_near_as_exact_steps_would():
    # 80 steps leave 1e-24 in exact arithmetic; rounded runs stay apart, within the bound.
    loss, rate = Quadratic(0, 40, 0.5, 1.5), 0.9
    m = cu.DescentToDelete(
        initial_distance=1.0, learning_rate=rate, strong_convexity=0.5, smoothness=1.5, steps=80
    )
    rng = np.random.default_rng(3)
    ends = [
        before_noise(loss, loss.lowest + 0.02 * rng.normal(size=40), rate, 80, FLOAT32)
        for _ in range(20)
    ]
    apart = max(length(x - y) for x in ends for y in ends)
    assert m.final_distance < 1e-17
    assert apart > 1e9 * m.final_distance
    bound = rounding.distance_before_noise(m, [np.full(40, 0.9, FLOAT32)])
    assert 0.01 * bound < apart <= bound


def test_the_bound_is_the_recursion_of_the_theorem():
    m = cu.DescentToDelete(**DESCENT)  # four steps of factor 0.95
    leaves = [np.array([-0.75, 0.1], FLOAT32), np.zeros(3), np.array([5.0])]
    u, h = 2.0**-24, np.array([2.0**-24] * 2 + [2.0**-1022] * 3 + [2.0**-50])
    step = np.linalg.norm(h)
    expected = 2.0
    for errors in (2, 2, 2, 1):
        expected = (0.95 + 2 * u) * expected + errors * step
    assert rounding.distance_before_noise(m, leaves) == pytest.approx(expected, rel=1e-14)
    assert rounding.spacing(leaves[0]) == 2.0**-24
    # A second request: its four steps, and the four of the first, which were rounded too.
    second = m.next(stability_distance=0.1, gradient_difference=0.2)
    assert second.past_error == pytest.approx(1 + 0.95 + 0.95**2 + 0.95**3)
    expected = second.initial_distance * (1 + 4 * u) ** 4 + 2 * step * second.past_error
    for errors in (2, 2, 2, 1):
        expected = (0.95 + 2 * u) * expected + errors * step
    assert rounding.distance_before_noise(second, leaves) == pytest.approx(expected, rel=1e-14)
    assert second.initial_distance == pytest.approx(
        1.001 * 0.95**4 * 2.0 + 0.95**4 * 0.1 + 0.1 * second.past_error * 0.2
    )
    assert second.next(stability_distance=1.0, gradient_difference=1.0).past_error == (
        pytest.approx(sum(0.95**t for t in range(8)))
    )


@pytest.mark.parametrize("seed", range(4))
def test_rounded_rewinds_are_never_farther_apart_than_the_theorem_says(seed):
    # The deleted example pulls one way, all others the other way, by up to 1.7 on the wave.
    rng, size, count, rate = np.random.default_rng(seed), 30, 10**6, 0.05
    m = cu.RewindToDelete(
        learning_rate=rate,
        smoothness=1.0,
        gradient_bound=2.0,
        training_learning_rate=rate,
        trained_steps=30,
        steps=20,
        size=count,
        deletions=1,
    )

    def gap_before_noise(start, dtype):
        trained = retrained = start.astype(dtype)
        for t in range(m.trained_steps + m.steps):
            moves = []
            for w, all_data in ((trained, t < m.trained_steps), (retrained, False)):
                gradient = 0.1 * np.sin(10 * w.astype(np.float64)) - 0.2
                if all_data:
                    gradient += (2 / np.sqrt(size) - gradient) / count
                moves.append((-np.float64(dtype(rate)) * gradient).astype(dtype))
            before = [np.float64(w) + v for w, v in zip((trained, retrained), moves, strict=True)]
            trained, retrained = trained + moves[0], retrained + moves[1]
        assert 0.5 < np.max(np.abs(before)) < 1
        return before[0] - before[1], trained

    start = rng.uniform(0.1, 0.4, size=size).astype(FLOAT32)
    rounded, released = gap_before_noise(start, FLOAT32)
    exact, _ = gap_before_noise(start, np.float64)
    room = rounding.distance_before_noise(m, [released]) - m.final_distance
    assert length(exact) <= m.final_distance
    assert 0.001 * room < length(rounded - exact) <= room
    with pytest.raises(ValueError, match="steps=20 leave a distance of"):
        rounding.check(m, 1.0, [released])


@pytest.mark.parametrize("m", [cu.DescentToDelete(**DESCENT), cu.RewindToDelete(**REWIND)])
def test_the_reserve_is_in_every_number(m):
    share = 1 + pairs.ROUNDING_SHARE
    assert share == 1.001
    counted = cu.OutputPerturbation(init_radius=m.final_distance * share / 2)
    for options in ({"accountant": "interpolation"}, {}):
        sigma = cu.noise_scale(m, epsilon=1.0, delta=1e-5, **options)
        assert sigma == pytest.approx(
            cu.noise_scale(counted, epsilon=1.0, delta=1e-5, accountant="interpolation"), rel=1e-9
        )
    assert cu.accounting.mu(m, noise_scale=2.0) == pytest.approx(m.final_distance * share / 2)
    assert np.prod(m.contraction) == pytest.approx(np.prod(m.factors) * share)


def test_rounding_a_release_to_a_fourth_of_its_noise_adds_a_half_percent_of_variance():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=400_000) * rounding.NOISE_SPACINGS
    for offset in (0.0, 0.3, 0.5):
        rounded = np.round(noise + offset)
        assert np.var(rounded) / np.var(noise) <= 1 + 1 / (12 * 4**2) + 1e-3
        assert np.mean(rounded) == pytest.approx(np.mean(noise) + offset, abs=3e-3)


def plain(**changes):
    fields = {"init_radius": 1.0, "clip_norm": 1.0, "learning_rate": 0.1, "steps": 2}
    return cu.GradientClipping(**fields | changes)


@pytest.mark.parametrize(
    ("mechanism", "sigma", "leaf", "words"),
    [
        (plain(), 4.7e-7, np.ones(3, FLOAT32), "noise_scale must be at least 4.77e-07"),
        (plain(), (1.0, 4.7e-7), np.ones(3, FLOAT32), "got 4.7e-07"),
        (plain(), 1.0, np.full(3, 1e8, FLOAT32), "noise_scale must be at least 32"),
        (plain(), 1e-40, np.zeros(3, FLOAT32), "noise_scale must be at least 4.7e-38"),
        (plain(), 3.5e37, np.ones(3, FLOAT32), "noise_scale must be below 3.4e.37"),
        (plain(), 1e300, np.ones(3, FLOAT32), "so that no draw overflows, got 1e.300"),
        (plain(), 1e308, np.ones(3), "noise_scale must be below 1.8e.307"),
        (plain(), 1.0, np.array([1.0, np.nan], FLOAT32), "params must be finite"),
        (plain(), 1.0, np.array([np.inf]), "params must be finite"),
        (plain(), 1.0, jnp.ones(2, jnp.bfloat16), "float32 or float64, got bfloat16"),
        (
            cu.DPSGD(
                clip_norm=1.0,
                learning_rate=0.1,
                steps=2,
                sampling_rate=0.5,
                batch_size=5,
                deletions=1,
            ),
            1e-8,
            np.ones(3, FLOAT32),
            "rounding would swallow",
        ),
        (
            cu.ModelClipping(
                init_radius=1.0,
                model_radius=1.0,
                learning_rate=0.1,
                steps=2,
                init_noise_scale=1e-9,
            ),
            1.0,
            np.ones(3, FLOAT32),
            "got 1e-09",
        ),
    ],
)
def test_noise_that_numbers_cannot_carry_is_refused(mechanism, sigma, leaf, words):
    with pytest.raises(ValueError, match=words):
        rounding.check(mechanism, sigma, [np.zeros(1), leaf])


def test_noise_that_numbers_can_carry_passes():
    rounding.check(plain(), 4.8e-7, [np.ones(3, FLOAT32)])
    rounding.check(plain(), 1e300, [np.ones(3)])
    rounding.check(plain(), 3.3e37, [jnp.ones(3), np.zeros((0, 2), FLOAT32)])
    rounding.check(plain(), 1.0, [])
    # Only the last step of these has noise.
    m = cu.DescentToDelete(**DESCENT)
    rounding.check(m, (1e-30, 1e-30, 1e-30, 1.0), [np.ones(3, FLOAT32)])
    # A narrow leaf's spacing counts beside a wide one's.
    wide, narrow = np.ones(3), np.ones(3, FLOAT32)
    rounding.check(plain(), 1e-12, [wide])
    with pytest.raises(ValueError, match="float32"):
        rounding.check(plain(), 1e-12, [wide, narrow])


def test_steps_of_factor_zero_leave_nothing_in_reserve():
    m = cu.DescentToDelete(**DESCENT | {"strong_convexity": 4.0, "learning_rate": 0.25})
    assert m.final_distance == 0
    with pytest.raises(ValueError, match="steps=4 leave a distance of 0"):
        rounding.check(m, 1.0, [np.ones(3)])


CLIPPED = cu.GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=4)


def test_the_optimizer_refuses_parameters_that_cannot_carry_its_noise():
    tx = cu.noisy_sgd(CLIPPED, 1e-7, key=jax.random.key(0))
    tx.init({"w": jnp.full(3, 0.05)})
    with pytest.raises(ValueError, match=r"noise_scale must be at least 2\.38e-07 for float32"):
        tx.init({"w": jnp.full(3, 0.05), "b": jnp.full(3, -0.5)})
    with jax.enable_x64(True):
        tx.init({"w": jnp.full(3, 0.5, jnp.float64)})


@pytest.mark.parametrize(
    "mode",
    [pytest.param(m, marks=[pytest.mark.slow] * (m not in ("jit", "vmap", "scan"))) for m in MODES],
)
def test_noise_that_rounding_would_swallow_is_nan_wherever_it_is_compiled(mode):
    check_swallowed(mode)


@pytest.mark.parametrize("center", [None, {"w": jnp.full(3, 0.1)}])
def test_a_step_without_its_noise_is_never_repaired_by_a_projection(center):
    m = cu.ModelClipping(
        init_radius=1.0, model_radius=0.5, clip_norm=1e4, learning_rate=1.0, steps=3
    )
    tx = cu.noisy_sgd(m, 1e-3, key=jax.random.key(0), center=center)
    params = {"w": jnp.full(3, 0.2)}
    state, update = tx.init(params), jax.jit(tx.update)
    for size in (1e5, 0.0, 0.1):  # of the gradient: the first is too large
        updates, state = update({"w": jnp.full(3, size)}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        assert jnp.isnan(params["w"]).all()


def test_narrow_parameters_have_wider_spacings():
    tx = cu.transforms.add_gaussian_noise(2.0**-6, jax.random.key(0))
    for dtype, carried in ((jnp.float32, True), (jnp.bfloat16, False)):
        update = jnp.zeros(3, dtype)
        updates, _ = tx.update(update, tx.init(None), jnp.ones(3, dtype))
        assert bool(jnp.isfinite(updates).all()) == carried
        # Without its parameter an update is judged in the dtype it comes out in.
        assert jnp.isfinite(tx.update(update, tx.init(None))[0]).all()


def test_abstract_parameters_pass():
    tx = cu.noisy_sgd(CLIPPED, 0.1, key=jax.random.key(0))
    state = tx.init({"w": jax.ShapeDtypeStruct((3,), jnp.float32)})
    assert cu.mechanisms.evidence(state) == (0, 0)


def test_parameters_that_outgrow_their_noise_are_not_released():
    m = cu.GradientClipping(init_radius=1.0, clip_norm=1e4, learning_rate=1.0, steps=4)
    params, data = {"w": jnp.zeros(3)}, jnp.ones((8, 3))
    options = {"noise_scale": 1e-3, "delta": 1e-5, "batch_size": 8, "progress": False}
    with pytest.raises(FloatingPointError, match="rounding would swallow the noise"):
        cu.unlearn(lambda p, x: -1e5 * jnp.mean(x @ p["w"]), params, data, m, **options)


def test_steps_without_noise_have_no_noise_to_swallow():
    tx = cu.noisy_sgd(cu.DescentToDelete(**DESCENT), 1e-3, key=jax.random.key(0))
    large, state = jnp.full(3, 1e6), tx.init(jnp.zeros(3))
    for step in range(DESCENT["steps"]):
        updates, state = jax.jit(tx.update)(jnp.zeros(3), state, large)
        assert bool(jnp.isnan(updates).all()) == (step == DESCENT["steps"] - 1)
