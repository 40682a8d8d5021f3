"""Compiled steps that serve later runs: when they do, when they must not, and how many are kept."""

import dataclasses
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import certunlearn as cu
from certunlearn.mechanisms import step_rules
from certunlearn.unlearning import kept_steps
from certunlearn.unlearning.snapshots import snapshot
from tests.loop_helpers import CLIPPED, CONVEX, DATA, PARAMS, loss_fn, run

COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: COMPILED.append(name) if "backend_compile" in name else None
)
FACTOR = 1.0
TABLE = {"factor": 1.0}


@pytest.fixture(autouse=True)
def _nothing_kept():
    cu.unlearning.clear_compiled_steps()
    yield
    cu.unlearning.clear_compiled_steps()


def compiled_by(call):
    COMPILED.clear()
    result = call()
    return len(COMPILED), result


BALL = {"init_radius": 1.0, "learning_rate": 0.1, "steps": 6}
# Each with other numbers, and other steps where no number is one for each step.
PAIRS = {
    "clipped": (
        cu.GradientClipping(**CLIPPED, weight_decay=0.1),
        cu.GradientClipping(
            init_radius=2.0, clip_norm=0.7, learning_rate=0.2, steps=4, weight_decay=0.3
        ),
    ),
    "projected": (
        cu.ModelClipping(**BALL, model_radius=1.0),
        cu.ModelClipping(**BALL | {"learning_rate": 0.3}, model_radius=2.0),
    ),
    "schedules": (
        cu.ModelClipping(**BALL | {"learning_rate": [0.1] * 6}, model_radius=1.0, clip_norm=1.0),
        cu.ModelClipping(
            **BALL | {"learning_rate": np.linspace(0.1, 0.2, 6)}, model_radius=2.0, clip_norm=0.5
        ),
    ),
    "convex": (
        cu.ProjectedNoisySGD(**CONVEX, radius=1.0),
        cu.ProjectedNoisySGD(**CONVEX, radius=2.0).next(
            stability_distance=0.1, gradient_difference=0.1
        ),
    ),
    "separations": (
        cu.Separations(initial_distance=1.0, contraction=0.9, shift=0.1, steps=6),
        cu.Separations(initial_distance=2.0, contraction=0.8, shift=0.2, steps=5),
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        "clipped",
        *(pytest.param(name, marks=pytest.mark.slow) for name in PAIRS if name != "clipped"),
    ],
)
def test_a_second_run_of_equal_shapes_compiles_nothing(name):
    (first, second), other = PAIRS[name], jax.tree.map(lambda x: x + 1, PARAMS)
    run(first, key=1)
    again = functools.partial(run, second, other, key=2, noise_scale=1.5)
    count, result = compiled_by(again)
    assert count == 0
    # And does what a run on its own does, bit for bit.
    cu.unlearning.clear_compiled_steps()
    count, alone = compiled_by(again)
    assert count == 1
    assert jax.tree.all(jax.tree.map(np.array_equal, result.params, alone.params))
    assert result.certificate.epsilon == alone.certificate.epsilon


def test_another_number_of_examples_compiles_no_step():
    mechanism, tuned = PAIRS["clipped"][0], {"finetune": (optax.sgd(0.1), 2)}
    fewer = jax.tree.map(lambda leaf: leaf[:-3], DATA)
    run(mechanism, **tuned)
    count, result = compiled_by(lambda: run(mechanism, data=fewer, **tuned))
    assert count <= 3  # what draws an order, and what takes one batch or many by it
    cu.unlearning.clear_compiled_steps()
    count, alone = compiled_by(lambda: run(mechanism, data=fewer, **tuned))
    assert count == 2  # with noise and without
    assert jax.tree.all(jax.tree.map(np.array_equal, result.params, alone.params))


def test_fine_tuning_centres_and_frozen_leaves_are_served_too():
    mechanism = PAIRS["clipped"][0]
    center = {"w": jnp.ones(3), "b": jnp.zeros(())}
    frozen = {"w": False, "b": True}
    more = {"frozen": frozen}

    def once(number):
        return run(
            mechanism,
            jax.tree.map(lambda x: x + number, PARAMS),
            key=number,
            center=jax.tree.map(lambda x: x + 0.1 * number, center),
            finetune=(optax.adam(1e-3), 3),
            **more,
        )

    once(1)
    count, result = compiled_by(lambda: once(2))
    assert count == 0
    assert result.params["b"] == PARAMS["b"] + 2


