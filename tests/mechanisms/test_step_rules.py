"""The steps' numbers as arguments of a compiled step: the bounds hold as they do for constants."""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import certunlearn as cu
from certunlearn._numerics import schedules
from certunlearn.mechanisms import noisy_optimizer, step_rules

RATES = {"learning_rate": 0.1, "steps": 3}
CURVED = {"initial_distance": 0.5, "strong_convexity": 0.1, "smoothness": 1.0, **RATES}
RISING = [0.1, 0.2, 0.3]
MECHANISMS = [
    cu.GradientClipping(init_radius=1.0, clip_norm=0.7, **RATES),
    cu.GradientClipping(
        init_radius=1.0, clip_norm=RISING, learning_rate=RISING, weight_decay=RISING, steps=3
    ),
    cu.ModelClipping(init_radius=1.0, model_radius=0.3, weight_decay=0.7, **RATES),
    cu.ModelClipping(init_radius=1.0, model_radius=0.3, clip_norm=0.7, **RATES),
    cu.ProjectedNoisySGD(**CURVED, radius=0.3),
    cu.ProjectedNoisySGD(**CURVED),
    cu.DescentToDelete(**CURVED),
    cu.RewindToDelete(
        smoothness=1.0,
        gradient_bound=1.0,
        training_learning_rate=0.1,
        trained_steps=2,
        size=9,
        deletions=1,
        **RATES,
    ),
    cu.DPSGD(clip_norm=1.0, sampling_rate=0.1, batch_size=5, deletions=1, **RATES),
    cu.OutputPerturbation(init_radius=1.0),
    cu.Separations(initial_distance=1.0, contraction=1 - 1e-9, shift=0.1, steps=3),
    cu.Separations(
        initial_distance=1.0, contraction=[0.9] * 3, shift=[0.1, 0.0, 0.2], diameter=0.7
    ),
]
SAME = "the same bits, whether numbers are constants or arguments"


def rounded_up(value):
    """A number near `value` that float32 rounds up by nearly half a spacing."""
    low = np.float32(value)
    high = np.nextafter(low, np.float32(np.inf))
    return float(low) + (float(high) - float(low)) * 0.5000001


