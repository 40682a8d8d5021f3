"""EMA: a moving average of parameters that starts after the last noisy step.

Shows: a loop by hand: noisy steps, then fine-tuning, whose iterates are averaged and released.
Keeps the guarantee: the average sees the last noisy parameters and what follows, nothing earlier.
Would void it: an average over noisy steps, which shows iterates that must stay hidden.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import certunlearn as cu


def predict(params, x):
    return jax.nn.relu(x @ params["first"]) @ params["second"]


def loss_fn(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(predict(params, x), y).mean()


def training(tx, params, batches):
    @jax.jit
    def step(params, state, x, y):
        updates, state = tx.update(jax.grad(loss_fn)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for rows in batches:
        params, state = step(params, state, images[rows], labels[rows])
        yield params, state


images, labels = load_digits(return_X_y=True)
images, labels = np.float32(images / 16), np.int32(labels)
one, two = jax.random.split(jax.random.key(0))
trained = {  # in practice: the trained parameters
    "first": jax.random.normal(one, (64, 32)) / 8,
    "second": jax.random.normal(two, (32, 10)) / 6,
}
mechanism = cu.GradientClipping(init_radius=0.05, clip_norm=1.0, learning_rate=0.005, steps=6)
claim = {"delta": 1e-5, "accountant": "interpolation"}
claim["noise_scale"] = cu.noise_scale(mechanism, epsilon=1.0, **claim)
keys = cu.unlearning.system_keys()
noisy_sgd = cu.noisy_sgd(mechanism, claim["noise_scale"], key=keys.noise)
start = cu.clip_params(trained, mechanism.init_radius)
noisy_batches = cu.batch_indices(keys.data, 1000, 100, mechanism.steps)  # of rows to be kept
for params, state in training(noisy_sgd, start, noisy_batches):
    pass  # these stay hidden: no average, no evaluation

average, seen = params, [params]  # the average starts here
batches = cu.batch_indices(keys.finetune, 1000, 100, 200)
for params, _ in training(optax.adam(0.01), params, batches):
    average = optax.incremental_update(params, average, step_size=0.05)
    seen.append(params)
# `state` is that of the noisy steps. Released is the average, and so the certificate is for it.
certificate = cu.certify(mechanism, **claim, params=average, state=state, finetune_steps=200)
released = average
assert cu.verify(certificate, released)
assert certificate.epsilon <= 1.0
assert (certificate.steps_run, len(seen)) == (mechanism.steps, 1 + certificate.finetune_steps)

weights = np.array([1.0] + 200 * [0.05]) * 0.95 ** np.arange(200, -1, -1)
by_hand = jax.tree.map(lambda *each: np.tensordot(weights, np.stack(each), 1), *seen)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), by_hand, average)
accuracy = jnp.mean(predict(average, images[1300:]).argmax(-1) == labels[1300:])
print(f"epsilon {certificate.epsilon:.3f}, test accuracy {accuracy:.1%}")
assert accuracy > 0.8
