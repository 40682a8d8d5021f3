"""Minimisation to a verified gradient norm: every solver reaches it, or returns nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convex_helpers import LOSSES, draw_data, every_loss, norm

from certunlearn import convex, solvers
from certunlearn.solvers import data_blocks, data_passes, kept_factors

SLOW = pytest.mark.slow


def problem(size=400, width=12, classes=2, l2=1e-3, seed=0):
    """Features of decaying size, as real ones are, so that curvatures differ much."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size, width)) * np.geomspace(1, 0.03, width)
    x = np.asarray(convex.clip_features(x, 1.0))
    y = np.argmax(x @ rng.normal(size=(width, classes)) * 5 + rng.gumbel(size=(size, classes)), 1)
    return convex.logistic_regression(1.0, l2, classes), (x, y)


@every_loss
@pytest.mark.parametrize("method", ["newton", "lbfgs", pytest.param("descent", marks=SLOW)])
def test_every_solver_reaches_the_tolerance(name, method):
    loss, data = LOSSES[name], draw_data(name)
    start = loss.init(4)
    out = solvers.minimize(loss, start, data, tolerance=1e-8, method=method)
    assert out.gradient_norm <= 1e-8
    assert isinstance(out.params, np.ndarray)
    assert out.params.dtype == np.float64
    assert out.params.shape == start.shape
    assert convex.gradient_norm(loss, out.params, data) == out.gradient_norm
    best = solvers.minimize(loss, out.params, data, tolerance=1e-12)
    assert norm(out.params - best.params) <= (1e-8 + 1e-12) / loss.strong_convexity
    assert not jax.config.jax_enable_x64


# ------------------------------------------------------------------------------ the theorem


def on_the_sphere(loss, data, tau, directions):
    """Distances from the minimiser of points along directions where the gradient norm is tau."""
    middle = solvers.minimize(loss, loss.init(data[0].shape[1]), data, tolerance=1e-12).params
    aim = data_passes.objective(loss, middle, data, None)
    for direction in directions:
        unit = direction / np.linalg.norm(direction)
        low, high = 0.0, 2 * tau / loss.strong_convexity
        for _ in range(40):
            size = (low + high) / 2
            slope = aim.at(middle.ravel() + size * unit.ravel()).gradient
            low, high = (size, high) if np.linalg.norm(slope) < tau else (low, size)
        yield high


@pytest.mark.parametrize("name", ["ridge", "binary", pytest.param("softmax", marks=SLOW)])
def test_points_of_a_gradient_norm_are_as_near_as_the_theorem_says(name):
    """m ||w - w_R|| <= ||grad F_R(w)||, attained where the data have nothing to say."""
    loss, (x, y) = LOSSES[name], draw_data(name)
    x = np.array(x)
    x[:, 3] = 0.0
    tau, rng = 0.03, np.random.default_rng(0)
    shape = loss.init(4).shape
    silent = np.zeros(shape)
    silent[3] = 1.0
    directions = [silent, *rng.normal(size=(8, *shape))]
    reached = list(on_the_sphere(loss, (x, y), tau, directions))
    limit = tau / loss.strong_convexity
    assert max(reached) <= limit * (1 + 1e-9)
    assert reached[0] == pytest.approx(limit, rel=1e-6)
    assert max(reached[1:]) < 0.99 * limit


# ------------------------------------------------------------------------------ the bound


def exact_gradient(name, loss, params, data):
    """In long doubles, from formulas by hand."""
    x, w = np.asarray(data[0], np.longdouble), np.asarray(params, np.longdouble)
    lengths = np.sqrt(np.sum(x**2, axis=1))
    x = x * np.minimum(1, np.longdouble(loss.feature_norm) / lengths)[:, None]
    z, y = x @ w, np.asarray(data[1])
    if name == "ridge":
        residual = z - np.clip(y.astype(np.longdouble), -1.5, 1.5)
    elif name == "binary":
        residual = 1 / (1 + np.exp(-z)) - y
    else:
        powers = np.exp(z - z.max(axis=1, keepdims=True))
        residual = powers / powers.sum(axis=1, keepdims=True) - np.eye(3)[y]
    return x.T @ residual / len(x) + np.longdouble(loss.l2) * w


