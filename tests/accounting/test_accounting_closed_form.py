import dataclasses

import numpy as np
import pytest
from accounting_helpers import interpolated, make

import certunlearn as cu


@pytest.mark.parametrize(
    ("delta", "largest"), [(1e-2, 7.6), (1e-3, 8.9), (1e-5, 10.9), (1e-6, 11.9), (1e-8, 13.6)]
)
def test_the_closed_form_ends_at_a_largest_epsilon(delta, largest):
    m = make(steps=10)
    cu.noise_scale(m, epsilon=largest - 0.1, delta=delta, accountant="closed-form")
    with pytest.raises(ValueError, match="use accountant='interpolation'"):
        cu.noise_scale(m, epsilon=largest + 0.1, delta=delta, accountant="closed-form")


@pytest.mark.parametrize(("decay", "truth"), [(1.0, 4.9), (10.0, 2.6)])
def test_the_closed_form_with_decay_is_refused_for_few_steps(decay, truth):
    m = make(learning_rate=1e-3, weight_decay=decay, steps=1)
    with pytest.raises(ValueError, match="unsound") as refusal:
        cu.noise_scale(m, epsilon=1.0, delta=1e-5, accountant="closed-form")
    gamma = 1e-3
    sigma = np.sqrt(72 * gamma * decay * np.log(1e5)) * ((1 - gamma * decay) + 1 / decay)
    assert interpolated.epsilon(m, noise_scale=sigma, delta=1e-5) == pytest.approx(truth, abs=0.06)
    assert f"gives {truth}"[:8] in str(refusal.value)
    enough = dataclasses.replace(m, steps=int(np.ceil(0.144 / (gamma * decay))))
    assert cu.noise_scale(enough, epsilon=1.0, delta=1e-5, accountant="closed-form") > 0


def test_the_closed_form_is_looser_by_what_theory_says():
    m = make(steps=10)
    ratio = cu.noise_scale(
        m, epsilon=1.0, delta=1e-5, accountant="closed-form"
    ) / interpolated.noise_scale(m, epsilon=1.0, delta=1e-5)
    assert ratio == pytest.approx(1.36, abs=0.01)


@pytest.mark.parametrize(
    ("setting", "closed", "with_memory", "memoryless"),
    [
        ((1e-3, 50, 0.01, 10, 100), 1.288, 0.463, 0.1455),
        ((1e-3, 50, 0.1, 10, 100), 1.291, 0.465, 0.4036),
        ((1e-2, 10, 0.1, 1, 60), 0.912, 0.325, 0.3252),
    ],
)
def test_published_and_exact_noise_with_weight_decay(setting, closed, with_memory, memoryless):
    gamma, decay, c0, c1, steps = setting
    m = make(c0, c1, gamma, decay, steps)
    claim = {"epsilon": 1.0, "delta": 1e-5}
    published = cu.noise_scale(m, **claim, accountant="closed-form")
    assert published == pytest.approx(closed, abs=6e-4)
    forgetful = interpolated.noise_scale(m, **claim)
    assert forgetful == pytest.approx(memoryless, abs=6e-5)
    # A memoryless update's guarantee is the best of its prefixes: what follows is post-processing.
    # The prefixes' noise scales come from mechanisms with fewer steps and no minimum of their own.
    prefixes = [
        interpolated.noise_scale(dataclasses.replace(m, steps=t, memoryless=False), **claim)
        for t in range(1, steps + 1)
    ]
    assert prefixes[-1] == pytest.approx(with_memory, abs=6e-4)
    assert forgetful == pytest.approx(min(prefixes), rel=1e-9)


def test_the_closed_form_inverts_and_leaves_gaps_in_its_curve():
    m = make(learning_rate=1e-3, weight_decay=10.0, steps=60)
    closed = {"accountant": "closed-form"}
    sigma = cu.noise_scale(m, epsilon=1.0, delta=1e-5, **closed)
    assert cu.epsilon(m, noise_scale=sigma, delta=1e-5, **closed) == pytest.approx(1.0)
    assert cu.delta(m, noise_scale=sigma, epsilon=1.0, **closed) == pytest.approx(1e-5)
    curve = cu.epsilon_curve(m, noise_scale=sigma, delta=1e-5, **closed)
    assert curve[-1] == pytest.approx(1.0)
    assert np.all(np.isinf(curve[:3]))
    holds = np.isfinite(curve)
    truth = interpolated.epsilon_curve(m, noise_scale=sigma, delta=1e-5)
    assert np.all(curve[holds] >= truth[holds])
    for schedule in ({"learning_rate": np.linspace(1e-3, 1e-4, 60)}, {"clip_norm": [1, 2] * 30}):
        with pytest.raises(ValueError, match="schedule"):
            cu.noise_scale(dataclasses.replace(m, **schedule), epsilon=1.0, delta=1e-5, **closed)
