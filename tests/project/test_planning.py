import dataclasses
import json
import math

import numpy as np
import pytest

from certunlearn import accounting, mechanisms, planning

BALL = {"init_radius": 1.0, "clip_norm": 1.0, "learning_rate": 0.1}
TARGET = {"epsilon": 1.0, "delta": 1e-5}
FAST = {"accountants": ("interpolation", "closed-form")}


def test_without_steps_the_best_number_is_used():
    plan = planning.make_plan(**TARGET, **BALL, **FAST)
    assert plan.mechanism.steps == plan.best_steps == 10
    assert plan.accountants[0].noise_scale == plan.best_noise_scale


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("reference", mechanisms.REFERENCES)
def test_the_best_number_of_steps_needs_no_more_noise_than_any_other(weight_decay, reference):
    options = {**TARGET, **BALL, **FAST, "weight_decay": weight_decay, "reference": reference}
    best = planning.make_plan(**options)
    for steps in (1, 2, 5, 20, 100, 400):
        other = planning.make_plan(**options, steps=steps)
        assert other.best_steps == best.best_steps
        assert other.mechanism.steps == steps
        assert best.best_noise_scale <= other.accountants[0].noise_scale * (1 + 1e-8)


def test_the_numbers_are_the_accountants():
    plan = planning.make_plan(**TARGET, **BALL, **FAST, steps=30, weight_decay=0.2, params=400)
    names = [entry.accountant for entry in plan.accountants]
    assert names == list(FAST["accountants"])
    for entry in plan.accountants:
        if entry.refused is not None:
            continue
        sigma = accounting.noise_scale(plan.mechanism, **TARGET, accountant=entry.accountant)
        assert entry.noise_scale == sigma
        powers = 0.98 ** (2 * np.arange(30))
        assert entry.total_noise == pytest.approx(sigma * math.sqrt(powers.sum()), rel=1e-12)
        assert entry.total_noise_norm == pytest.approx(20 * entry.total_noise, rel=1e-12)
        limit = accounting.total_variation(
            plan.mechanism, noise_scale=sigma, accountant="interpolation"
        )
        assert entry.total_variation == limit
        attacked = accounting.epsilon_lower_bound(plan.mechanism, noise_scale=sigma, delta=1e-5)
        assert entry.true_epsilon_at_least == attacked
        assert 0 < attacked < 1


def test_all_accountants_are_shown_and_the_default_is_among_them():
    plan = planning.make_plan(**TARGET, **BALL, steps=2)
    entries = {entry.accountant: entry for entry in plan.accountants}
    assert tuple(entries) == accounting.supported_names(plan.mechanism)
    noises = [entry.noise_scale for entry in entries.values() if entry.refused is None]
    assert entries["coupling"].noise_scale == min(noises)
    assert min(noises) == accounting.noise_scale(plan.mechanism, **TARGET)
    # The interval of the best accountant is the narrowest.
    least = entries["coupling"].true_epsilon_at_least
    assert entries["interpolation"].true_epsilon_at_least < least < 1
    assert planning.to_table(plan).count("to 1\n") == len(noises)


def test_total_noise_of_schedules_is_what_a_simulation_adds_up():
    mechanism = mechanisms.GradientClipping(
        init_radius=1.0, clip_norm=1.0, learning_rate=(0.1, 0.5, 0.2), weight_decay=1.0, steps=3
    )
    variance = 0.0
    for contraction in mechanism.contraction:
        variance = contraction**2 * variance + 4.0
    assert mechanism.total_noise_scale(2.0) == pytest.approx(math.sqrt(variance), rel=1e-12)


def test_a_refusal_has_a_reason_and_no_numbers():
    plan = planning.make_plan(epsilon=20.0, delta=1e-5, **BALL, **FAST)
    entry = {e.accountant: e for e in plan.accountants}["closed-form"]
    assert "unsound" in entry.refused
    assert entry.noise_scale is entry.total_noise is entry.total_variation is None
    record = planning.to_record(plan)["accountants"]["closed-form"]
    assert record["noise_scale"] is None
    assert record["refused"] == entry.refused
    assert "refused: " in planning.to_table(plan)


def test_the_record_is_json_and_complete():
    plan = planning.make_plan(**TARGET, **BALL, **FAST, params=10)
    record = planning.to_record(plan)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert mechanisms.from_record(record["mechanism"]) == plan.mechanism
    shown = {field.name for field in dataclasses.fields(planning.AccountantPlan)} - {"accountant"}
    assert set(record["accountants"]["interpolation"]) == shown


def test_the_table_names_steps_other_than_the_best():
    assert "not 3" in planning.to_table(planning.make_plan(**TARGET, **BALL, **FAST, steps=3))


def test_any_constant_separations_have_a_best_number_of_steps():
    plan = planning.make_plan(**TARGET, **BALL, **FAST, steps=3, weight_decay=0.2)
    stated = mechanisms.Separations(
        initial_distance=2.0, contraction=[0.98] * 3, shift=[0.2] * 3, assumptions=["It is so."]
    )
    same = planning.plan_for(stated, **TARGET, accountants=("interpolation",))
    assert same.best_steps == plan.best_steps
    assert same.best_noise_scale == pytest.approx(plan.best_noise_scale, rel=1e-12)
    assert same.accountants[0].noise_scale == pytest.approx(
        plan.accountants[0].noise_scale, rel=1e-12
    )
    assert "radius of the ball of starts  1 " in planning.to_table(same)
    record = planning.to_record(same)
    assert record["mechanism"]["diameter"] is None
    assert json.loads(json.dumps(record, allow_nan=False)) == record


@pytest.mark.parametrize(
    "change",
    [
        {"contraction": [0.9, 0.8, 0.9]},
        {"shift": [0.1, 0.2, 0.1]},
        {"shift": 0.0},
        {"contraction": 0.0},
        {"noisy": [False, True, True]},
        {"init_noise_scale": 0.1},
    ],
)
def test_other_separations_have_no_best_number_of_steps(change):
    fields = {"initial_distance": 2.0, "contraction": 0.9, "shift": 0.1, "steps": 3} | change
    plan = planning.plan_for(
        mechanisms.Separations(**fields), **TARGET, accountants=("interpolation",)
    )
    assert plan.best_steps is plan.best_noise_scale is None
    shown = planning.to_table(plan)
    assert ("3 steps, 2 of them noisy" in shown) == ("noisy" in change)


def test_a_plan_needs_a_mechanism():
    with pytest.raises(TypeError, match=r"mechanism must be a certunlearn\.Mechanism"):
        planning.plan_for("GradientClipping", **TARGET)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"epsilon": 0.0}, ValueError),
        ({"epsilon": math.nan}, ValueError),
        ({"delta": 1.0}, ValueError),
        ({"init_radius": -1.0}, ValueError),
        ({"steps": 0}, ValueError),
        ({"steps": 2.5}, TypeError),
        ({"params": 0}, ValueError),
        ({"reference": "nothing"}, ValueError),
        ({"weight_decay": 11.0}, ValueError),
    ],
)
def test_bad_input_is_refused(change, error):
    with pytest.raises(error):
        planning.make_plan(**(TARGET | BALL | change))