@every_loss
def test_the_bound_is_above_the_exact_norm_and_close(name):
    assert np.finfo(np.longdouble).eps < 1e-18
    loss, data = LOSSES[name], draw_data(name)
    solved = solvers.minimize(loss, loss.init(4), data, tolerance=1e-12).params
    for params in (solved, solved + 1e-9, 30 * solved, np.zeros_like(solved)):
        for cut in (data, [tuple(part[i : i + 7] for part in data) for i in range(0, 40, 7)]):
            bound = convex.gradient_norm(loss, params, cut)
            exact = float(np.linalg.norm(exact_gradient(name, loss, params, data).ravel()))
            assert exact <= bound <= exact + 1e-11 * (1 + norm(params))


def test_rounding_alone_would_not_do():
    """Somewhere near the minimiser the computed norm is below the exact one."""
    loss, data = LOSSES["binary"], draw_data("binary")
    solved = solvers.minimize(loss, loss.init(4), data, tolerance=1e-13).params
    below = 0
    for seed in range(40):
        params = solved + 1e-16 * np.random.default_rng(seed).normal(size=4)
        there = data_passes.objective(loss, params, data, None).at(params)
        exact = float(np.linalg.norm(exact_gradient("binary", loss, params, data)))
        below += np.linalg.norm(there.gradient) < exact
        assert exact <= there.bound
    assert below > 0


# ------------------------------------------------------------------------------ refusals


def test_what_is_not_reached_returns_nothing():
    loss, data = problem()
    start = np.zeros(12)
    for method in ("newton", "lbfgs", "descent"):
        with pytest.raises(ValueError, match=r"got gradient norm .* after 2 passes: raise max_pas"):
            solvers.minimize(loss, start, data, tolerance=1e-9, method=method, max_passes=2)
        with pytest.raises(ValueError, match=r"rounding alone may hide .*: raise tolerance"):
            solvers.minimize(loss, start, data, tolerance=1e-17, method=method)
    with pytest.raises(ValueError, match="params"):
        solvers.minimize(loss, np.full(12, np.nan), data, tolerance=1e-3)
    with pytest.raises(ValueError, match="start where the gradient is finite"):
        solvers.minimize(loss, np.full(12, 1e308), data, tolerance=1e-3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tolerance": 0.0}, ValueError, "tolerance must be positive"),
        ({"method": "sgd"}, ValueError, "method must be one of 'newton', 'lbfgs', 'descent'"),
        ({"max_passes": 0}, ValueError, "max_passes must be at least 1"),
        ({"curvature": np.eye(4)}, TypeError, "curvature must be a Curvature"),
        ({"curvature": solvers.Curvature(np.eye(3)[None], None)}, ValueError, "4 parameters"),
        ({"params": np.zeros(5)}, ValueError, r"params must be of shape \(4,\)"),
        ({"allowance": 1e-9}, ValueError, "allowance must be None"),
        ({"loss": lambda w, b: 0.0}, TypeError, "loss must be a ConvexLoss"),
        ({"data": "rows"}, TypeError, "data must be"),
        ({"data": {"x": 1}}, TypeError, "data must be"),
        ({"data": []}, TypeError, "batch"),
        ({"data": iter([1])}, ValueError, "data must be a list of batches"),
        ({"data": lambda: iter(())}, ValueError, "at least one example"),
        ({"data": lambda: [3.0]}, TypeError, "batches of data must be tuples"),
        ({"data": (np.ones((3, 4)), np.full(3, 5))}, ValueError, "labels from 0 to 1"),
        ({"data": [(np.ones((3, 4)), np.full(3, 5))]}, ValueError, "norm|labels"),
    ],
)
def test_bad_arguments_are_errors(arguments, error, message):
    good = {"loss": LOSSES["binary"], "params": np.zeros(4), "data": draw_data("binary")}
    good |= {"tolerance": 1e-3} | arguments
    with pytest.raises(error, match=message):
        solvers.minimize(**good)


# ------------------------------------------------------------------------------ starts, factors


