import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import optax
import pytest
from accounting_helpers import interpolated, make
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

import certunlearn as cu
from certunlearn import accounting
from certunlearn.accounting import _gaussian
from certunlearn.accounting.coupling import Coupling

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "accounting.json").read_text())
FIELDS = ("init_radius", "clip_norm", "learning_rate", "weight_decay", "steps")


@pytest.mark.parametrize("row", VECTORS["interpolation_constant"])
def test_vectors(row):
    m = make(**{name: row[name] for name in FIELDS})
    claim = {"epsilon": row["epsilon"], "delta": row["delta"]}
    with_state = dataclasses.replace(m, memoryless=False)
    assert interpolated.noise_scale(m, **claim) == pytest.approx(
        row["noise_scale_interpolation"], rel=1e-8
    )
    assert interpolated.noise_scale(with_state, **claim) == pytest.approx(
        row["noise_scale_interpolation_with_state"], rel=1e-8
    )
    if row["closed_form_is_sound"]:
        closed = cu.noise_scale(m, **claim, accountant="closed-form")
        assert closed == pytest.approx(row["noise_scale_closed_form_at_T"], rel=1e-12)
        assert closed > row["noise_scale_interpolation"]
    else:
        with pytest.raises(ValueError, match="closed form is unsound"):
            cu.noise_scale(m, **claim, accountant="closed-form")


mechanisms = st.builds(
    make,
    init_radius=st.floats(0.01, 10),
    clip_norm=st.floats(0.01, 10),
    learning_rate=st.floats(1e-3, 0.5),
    weight_decay=st.one_of(st.just(0.0), st.floats(1e-3, 1.9)),
    steps=st.integers(1, 80),
    reference=st.sampled_from(["retrained", "center"]),
    memoryless=st.booleans(),
)
epsilons, deltas = st.floats(0.05, 20), st.floats(-12, -1).map(lambda x: 10.0**x)


@settings(max_examples=60, deadline=None)
@given(mechanisms, epsilons, deltas)
def test_noise_scale_inverts_epsilon_and_delta(m, epsilon, delta):
    sigma = interpolated.noise_scale(m, epsilon=epsilon, delta=delta)
    assert interpolated.epsilon(m, noise_scale=sigma, delta=delta) <= epsilon
    assert interpolated.epsilon(m, noise_scale=sigma, delta=delta) == pytest.approx(
        epsilon, rel=1e-8
    )
    assert interpolated.delta(m, noise_scale=sigma, epsilon=epsilon) == pytest.approx(
        delta, rel=1e-8
    )
    assert interpolated.epsilon(m, noise_scale=0.999 * sigma, delta=delta) > epsilon


@settings(max_examples=40, deadline=None)
@given(mechanisms, deltas)
def test_epsilon_falls_in_sigma_and_vanishes(m, delta):
    values = [
        interpolated.epsilon(m, noise_scale=s, delta=delta) for s in (0.3, 1.0, 3.0, 30.0, 1e9)
    ]
    assert all(a >= b for a, b in itertools.pairwise(values))
    assert values[-1] < 1e-6


