"""Inputs at which the coupling accountant was far from the attack, each held near it."""

import numpy as np
import pytest
from coupling_helpers import at_nominal, by_attack, game
from hypothesis import given, settings
from hypothesis import strategies as st

import certunlearn as cu
from certunlearn.accounting._reflection import blocks, solution


@pytest.mark.slow
@pytest.mark.parametrize(("delta", "most"), [(1e-15, 0.66), (1e-60, 0.75)])
def test_errors_scale_with_delta(delta, most):
    steps = at_nominal(2.0, 1.0, 0.5, 4, 1.0, delta)
    assert by_attack(steps, delta) <= solution.epsilon(steps, delta) <= most


@pytest.mark.slow
def test_levels_are_where_values_are_after_a_reset():
    contraction, shift = [1, 1, 1e-8, 1, 1, 1e-3, 1, 1], [0.05] * 8
    shift[3] = shift[6] = 3.0
    steps = at_nominal(2.0, contraction, shift, 8, 3.0, 1e-5)
    assert by_attack(steps, 1e-5) <= solution.epsilon(steps, 1e-5) <= 0.88


def test_noise_of_many_small_steps_counts_together():
    """Starts a hundred of one step's deviations apart, and a few of a block's."""
    steps = at_nominal(2.0, 1.0, 2.0 / 20_000, 20_000, 8.0, 1e-5)
    assert steps.distance > 100 * steps.noise[0]
    # A block is 417 steps. With room: by the noise of one step all would be in a single block.
    assert len(blocks.blocks(steps).noise) == 48
    # Of use up to a hundred deviations of a block, and no further.
    for distance, count in ((90.0, 48), (110.0, 1)):
        far = game(distance * 417**0.5, 1.0, 0.0, 1.0, 20_000)
        assert len(blocks.blocks(far).noise) == count


@pytest.mark.parametrize("small", [1e-9, 1e-3, 0.3])
def test_little_noise_among_much_is_left_out(small):
    steps = game(2.0, 1.0, 0.1, [3, 3, 3, small, 3, 3])
    found = blocks.variants(steps)
    assert [each.noise.tolist() for each in found] == [
        [3, 3, 3, small, 3, 3],
        [3, 3, 3, 0, 3, 3],
    ]


def test_noise_is_not_left_out_where_it_counts():
    for noise, contraction, distance in (
        ([1.0, 1.0, 1.0], 1.0, 2.0),  # like others
        ([3.0, 2.0, 1.0, 0.5, 0.2, 0.1], 1.0, 2.0),  # nothing large follows
        ([3.0, 3.0, 0.1], 1.0, 2.0),  # the last hides the last shift
        ([0.1, 1.0, 1.0], 1.0, 0.1),  # the two may meet before the next shift
    ):
        assert len(blocks.variants(game(distance, contraction, 0.1, noise))) == 1
    # What many leave out together is not more than what one may.
    many = blocks.variants(game(50.0, 1.0, 0.1, [0.1] * 500 + [1.0]))[-1].noise
    assert np.count_nonzero(many == 0) == 2


@pytest.mark.slow
def test_more_noise_at_one_step_never_hurts():
    none, little = (
        solution.epsilon(game(2.0, 1.0, 0.1, [3, small, 3]), 1e-5) for small in (0.0, 1e-3)
    )
    assert by_attack(game(2.0, 1.0, 0.1, [3, 1e-3, 3]), 1e-5) <= little <= none * (1 + 1e-9)


def test_schedules_are_divided_by_what_they_forget():
    steps = at_nominal(2.0, 0.99, 0.02, 3_000, 10.0, 1e-5)
    shift = steps.shift.copy()
    shift[0] *= 0.999
    alike, other = (blocks.blocks(each) for each in (steps, steps._replace(shift=shift)))
    assert len(alike.noise) == len(other.noise)
    for part, same in zip(alike[1:], other[1:], strict=True):
        assert part == pytest.approx(same, rel=1e-9)
    # Where the steps forget, blocks are shorter.
    contraction = np.repeat([1.0, 0.99], 1_500)
    mixed = blocks.blocks(steps._replace(contraction=contraction))
    forgetting = np.count_nonzero(mixed.contraction < 1)
    assert 150 < forgetting < 400
    assert len(mixed.noise) - forgetting < 40


