"""The theorem of docs/theory/minimizer.md against brute force, and what the mechanism says."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import certunlearn as cu
from certunlearn import mechanisms
from certunlearn.accounting import _gaussian
from certunlearn.mechanisms import PlannedRun, records, sentences

TAU, M = 1e-3, 0.05
MECHANISM = cu.PerturbedMinimizer(gradient_norm=TAU, strong_convexity=M)
RETRAINED = dataclasses.replace(MECHANISM, reference="retrained")
RUN = PlannedRun(size=9, batch_size=9, per_example=False, centered=False, finetuned=False)


# ------------------------------------------------------------------------------ the theorem


class Logistic:
    """F(w) = mean log(1 + e^(-y x^T w)) + 1/2 w^T diag(l2) w, in NumPy alone."""

    def __init__(self, rows, labels, l2):
        self.rows, self.signs, self.l2 = rows, 2.0 * labels - 1, np.broadcast_to(l2, rows.shape[1])

    def gradient(self, w):
        margins = self.signs * (self.rows @ w)
        return -(self.signs / (1 + np.exp(margins))) @ self.rows / len(self.rows) + self.l2 * w

    def hessian(self, w):
        p = 1 / (1 + np.exp(-self.rows @ w))
        return (self.rows.T * (p * (1 - p))) @ self.rows / len(self.rows) + np.diag(self.l2)

    def where(self, gradient, w=None):
        """The point that has this gradient: there is one, as F is strongly convex."""
        w = np.zeros(self.rows.shape[1]) if w is None else w
        for _ in range(60):
            step = np.linalg.solve(self.hessian(w), self.gradient(w) - gradient)
            w = w - step * min(1.0, 1 / max(1e-12, np.linalg.norm(step)))
        assert np.linalg.norm(self.gradient(w) - gradient) < 1e-12
        return w


def objective(seed, features=6, used=4, l2=M):
    rng = np.random.default_rng(seed)
    rows = np.zeros((40, features))
    rows[:, :used] = rng.normal(size=(40, used))
    return Logistic(rows, rng.integers(0, 2, 40), l2)


def on_the_sphere(found, tau, count=300, seed=0):
    """Points whose gradient norm is tau: of random directions, and of the flattest ones."""
    rng, d = np.random.default_rng(seed), found.rows.shape[1]
    minimum = found.where(np.zeros(d))
    flat = np.linalg.eigh(found.hessian(minimum))[1].T
    directions = [*rng.normal(size=(count, d)), *np.eye(d), *flat]
    points = [found.where(tau * u / np.linalg.norm(u), minimum) for u in directions]
    return minimum, np.array(points)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tau", [1e-6, 1e-3, 0.3])
def test_worst_points_of_a_gradient_norm_are_as_far_as_the_theorem_says(seed, tau):
    m = cu.PerturbedMinimizer(gradient_norm=tau, strong_convexity=M)
    minimum, points = on_the_sphere(objective(seed), tau, count=40)
    distances = np.linalg.norm(points - minimum, axis=1)
    assert distances.max() <= m.initial_distance * (1 + 1e-6)
    # No smaller distance would do: features that no row has leave the L2 term alone.
    assert distances.max() > m.initial_distance * (1 - 1e-6)


def test_two_runs_are_twice_as_far():
    found = objective(1)
    minimum = found.where(np.zeros(6))
    flat = np.eye(6)[5]
    two = [found.where(sign * TAU * flat, minimum) for sign in (1, -1)]
    apart = np.linalg.norm(two[0] - two[1])
    assert apart == pytest.approx(RETRAINED.initial_distance, rel=1e-6)
    assert apart > 1.9 * MECHANISM.initial_distance


def test_every_data_set_and_every_deletion_has_the_same_bound():
    # The worst rows of the worst deletion move the minimiser by far more than tau / m.
    whole = objective(2)
    trained = whole.where(np.zeros(6))
    for kept in (39, 20, 5, 1):
        retained = Logistic(whole.rows[:kept], (whole.signs[:kept] + 1) / 2, M)
        minimum, points = on_the_sphere(retained, TAU, count=10)
        assert np.linalg.norm(points - minimum, axis=1).max() <= TAU / M * (1 + 1e-6)
    assert np.linalg.norm(trained - minimum) > 50 * TAU / M


def test_an_intercept_without_its_quadratic_term_breaks_the_bound():
    # The sharp edge that the assumptions name: rows far on one side make the intercept flat.
    rows = np.c_[np.full(40, 12.0) + np.random.default_rng(0).normal(size=40), np.ones(40)]
    labels = np.r_[np.ones(39), 0]
    found = Logistic(rows, labels, np.array([M, 1e-9]))
    minimum, points = on_the_sphere(found, TAU, count=0)
    assert np.linalg.norm(points - minimum, axis=1).max() > 2 * TAU / M
    assert any("no intercept" in sentence for sentence in MECHANISM.assumptions)


@pytest.mark.slow
def test_the_package_s_losses_have_the_convexity_that_is_asked_of_them():
    rows = jnp.asarray(objective(3).rows) / 10
    data = (rows, jnp.asarray(np.random.default_rng(0).integers(0, 2, 40)))
    loss = cu.convex.logistic_regression(feature_norm=1.0, l2=M)
    hessians = jax.vmap(jax.hessian(lambda w: loss.loss_fn(w, data)))(
        jnp.asarray(np.random.default_rng(1).normal(size=(20, 6)) * 3, jnp.float32)
    )
    assert np.linalg.eigvalsh(np.asarray(hessians, np.float64)).min() >= M * (1 - 1e-5)


# ------------------------------------------------------------------------------ numbers


def test_its_separations_are_one_gaussian_over_the_distance():
    stated = MECHANISM.separations()
    assert (stated.initial_distance, stated.steps) == (TAU / M, 1)
    assert (stated.contraction, stated.shift, stated.noisy) == (1.0, 0.0, None)
    assert stated.reference == "minimizer"
    assert RETRAINED.separations().initial_distance == 2 * TAU / M
    assert MECHANISM.solve_to == TAU
    assert MECHANISM.steps == RETRAINED.steps == 1


@pytest.mark.parametrize("mechanism", [MECHANISM, RETRAINED], ids=["minimizer", "retrained"])
def test_the_noise_is_that_of_the_exact_gaussian(mechanism):
    sigma = cu.noise_scale(mechanism, epsilon=1.0, delta=1e-5)
    mu = mechanism.initial_distance / sigma
    assert float(_gaussian.epsilon(mu, 1e-5)) == pytest.approx(1.0, rel=1e-9)
    assert cu.accounting.mu(mechanism, noise_scale=sigma) == pytest.approx(mu, rel=1e-12)
    assert cu.epsilon(mechanism, noise_scale=sigma, delta=1e-5) <= 1
    assert cu.epsilon(mechanism, noise_scale=0.9 * sigma, delta=1e-5) > 1.1
    # The attack reaches it: a quadratic loss and a solver that stops on one side.
    assert mechanism.attackable
    reached = cu.epsilon_lower_bound(mechanism, noise_scale=sigma, delta=1e-5)
    assert reached == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"gradient_norm": 0.0}, ValueError, "gradient_norm must be positive"),
        ({"gradient_norm": math.nan}, ValueError, "gradient_norm must be positive"),
        ({"strong_convexity": -1.0}, ValueError, "strong_convexity must be positive"),
        ({"strong_convexity": "1"}, TypeError, "strong_convexity"),
        ({"reference": "center"}, ValueError, "reference"),
        ({"gradient_norm": 1e300, "strong_convexity": 1e-300}, ValueError, "fit a float64"),
    ],
)
def test_arguments_are_checked(changes, error, words):
    with pytest.raises(error, match=words):
        dataclasses.replace(MECHANISM, **changes)


def test_its_sentences():
    assert sentences.REQUESTS not in MECHANISM.assumptions  # adaptive requests are covered
    said = " ".join(MECHANISM.assumptions)
    for words in (
        "exact minimiser of the objective on the retain data, with Gaussian noise",
        f"at most {TAU!r}",
        f"constant at least {M!r}",
        "fixed before any request",
        "solver's passes and time",
        "whether an attempt failed",
        "public map that looks at one row alone",
        "noise is fresh",
        "float64",
    ):
        assert words in said, words
    assert "any other run on the retain data" in RETRAINED.assumptions[0]
    assert MECHANISM.assumptions[1:] == RETRAINED.assumptions[1:]
    for words in ("Nothing accumulates", "chosen by looking at earlier", "mu^2", "may itself tell"):
        assert words in MECHANISM.sequence


def test_it_is_recorded_and_read_back():
    record = mechanisms.to_record(RETRAINED)
    assert record == {
        "name": "PerturbedMinimizer",
        "gradient_norm": TAU,
        "strong_convexity": M,
        "reference": "retrained",
    }
    assert records.from_record(record) == RETRAINED


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"centered": True}, "center must be None"),
        ({"per_example": True}, "per_example must be False"),
        ({"batch_size": 3}, "all 9 examples"),
    ],
)
def test_runs_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        MECHANISM.check_run(RUN._replace(**changes))
    MECHANISM.check_run(RUN)
    MECHANISM.check_run(RUN._replace(batch_size=3, finetuned=True))  # that of fine-tuning


def test_it_cannot_stop_before_its_noise():
    assert MECHANISM.first(1) is MECHANISM
    with pytest.raises(ValueError, match="cannot stop early"):
        MECHANISM.first(2)


def test_a_less_convex_loss_is_refused():
    assert MECHANISM.loss_problem(M) is None
    assert MECHANISM.loss_problem(2 * M) is None
    assert "strong_convexity must be at most" in MECHANISM.loss_problem(M * (1 - 1e-12))


def test_its_optimizer_takes_parameters_of_float64_only():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="must be float64"):
        cu.noisy_sgd(MECHANISM, 0.1, key=key).init(jnp.zeros(3))
    with jax.enable_x64(True):
        tx = cu.noisy_sgd(MECHANISM, 0.1, key=key)
        params = jnp.zeros(3, jnp.float64)
        updates, state = tx.update(jnp.full(3, jnp.nan), tx.init(params), params)
        assert updates.dtype == jnp.float64
        assert mechanisms.evidence(state) == (1, 0)
        assert bool(jnp.all(jnp.isfinite(updates)))


def test_plain_separations_may_name_the_same_reference_but_not_run_without_a_transform():
    plain = MECHANISM.separations()
    assert "exact minimiser" in plain.rests_on()[0]
    with pytest.raises(ValueError, match="reference must be 'retrained' or 'center' to be run"):
        plain.start(jnp.zeros(3), None, jax.random.key(0))
