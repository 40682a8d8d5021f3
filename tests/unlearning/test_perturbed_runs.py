"""`unlearn` with `PerturbedMinimizer`: solved, verified, noised in float64, and nothing else."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from loop_helpers import arguments, handler

import certunlearn as cu
from certunlearn.unlearning import load_state, save_state

D, SIZE, L2 = 5, 60, 0.1
_RNG = np.random.default_rng(0)
X = _RNG.normal(size=(SIZE, D))
X /= np.linalg.norm(X, axis=1, keepdims=True) * (1 + 1e-6)
Y = (X @ np.arange(D) > 0).astype(np.int32)
DATA = (X, Y)
LOSS = cu.convex.logistic_regression(feature_norm=1.0, l2=L2)
START = jnp.zeros(D)
MECHANISM = cu.PerturbedMinimizer(gradient_norm=1e-6, strong_convexity=L2)


def newton(loss, params, data, tolerance):
    """An independent solver, in NumPy."""
    del loss, tolerance
    x, y, w = np.asarray(data[0], np.float64), np.asarray(data[1]), np.asarray(params)
    for _ in range(8):
        p = 1 / (1 + np.exp(-x @ w))
        hessian = (x.T * (p * (1 - p))) @ x / len(x) + L2 * np.eye(x.shape[1])
        w = w - np.linalg.solve(hessian, x.T @ (p - y) / len(x) + L2 * w)
    return w


def stays(loss, params, data, tolerance):
    del loss, data, tolerance
    return params


def run(mechanism=MECHANISM, params=START, data=DATA, loss=LOSS, key=3, **changes):
    given = {"solver": newton, "delta": 1e-5, "progress": False}
    given |= {"key": None if key is None else jax.random.key(key)}
    if "noise_scale" not in changes:
        given["epsilon"] = 1.0
    return cu.unlearn(loss, params, data, mechanism, **arguments(**(given | changes)))


# ------------------------------------------------------------------------------ what leaves


def test_the_release_is_the_minimiser_with_noise_and_certified():
    result = run()
    exact = newton(LOSS, np.zeros(D), DATA, 0)
    assert np.linalg.norm(result.history.before_noise - exact) <= MECHANISM.initial_distance
    certificate = result.certificate
    verified = cu.verify(certificate, result.params)
    assert verified, verified.problems
    assert certificate.evidence == "optimizer state"
    assert (certificate.steps_run, certificate.accountant) == (1, "interpolation")
    assert certificate.epsilon == pytest.approx(1.0)
    assert certificate.reference == "minimizer"
    assert result.params.dtype == jnp.float32
    assert result.params.shape == (D,)
    assert "reference 'minimizer'" in verified.summary


def test_the_default_solver_reaches_the_tolerance():
    result = run(solver=None)
    assert cu.verify(result.certificate, result.params)
    assert result.history.gradient_norm <= MECHANISM.gradient_norm
    assert result.history.passes > 0
    exact = newton(LOSS, np.zeros(D), DATA, 0)
    assert np.linalg.norm(result.history.before_noise - exact) <= MECHANISM.initial_distance


def test_a_chain_of_requests_starts_where_the_last_one_stopped():
    params, left = START, np.arange(SIZE)
    for _ in range(3):
        left = left[1:]
        result = run(params=params, data=(X[left], Y[left]), key=None)
        assert cu.verify(result.certificate, result.params)
        params = result.history.before_noise
        exact = newton(LOSS, np.zeros(D), (X[left], Y[left]), 0)
        assert np.linalg.norm(params - exact) <= MECHANISM.initial_distance
        assert result.certificate.retain_size == len(left)


MANY = 20_000
SPREAD = cu.convex.ridge_regression(feature_norm=1.0, target_norm=1.0, l2=L2)
NOTHING = (np.zeros((2, MANY)), np.zeros(2))


def is_normal(draws, scale):
    """Whether numbers are N(0, scale^2), by mean, variance and tails; wrong with chance 1e-6."""
    z = np.asarray(draws, np.float64) / scale
    n, five = z.size, 5.0
    return (
        abs(z.mean()) < five / n**0.5
        and abs(z.var() - 1) < five * (2 / n) ** 0.5
        and abs(np.mean(np.abs(z) > 1) - 0.31731) < five * (0.31731 * 0.68269 / n) ** 0.5
    )


@pytest.mark.parametrize(
    "reference", ["minimizer", pytest.param("retrained", marks=pytest.mark.slow)]
)
def test_the_released_parameters_have_the_certified_noise(reference):
    # The minimiser of a ridge regression on zeros is 0: what is released is the noise.
    mechanism = cu.PerturbedMinimizer(gradient_norm=1e-3, strong_convexity=L2, reference=reference)
    result = run(mechanism, np.zeros(MANY, np.float32), NOTHING, SPREAD, solver=stays)
    noise = np.asarray(result.params, np.float64)
    sigma = (
        mechanism.initial_distance * 3.730631634815
    )  # mu of (1, 1e-5), by an outside computation
    assert is_normal(noise, sigma)
    for wrong in (0.95, 1.05, 0.5, 2.0):
        assert not is_normal(noise, wrong * sigma)
    assert not result.history.before_noise.any()
    again = run(mechanism, np.zeros(MANY, np.float32), NOTHING, SPREAD, solver=stays, key=4)
    assert abs(np.corrcoef(noise, np.asarray(again.params))[0, 1]) < 5 / MANY**0.5


def test_noise_below_the_spacing_of_float32_is_added_in_float64_and_rounded_with_it():
    # Far below 4 spacings of float32 at 1, which a mechanism that steps in float32 must refuse.
    rows = np.vstack([np.eye(8), np.eye(8)])
    mechanism = cu.PerturbedMinimizer(gradient_norm=1e-10, strong_convexity=1.0)
    loss = cu.convex.ridge_regression(feature_norm=1.0, target_norm=20.0, l2=1.0)
    targets = np.full(16, 17.0)  # the mean of 16 rows: w = (17 / 8) / (1 / 8 + 1)
    exact = np.full(8, 17 / 9)
    result = run(mechanism, np.zeros(8, np.float32), (rows, targets), loss, solver=lambda *_: exact)
    assert result.certificate.noise_scale < np.spacing(np.float32(1.9))
    assert cu.verify(result.certificate, result.params)
    np.testing.assert_array_equal(result.params, exact.astype(np.float32))


# ------------------------------------------------------------------------------ what is refused


def test_a_solver_that_did_not_get_there_releases_nothing():
    with pytest.raises(ValueError, match=r"must reach a gradient norm.*nothing is released"):
        run(solver=stays)


@pytest.mark.parametrize(
    ("solver", "error", "words"),
    [
        (lambda *_: np.full(D, np.nan), ValueError, "finite|gradient norm"),
        (lambda *_: np.zeros(D + 1), ValueError, "keep the shapes"),
        (lambda *_: {"w": np.zeros(D)}, ValueError, "structured like params"),
        (lambda *_: None, ValueError, "structured like params"),
    ],
)
def test_a_solver_is_not_trusted(solver, error, words):
    with pytest.raises(error, match=words):
        run(solver=solver)


def test_the_tolerance_is_that_of_the_data_as_they_were_given():
    seen = {}

    def solver(loss, params, data, tolerance):
        seen.update(features=data[0].dtype, params=params.dtype, tolerance=tolerance)
        return newton(loss, params, data, tolerance)

    run(solver=solver)
    assert seen == {"features": np.float64, "params": np.float64, "tolerance": 1e-6}
    # The minimiser of rounded features is farther off than a fine tolerance allows.
    fine = cu.PerturbedMinimizer(gradient_norm=1e-12, strong_convexity=L2)
    rounded = lambda loss, w, data, t: newton(loss, w, (data[0].astype(jnp.float32), data[1]), t)  # noqa: E731
    with pytest.raises(ValueError, match="gradient norm"):
        run(fine, solver=rounded)


def plain_loss(params, batch):
    return jnp.mean((batch[0] @ params - batch[1]) ** 2)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"loss": plain_loss}, TypeError, r"ConvexLoss.*strong convexity is known"),
        (
            {"loss": cu.convex.logistic_regression(feature_norm=1.0, l2=L2 / 2)},
            ValueError,
            "strong_convexity must be at most the loss's",
        ),
        ({"frozen": True}, ValueError, "frozen must be None"),
        ({"center": np.zeros(D)}, ValueError, "center must be None"),
        ({"per_example": True}, ValueError, "per_example must be False"),
        (
            {"microbatch_size": 1},
            ValueError,
            "microbatch_size must be None for",
        ),
        ({"batch_size": 7}, ValueError, f"batch_size must be None or all {SIZE}"),
        ({"before_clip": optax.scale(0.5)}, ValueError, "before_clip must be None"),
        ({"delta": None}, TypeError, "delta must be one real number"),
        ({"accountant": "exact"}, ValueError, "accountant='exact' is for mechanisms that need no"),
        ({"stop_after": 2}, ValueError, "stop_after must be at most"),
    ],
)
def test_runs_that_make_no_sense_are_refused(changes, error, words):
    with pytest.raises(error, match=words):
        run(**changes)


def test_what_only_such_a_run_takes_others_refuse():
    clipping = cu.GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=2)
    with pytest.raises(ValueError, match="solver and gradient_allowance must be None for Grad"):
        run(clipping, loss=plain_loss, batch_size=20)
    with pytest.raises(TypeError, match="batch_size must be given for GradientClipping"):
        run(clipping, loss=plain_loss, solver=None)
    with pytest.raises(TypeError, match="solver must be a function"):
        cu.Options(solver=3)


# ------------------------------------------------------------------------------ what is private


def test_what_the_solver_did_is_in_the_private_history_alone(tmp_path):
    result = run()
    history = result.history
    assert history.gradient_norm <= MECHANISM.gradient_norm
    assert history.passes is None  # another's solver does not say
    assert history.before_noise.dtype == np.float64
    assert len(history.losses) == 0
    assert history.state is None
    public = result.certificate.to_json() + repr(result) + repr(history)
    assert repr(history.gradient_norm) not in public
    assert str(history.before_noise[0])[:8] not in public
    history.save(tmp_path / "run.private.json")
    saved = json.loads((tmp_path / "run.private.json").read_text())
    assert saved["gradient_norm"] == history.gradient_norm
    assert "before_noise" not in saved


# ------------------------------------------------------------------------------ going on


FINETUNE = (optax.sgd(0.1), 4)


def test_finetuning_follows_in_the_released_precision():
    plain, tuned = run(), run(finetune=FINETUNE, batch_size=20)
    assert tuned.certificate.finetune_steps == 4
    assert tuned.params.dtype == jnp.float32
    assert cu.verify(tuned.certificate, tuned.params)
    assert not np.array_equal(plain.params, tuned.params)
    assert len(tuned.history.finetune_losses) == 4


def test_a_failure_after_the_noise_goes_on_with_the_same_noise_and_does_not_solve_again(tmp_path):
    calls = []

    def counted(*given):
        calls.append(1)
        return newton(*given)

    def fails(params):
        raise RuntimeError("evaluation")

    def evaluate(params):
        return fails(params) if len(calls) else None

    with pytest.raises(cu.unlearning.UnlearningFailed) as failed:
        run(solver=counted, evaluate=evaluate, finetune=FINETUNE, batch_size=20)
    assert len(calls) == 1
    save = tmp_path / "state.private.npz"
    with pytest.warns(UserWarning, match="holds the noise key"):
        save_state(save, failed.value.state)
    state = load_state(save)
    assert state.step == 1
    resumed = run(solver=counted, resume=state, key=None, finetune=FINETUNE, batch_size=20)
    assert len(calls) == 1
    whole = run(solver=newton, finetune=FINETUNE, batch_size=20)
    np.testing.assert_array_equal(resumed.params, whole.params)
    assert cu.verify(resumed.certificate, resumed.params)
    # The point before the noise comes from the state; what the solver reached is gone.
    np.testing.assert_allclose(resumed.history.before_noise, whole.history.before_noise, atol=1e-12)
    assert resumed.history.gradient_norm is None
    other = cu.PerturbedMinimizer(gradient_norm=2e-6, strong_convexity=L2)
    with pytest.raises(
        ValueError, match="resume is the state of another plan: batch_size, mechanism"
    ):
        run(other, resume=state, key=None, noise_scale=resumed.certificate.noise_scale)


def test_an_interrupt_before_the_noise_says_that_nothing_is_left():
    def interrupted(*given):
        os.kill(os.getpid(), signal.SIGINT)
        return newton(*given)

    with (
        handler(signal.SIGINT, signal.default_int_handler),
        pytest.raises(KeyboardInterrupt, match="nothing is released, and there is no state"),
    ):
        run(solver=interrupted)


def test_a_solver_that_raises_leaves_its_own_exception():
    def broken(*given):
        raise MemoryError("too large")

    with pytest.raises(MemoryError, match="too large"):
        run(solver=broken)


@pytest.mark.slow
def test_a_linearised_network_rests_on_the_allowance_that_is_stated():
    rng = np.random.default_rng(0)
    public = {
        "w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
        "v": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32),
    }
    model = cu.convex.linearized(
        lambda params, x: jnp.tanh(x @ params["w"]) @ params["v"], public, radius=1.0
    )
    loss = model.logistic_loss(l2=0.2)
    x = rng.normal(size=(30, 4)).astype(np.float32)
    data = (x, np.asarray(model.scales(x)), rng.integers(0, 2, 30))
    mechanism = cu.PerturbedMinimizer(gradient_norm=1e-6, strong_convexity=0.2)
    given = {"params": model.zeros(), "data": data, "loss": loss, "solver": None}
    with pytest.raises(ValueError, match="allowance must be given"):
        run(mechanism, **given)
    result = run(mechanism, **given, gradient_allowance=1e-12)
    assert cu.verify(result.certificate, result.params)
    assert set(result.params) == {"w", "v"}
    with jax.enable_x64(True):
        point = jax.tree.map(jnp.asarray, result.history.before_noise)
        gradient = jax.tree.leaves(jax.grad(loss.loss_fn)(point, jax.tree.map(jnp.asarray, data)))
    assert np.sqrt(sum(np.sum(np.asarray(leaf) ** 2) for leaf in gradient)) <= 1e-6
    with pytest.raises(ValueError, match="gradient_allowance must be positive"):
        cu.Options(gradient_allowance=0.0)
