import dataclasses

import numpy as np
import optax
import pytest

from certunlearn import mechanisms
from certunlearn.mechanisms import GradientClipping

GOOD = {"init_radius": 1.0, "clip_norm": 2.0, "learning_rate": 0.1, "weight_decay": 0.5, "steps": 4}


def make(**changes):
    return GradientClipping(**(GOOD | changes))


def test_separation_is_contraction_times_distance_plus_shift():
    m = make()
    assert m.initial_distance == 2.0
    assert make(reference="center").initial_distance == 1.0
    np.testing.assert_allclose(m.contraction, [0.95] * 4)
    np.testing.assert_allclose(m.shift, [0.4] * 4)
    assert m.separation(2, 3.0) == pytest.approx(0.95 * 3.0 + 0.4)


def test_separation_holds_for_any_two_clipped_gradients():
    rng = np.random.default_rng(0)
    m = make()
    worst = 0.0
    for _ in range(2000):
        x, y, g, h = rng.normal(size=(4, 2))
        g, h = (
            2.0 * v / max(np.linalg.norm(v), 2.0 if rng.random() < 0.5 else 0.0) for v in (g, h)
        )
        before = np.linalg.norm(x - y)
        after = np.linalg.norm((x - 0.1 * (g + 0.5 * x)) - (y - 0.1 * (h + 0.5 * y)))
        assert after <= m.separation(0, before) + 1e-12
        worst = max(worst, after / m.separation(0, before))
    assert worst > 0.9  # the bound is not idle


def test_schedules_are_evaluated_and_recorded_as_numbers():
    schedule = optax.linear_schedule(0.1, 0.0125, 3)
    m = make(learning_rate=schedule, clip_norm=[1.0, 2.0, 3.0, 4.0])
    expected = [float(schedule(t)) for t in range(4)]
    assert m.learning_rate == pytest.approx(tuple(expected))
    np.testing.assert_allclose(m.shift, 2 * np.array(expected) * [1, 2, 3, 4])
    constant = make(learning_rate=optax.constant_schedule(0.25))
    assert constant.learning_rate == (0.25,) * 4
    joined = optax.join_schedules([optax.constant_schedule(0.1), lambda t: 0.2], [2])
    assert make(learning_rate=joined).learning_rate == pytest.approx((0.1, 0.1, 0.2, 0.2))
    python_flow = make(learning_rate=lambda t: 0.1 if t < 2 else 0.2)
    assert python_flow.learning_rate == (0.1, 0.1, 0.2, 0.2)


def test_first_cuts_schedules():
    m = make(learning_rate=[0.1, 0.2, 0.3, 0.4])
    assert m.first(2) == make(learning_rate=[0.1, 0.2], steps=2)
    assert m.first(4) == m
    with pytest.raises(ValueError, match="steps must be at most 4, got 5"):
        m.first(5)


def test_mechanisms_are_values():
    assert make() == make()
    assert hash(make(clip_norm=[1, 2, 3, 4])) == hash(make(clip_norm=np.array([1.0, 2, 3, 4])))
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().steps = 5


def test_record_round_trip():
    for m in (make(), make(learning_rate=[0.1, 0.2, 0.3, 0.4], reference="center")):
        assert mechanisms.from_record(mechanisms.to_record(m)) == m


@pytest.mark.parametrize(
    "change", [{"name": "Other"}, {"surplus": 1}, {"steps": None}, {"init_radius": -1.0}]
)
def test_bad_records_are_refused(change):
    with pytest.raises((TypeError, ValueError)):
        mechanisms.from_record(mechanisms.to_record(make()) | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"init_radius": 0.0}, "init_radius must be positive"),
        ({"init_radius": -1.0}, "init_radius must be positive"),
        ({"init_radius": float("nan")}, "init_radius must be positive and finite"),
        ({"init_radius": float("inf")}, "init_radius must be positive and finite"),
        ({"clip_norm": 0.0}, "clip_norm must be positive"),
        ({"clip_norm": [1.0, 1.0, -1.0, 1.0]}, "clip_norm must be .* at step 2"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"learning_rate": [0.1] * 3}, "one for each of the 4 steps"),
        ({"learning_rate": [[0.1] * 4]}, "one for each of the 4 steps"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"weight_decay": 11.0}, r"weight_decay \* learning_rate must be at most 1, got 1.1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"reference": "zero"}, "reference must be one of"),
    ],
)
def test_out_of_range_is_a_value_error(change, words):
    with pytest.raises(ValueError, match=words):
        make(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"init_radius": "1"},
        {"init_radius": [1.0]},
        {"init_radius": True},
        {"clip_norm": "wide"},
        {"learning_rate": None},
        {"steps": 2.5},
        {"steps": True},
        {"memoryless": "yes"},
    ],
)
def test_wrong_kind_is_a_type_error(change):
    with pytest.raises(TypeError):
        make(**change)


def test_full_decay_is_allowed_and_forgets_at_once():
    m = make(weight_decay=10.0)
    np.testing.assert_allclose(m.contraction, 0.0, atol=1e-15)
    assert np.all(m.contraction >= 0)


def test_assumptions_say_which_reference_and_whether_memory_is_allowed():
    assert "without the forget set" in make().assumptions[0]
    assert "centre itself" in make(reference="center").assumptions[0]
    assert make().assumptions != make(memoryless=False).assumptions
