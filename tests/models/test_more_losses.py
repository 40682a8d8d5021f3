"""Losses of regressions and classifications: values, proved constants, weights, intercepts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
from convex_helpers import ROUNDING, norm

from certunlearn import convex, solvers

B, L2, W = 2.0, 0.1, 3.0
# Each with its constants by hand: curvature in the output, and slope there.
RADIUS = 1 / math.sqrt(L2)
LOSSES = {
    "huber": (lambda **k: convex.huber_regression(B, L2, 0.7, **k), 1.0, 0.7),
    "quantile": (lambda **k: convex.quantile_regression(B, L2, 0.8, 0.25, **k), 2.0, 0.8),
    "poisson": (lambda **k: convex.poisson_regression(B, L2, 5.0, **k), 5.0, 5.0),
    "hinge": (lambda **k: convex.squared_hinge(B, L2, radius=4.0, **k), 1.0, 1 + 4 * B),
    "signs": (lambda **k: convex.ridge_classification(B, L2, radius=4.0, **k), 1.0, 1 + 4 * B),
    "logistic": (lambda **k: convex.logistic_regression(B, L2, **k), 0.25, 1.0),
}
LABELLED = ("hinge", "signs", "logistic")
SLOW = pytest.mark.slow
every = pytest.mark.parametrize("name", LOSSES)


def targets_of(name):
    """Every kind of target, those outside the bounds included."""
    if name in LABELLED:
        return np.array([0.0, 1.0, -1.0, 7.0])
    return np.array([0.0, 1.0, 4.9, 5.0, 80.0, -3.0, 0.25, 1e6])


def derivatives(name, loss):
    """Outputs, targets, and first and second derivatives of an example's loss in its output."""
    grid = np.concatenate([np.linspace(-8, 8, 1601), [-1e3, 1e3]])
    grid = grid if name not in ("hinge", "signs") else grid[np.abs(grid) <= 4 * B]
    z, y = (a.ravel() for a in np.meshgrid(grid, targets_of(name)))
    with jax.enable_x64(True):
        slopes = jax.grad(lambda z, y: jnp.sum(loss.output_loss(z, y, None)))
        bends = lambda z, y: jax.jvp(lambda z: slopes(z, y), (z,), (jnp.ones_like(z),))  # noqa: E731
        first, second = jax.jit(bends)(jnp.asarray(z), jnp.asarray(y))
    return z, y, np.asarray(first), np.asarray(second)


@every
def test_slopes_and_curvatures_are_as_proved_and_attained(name):
    make, curvature, slope = LOSSES[name]
    loss = make()
    _, _, first, second = derivatives(name, loss)
    assert np.max(np.abs(first)) <= slope * (1 + 1e-12)
    assert np.max(np.abs(first)) >= slope * 0.99
    assert np.min(second) >= 0
    assert np.max(second) <= curvature * (1 + 1e-12)
    assert np.max(second) >= curvature * 0.99
    assert loss.strong_convexity == L2
    assert loss.smoothness == pytest.approx(L2 + B**2 * curvature, rel=1e-12)
    assert loss.gradient_bound == pytest.approx(B * slope, rel=1e-12)


@every
def test_derivatives_never_jump_by_more_than_the_curvature(name):
    """Also over kinks of the second derivative, which pointwise derivatives do not show."""
    make, curvature, _ = LOSSES[name]
    z, y, first, _ = derivatives(name, make())
    for target in targets_of(name):
        at, slope = z[y == target], first[y == target]
        order = np.argsort(at)
        rise, run = np.diff(slope[order]), np.diff(at[order])
        assert np.all(rise >= -1e-9)
        assert np.all(rise <= curvature * run * (1 + 1e-9) + 1e-12)


def by_hand(name, z, y):
    if name == "huber":
        return scipy.special.huber(0.7, y - z)
    if name == "quantile":
        kinks = [p for p in [(z - y) / 0.25] if -1 < p < 1]
        shifted = lambda u: y - z + 0.25 * u  # noqa: E731
        pinball = lambda u: max(0.8 * shifted(u), -0.2 * shifted(u)) / 2  # noqa: E731
        return scipy.integrate.quad(pinball, -1, 1, points=kinks or None)[0]
    if name == "poisson":
        return -scipy.stats.poisson.logpmf(y, math.exp(z)) - scipy.special.gammaln(y + 1)
    sign = 1 if y > 0 else -1
    return {
        "hinge": max(0, 1 - sign * z) ** 2 / 2,
        "signs": (z - sign) ** 2 / 2,
        "logistic": math.log1p(math.exp(-sign * z)),
    }[name]


