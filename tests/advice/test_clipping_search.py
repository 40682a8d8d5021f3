import dataclasses
import math

import pytest
from advice_helpers import mu_of
from hypothesis import given
from hypothesis import strategies as st

import certunlearn as cu
from certunlearn.advice import Tried, clipping_search, suggest_clipping

FAST = {"accountant": "interpolation"}


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 8.0])
@pytest.mark.parametrize("reference", ["retrained", "center"])
def test_by_interpolation_kept_and_moved_share_what_the_noise_hides(epsilon, reference):
    # mu S = (distance of the starts, decayed) + 2 (what gradients can move), by section 4.
    found = suggest_clipping(
        total_noise=0.01, epsilon=epsilon, travel=0.5, reference=reference, **FAST
    )
    starts = 2.0 if reference == "retrained" else 1.0
    kept = mu_of(epsilon, 1e-5) * 0.01 / (starts + 2 * 0.5)
    assert [each.kept_radius for each in found.tried] == pytest.approx([kept] * 8, rel=1e-6)
    assert 0.99 * kept < found.kept_radius <= kept
    assert found.most_kept_radius == pytest.approx(
        mu_of(epsilon, 1e-5) * found.total_noise / starts, rel=1e-6
    )
    # All are the same, so the cheapest is taken: one step, no decay.
    assert (found.mechanism.steps, found.mechanism.weight_decay) == (1, 0.0)


def test_a_proposal_does_what_it_says():
    found = suggest_clipping(
        total_noise=0.02, clip_norm=3.0, travel=2.0, steps=[4], decays=[0.5], **FAST
    )
    m = found.mechanism
    assert m.steps * m.learning_rate * m.weight_decay == pytest.approx(0.5)
    factor = 1 - 0.5 / 4
    assert m.init_radius * factor**4 == pytest.approx(found.kept_radius)
    moved = sum(m.learning_rate * m.clip_norm * factor**t for t in range(4))
    assert moved == pytest.approx(2.0 * found.kept_radius)
    assert m.clip_norm == 3.0
    noise = math.sqrt(sum((found.noise_scale * factor**t) ** 2 for t in range(4)))
    assert noise == pytest.approx(found.total_noise)
    assert 0.99 * 0.02 < found.total_noise <= 0.02
    scale = found.noise_scale * (1 + 1e-9)
    assert cu.epsilon(m, noise_scale=scale, delta=1e-5, **FAST) <= 1
    wider = dataclasses.replace(m, init_radius=1.01 * m.init_radius)
    assert cu.epsilon(wider, noise_scale=found.noise_scale, delta=1e-5, **FAST) > 1


@pytest.mark.parametrize(
    ("kept", "chosen"),
    [
        ([1.0, 1.0, 1.0], 0),  # the first of equals
        ([1.0, 1.04, 1.05], 0),  # not worth more steps
        ([1.0, 1.06, 1.1], 1),
        ([1.0, 1.2, 1.3], 2),
        ([1.0, 2.0, 1.0], 1),
    ],
)
def test_the_cheapest_of_the_good_ones_is_chosen(kept, chosen):
    tried = [Tried(steps=2**i, total_decay=0.0, kept_radius=k) for i, k in enumerate(kept)]
    assert clipping_search._chosen(tried) == tried[chosen]


@given(st.floats(1e-12, 1e12), st.floats(1.0, 2.0))
def test_rounding_down_takes_less_than_a_hundredth_and_keeps_the_order(value, factor):
    rounded = clipping_search.rounded_down(value)
    assert 0.99 * value < rounded <= value
    assert rounded <= clipping_search.rounded_down(value * factor)
    assert float(f"{rounded:.3g}") == pytest.approx(rounded, rel=1e-11)  # or as good as


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"total_noise": 0.0}, "total_noise must be positive"),
        ({"travel": -1.0}, "travel must be positive"),
        ({"steps": []}, "must not be empty"),
        ({"steps": [1], "decays": [1.0]}, "below every number of steps"),
        ({"decays": [-0.1]}, "at least 0"),
        ({"epsilon": 0.0}, "epsilon must be positive"),
        ({"clip_norm": 0}, "clip_norm must be positive"),
    ],
)
def test_what_is_out_of_range_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        suggest_clipping(**{"total_noise": 1.0, **FAST, **wrong})


@pytest.mark.slow
def test_no_choice_of_the_grid_is_better_by_coupling():
    epsilon, steps, decays = 1.0, (1, 2, 4), (0.0, 0.5)
    found = suggest_clipping(total_noise=0.01, epsilon=epsilon, steps=steps, decays=decays)
    m = found.mechanism
    assert [(t.steps, t.total_decay) for t in found.tried] == [
        (s, d) for s in steps for d in decays
    ]
    most = max(each.kept_radius for each in found.tried)
    assert most <= found.kept_radius * clipping_search.NEAR * 1.01
    for each in found.tried:
        # Nothing cheaper is as good, and nothing keeps more than one Gaussian would.
        if each.steps < m.steps:
            assert each.kept_radius * clipping_search.NEAR < most
        assert each.kept_radius <= mu_of(epsilon, 1e-5) * 0.01 / 2 * (1 + 1e-9)
    assert found.kept_radius <= found.most_kept_radius
    # It is certified, and a radius that is a tenth larger is not.
    assert cu.epsilon(m, noise_scale=found.noise_scale * 1.001, delta=1e-5) <= epsilon
    wider = dataclasses.replace(m, init_radius=1.1 * m.init_radius)
    assert cu.epsilon(wider, noise_scale=found.noise_scale, delta=1e-5) > epsilon
    # Coupling pays: more than interpolation's half of what one Gaussian keeps.
    assert found.kept_radius > 0.55 * found.most_kept_radius