@settings(max_examples=40, deadline=None)
@given(mechanisms, deltas)
def test_curve_ends_at_epsilon_and_falls_only_without_memory(m, delta):
    curve = interpolated.epsilon_curve(m, noise_scale=1.0, delta=delta)
    assert curve.shape == (m.steps + 1,)
    assert curve[0] == np.inf
    assert curve[-1] == pytest.approx(interpolated.epsilon(m, noise_scale=1.0, delta=delta))
    half = max(1, m.steps // 2)
    assert curve[half] == pytest.approx(
        interpolated.epsilon(m.first(half), noise_scale=1.0, delta=delta)
    )
    if m.memoryless:
        assert np.all(np.diff(curve[1:]) <= 1e-12)


def test_state_costs_the_minimum_over_prefixes():
    m = make(steps=200)  # far beyond the best ten steps
    with_state = dataclasses.replace(m, memoryless=False)
    short = dataclasses.replace(m, steps=10)
    sigma = {
        k: interpolated.noise_scale(v, epsilon=1.0, delta=1e-5)
        for k, v in {"plain": m, "state": with_state, "short": short}.items()
    }
    assert sigma["plain"] == pytest.approx(sigma["short"], rel=1e-9)
    assert sigma["state"] > 2 * sigma["plain"]


@settings(max_examples=30, deadline=None)
@given(mechanisms)
def test_a_constant_schedule_is_the_constant(m):
    listed = dataclasses.replace(
        m,
        learning_rate=[m.learning_rate] * m.steps,
        clip_norm=optax.constant_schedule(m.clip_norm),
        weight_decay=np.full(m.steps, m.weight_decay),
    )
    for value in (accounting.mu, interpolated.total_variation):
        assert value(listed, noise_scale=np.full(m.steps, 0.7)) == pytest.approx(
            value(m, noise_scale=0.7), rel=1e-12
        )


def test_weight_decay_to_zero_is_continuous():
    plain = interpolated.noise_scale(make(), epsilon=1.0, delta=1e-5)
    for decay in (1e-6, 1e-9, 1e-14):
        decayed = interpolated.noise_scale(make(weight_decay=decay), epsilon=1.0, delta=1e-5)
        assert decayed == pytest.approx(plain, rel=100 * decay + 1e-11)


def test_one_step_is_the_gaussian_mechanism():
    m = make(steps=1, weight_decay=2.0)
    mu = (2.0 * 0.8 + 0.2) / 3.0
    assert accounting.mu(m, noise_scale=3.0) == pytest.approx(mu)
    textbook = ndtr(mu / 2 - 1 / mu) - np.exp(1) * ndtr(-mu / 2 - 1 / mu)
    assert interpolated.delta(m, noise_scale=3.0, epsilon=1.0) == pytest.approx(textbook, rel=1e-9)
    assert interpolated.total_variation(m, noise_scale=3.0) == pytest.approx(2 * ndtr(mu / 2) - 1)


def test_center_needs_half_the_noise_of_retrained_at_the_best_steps():
    ratios = [
        interpolated.noise_scale(
            make(steps=1, clip_norm=1e-9, reference=r), epsilon=1.0, delta=1e-5
        )
        for r in ("retrained", "center")
    ]
    assert ratios[0] / ratios[1] == pytest.approx(2, rel=1e-6)


def simulate(m, sigma, runs, rng):
    """Two runs against which the accountant is exact: gradients that always push apart.

    They ignore the state, so the last parameters are Gaussian and `mu` is attained, not only
    bounded: the strongest test that the certified noise is neither too small nor wasted.
    """
    ends = []
    for side in (1.0, -1.0):
        x = np.full(runs, side * m.initial_distance / 2)
        for c, s in zip(m.contraction, m.shift, strict=True):
            x = c * x + side * s / 2 + sigma * rng.standard_normal(runs)
        ends.append(x)
    return ends


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_a_worst_case_adversary_reaches_but_does_not_beat_the_certificate(decay):
    m = make(weight_decay=decay, steps=12, memoryless=False)
    runs, rng = 400_000, np.random.default_rng(0)
    sigma = interpolated.noise_scale(m, epsilon=1.0, delta=0.05)
    plus, minus = simulate(m, sigma, runs, rng)
    spread = np.sqrt(np.var(plus) / 2 + np.var(minus) / 2)
    mu = (plus.mean() - minus.mean()) / spread
    threshold = (1.0 / mu) * spread + (plus.mean() + minus.mean()) / 2
    measured = np.mean(plus > threshold) - np.e * np.mean(minus > threshold)
    error = 4 * np.sqrt(0.25 * (1 + np.e**2) / runs)
    assert measured <= 0.05 + error  # never beats
    assert measured >= 0.05 - error  # and reaches: the noise is the least there is
    weak = interpolated.delta(m, noise_scale=0.9 * sigma, epsilon=1.0)
    assert weak > 0.05 + 2 * error  # so ten per cent less noise would have been seen
    plus, minus = simulate(m, 0.9 * sigma, runs, rng)
    middle = (plus.mean() + minus.mean()) / 2
    spread, mu = 0.9 * spread, mu / 0.9
    caught = np.mean(plus > spread / mu + middle) - np.e * np.mean(minus > spread / mu + middle)
    assert caught > 0.05 + error


def test_best_steps():
    assert (
        cu.accounting.best_steps(make(init_radius=1.0, clip_norm=0.5, learning_rate=0.1, steps=1))
        == 20
    )
    m = make(weight_decay=1.0, steps=5)
    best = cu.accounting.best_steps(m)
    claim = {"epsilon": 1.0, "delta": 1e-5}
    at_best = interpolated.noise_scale(dataclasses.replace(m, steps=best), **claim)
    for steps in (1, best // 2, best - 1, best + 1, 2 * best, 10 * best):
        other = interpolated.noise_scale(dataclasses.replace(m, steps=max(1, steps)), **claim)
        assert other >= at_best * (1 - 1e-8)
    with pytest.raises(ValueError, match="schedules"):
        cu.accounting.best_steps(make(learning_rate=[0.1, 0.2], steps=2))


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (cu.noise_scale, {"epsilon": 0.0, "delta": 1e-5}),
        (cu.noise_scale, {"epsilon": -1.0, "delta": 1e-5}),
        (cu.noise_scale, {"epsilon": np.inf, "delta": 1e-5}),
        (cu.noise_scale, {"epsilon": 1.0, "delta": 0.0}),
        (cu.noise_scale, {"epsilon": 1.0, "delta": 1.0}),
        (cu.noise_scale, {"epsilon": 1.0, "delta": np.nan}),
        (cu.noise_scale, {"epsilon": 1.0, "delta": 1e-5, "accountant": "moments"}),
        (cu.epsilon, {"noise_scale": 0.0, "delta": 1e-5}),
        (cu.epsilon, {"noise_scale": -1.0, "delta": 1e-5}),
        (cu.epsilon, {"noise_scale": [1.0, 2.0], "delta": 1e-5}),
        (cu.epsilon, {"noise_scale": 1.0, "delta": 2.0}),
        (cu.delta, {"noise_scale": 1.0, "epsilon": -0.1}),
        (cu.epsilon_curve, {"noise_scale": 1.0, "delta": -1.0}),
    ],
)
def test_bad_values(function, arguments):
    with pytest.raises(ValueError, match="must be"):
        function(make(), **arguments)