def test_a_warm_start_and_a_kept_factor_save_passes():
    loss, (x, y) = problem(2000, 30, l2=1e-4)
    trained = solvers.minimize(loss, np.zeros(30), (x, y), tolerance=1e-9)
    kept = (x[20:], y[20:])
    request = {"tolerance": 1e-8, "method": "lbfgs"}
    cold = solvers.minimize(loss, np.zeros(30), kept, **request)
    warm = solvers.minimize(loss, trained.params, kept, **request)
    factor = solvers.factorize(loss, trained.params, (x, y))
    quick = solvers.minimize(loss, trained.params, kept, curvature=factor, **request)
    assert quick.passes < warm.passes < cold.passes
    assert quick.passes <= 4
    assert quick.curvature is factor
    assert quick.factorizations == 0
    assert cold.curvature is None
    newton = solvers.minimize(loss, trained.params, kept, curvature=factor, tolerance=1e-8)
    assert newton.passes <= 4
    assert "private" in repr(factor)
    assert str(factor.factors[0, 0, 0]) not in repr(factor)


@SLOW
def test_a_misleading_factor_costs_passes_only():
    loss, data = problem(l2=1e-4)
    exact = solvers.minimize(loss, np.zeros(12), data, tolerance=1e-10)
    rng = np.random.default_rng(0)
    for matrix in (1e-4 * np.eye(12), 100 * np.eye(12), np.tril(rng.normal(size=(12, 12)))):
        np.fill_diagonal(matrix, np.abs(np.diag(matrix)) + 1e-2)
        odd = solvers.Curvature(matrix[None], None)
        for method in ("newton", "lbfgs"):
            out = solvers.minimize(
                loss, np.zeros(12), data, tolerance=1e-9, method=method, curvature=odd
            )
            assert norm(out.params - exact.params) <= 1.1e-9 / loss.strong_convexity
            assert (out.curvature is odd) == (method == "lbfgs")


@SLOW
def test_far_starts_are_no_trouble():
    loss, data = problem(l2=1e-3, classes=3)
    for scale in (10.0, 1e4):
        start = scale * np.random.default_rng(1).normal(size=(12, 3))
        for method in ("newton", "lbfgs"):
            out = solvers.minimize(loss, start, data, tolerance=1e-8, method=method)
            assert out.gradient_norm <= 1e-8


def test_hessians_are_those_of_the_formula():
    loss, (x, y) = problem(50, 4, classes=3)
    w = np.random.default_rng(2).normal(size=(4, 3))
    powers = np.exp(x @ w)
    p = powers / powers.sum(axis=1, keepdims=True)
    bends = p[:, :, None] * np.eye(3) - p[:, :, None] * p[:, None, :]
    wide = np.asarray(x, np.float64)
    expected = np.einsum("ni,nab,nj->aibj", wide, bends, wide).reshape(12, 12) / 50
    expected += loss.l2 * np.eye(12)  # by output, then by feature
    aim = data_passes.objective(loss, w, (x, y), None)
    whole = aim.hessian(w.ravel(), by_output=False)
    np.testing.assert_allclose(whole, expected[None], atol=1e-14)
    gradient = np.random.default_rng(3).normal(size=12)
    ordered = np.linalg.solve(expected, gradient.reshape(4, 3).T.ravel())
    solved = kept_factors.factored(aim, w.ravel()).solve(gradient)
    np.testing.assert_allclose(solved, ordered.reshape(3, 4).T.ravel(), rtol=1e-9)


@SLOW
def test_losses_without_an_output_loss_are_differentiated_as_a_whole():
    loss, (x, y) = problem(50, 4, classes=3)
    w = np.random.default_rng(2).normal(size=12)
    names = ("loss_fn", "strong_convexity", "smoothness", "gradient_bound", "l2")
    fields = {name: vars(loss)[name] for name in names}
    opaque = convex.ConvexLoss(**fields, feature_norm=1.0, outputs=3)
    ours, theirs = (
        data_passes.objective(one, w.reshape(4, 3), (x, y), None) for one in (loss, opaque)
    )
    np.testing.assert_allclose(ours.at(w).gradient, theirs.at(w).gradient, atol=1e-15)
    assert ours.at(w).value == pytest.approx(theirs.at(w).value, rel=1e-14)
    whole = ours.hessian(w, by_output=False)
    np.testing.assert_allclose(theirs.hessian(w, by_output=False), whole, atol=1e-14)
    for k, part in enumerate(ours.hessian(w, by_output=True)):
        block = slice(4 * k, 4 * k + 4)
        np.testing.assert_allclose(part, whole[0, block, block], atol=1e-14)


