"""Linen and NNX training loops over `noisy_sgd` on real digits, against a loop written by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

from certunlearn import transforms
from certunlearn.mechanisms import GradientClipping, noisy_optimizer

STEPS, BATCH, SCALE = 12, 64, 0.01
MECHANISM = GradientClipping(
    init_radius=3.0, clip_norm=1.0, learning_rate=0.5, weight_decay=0.1, steps=STEPS
)
KEY = jax.random.key(11)


@pytest.fixture(scope="module")
def batches():
    images, labels = load_digits(return_X_y=True)
    images = np.float32(images / 16)
    return [
        (jnp.asarray(images[i * BATCH :][:BATCH]), jnp.asarray(labels[i * BATCH :][:BATCH]))
        for i in range(STEPS + 2)
    ]


def cross_entropy(logits, labels):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def mlp(params, images):
    hidden = nn.relu(images @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
    return hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]


def by_hand(params, batches):
    """Noisy SGD spelled out; only the noise comes from the transform."""
    noise = transforms.add_gaussian_noise(SCALE, KEY)
    state, draw = noise.init(params), jax.jit(noise.update)
    zero = jax.tree.map(jnp.zeros_like, params)
    grad = jax.jit(jax.grad(lambda p, x, y: cross_entropy(mlp(p, x), y)))
    m = MECHANISM
    for x, y in batches[:STEPS]:
        gradient = grad(params, x, y)
        noised, state = draw(zero, state)
        factor = jnp.minimum(1, m.clip_norm / optax.global_norm(gradient))
        params = jax.tree.map(
            lambda p, g, n, f=factor: p - m.learning_rate * (f * g + m.weight_decay * p) + n,
            params,
            gradient,
            noised,
        )
    return params


def start(params):
    return transforms.clip_params(params, MECHANISM.init_radius)


def close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), left, right)


def tx():
    return noisy_optimizer.noisy_sgd(MECHANISM, SCALE, key=KEY)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, images):
        hidden = nn.relu(nn.Dense(32)(images))
        return nn.Dense(10)(hidden)


@pytest.mark.slow
def test_linen_train_state(batches):
    model = Linen()
    params = start(model.init(jax.random.key(0), batches[0][0])["params"])
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx())

    @jax.jit
    def step(state, x, y):
        loss = lambda p: cross_entropy(state.apply_fn({"params": p}, x), y)  # noqa: E731
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for x, y in batches[:STEPS]:
        state = step(state, x, y)
    close(state.params, by_hand(params, batches))
    moved = optax.global_norm(jax.tree.map(jnp.subtract, state.params, params))
    assert moved > 0.5
    # Two calls more than the mechanism has steps change nothing.
    released = state.params
    for x, y in batches[STEPS:]:
        state = step(state, x, y)
    jax.tree.map(np.testing.assert_array_equal, state.params, released)
    assert int(state.opt_state.count) == STEPS


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, 32, rngs=rngs)
        self.second = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, images):
        return self.second(nnx.relu(self.first(images)))


def as_dict(model):
    """The NNX model's parameters under Linen's names."""
    return {
        name: {"kernel": layer.kernel[...], "bias": layer.bias[...]}
        for name, layer in (("Dense_0", model.first), ("Dense_1", model.second))
    }


@pytest.mark.slow
def test_nnx_optimizer(batches):
    model = Nnx(nnx.Rngs(0))
    nnx.update(model, start(nnx.state(model, nnx.Param)))
    params = jax.tree.map(jnp.array, as_dict(model))
    optimizer = nnx.Optimizer(model, tx(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        grads = nnx.grad(lambda m: cross_entropy(m(x), y))(model)
        optimizer.update(model, grads)

    # Flax orders leaves by name: bias before kernel, first before second, as by_hand's dict.
    for x, y in batches[:STEPS]:
        step(model, optimizer, x, y)
    close(as_dict(model), by_hand(params, batches))
    released = jax.tree.map(jnp.array, as_dict(model))
    for x, y in batches[STEPS:]:
        step(model, optimizer, x, y)
    jax.tree.map(np.testing.assert_array_equal, as_dict(model), released)


@pytest.mark.slow
def test_nnx_with_a_center_and_narrow_parameters():
    model = Nnx(nnx.Rngs(0))
    center = jax.tree.map(jnp.array, nnx.state(model, nnx.Param))
    noisy = noisy_optimizer.noisy_sgd(MECHANISM, 1e-6, key=KEY, center=center)
    decayed = nnx.Optimizer(model, noisy, wrt=nnx.Param)
    before = jax.tree.map(jnp.array, as_dict(model))
    decayed.update(model, jax.tree.map(jnp.zeros_like, center))
    close(as_dict(model), before)  # at the centre nothing decays
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), center)
    with pytest.raises(ValueError, match=r"bfloat16 at .*first.*; keep float32"):
        tx().init(narrow)
