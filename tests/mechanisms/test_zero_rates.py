"""Schedules that start or end at a learning rate of 0: such steps only add noise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from mechanism_helpers import DESCENT, REWIND

import certunlearn as cu
from certunlearn import accounting, mechanisms

RATES = (0.0, 0.1, 0.1, 0.0)
BALL = {"init_radius": 0.5, "steps": 4}
EVERY = [
    cu.GradientClipping(**BALL, clip_norm=1.0, learning_rate=RATES),
    cu.GradientClipping(**BALL, clip_norm=1.0, learning_rate=RATES, weight_decay=1.0),
    cu.ModelClipping(**BALL, model_radius=0.3, learning_rate=RATES),
    cu.ModelClipping(**BALL, model_radius=0.3, clip_norm=1.0, learning_rate=RATES),
    cu.ProjectedNoisySGD(**DESCENT | {"learning_rate": RATES}),
    cu.ProjectedNoisySGD(**DESCENT | {"learning_rate": RATES}, radius=3.0),
    cu.DescentToDelete(**DESCENT | {"learning_rate": RATES}),
    cu.RewindToDelete(**REWIND | {"learning_rate": RATES}),
]
every = pytest.mark.parametrize("m", EVERY, ids=lambda m: type(m).__name__)


@pytest.mark.parametrize(
    "schedule",
    [
        optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 6),
        optax.linear_schedule(0.0, 0.1, 3),
        optax.cosine_decay_schedule(0.1, 3),
        optax.constant_schedule(0.0),
        lambda t: 0.1 if t > 3 else 0.0,
    ],
)
def test_schedules_of_optax_that_touch_zero_are_taken(schedule):
    m = cu.GradientClipping(init_radius=0.1, clip_norm=1.0, learning_rate=schedule, steps=6)
    assert min(m.learning_rate) == 0.0
    zero = np.array(m.learning_rate) == 0
    np.testing.assert_array_equal(m.shift[zero], 0.0)
    np.testing.assert_array_equal(m.contraction, 1.0)
    assert m.first(1).learning_rate == m.learning_rate[:1]
    assert mechanisms.from_record(mechanisms.to_record(m)) == m


@every
def test_a_step_of_rate_zero_moves_no_two_points_apart_and_none_together(m):
    if isinstance(m, cu.ModelClipping) and m.clip_norm is None:
        assert m.separation(0, 0.2) == 0.6  # the ball's diameter, whatever came before
        return
    assert m.separation(0, 0.2) == 0.2
    reserve = 1.001 if isinstance(m, cu.DescentToDelete | cu.RewindToDelete) else 1.0
    assert m.separation(3, 0.2) == pytest.approx(0.2 * reserve, rel=1e-12)


@every
def test_every_accountant_takes_them_in_the_right_order(m):
    found = {}
    for name in accounting.supported_names(m):
        if name == "closed-form":
            with pytest.raises(ValueError, match="learning_rate must be one number"):
                cu.epsilon(m, noise_scale=2.0, delta=1e-5, accountant=name)
        elif name != "coupling" or type(m) is cu.DescentToDelete:
            found[name] = cu.epsilon(m, noise_scale=2.0, delta=1e-5, accountant=name)
    assert found["interpolation"] > 0
    least = accounting.affordable_lower_bound(m, noise_scale=2.0, delta=1e-5)
    assert (least is not None) == m.attackable
    if least is not None:
        assert 0 < least <= min(found.values()) * (1 + 1e-6)
    curve = accounting.epsilon_curve(m, noise_scale=2.0, delta=1e-5, accountant="interpolation")
    assert curve.shape == (5,)
    assert curve[-1] == found["interpolation"]


@pytest.mark.slow
@every
def test_coupling_is_between_the_attack_and_interpolation(m):
    coupled = cu.epsilon(m, noise_scale=2.0, delta=1e-5, accountant="coupling")
    if not m.attackable:
        assert coupled > 0
        return
    assert cu.epsilon_lower_bound(m, noise_scale=2.0, delta=1e-5) <= coupled
    if isinstance(m, cu.GradientClipping):
        shifted = cu.epsilon(m, noise_scale=2.0, delta=1e-5, accountant="interpolation")
        assert coupled <= shifted * (1 + 1e-9)


@pytest.mark.slow
def test_without_any_learning_the_noises_add_up():
    for rates, decay in (((0.0,) * 4, 0.0), ((0.0,) * 4, 1.0)):
        m = cu.GradientClipping(**BALL, clip_norm=1.0, learning_rate=rates, weight_decay=decay)
        assert accounting.mu(m, noise_scale=2.0) == pytest.approx(1.0 / (2.0 * 2.0))
        for name in ("interpolation", "coupling"):
            one = cu.OutputPerturbation(init_radius=0.5)
            assert cu.epsilon(m, noise_scale=2.0, delta=1e-5, accountant=name) == pytest.approx(
                cu.epsilon(one, noise_scale=4.0, delta=1e-5, accountant="interpolation"), rel=1e-6
            )
        # The published formula without steps, 3 C0 / sqrt(T), whether or not they would decay.
        sigma = cu.noise_scale(m, epsilon=1.0, delta=1e-5, accountant="closed-form")
        assert sigma == pytest.approx(3 * 0.5 * np.sqrt(np.log(1e5)) / 2)
        assert cu.delta(m, noise_scale=sigma, epsilon=1.0, accountant="closed-form") == (
            pytest.approx(1e-5)
        )


def test_interpolation_charges_only_for_the_steps_that_learn():
    m = cu.GradientClipping(**BALL, clip_norm=1.0, learning_rate=RATES)
    # A distance of 1 and two shifts of 0.2, closed in equal parts by four noises of 2.
    assert accounting.mu(m, noise_scale=2.0) == pytest.approx(1.4 / (2.0 * 2.0))
    late = cu.GradientClipping(**BALL, clip_norm=1.0, learning_rate=(0.0, 0.0, 0.0, 2.0))
    # The hull has a corner: 1 by three noises of 2, then 4 by one, in quadrature.
    expected = np.sqrt((1.0 / (2.0 * np.sqrt(3))) ** 2 + (4.0 / 2.0) ** 2)
    stateful = cu.GradientClipping(
        **BALL, clip_norm=1.0, learning_rate=(0.0, 0.0, 0.0, 2.0), memoryless=False
    )
    assert accounting.mu(stateful, noise_scale=2.0) == pytest.approx(expected)
    # Before the last step the runs were that close already.
    assert accounting.mu(late, noise_scale=2.0) == pytest.approx(1.0 / (2.0 * np.sqrt(3)))


@every
def test_updates_of_rate_zero_are_their_noise(m):
    tx = cu.noisy_sgd(m, 1e-3, key=jax.random.key(0))
    params = jnp.full(3, 0.1)
    update = jax.jit(tx.update)
    moves, _ = update(jnp.full(3, 1e6), tx.init(params), params)
    if m.noisy[0]:
        assert 0 < float(jnp.max(jnp.abs(moves))) < 0.01
    else:
        assert not np.any(moves)


def test_one_rate_of_zero_for_all_steps_is_a_mistake():
    for kind, fields in (
        (cu.GradientClipping, BALL | {"clip_norm": 1.0}),
        (cu.ModelClipping, BALL | {"model_radius": 1.0}),
        (cu.ProjectedNoisySGD, DESCENT),
        (cu.DescentToDelete, DESCENT),
        (cu.RewindToDelete, REWIND),
    ):
        with pytest.raises(ValueError, match=r"learning_rate must be positive.*OutputPerturbation"):
            kind(**fields | {"learning_rate": 0.0})
        with pytest.raises(ValueError, match="learning_rate must be at least 0"):
            kind(**fields | {"learning_rate": [0.1, 0.1, 0.1, -0.1]})