SHORT = make(learning_rate=0.5, steps=2)


def values_of(m, accountant):
    """What each function gives, the curve as its end."""
    return [
        cu.epsilon(m, noise_scale=6.0, delta=1e-5, accountant=accountant),
        cu.delta(m, noise_scale=6.0, epsilon=0.5, accountant=accountant),
        cu.noise_scale(m, epsilon=1.0, delta=1e-5, accountant=accountant),
        cu.epsilon_curve(m, noise_scale=6.0, delta=1e-5, accountant=accountant)[-1],
        cu.accounting.total_variation(m, noise_scale=6.0, accountant=accountant),
    ]


def test_the_default_is_the_least_of_the_accountants_that_hold():
    least = values_of(SHORT, None)
    assert least == values_of(SHORT, "coupling")
    assert all(a < b for a, b in zip(least, values_of(SHORT, "interpolation"), strict=True))
    found = accounting.least_epsilon(SHORT, noise_scale=6.0, delta=1e-5)
    assert found == (least[0], "coupling")
    stateful = dataclasses.replace(SHORT, memoryless=False)
    assert values_of(stateful, None) == values_of(stateful, "interpolation")
    found = accounting.least_epsilon(stateful, noise_scale=6.0, delta=1e-5)
    assert found == (values_of(stateful, "interpolation")[0], "interpolation")


@pytest.mark.parametrize("m", [make(steps=1), make(steps=30, memoryless=False)])
@pytest.mark.parametrize("epsilon", [1.0, 20.0])
def test_the_default_never_refuses_and_is_not_above_the_closed_form(m, epsilon):
    sigma = cu.noise_scale(m, epsilon=epsilon, delta=1e-5)
    assert cu.epsilon(m, noise_scale=sigma, delta=1e-5) <= epsilon
    try:
        closed = cu.noise_scale(m, epsilon=epsilon, delta=1e-5, accountant="closed-form")
    except ValueError:
        assert epsilon == 20.0  # where the closed form is unsound
    else:
        assert sigma <= closed


@pytest.mark.parametrize(
    ("factor", "accountant"),
    [(0.5, "coupling"), (1.0, "interpolation"), (1 - 1e-13, "interpolation")],
)
def test_where_coupling_gains_nothing_interpolation_is_named(monkeypatch, factor, accountant):
    exact = interpolated.epsilon(SHORT, noise_scale=6.0, delta=1e-5)
    monkeypatch.setattr(Coupling, "epsilon", lambda self, m, scale, delta: factor * exact)
    value, name = accounting.least_epsilon(SHORT, noise_scale=6.0, delta=1e-5)
    assert name == accountant
    assert value == (factor * exact if factor == 0.5 else exact)


def test_coupling_is_not_tried_where_nothing_is_certified_to_speak_of():
    sigma = 1e-9 * interpolated.noise_scale(SHORT, epsilon=1.0, delta=1e-5)
    found = accounting.least_epsilon(SHORT, noise_scale=sigma, delta=1e-5)
    assert found == (interpolated.epsilon(SHORT, noise_scale=sigma, delta=1e-5), "interpolation")
    huge = {"epsilon": 1e4, "delta": 1e-5}
    assert cu.noise_scale(SHORT, **huge) == interpolated.noise_scale(SHORT, **huge)


def test_lower_bounds_are_worked_out_for_runs_that_are_not_long():
    arguments = {"noise_scale": 6.0, "delta": 1e-5}
    known = accounting.affordable_lower_bound(SHORT, **arguments)
    assert known == cu.epsilon_lower_bound(SHORT, **arguments)
    long = make(steps=accounting.MOST_ATTACKED + 1)
    assert accounting.affordable_lower_bound(long, **arguments) is None


@pytest.mark.parametrize("mechanism", [None, 1.0, cu.GradientClipping, {"steps": 3}])
def test_not_a_mechanism(mechanism):
    with pytest.raises(TypeError, match="mechanism must be"):
        interpolated.noise_scale(mechanism, epsilon=1.0, delta=1e-5)


def test_tiny_delta():
    sigma = interpolated.noise_scale(make(), epsilon=1.0, delta=1e-300)
    assert interpolated.delta(make(), noise_scale=sigma, epsilon=1.0) == pytest.approx(
        1e-300, rel=1e-9
    )
    mu = accounting.mu(make(), noise_scale=sigma)
    assert np.exp(_gaussian.log_delta(1.0, mu)) <= 1e-300 * (1 + 1e-12)
