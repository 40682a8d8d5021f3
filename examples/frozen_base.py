"""Frozen base: a Linen training loop in which only the head takes noisy steps.

Shows: `optax.partition` with one noisy group; `TrainState` and the step are as in Flax's tutorial.
Keeps the guarantee: the base is public, and takes no step. The certificate covers the head alone.
Would void it: a base that saw the rows to be forgotten, `optax.masked`, which lets raw gradients
through to the rest, and two noisy groups, each of which is clipped by itself.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import certunlearn as cu


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10, name="head")(nn.relu(nn.Dense(128, name="base")(x)))


@jax.jit
def step(state, x, y):
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return state.apply_gradients(grads=jax.grad(loss_fn)(state.params))


def optimizer(tx):
    return optax.partition(
        {"noisy": tx, "frozen": optax.set_to_zero()}, {"base": "frozen", "head": "noisy"}
    )


images, labels = load_digits(return_X_y=True)
images, labels = np.float32(images / 16), np.int32(labels)
network = Network()
params = network.init(jax.random.key(0), images[:1])["params"]  # in practice: the trained ones
mechanism = cu.GradientClipping(init_radius=0.05, clip_norm=1.0, learning_rate=0.005, steps=6)
claim = {"delta": 1e-5, "accountant": "interpolation"}
claim["noise_scale"] = cu.noise_scale(mechanism, epsilon=1.0, **claim)
keys = cu.unlearning.system_keys()
noisy_sgd = cu.noisy_sgd(mechanism, claim["noise_scale"], key=keys.noise)
start = {**params, "head": cu.clip_params(params["head"], mechanism.init_radius)}
state = TrainState.create(apply_fn=network.apply, params=start, tx=optimizer(noisy_sgd))
for rows in cu.batch_indices(keys.data, 1000, 100, mechanism.steps):  # of rows to be kept
    state = step(state, images[rows], labels[rows])
evidence = state  # of the noisy steps; secret, and dropped after `certify`

state = TrainState.create(
    apply_fn=network.apply, params=state.params, tx=optimizer(optax.adam(0.01))
)
for rows in cu.batch_indices(keys.finetune, 1000, 100, 100):
    state = step(state, images[rows], labels[rows])
released = state.params
certificate = cu.certify(
    mechanism,
    **claim,
    params=released,
    state=evidence,
    frozen=["base/bias", "base/kernel"],
    finetune_steps=100,
)
assert cu.verify(certificate, released)
assert certificate.epsilon <= 1.0
assert all(jax.tree.leaves(jax.tree.map(np.array_equal, released["base"], params["base"])))
assert certificate.coverage["parameters"] == 128 * 10 + 10
accuracy = jnp.mean(network.apply({"params": released}, images[1300:]).argmax(-1) == labels[1300:])
print(f"epsilon {certificate.epsilon:.3f}, test accuracy {accuracy:.1%}")
assert accuracy > 0.6