@pytest.mark.slow
def test_a_loss_whose_surroundings_changed_is_not_served(monkeypatch):
    def loss(params, batch):
        return FACTOR * loss_fn(params, batch)

    mechanism = cu.GradientClipping(**CLIPPED | {"clip_norm": 100.0})
    run(mechanism, loss=loss)
    monkeypatch.setitem(globals(), "FACTOR", 0.25)
    count, result = compiled_by(lambda: run(mechanism, loss=loss))
    assert count == 1
    expected = run(mechanism, loss=lambda params, batch: 0.25 * loss_fn(params, batch))
    np.testing.assert_allclose(result.params["w"], expected.params["w"], rtol=1e-6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signs(cu.Mechanism):
    steps: int
    length: float

    def separations(self):
        return cu.Separations(
            initial_distance=1.0, contraction=1.0, shift=4 * self.length, steps=self.steps
        )

    def update(self, center):
        return optax.chain(optax.scale_by_sign(), optax.scale(-self.length))


@pytest.mark.slow
def test_a_mechanism_of_ones_own_is_served_by_equality_only():
    run(Signs(steps=3, length=0.1))
    assert compiled_by(lambda: run(Signs(steps=3, length=0.1), key=8))[0] == 0
    count, result = compiled_by(lambda: run(Signs(steps=3, length=0.5), key=8))
    assert count >= 1
    assert (
        result.params["w"].tolist() != run(Signs(steps=3, length=0.1), key=8).params["w"].tolist()
    )


class OtherStep(cu.GradientClipping):
    def update(self, center):
        return optax.chain(super().update(center), optax.scale(0.0))


@pytest.mark.slow
def test_a_subclass_with_an_update_of_its_own_is_not_run_by_the_rule_of_its_parent():
    # Eight steps at a time would hide it: one is enough.
    numbers = CLIPPED | {"steps": 1}
    still = run(OtherStep(**numbers), key=3, noise_scale=1e-3, accountant=None)
    moved = run(cu.GradientClipping(**numbers), key=3, noise_scale=1e-3, accountant=None)
    difference = jax.tree.map(jnp.subtract, moved.params, still.params)
    assert float(optax.global_norm(difference)) > 0.04  # a learning rate of 0.1 times 0.5


def test_whoever_overrides_an_update_has_no_rule():
    assert step_rules.rule_of(PAIRS["clipped"][0]) is not None
    assert step_rules.rule_of(OtherStep(**CLIPPED)) is None
    assert step_rules.rule_of(Signs(steps=1, length=1.0)) is None
    given = dataclasses.replace(PAIRS["separations"][0], transform=optax.identity())
    assert step_rules.rule_of(given) is None


@pytest.mark.slow
def test_many_requests_leave_no_more_than_the_first():
    run()
    gc.collect()
    before = len(jax.devices()[0].client.live_executables()), len(kept_steps._kept)
    COMPILED.clear()
    for number in range(50):  # three times as many as programs are kept
        run(key=number, noise_scale=1.0 + number / 50)
    gc.collect()
    assert not COMPILED
    assert (len(jax.devices()[0].client.live_executables()), len(kept_steps._kept)) == before


@pytest.mark.slow
def test_a_bounded_number_of_programs_is_kept():
    def make(this):
        return jax.jit(lambda x: x * this.fixed)

    def once(size):
        values = np.ones(size, np.float32)
        return kept_steps.compiled("test", 2.0, (2.0,), (values,), make)(values)

    once(1)
    gc.collect()
    before = len(jax.devices()[0].client.live_executables())
    for size in range(2, 40):
        once(size)
    gc.collect()
    assert len(kept_steps._kept) == 16
    assert len(jax.devices()[0].client.live_executables()) <= before + 15
    assert compiled_by(lambda: once(39))[0] == 0
    assert cu.unlearning.clear_compiled_steps() == 16


# ------------------------------------------------------------------------------------ snapshots


def _closure(value):
    return lambda params, batch: value


def _default(value):
    return lambda params, batch, extra=value: extra


def _nested(value):
    inner = _closure(value)
    return lambda params, batch: [inner(params, batch) for _ in range(2)]


class Holder:
    pass


@pytest.mark.parametrize("wrap", [_closure, _default, _nested, lambda v: functools.partial(max, v)])
def test_functions_are_the_same_if_all_that_they_look_at_is(wrap):
    equal = [(1.0, 1.0), ([1, 2], [1, 2]), ({"a": 1}, {"a": 1}), (_closure(3), _closure(3))]
    for one, other in equal:
        assert snapshot(wrap(one)) == snapshot(wrap(other)) is not None
    different = [(1.0, 2.0), (1, 1.0), (0.0, -0.0), ([1, 2], [2, 1]), (_closure(3), _closure(4))]
    different += [({"a": 1}, {"a": 2}), (np.float32(1), np.float64(1)), (True, 1), (max, min)]
    different += [(optax.adam(1e-3), optax.adam(1e-2)), (optax.sgd(0.1), optax.adam(0.1))]
    for one, other in different:
        keys = snapshot(wrap(one)), snapshot(wrap(other))
        assert None not in keys, (one, other)
        assert keys[0] != keys[1], (one, other)
    for unknown in (np.ones(2), jnp.ones(2), jax.random.key(0), Holder(), [].append, [].__len__):
        assert snapshot(wrap(unknown)) is None, unknown


def test_what_changes_in_place_changes_the_snapshot(monkeypatch):
    def of_module(params, batch):
        return TABLE["factor"]

    def through_a_method(params, batch):
        return Signs(steps=1, length=1.0).update(None)

    before = snapshot(of_module), snapshot(through_a_method)
    assert None not in before
    monkeypatch.setitem(TABLE, "factor", 2.0)
    assert snapshot(of_module) != before[0]
    monkeypatch.setattr(Signs, "update", lambda self, center: optax.identity())
    assert snapshot(through_a_method) != before[1]


def test_what_can_look_anywhere_has_no_snapshot():
    def looks(params, batch):
        return globals()["FACTOR"]

    def imports(params, batch):
        from tests import loop_helpers

        return loop_helpers.loss_fn(params, batch)

    assert snapshot(looks) is None
    assert snapshot(imports) is None