@pytest.mark.parametrize("alike", [0.02, 0.3])
def test_blocks_that_share_numbers_take_the_worst(alike):
    rng = np.random.default_rng(0)
    count = 2_000
    steps = game(
        2.0,
        1 - 0.02 * rng.uniform(0.99, 1, count) * np.linspace(1, 0.5, count),
        0.02 * rng.uniform(0.99, 1, count),
        rng.uniform(0.99, 1, count),
    )
    found, plain = blocks.blocks(steps, None, alike), blocks.blocks(steps, None, 0.0)
    assert len(found.noise) == len(plain.noise) > 300
    assert np.all(found.contraction >= plain.contraction)
    assert np.all(found.shift >= plain.shift)
    assert np.all(found.noise <= plain.noise)
    assert found.noise == pytest.approx(plain.noise, rel=alike)
    kinds = {tuple(part[i] for part in found[1:4]) for i in range(len(found.noise))}
    assert len(kinds) < len(found.noise) / 2


@pytest.mark.slow
def test_a_schedule_is_certified_as_well_as_the_constants_near_it():
    steps = at_nominal(2.0, 0.97, 0.02, 150, 6.0, 1e-5)
    wave = 1 + 1e-3 * np.cos(np.arange(150))
    other = steps._replace(shift=steps.shift * wave, noise=steps.noise * wave[::-1])
    reached = by_attack(other, 1e-5)
    # 1.21 times with the constants, too; 1.46 times if blocks that are nearly alike share nothing.
    assert reached <= solution.epsilon(other, 1e-5) <= 1.25 * reached


@pytest.mark.slow
def test_coupling_reads_what_bounds_the_separations():
    models = cu.ModelClipping(init_radius=1.0, model_radius=0.5, learning_rate=0.1, steps=3)
    claim = {"noise_scale": 0.6, "delta": 1e-5}
    product = cu.epsilon(models, **claim, accountant="product")
    assert cu.epsilon(models, **claim, accountant="coupling") <= product
    assert product < 0.5 * cu.epsilon(models, **claim, accountant="interpolation")
    curves = [
        cu.epsilon_curve(models, **claim, accountant=name) for name in ("coupling", "product")
    ]
    assert np.all(curves[0] <= curves[1])
    target = {"epsilon": 1.0, "delta": 1e-5}
    noise = cu.noise_scale(models, **target, accountant="coupling")
    assert noise <= cu.noise_scale(models, **target, accountant="product")
    assert cu.epsilon(models, noise_scale=noise, delta=1e-5, accountant="coupling") <= 1


def test_an_attack_that_would_take_minutes_is_refused_before_it_begins():
    long = cu.GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=1e-4, steps=20_000)
    with pytest.raises(ValueError, match="steps must be fewer than 20000, or their noise"):
        cu.epsilon_lower_bound(long, noise_scale=0.05, delta=1e-5)


# What the default tables may be off by, and a little of epsilon itself where it is nearly 0.
STATED, NEARLY_NONE = 0.04, 2e-3
NAMES = ("contraction", "shift", "noise", "delta")


@pytest.mark.slow
@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    each=st.lists(
        st.tuples(st.floats(0, 1), st.floats(-2, 0), st.floats(-1.5, 0.4)), min_size=2, max_size=4
    ),
    change=st.tuples(st.integers(0, 3), st.floats(1.0, 3.0), st.sampled_from(NAMES)),
    delta=st.floats(-7, -3),
)
def test_harder_games_never_get_less_and_near_ones_nearly_the_same(each, change, delta):
    contraction, shift, noise = np.array(each).T
    steps, delta = game(1.0, contraction, 10**shift, 10**noise), 10**delta
    found = solution.epsilon(steps, delta)
    assert by_attack(steps, delta) <= found
    # One step with less noise, more shift or less contraction, or all at a smaller delta.
    at, factor, name = change
    if name == "delta":
        harder = solution.epsilon(steps, delta / factor)
    else:
        part = getattr(steps, name).copy()
        power = {"contraction": 1, "shift": 1, "noise": -1}[name]
        part[at % len(part)] *= factor**power
        harder = solution.epsilon(steps._replace(**{name: part}), delta)
    assert found <= harder * (1 + STATED) + NEARLY_NONE
    wave = 1 + 1e-3 * np.cos(2.0 * np.arange(len(noise)))
    near = steps._replace(
        contraction=steps.contraction * wave, shift=steps.shift / wave, noise=steps.noise * wave
    )
    assert solution.epsilon(near, delta) == pytest.approx(found, rel=0.05, abs=NEARLY_NONE)
