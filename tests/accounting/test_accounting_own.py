"""An accountant of a user's own, passed as `accountant=`: what CONTRIBUTING shows, and more."""

import dataclasses
import math

import numpy as np
import pytest
from accounting_helpers import make

import certunlearn as cu
from certunlearn import accounting
from certunlearn.accounting import _gaussian


class LastNoise(accounting.Accountant):
    """Both runs get the same noise until the last, which hides all that is left between them."""

    name = "last-noise"

    def unsupported_reason(self, mechanism):
        stated = mechanism.separations()
        if stated is not None and stated.memoryless:
            return None
        return "accountant='last-noise' needs a memoryless mechanism with separations"

    def epsilon(self, mechanism, noise_scale, delta):
        one, sigma = self._one_gaussian(mechanism.separations(), noise_scale)
        return cu.epsilon(one, noise_scale=sigma, delta=delta)

    def delta(self, mechanism, noise_scale, epsilon):
        one, sigma = self._one_gaussian(mechanism.separations(), noise_scale)
        return cu.delta(one, noise_scale=sigma, epsilon=epsilon)

    def _one_gaussian(self, stated, noise_scale):
        last = int(np.flatnonzero(stated.noisy_steps)[-1])  # what follows is post-processing
        distance = stated.initial_distance
        for step in range(last + 1):
            distance = stated.separation(step, distance)
        sigma = float(np.broadcast_to(noise_scale, stated.steps)[last])
        return cu.Separations(initial_distance=distance, contraction=[1.0], shift=[0.0]), sigma


class Renamed(accounting.Accountant):
    """Interpolation under another name: for mechanisms with memory, too."""

    name = "renamed"

    def unsupported_reason(self, mechanism):
        return accounting.supported_accountants(mechanism)["interpolation"]

    def epsilon(self, mechanism, noise_scale, delta):
        return cu.epsilon(
            mechanism, noise_scale=noise_scale, delta=delta, accountant="interpolation"
        )

    def delta(self, mechanism, noise_scale, epsilon):
        return cu.delta(
            mechanism, noise_scale=noise_scale, epsilon=epsilon, accountant="interpolation"
        )


LEFT = 2.0 * 0.9**4 + 0.05 * sum(0.9**t for t in range(4))
RUN = cu.Separations(initial_distance=2.0, contraction=0.9, shift=0.05, steps=4)


def test_four_functions_are_enough_for_every_query():
    own = {"accountant": LastNoise()}
    sigma = cu.noise_scale(RUN, epsilon=1.0, delta=1e-5, **own)
    assert sigma == pytest.approx(LEFT / _gaussian.mu(1.0, 1e-5), rel=1e-8)
    found = cu.epsilon(RUN, noise_scale=sigma, delta=1e-5, **own)
    assert 1 - 1e-8 <= found <= 1.0
    assert cu.delta(RUN, noise_scale=sigma, epsilon=1.0, **own) == pytest.approx(1e-5, rel=1e-7)
    curve = cu.epsilon_curve(RUN, noise_scale=sigma, delta=1e-5, **own)
    assert curve[0] == np.inf
    assert curve[-1] == found
    assert np.all(np.diff(curve) < 0)
    variation = accounting.total_variation(RUN, noise_scale=sigma, **own)
    assert variation == pytest.approx(float(_gaussian.total_variation(LEFT / sigma)), rel=1e-9)


@pytest.mark.parametrize(
    "m",
    [
        RUN,
        make(steps=12),
        dataclasses.replace(RUN, contraction=[1.2, 0.0, 1.0, 0.5]),
        dataclasses.replace(RUN, noisy=[True, False, True, False]),
        dataclasses.replace(RUN, init_noise_scale=0.3),
    ],
)
def test_it_lies_above_the_attack_and_above_interpolation(m):
    claim = {"noise_scale": 1.7, "delta": 1e-5}
    found = cu.epsilon(m, **claim, accountant=LastNoise())
    assert cu.epsilon_lower_bound(m, **claim) <= found
    assert cu.epsilon(m, **claim, accountant="interpolation") <= found * (1 + 1e-12)


def test_what_it_refuses_is_refused_with_its_reason():
    with pytest.raises(ValueError, match="'last-noise' needs a memoryless mechanism"):
        cu.epsilon(make(memoryless=False), noise_scale=1.0, delta=1e-5, accountant=LastNoise())


def test_a_schedule_reaches_it_step_by_step():
    noise = [9.0, 8.0, 7.0, 3.0]
    found = cu.epsilon(RUN, noise_scale=noise, delta=1e-5, accountant=LastNoise())
    assert found == pytest.approx(float(_gaussian.epsilon(LEFT / 3, 1e-5)), rel=1e-9)
    curve = cu.epsilon_curve(RUN, noise_scale=noise, delta=1e-5, accountant=LastNoise())
    assert curve[1] == pytest.approx(float(_gaussian.epsilon(1.85 / 9, 1e-5)), rel=1e-9)
    assert curve[4] == curve[1]  # what follows the first noise is post-processing