@SLOW
def test_many_parameters_are_factored_by_output_or_not_at_all(monkeypatch):
    loss, data = problem(300, 8, classes=3, l2=1e-2)
    monkeypatch.setattr(kept_factors, "MOST_FACTORED", 10)
    factor = solvers.factorize(loss, np.zeros((8, 3)), data)
    assert factor.factors.shape == (3, 8, 8)
    out = solvers.minimize(loss, np.zeros((8, 3)), data, tolerance=1e-8, curvature=factor)
    assert out.gradient_norm <= 1e-8
    binary, data = problem(300, 12)
    with pytest.raises(ValueError, match=r"params must be fewer .* got 12: minimize without"):
        solvers.factorize(binary, np.zeros(12), data)
    out = solvers.minimize(binary, np.zeros(12), data, tolerance=1e-8)
    assert out.factorizations == 0


# ------------------------------------------------------------------------------ forms of data


class Loader:
    """What iterates anew each time, in another order, with copies as streams make them."""

    def __init__(self, data, size=64):
        self.data, self.size, self.passes = data, size, 0

    def __iter__(self):
        self.passes += 1
        starts = np.random.default_rng(self.passes).permutation(-(-len(self.data[0]) // self.size))
        for start in self.size * starts:
            yield tuple(np.array(part[start : start + self.size]) for part in self.data)


@pytest.mark.parametrize("classes", [2, pytest.param(3, marks=SLOW)])
def test_batches_are_the_same_as_one_array(classes):
    loss, data = problem(500, 12, classes)
    start = np.asarray(loss.init(12))
    whole = solvers.minimize(loss, start, data, tolerance=1e-11, method="lbfgs")
    loader = Loader(data)
    batches = list(Loader(data))
    for form in (loader, batches, lambda: iter(batches), list(data), tuple(map(jnp.asarray, data))):
        out = solvers.minimize(loss, start, form, tolerance=1e-11, method="lbfgs")
        assert norm(out.params - whole.params) <= 2e-11 / loss.strong_convexity
        assert convex.gradient_norm(loss, whole.params, form) <= 1.5e-11
    assert loader.passes == out.passes + 1
    factor = solvers.factorize(loss, whole.params, batches)
    same = solvers.factorize(loss, whole.params, data)
    np.testing.assert_allclose(factor.factors, same.factors, atol=1e-12)


def test_blocks_of_one_array_are_the_same_as_one_block(monkeypatch):
    loss, data = problem(500, 12)
    point = np.linspace(-1, 1, 12)
    whole = data_passes.objective(loss, point, data, None).at(point)
    monkeypatch.setattr(data_blocks, "_MOST_ROWS", 64)
    for kept in (2**31, 0):
        monkeypatch.setattr(data_blocks, "_KEPT_BYTES", kept)
        aim = data_passes.objective(loss, point, data, None)
        parts = aim.at(point)
        with jax.enable_x64(True):
            assert [block.rows for block in aim.blocks(False)] == [64] * 7 + [52]
        np.testing.assert_allclose(parts.gradient, whole.gradient, atol=1e-15)
        assert parts.value == pytest.approx(whole.value, rel=1e-14)
        assert parts.rows == whole.rows == 500
        assert parts.rounding < whole.rounding


@SLOW
def test_weights_go_through_blocks(monkeypatch):
    monkeypatch.setattr(data_blocks, "_MOST_ROWS", 64)
    _, (x, y) = problem(150, 5)
    loss = convex.logistic_regression(1.0, 0.01, largest_weight=2.0)
    weights = np.where(np.arange(150) < 100, 1.0, 0.0)
    out = solvers.minimize(loss, np.zeros(5), (x, y, weights), tolerance=1e-10)
    plain = convex.logistic_regression(1.0, 0.015)
    kept = solvers.minimize(plain, np.zeros(5), (x[:100], y[:100]), tolerance=1e-10)
    np.testing.assert_allclose(out.params, kept.params, atol=1e-7)  # 2/3 of the mean, and of l2


def test_streams_that_change_are_errors():
    loss, (x, y) = problem()
    passes = iter(range(100))
    shrinking = lambda: [(x[next(passes) :], y)]  # noqa: E731
    with pytest.raises(ValueError, match="data must be 2 arrays of as many rows"):
        solvers.minimize(loss, np.zeros(12), shrinking, tolerance=1e-9)

    def fewer():
        cut = next(passes)
        return [(x[cut:], y[cut:])]

    with pytest.raises(ValueError, match="same examples in every pass"):
        solvers.minimize(loss, np.zeros(12), fewer, tolerance=1e-9)