@every
def test_values_are_those_of_other_derivations(name):
    loss = LOSSES[name][0]()
    rng = np.random.default_rng(0)
    w, x = np.array([0.6, -0.4]), rng.normal(size=(12, 2)) / 2
    y = rng.integers(0, 2 if name in LABELLED else 4, 12)
    expected = [by_hand(name, z, t) for z, t in zip(x @ w, y, strict=True)]
    with jax.enable_x64(True):
        value = float(loss(jnp.asarray(w), (jnp.asarray(x), jnp.asarray(y))))
    assert value == pytest.approx(np.mean(expected) + L2 / 2 * float(w @ w), rel=1e-9)


def slopes_by_hand(name, z, y):
    """Derivatives in the outputs, in long doubles."""
    sign = np.where(y > 0, 1, -1)
    return {
        "huber": lambda: np.clip(z - y, -np.longdouble(0.7), np.longdouble(0.7)),
        "quantile": lambda: -0.8 + (0.25 - np.clip(y - z, -0.25, 0.25)) * 2,
        "poisson": lambda: np.minimum(np.exp(z), 5) - np.clip(y, 0, 5),
        "hinge": lambda: -sign * np.maximum(1 - sign * z, 0),
        "signs": lambda: z - sign,
        "logistic": lambda: 1 / (1 + np.exp(-z)) - (y > 0),
    }[name]()


@every
def test_the_gradient_bound_is_above_the_exact_norm_and_close(name):
    loss = LOSSES[name][0](largest_weight=W)
    rng = np.random.default_rng(5)
    x, y = draw(name, 1)
    y = np.where(np.abs(y) > 10, 1, np.clip(y, 0, 1 if name in LABELLED else 5)).astype(np.float32)
    weights = rng.uniform(0, W, 30).astype(np.float32)
    data = (x, y, weights)
    solved = solvers.minimize(loss, np.zeros(3), data, tolerance=1e-11, method="lbfgs").params
    for w in (solved, solved + 1e-12, rng.normal(size=3), 20 * rng.normal(size=3)):
        wide = [np.asarray(a, np.longdouble) for a in (x, y, weights, w)]
        slopes = slopes_by_hand(name, wide[0] @ wide[3], wide[1]) * wide[2]
        exact = wide[0].T @ slopes / 30 + np.longdouble(L2) * wide[3]
        exact = float(np.sqrt(np.sum(exact**2)))
        assert exact <= convex.gradient_norm(loss, w, data) <= exact + 1e-11 * (1 + norm(w))