def test_the_search_for_noise_matches_the_root_at_any_size():
    for distance in (1e-12, 1.0, 1e12):
        m = cu.Separations(initial_distance=distance, contraction=[1.0], shift=[0.0])
        sigma = cu.noise_scale(m, epsilon=0.5, delta=1e-6, accountant=LastNoise())
        assert sigma == pytest.approx(distance / _gaussian.mu(0.5, 1e-6), rel=1e-8)
        assert cu.epsilon(m, noise_scale=sigma, delta=1e-6, accountant=LastNoise()) <= 0.5
    nothing = cu.Separations(initial_distance=0.0, contraction=[1.0], shift=[0.0])
    assert 0 < cu.noise_scale(nothing, epsilon=0.5, delta=1e-6, accountant=LastNoise()) < 1e-20


def test_numbers_of_steps_between_those_worked_out_get_the_last_number_or_none():
    run = {"contraction": 0.9, "shift": 0.05, "steps": 100, "initial_distance": 2.0}
    claim = {"noise_scale": 1.0, "delta": 1e-5}
    forgetful = cu.Separations(**run)
    curve = cu.epsilon_curve(forgetful, **claim, accountant=Renamed())
    exact = cu.epsilon_curve(forgetful, **claim, accountant="interpolation")
    assert np.all(curve >= exact * (1 - 1e-12))
    assert np.all(np.isfinite(curve[1:]))
    assert np.all(np.diff(curve[1:]) <= 0)
    stateful = cu.Separations(**run, memoryless=False)
    curve = cu.epsilon_curve(stateful, **claim, accountant=Renamed())
    exact = cu.epsilon_curve(stateful, **claim, accountant="interpolation")
    known = np.isfinite(curve)
    assert 20 <= known.sum() <= 24
    np.testing.assert_allclose(curve[known], exact[known], rtol=1e-12)
    assert known[100]
    assert not known[70]


def test_a_curve_knows_where_a_run_cannot_stop():
    m = cu.Separations(
        initial_distance=2.0, contraction=1.0, shift=[0.1] * 3, noisy=[0 == 1, True, True]
    )
    curve = cu.epsilon_curve(m, noise_scale=1.0, delta=1e-5, accountant=LastNoise())
    assert np.isinf(curve[:2]).all()
    assert np.isfinite(curve[2:]).all()


class Returns(Renamed):
    """Gives a number that is none."""

    def __init__(self, value):
        self.value = value

    def epsilon(self, mechanism, noise_scale, delta):
        return self.value

    def delta(self, mechanism, noise_scale, epsilon):
        return self.value


@pytest.mark.parametrize("value", [math.nan, -1e-3])
def test_nan_and_negative_numbers_do_not_pass(value):
    own = {"accountant": Returns(value)}
    claim = {"noise_scale": 1.0, "delta": 1e-5}
    for call in (
        lambda: cu.epsilon(RUN, **claim, **own),
        lambda: cu.delta(RUN, noise_scale=1.0, epsilon=1.0, **own),
        lambda: cu.epsilon_curve(RUN, **claim, **own),
        lambda: accounting.total_variation(RUN, **claim, **own),
    ):
        with pytest.raises(ValueError, match=r"'renamed'.* must"):
            call()
    with pytest.raises(ValueError, match="'renamed' finds no noise_scale"):
        cu.noise_scale(RUN, epsilon=1.0, delta=1e-5, accountant=Returns(2.0))


@pytest.mark.parametrize("wrong", ["moments", 3, LastNoise, cu.epsilon, b"coupling"])
def test_what_is_no_accountant_gets_an_error_that_says_what_is_one(wrong):
    with pytest.raises(
        ValueError, match=r"must be one of 'interpolation', .*accounting.Accountant"
    ):
        cu.epsilon(RUN, noise_scale=1.0, delta=1e-5, accountant=wrong)


def test_an_accountant_must_have_its_four_parts():
    class Half(accounting.Accountant):
        name = "half"

    with pytest.raises(TypeError, match="abstract"):
        Half()


def test_nothing_is_registered():
    cu.epsilon(RUN, noise_scale=1.0, delta=1e-5, accountant=LastNoise())
    assert "last-noise" not in accounting.ACCOUNTANTS
    assert tuple(cu.supported_accountants(RUN)) == accounting.ACCOUNTANTS
    assert accounting.unaffordable_reason(LastNoise(), RUN, 1e-3) is None


def test_costly_claims_have_a_reason():
    assert accounting.unaffordable_reason("coupling", RUN, 1.0) is None
    assert accounting.unaffordable_reason("interpolation", RUN, 1e-3) is None
    reason = accounting.unaffordable_reason("coupling", RUN, 1e-3)
    assert reason.startswith("accountant must be another than coupling")
    private = {"clip_norm": 1.0, "learning_rate": 1.0, "steps": 2, "sampling_rate": 0.5}
    many = [
        cu.DPSGD(**private, batch_size=10, deletions=deletions) for deletions in (10_000, 10_001)
    ]
    assert accounting.unaffordable_reason("dp-accounting", many[0], 1.0) is None
    reason = accounting.unaffordable_reason("dp-accounting", many[1], 1.0)
    assert reason == "deletions must be at most 10000, got 10001"