def exact_norm_squared(array):
    return sum(Fraction(float(x)) ** 2 for x in np.asarray(array).ravel())


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: type(m).__name__)
def test_numbers_as_arguments_give_the_bits_of_constants(mechanism):
    params = {"w": jnp.array([0.3, -0.2, 0.1]), "b": jnp.array(0.2)}
    center = jax.tree.map(lambda x: 0.1 * x, params) if mechanism.uses_center else None
    scale = 0.123456789
    tx = cu.noisy_sgd(mechanism, scale, key=jax.random.key(1), center=center)
    arguments = noisy_optimizer.step_arguments(mechanism, scale, center)

    @jax.jit
    def by_constants(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def by_arguments(arguments, grads, state, params):
        update = noisy_optimizer.update_with(arguments, None, None, None)
        updates, state = update(grads, state, params)
        return optax.apply_updates(params, updates), state

    one = other = params, tx.init(params)
    for step in range(mechanism.steps + 1):
        grads = jax.tree.map(lambda p, s=step: 10.0**s * jnp.cos(3 * p + s), params)
        one = by_constants(grads, one[1], one[0])
        other = by_arguments(arguments, grads, other[1], other[0])
        assert jax.tree.all(jax.tree.map(np.array_equal, one, other)), SAME


@functools.partial(jax.jit, static_argnames="start")
def moved(rule, gradient, params, start=None):
    """An update by a rule, without its noise, from a fresh state."""
    none = optax.GradientTransformation(lambda p: optax.EmptyState(), lambda u, s, p=None: (u, s))
    chain = optax.chain(*rule.transforms(none, None))
    return chain.update(gradient, chain.init(params), params)[0]


def on_device(mechanism):
    return jax.tree.map(jnp.asarray, step_rules.rule_of(mechanism))


@pytest.mark.parametrize("size", [1, 7, 300])
def test_a_clipped_step_is_never_longer_than_its_separation_says(size):
    rng = np.random.default_rng(size)
    for seed in range(40):
        rate, norm = (rounded_up(v) for v in rng.uniform(0.01, 3, 2))
        mechanism = cu.GradientClipping(
            init_radius=1.0, clip_norm=norm, learning_rate=rate, steps=1 + seed
        )
        gradient = rng.normal(size=size).astype(np.float32) * np.float32(10.0 ** rng.uniform(-2, 9))
        update = moved(on_device(mechanism), jnp.asarray(gradient), jnp.zeros(size))
        assert 4 * exact_norm_squared(update) <= Fraction(mechanism.shift[0]) ** 2
        # And no shorter than it need be, where the gradient is long.
        if np.linalg.norm(gradient.astype(np.float64)) > 2 * norm:
            assert float(exact_norm_squared(update)) ** 0.5 > rate * norm * (1 - 1e-4)


def test_a_projected_step_ends_inside_of_the_ball():
    rng = np.random.default_rng(5)
    for _ in range(40):
        rate, radius = (rounded_up(v) for v in rng.uniform(0.01, 3, 2))
        mechanism = cu.ModelClipping(
            init_radius=1.0, model_radius=radius, learning_rate=rate, steps=1
        )
        params = rng.normal(size=20).astype(np.float32)
        update = moved(on_device(mechanism), jnp.asarray(100 * params), jnp.asarray(params))
        reached = params.astype(np.float64) + np.asarray(update, np.float64)
        assert exact_norm_squared(np.asarray(params + np.asarray(update))) <= Fraction(radius) ** 2
        assert np.linalg.norm(reached) <= radius


@pytest.mark.parametrize("steps", [1, 3])
def test_a_contraction_near_one_keeps_its_digits(steps):
    pull = rounded_up(1e-9)
    mechanism = cu.Separations(
        initial_distance=1.0, contraction=[1 - pull] * steps, shift=0.0, steps=steps
    )
    update = moved(on_device(mechanism), jnp.ones(2), jnp.array([1.0, -2.0]))
    # In float32 the contraction itself would be 1, and the update 0.
    np.testing.assert_allclose(update, [-pull, 2 * pull], rtol=1e-6)


def test_noise_is_never_below_what_was_asked_for():
    rng = np.random.default_rng(3)
    below = [float(np.float32(v)) + 1e-9 for v in rng.uniform(0.1, 1, 50)]
    values = [*below, *(rounded_up(v) for v in rng.uniform(1e-20, 1e20, 50))]
    for x64 in (False, True):
        with jax.enable_x64(x64):
            table = schedules.NoiseTable.rounded(values)
            for dtype in [np.float32, np.float64][: 1 + x64]:
                found = jax.jit(
                    lambda table, dtype=dtype: jax.vmap(
                        lambda i: schedules.NoiseTable(*table).rounded_up(i, dtype)
                    )(jnp.arange(len(values)))
                )(table)
                assert found.dtype == dtype
                assert np.all(np.asarray(found, np.float64) >= values)
                assert np.all(np.asarray(found, np.float64) <= np.array(values) * (1 + 2e-7))


def test_a_rule_keeps_its_structure_where_only_numbers_differ():
    def structure(**changes):
        fields = {"init_radius": 1.0, "clip_norm": 1.0, **RATES, **changes}
        leaves, treedef = jax.tree.flatten(on_device(cu.GradientClipping(**fields)))
        return treedef, [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in leaves]

    assert structure() == structure(learning_rate=0.3, clip_norm=5.0, steps=9, init_radius=3.0)
    assert structure() != structure(weight_decay=0.1)
    assert structure() != structure(learning_rate=[0.1, 0.2, 0.3])
