"""What an optimizer state shows of a run, through wrappers, and what it must not show."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state
from transform_helpers import mechanism

import certunlearn as cu
from certunlearn import mechanisms, transforms
from certunlearn._numerics import random_keys
from certunlearn.mechanisms import noisy_optimizer

KEY = jax.random.key(5)
PARAMS = {"w": jnp.ones(3)}
NAN = {"w": jnp.full(3, jnp.nan)}
ADAM = optax.scale_by_adam


def noisy(m=None, **options):
    return noisy_optimizer.noisy_sgd(m or mechanism(steps=4), 0.1, key=KEY, **options)


def taken(tx, gradients):
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for gradient in gradients:
        _, state = update(gradient, state, PARAMS)
    return state


def test_counts_steps_and_gradients_that_were_not_finite():
    state = taken(noisy(), [PARAMS, NAN, PARAMS])
    assert noisy_optimizer.evidence(state) == (3, 1)
    # Nothing counts after the last step.
    assert noisy_optimizer.evidence(taken(noisy(), [NAN] * 7)) == (4, 4)
    with_memory = noisy(mechanism(memoryless=False, steps=4), before_clip=ADAM())
    assert noisy_optimizer.evidence(taken(with_memory, [PARAMS, NAN])) == (2, 1)


EACH = {
    "ModelClipping": {"model_radius": 1.0, "init_radius": 1.0, "learning_rate": 0.1, "steps": 3},
    "DescentToDelete": {
        "initial_distance": 1.0,
        "learning_rate": 0.1,
        "strong_convexity": 1.0,
        "smoothness": 2.0,
        "steps": 3,
    },
}


@pytest.mark.parametrize("name", EACH)
def test_zeroed_gradients_show_for_every_mechanism(name):
    m = getattr(mechanisms, name)(**EACH[name])
    assert noisy_optimizer.evidence(taken(noisy(m), [PARAMS, NAN])) == (2, 1)


WRAPPERS = {
    "MultiSteps": (lambda tx: optax.MultiSteps(tx, 2), 2),
    "inject_hyperparams": (
        lambda _: optax.inject_hyperparams(noisy_optimizer.noisy_sgd, static_args=("key",))(
            mechanism(steps=4), 0.1, key=KEY
        ),
        4,
    ),
    "partition": (
        lambda tx: optax.partition({"t": tx, "f": optax.set_to_zero()}, {"w": "t"}),
        4,
    ),
    "chain": (lambda tx: optax.chain(optax.identity(), tx), 4),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_is_found_within_wrappers(name):
    wrap, steps = WRAPPERS[name]
    state = taken(wrap(noisy()), [PARAMS] * 4)
    assert noisy_optimizer.evidence(state) == (steps, 0)
    assert noisy_optimizer.evidence({"any": [state, PARAMS]}) == (steps, 0)


# The wrappers that leave out noise, or the clip: documented, and seen by the count.
SKIPPING = {
    "apply_if_finite": (lambda tx: optax.apply_if_finite(tx, 10), NAN),
    "should_skip": (
        lambda tx: optax.MultiSteps(tx, 1, should_skip_update_fn=optax.skip_not_finite),
        NAN,
    ),
    "conditionally_transform": (
        lambda tx: optax.conditionally_transform(tx, lambda step, **_: step > 2),
        PARAMS,
    ),
}


@pytest.mark.parametrize("name", SKIPPING)
def test_skipped_updates_are_not_counted(name):
    wrap, gradient = SKIPPING[name]
    state = taken(wrap(noisy()), [gradient] * 4)
    assert noisy_optimizer.evidence(state).steps < 4
    # Not wrapped, all are.
    assert noisy_optimizer.evidence(taken(noisy(), [gradient] * 4)).steps == 4


def test_every_counted_update_has_its_noise():
    tx = noisy()
    state = tx.init(PARAMS)
    for gradient in (PARAMS, NAN, {"w": jnp.zeros(3)}, {"w": jnp.full(3, jnp.inf)}):
        before = int(state.count)
        updates, state = tx.update(gradient, state, PARAMS)
        assert int(state.count) == before + 1
        (quiet, *_), _ = noise_only(before)
        limit = 0.1 * mechanism().clip_norm * 1.001
        assert np.linalg.norm(np.asarray(updates["w"]) - quiet) <= limit


def noise_only(count):
    tx = transforms.add_gaussian_noise(0.1, KEY)
    state = tx.init(PARAMS)._replace(count=jnp.int32(count))
    updates, state = tx.update({"w": jnp.zeros(3)}, state)
    return (np.asarray(updates["w"]),), state


def test_train_states_and_nnx_optimizers():
    model = nn.Dense(2)
    variables = model.init(KEY, jnp.ones((1, 3)))
    state = train_state.TrainState.create(
        apply_fn=model.apply, params=variables["params"], tx=noisy()
    )
    state = state.apply_gradients(grads=variables["params"])
    assert noisy_optimizer.evidence(state) == (1, 0)
    assert noisy_optimizer.evidence(state.opt_state) == (1, 0)

    module = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    nnx_optimizer = nnx.Optimizer(module, noisy(), wrt=nnx.Param)
    for _ in range(2):
        nnx_optimizer.update(module, nnx.state(module, nnx.Param))
    assert noisy_optimizer.evidence(nnx_optimizer) == (2, 0)
    assert noisy_optimizer.evidence(nnx_optimizer.opt_state) == (2, 0)


def test_what_is_no_evidence_is_refused():
    state = taken(noisy(), [PARAMS] * 2)
    for none in (None, 3, PARAMS, optax.sgd(0.1).init(PARAMS)):
        with pytest.raises(ValueError, match="exactly one NoisySgdState"):
            noisy_optimizer.evidence(none)
    with pytest.raises(ValueError, match="with 2"):
        noisy_optimizer.evidence([state, state])
    several = jax.vmap(
        lambda key: noisy_optimizer.noisy_sgd(mechanism(), 0.1, key=key).init(PARAMS)
    )
    with pytest.raises(ValueError, match="one at a time"):
        noisy_optimizer.evidence(several(jax.random.split(KEY, 3)))
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda s: noisy_optimizer.evidence(s).steps)(state)


@pytest.mark.parametrize(
    "kind", [transforms.AddGaussianNoiseState, transforms.ClipByGlobalNormState]
)
def test_parts_that_disagree_are_refused(kind):
    state = taken(noisy(), [PARAMS] * 2)
    is_kind = lambda part: isinstance(part, kind)  # noqa: E731
    changed = jax.tree.map(
        lambda part: part._replace(count=part.count - 1) if is_kind(part) else part,
        state.inner_state,
        is_leaf=is_kind,
    )
    with pytest.raises(ValueError, match="disagree") as error:
        noisy_optimizer.evidence(state._replace(inner_state=changed))
    assert not any(word in str(error.value) for word in secret_words())


def test_steps_of_ones_own_that_drop_the_noise_are_no_evidence():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Silent(cu.OutputPerturbation):
        def step_transforms(self, noise, center):
            return (self.update(center),)

    tx = cu.noisy_sgd(Silent(init_radius=1.0), 0.1, key=KEY)
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert int(state.count) == 1
    with pytest.raises(ValueError, match="must be that of steps with noise"):
        cu.certify(Silent(init_radius=1.0), noise_scale=0.1, delta=1e-5, params=PARAMS, state=state)


# ------------------------------------------------------------------------------ no key shown


def secret_words():
    return [str(word) for word in np.asarray(jax.random.key_data(SECRET)).tolist()]


SECRET = jax.random.wrap_key_data(jnp.array([2882343476, 3735928559], jnp.uint32))


def only(state, kind):
    is_kind = lambda part: isinstance(part, kind)  # noqa: E731
    (found,) = filter(is_kind, jax.tree.leaves(state, is_leaf=is_kind))
    return found


def test_no_repr_shows_a_key_or_a_private_number():
    tx = noisy_optimizer.noisy_sgd(
        mechanism(memoryless=False), 0.1, key=SECRET, before_clip=optax.trace(0.9)
    )
    state = tx.init(PARAMS)
    _, state = tx.update({"w": jnp.full(3, 0.123456)}, state, PARAMS)
    shown = [repr(state), str(state), repr([state]), repr(state.inner_state[-1])]
    shown += [
        repr(random_keys.split_key(SECRET)),
        repr(random_keys.system_keys()),
        f"{random_keys.Keys(SECRET, 1, 2)}",
    ]
    for text in shown:
        assert "secret" in text
        assert "0.123456" not in text
        assert not any(word in text for word in secret_words())
    clip = only(state.inner_state, transforms.ClipByGlobalNormState)
    zeroed = only(state.inner_state, transforms.ZeroNonfiniteState)
    assert repr(clip).count("<private>") == 2
    assert "zeroed=<private>" in repr(zeroed)
    # As pytrees they are what they were.
    assert len(jax.tree.leaves(state.inner_state[-1])) == 2
    assert type(jax.tree.map(lambda x: x, state)) is noisy_optimizer.NoisySgdState


@pytest.mark.parametrize(
    "key",
    [
        2882343476,
        "2882343476",
        np.array([2882343476, 3735928559], np.float64),
        np.array([2882343476, 3735928559] * 2, np.uint32),
        [2882343476, 3735928559],
    ],
)
def test_no_error_shows_a_key(key):
    with pytest.raises(TypeError, match="key must be one key") as error:
        random_keys.as_key(key)
    assert not any(word in str(error.value) for word in secret_words())
    assert "2882343" not in str(error.value)
