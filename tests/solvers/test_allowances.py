"""Minimisation where rounding is not proved: linearised networks; and data spread over devices."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certunlearn import convex, solvers

SIZE = 40
ALLOWANCE = 1e-12


def net(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def narrow(params, x):
    """Computes in float32, whatever it gets."""
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, x))
    return net(*low)


def problem(apply_fn=net, size=SIZE):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(4, 5)), "v": rng.normal(size=(5, 3))}
    public = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    model = convex.linearized(apply_fn, public, radius=1.0)
    x = rng.normal(size=(size, 4)).astype(np.float32)
    return model, model.logistic_loss(l2=0.2), (x, model.scales(x), rng.integers(0, 3, size))


def exact_gradient(model, w, batch):
    """In long doubles, by hand: the tangent of tanh(x w) v, and the softmax loss on it."""
    wide = lambda leaf: np.asarray(leaf).astype(np.longdouble)  # noqa: E731
    p, w = ({key: wide(leaf) for key, leaf in tree.items()} for tree in (model.public_params, w))
    x, scales, labels = wide(batch[0]), wide(batch[1])[:, None], np.asarray(batch[2])
    hidden = np.tanh(x @ p["w"])
    bend = 1 - hidden**2
    z = hidden @ p["v"] + scales * ((bend * (x @ w["w"])) @ p["v"] + hidden @ w["v"])
    powers = np.exp(z - z.max(axis=1, keepdims=True))
    residual = (powers / powers.sum(axis=1, keepdims=True) - np.eye(3)[labels]) * scales / len(x)
    return {
        "w": x.T @ (bend * (residual @ p["v"].T)) + np.longdouble(0.2) * w["w"],
        "v": hidden.T @ residual + np.longdouble(0.2) * w["v"],
    }


def length(tree):
    return float(
        np.sqrt(sum(np.sum(np.asarray(leaf, np.longdouble) ** 2) for leaf in tree.values()))
    )


def random_point(scale):
    rng = np.random.default_rng(1)
    return {"w": scale * rng.normal(size=(4, 5)), "v": scale * rng.normal(size=(5, 3))}


def test_the_stated_allowance_holds_with_room():
    """A hundredth of it is enough for this network, against long doubles."""
    model, loss, batch = problem()
    solved = solvers.minimize(
        loss, model.zeros(), batch, tolerance=1e-11, method="lbfgs", allowance=1e-13
    ).params
    with jax.enable_x64(True):
        slope = jax.jit(jax.grad(loss.loss_fn))
        for w in (solved, random_point(1.0), random_point(30.0), random_point(0.0)):
            computed, exact = slope(w, batch), exact_gradient(model, w, batch)
            apart = length({key: np.asarray(computed[key]) - exact[key] for key in exact})
            largest = loss.gradient_bound + loss.smoothness * length(w)
            assert apart <= ALLOWANCE / 100 * largest
            bound = convex.gradient_norm(loss, w, batch, allowance=ALLOWANCE)
            assert length(exact) <= bound <= length(exact) + 1.1 * ALLOWANCE * largest + 1e-12


def test_without_an_allowance_it_is_refused():
    model, loss, batch = problem()
    for ask in (
        lambda: convex.gradient_norm(loss, model.zeros(), batch),
        lambda: solvers.minimize(loss, model.zeros(), batch, tolerance=1e-6),
    ):
        with pytest.raises(ValueError, match=r"allowance must be given.*no proved bound, got None"):
            ask()
    with pytest.raises(ValueError, match=r"allowance alone is .*: raise tolerance or lower it"):
        solvers.minimize(loss, model.zeros(), batch, tolerance=1e-9, allowance=1e-6)


def test_a_network_in_float32_needs_an_allowance_for_that():
    model, loss, batch = problem(narrow)
    with pytest.raises(ValueError, match=r"allowance must be at least .* computed in float32"):
        convex.gradient_norm(loss, model.zeros(), batch, allowance=ALLOWANCE)
    w = random_point(1.0)
    largest = loss.gradient_bound + loss.smoothness * length(w)
    exact = length(exact_gradient(model, w, batch))
    bound = convex.gradient_norm(loss, w, batch, allowance=1e-5)
    assert exact <= bound <= exact + 2e-5 * largest


@pytest.mark.slow
@pytest.mark.parametrize("method", ["newton", "lbfgs", "descent"])
def test_tangent_models_are_minimised(method):
    model, loss, batch = problem()
    out = solvers.minimize(
        loss, model.zeros(), batch, tolerance=1e-8, method=method, allowance=ALLOWANCE
    )
    assert out.gradient_norm <= 1e-8
    assert length(exact_gradient(model, out.params, batch)) <= out.gradient_norm
    assert {leaf.dtype for leaf in out.params.values()} == {np.dtype(np.float64)}
    parts = [tuple(part[i : i + 16] for part in batch) for i in range(0, SIZE, 16)]
    same = solvers.minimize(
        loss, out.params, parts, tolerance=1.1e-8, method=method, allowance=ALLOWANCE
    )
    assert same.passes == 1


@pytest.mark.slow
def test_tangent_models_use_kept_factors():
    model, loss, batch = problem(size=200)
    trained = solvers.minimize(loss, model.zeros(), batch, tolerance=1e-9, allowance=ALLOWANCE)
    factor = solvers.factorize(loss, trained.params, batch, allowance=ALLOWANCE)
    kept = tuple(part[5:] for part in batch)
    request = {"tolerance": 1e-7, "method": "lbfgs", "allowance": ALLOWANCE}
    warm = solvers.minimize(loss, trained.params, kept, **request)
    quick = solvers.minimize(loss, trained.params, kept, curvature=factor, **request)
    assert quick.passes < warm.passes
    apart = {key: quick.params[key] - warm.params[key] for key in quick.params}
    assert length(apart) <= 2e-7 / loss.strong_convexity


@pytest.mark.slow
def test_few_tangent_features_make_a_linear_model_with_a_proved_bound():
    rng = np.random.default_rng(0)
    public = {"w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), "v": jnp.zeros(3)}
    one = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]  # noqa: E731
    model = convex.linearized(one, public, radius=1.0)
    x = 3 * rng.normal(size=(SIZE, 4)).astype(np.float32)
    x[3] = np.nan
    scales, y = model.scales(x), rng.integers(0, 2, SIZE)
    features = model.features(x, scales, microbatch_size=16)
    assert features.shape == (SIZE, 15)
    assert np.all(np.linalg.norm(np.asarray(features, np.float64), axis=1) <= 1.0)
    assert not np.any(features[3])
    linear = convex.logistic_regression(1.0, 0.1)
    out = solvers.minimize(linear, np.zeros(15), (features, y), tolerance=1e-10)
    # The public network's outputs are 0, so this is its tangent model.
    tangent = model.logistic_loss(0.1, binary=True)
    w = {"v": out.params[:3], "w": out.params[3:].reshape(4, 3)}
    assert convex.gradient_norm(tangent, w, (x, scales, y), allowance=1e-12) < 1e-6
    with pytest.raises(ValueError, match=r"scales must have shape \(40,\)"):
        model.features(x, scales[:3])
    several, _, batch = problem()
    with pytest.raises(ValueError, match="apply_fn must have one output each, got 3"):
        several.features(*batch[:2])


SPREAD = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from certunlearn import convex, solvers

assert jax.device_count() == 8
rng = np.random.default_rng(0)
x = np.asarray(convex.clip_features(rng.normal(size=(640, 6)), 1.0))
y = rng.integers(0, 3, 640)
loss = convex.logistic_regression(1.0, 0.01, 3)
start = np.zeros((6, 3))
whole = solvers.minimize(loss, start, (x, y), tolerance=1e-10)
auto = Mesh(np.array(jax.devices()), ("rows",))
for mesh in (auto, jax.make_mesh((8,), ("rows",))):
    rows = NamedSharding(mesh, PartitionSpec("rows"))
    spread = tuple(jax.device_put(part, rows) for part in (x, y))
    assert len(spread[0].devices()) == 8
    for method in ("newton", "lbfgs"):
        out = solvers.minimize(loss, start, spread, tolerance=1e-10, method=method)
        assert np.linalg.norm(out.params - whole.params) <= 2e-10 / 0.01
        assert convex.gradient_norm(loss, out.params, (x, y)) <= 1.1e-10
    assert convex.gradient_norm(loss, whole.params, spread) <= 1.1e-10
a, b = (solvers.factorize(loss, start, data).factors for data in (spread, (x, y)))
np.testing.assert_allclose(a, b, atol=1e-12)
"""


@pytest.mark.slow
def test_spread_data_stay_where_they_are():
    root = pathlib.Path(__file__).parents[2]
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(root),
    }
    run = subprocess.run(
        [sys.executable, "-c", SPREAD], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