def draw(name, seed, longer=1.0):
    """Rows of norm B, times `longer`, with targets of every kind."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(30, 3))
    x *= longer * B * (1 - 1e-7) / np.linalg.norm(x, axis=1, keepdims=True)
    return x.astype(np.float32), rng.choice(targets_of(name), 30).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "longer"),
    [
        pytest.param(name, longer, marks=[] if (name, longer) == ("huber", 1.0) else SLOW)
        for name in LOSSES
        for longer in (1.0, 30.0)
    ],
)
def test_constants_hold_for_whole_losses(name, longer):
    """With weights, some outside of what is allowed, on data that may break the bounds."""
    loss = LOSSES[name][0](largest_weight=W)
    plain = LOSSES[name][0]()
    assert loss.smoothness - L2 == pytest.approx(W * (plain.smoothness - L2))
    if name not in ("hinge", "signs"):
        assert loss.gradient_bound == pytest.approx(W * plain.gradient_bound)
    hessian = jax.jit(jax.hessian(loss.loss_fn))
    each = jax.jit(
        jax.vmap(
            lambda w, x, y, v: jax.grad(loss.loss_fn)(w, (x[None], y[None], v[None])) - L2 * w,
            (None, 0, 0, 0),
        )
    )
    for seed, scale in enumerate((0.0, 0.3, 3.0)):
        rng = np.random.default_rng(seed)
        x, y = draw(name, seed, longer)
        v = np.float32(rng.choice([0.0, 1.0, W, 50.0, -2.0], 30))
        w = rng.normal(size=3)
        w = np.float32(w / np.linalg.norm(w) * min(scale, 4.0))
        for rows in (slice(None), slice(3, 4)):
            low, *_, high = np.linalg.eigvalsh(hessian(w, (x[rows], y[rows], v[rows])))
            assert low >= L2 * (1 - 1e-4)
            assert high <= loss.smoothness * ROUNDING
        assert max(norm(g) for g in each(w, x, y, v)) <= loss.gradient_bound * ROUNDING


@SLOW
def test_minimisers_stay_within_their_norm_and_reach_it():
    """Margins of one half everywhere: the largest minimiser there can be."""
    x = np.full((3, 1), math.sqrt(L2))
    for make, outputs in (
        (convex.squared_hinge, None),
        (convex.ridge_classification, None),
        (lambda b, l2: convex.ridge_classification(b, l2, 4), 4),
    ):
        loss = make(math.sqrt(L2), L2)
        assert loss.solution_norm == pytest.approx(math.sqrt((outputs or 1) / L2) / 2)
        out = solvers.minimize(loss, loss.init(1), (x, np.ones(3)), tolerance=1e-9)
        assert norm(out.params) == pytest.approx(loss.solution_norm, rel=1e-6)
    weighted = convex.squared_hinge(math.sqrt(W * L2), L2 * W * W, largest_weight=W)
    data = np.full((3, 1), math.sqrt(W * L2)), np.ones(3), np.full(3, W)
    out = solvers.minimize(weighted, weighted.init(1), data, tolerance=1e-9)
    assert norm(out.params) <= weighted.solution_norm * (1 + 1e-6)
    assert norm(out.params) == pytest.approx(weighted.solution_norm, rel=1e-6)


def test_targets_of_several_outputs_are_bounded_by_rows():
    loss = convex.ridge_regression(B, 1.0, L2, outputs=2)
    x, y = np.eye(2, 3), np.array([[3.0, 4.0], [0.6, 0.0]])
    scaled = np.array([[0.6, 0.8], [0.6, 0.0]])
    with pytest.raises(ValueError, match=r"target_norm = 1\.0, got 5\.0 in row 0"):
        loss.check_data((x, y))
    loss.check_data((x, scaled))
    w = np.float32(np.random.default_rng(0).normal(size=(3, 2)))
    expected = np.mean(np.sum((x @ w - scaled) ** 2, axis=1)) / 2 + L2 / 2 * norm(w) ** 2
    assert float(loss(w, (x, y))) == pytest.approx(expected, rel=1e-5)
    out = solvers.minimize(loss, loss.init(3), (x, scaled), tolerance=1e-12)
    exact = np.linalg.solve(x.T @ x / 2 + L2 * np.eye(3), x.T @ scaled / 2)
    np.testing.assert_allclose(out.params, exact, atol=1e-11)


# ------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("classes", [pytest.param(2, marks=SLOW), pytest.param(3, marks=SLOW)])
def test_a_weight_counts_a_row_as_often(classes):
    rng = np.random.default_rng(1)
    x, y = np.float32(rng.normal(size=(20, 3)) / 2), rng.integers(0, classes, 20)
    table = [1.0, 2.0, 0.0][:classes]
    weights = np.float32(np.array(table)[y])
    w = np.float32(rng.normal(size=(3,) if classes == 2 else (3, classes)))
    plain = convex.logistic_regression(B, L2, classes)
    rows = np.repeat(np.arange(20), weights.astype(int))
    term = L2 / 2 * norm(w) ** 2
    expected = (float(plain(w, (x[rows], y[rows]))) - term) * len(rows) / 20 + term
    by_class = convex.logistic_regression(B, L2, classes, class_weights=table)
    by_row = convex.logistic_regression(B, L2, classes, largest_weight=2.0)
    assert float(by_class(w, (x, y))) == pytest.approx(expected, rel=1e-5)
    assert float(by_row(w, (x, y, weights))) == pytest.approx(expected, rel=1e-5)
    both = convex.logistic_regression(B, L2, classes, class_weights=table, largest_weight=2.0)
    for loss, factor in ((by_class, 2), (by_row, 2), (both, 4)):
        assert loss.gradient_bound == pytest.approx(factor * plain.gradient_bound)
        assert loss.smoothness - L2 == pytest.approx(factor * (plain.smoothness - L2))


def test_deletions_of_heavy_rows_stay_within_the_stability_distance():
    """The mean is over n, whatever the weights: one over the total weight breaks the bound."""
    loss = convex.logistic_regression(B, 10.0, largest_weight=W)
    x = np.tile([[B * (1 - 1e-9), 0.0]], (40, 1))
    y, v = np.r_[np.zeros(4), np.ones(36)], np.r_[np.full(4, W), np.full(36, 0.1)]

    def apart(share):
        ends = [
            solvers.minimize(
                loss, np.zeros(2), (x[cut:], y[cut:], v[cut:] / share(v[cut:])), tolerance=1e-10
            )
            for cut in (0, 4)
        ]
        return norm(ends[0].params - ends[1].params)

    bound = convex.stability_distance(loss, size=40, deletions=4, gradient_norm=1e-10)
    assert 0.2 * bound < apart(lambda kept: 1.0) <= bound
    loss = convex.logistic_regression(B, 10.0, largest_weight=40.0)  # clips none of them
    assert apart(np.mean) > bound


def test_labels_that_are_no_class_have_no_class_weight():
    loss = convex.logistic_regression(B, L2, 3, class_weights=[1.0, 2.0, 3.0])
    w, x = np.ones((2, 3), np.float32), np.ones((1, 2), np.float32)
    assert float(loss(w, (x, np.array([-1])))) == pytest.approx(L2 / 2 * 6)


@pytest.mark.parametrize("given", ["balanced", {0: 1.0}, [1.0], [1.0, 2.0, 3.0], 1.0])
def test_class_weights_are_one_number_for_each_class(given):
    with pytest.raises(ValueError, match="class_weights must be 2 public numbers"):
        convex.logistic_regression(B, L2, class_weights=given)


def test_odd_weights_are_errors():
    for given in ([-1.0, 1.0], [0.0, 0.0], [np.inf, 1.0], [np.nan, 1.0]):
        with pytest.raises(ValueError, match="finite, at least 0 and not all 0"):
            convex.squared_hinge(B, L2, class_weights=given)
    loss = convex.huber_regression(B, L2, 1.0, largest_weight=W)
    x, y = np.ones((2, 1)), np.zeros(2)
    for odd, message in (
        (np.array([1.0, 3.1]), r"largest_weight = 3.0, got 3.1 in row 1"),
        (np.array([-0.1, 1.0]), "got -0.1 in row 0"),
        (np.array([np.nan, 1.0]), "got nan in row 0"),
        (np.ones(3), r"weights must be of shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            loss.check_data((x, y, odd))
    with pytest.raises(TypeError, match=r"weights \[n\]"):
        loss.check_data((x, y))
    with pytest.raises(ValueError, match=r"weights of shape .* must follow"):
        loss(np.zeros(1), (x, y))
    with pytest.raises(ValueError, match="largest_weight must be positive"):
        convex.huber_regression(B, L2, 1.0, largest_weight=0.0)


# ------------------------------------------------------------------------------ intercept


def test_an_intercept_is_a_constant_feature_and_regularised():
    rng = np.random.default_rng(0)
    x = convex.clip_features(rng.normal(size=(50, 3)), 1.0)
    y = (np.asarray(x)[:, 0] > -0.3).astype(int)
    wide = convex.append_intercept(x, value=2.0)
    assert wide.shape == (50, 4)
    np.testing.assert_array_equal(wide[:, :3], x)
    loss = convex.logistic_regression(math.hypot(1.0, 2.0), L2)
    loss.check_data((wide, y))
    out = solvers.minimize(loss, loss.init(4), (wide, y), tolerance=1e-10).params
    # The same by hand: the intercept b has the L2 term l2/2 (b/2)^2.
    z = np.asarray(x, np.float64) @ out[:3] + 2 * out[3]
    pull = np.mean(1 / (1 + np.exp(-z)) - y)
    assert pull == pytest.approx(-L2 * (2 * out[3]) / 4, abs=1e-8)
    with pytest.raises(ValueError, match="not strongly convex along the intercept"):
        convex.append_intercept(x, regularized=False)
    with pytest.raises(ValueError, match="value must be positive"):
        convex.append_intercept(x, value=0.0)
    with pytest.raises(ValueError, match=r"shape \[n, d\]"):
        convex.append_intercept(np.ones(3))
    assert convex.append_intercept(np.ones((2, 1), np.int32)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: convex.huber_regression(1.0, 0.1, 0.0), "threshold must be positive"),
        (lambda: convex.quantile_regression(1.0, 0.1, 1.0, 0.1), "quantile must be strictly"),
        (lambda: convex.quantile_regression(1.0, 0.1, 0.5, 0.0), "width must be positive"),
        (lambda: convex.poisson_regression(1.0, 0.1, np.inf), "largest_rate must be positive"),
        (lambda: convex.squared_hinge(1.0, 1.0, radius=0.4), "radius must be at least sqrt"),
        (lambda: convex.ridge_classification(1.0, 1.0, 4, radius=0.9), "radius must be at least"),
        (lambda: convex.ridge_classification(1.0, 1.0, 1), "classes must be at least 2"),
    ],
)
def test_bad_arguments_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "target"), [("huber", np.nan), ("quantile", np.inf), ("poisson", -1), ("poisson", 5.1)]
)
def test_targets_outside_the_bounds_are_errors(name, target):
    with pytest.raises(ValueError, match=r"targets must be .* in row 1"):
        LOSSES[name][0]().check_data((np.ones((2, 1)), np.array([1.0, target])))


@SLOW
def test_rates_below_the_cap_are_those_of_plain_poisson_regression():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(200, 2)) / 3
    y = rng.poisson(np.exp(x @ [0.5, 1.0]))
    ends = [
        solvers.minimize(loss, np.zeros(2), (x, y), tolerance=1e-8).params
        for loss in (convex.poisson_regression(B, L2, rate) for rate in (20.0, 2000.0))
    ]
    assert np.exp(x @ ends[0]).max() < 20
    np.testing.assert_allclose(*ends, atol=3e-7)
