"""Gradient accumulation: four small batches make one noisy step, in an NNX training loop.

Shows: `optax.MultiSteps` around `cu.noisy_sgd`; the loop is as in Flax's tutorial.
Keeps the guarantee: gradients are averaged first, then clipped, and get noise once.
Would void it: a loop that ends early, or `should_skip_update_fn`, which looks at gradients and
leaves steps out. `certify` refuses both, since too few steps were counted.
"""

import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import certunlearn as cu


class Network(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, 32, rngs=rngs)
        self.second = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def loss_fn(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def step(model, optimizer, x, y):
    grads = nnx.grad(loss_fn)(model, x, y)
    optimizer.update(model, grads)


images, labels = load_digits(return_X_y=True)
images, labels = np.float32(images / 16), np.int32(labels)
model = Network(nnx.Rngs(0))  # in practice: the trained model
mechanism = cu.GradientClipping(init_radius=0.05, clip_norm=1.0, learning_rate=0.005, steps=6)
claim = {"delta": 1e-5, "accountant": "interpolation"}
claim["noise_scale"] = cu.noise_scale(mechanism, epsilon=1.0, **claim)
keys = cu.unlearning.system_keys()
noisy_sgd = cu.noisy_sgd(mechanism, claim["noise_scale"], key=keys.noise)
nnx.update(model, cu.clip_params(nnx.state(model, nnx.Param), mechanism.init_radius))
tx = optax.MultiSteps(noisy_sgd, every_k_schedule=4).gradient_transformation()
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

changes, calls = 0, 4 * mechanism.steps  # four times as many calls as noisy steps
for call, rows in enumerate(cu.batch_indices(keys.data, 1000, 25, calls)):  # of rows to be kept
    if call == calls - 1:
        try:
            cu.certify(mechanism, **claim, params=model, state=optimizer)
        except ValueError as refusal:  # one call too early
            print(f"refused: {refusal}")
        else:
            raise AssertionError("a run that is not complete was certified")
    before = jax.tree.map(np.array, nnx.state(model, nnx.Param))
    step(model, optimizer, images[rows], labels[rows])
    changes += not np.array_equal(before["first"]["kernel"], model.first.kernel[...])

released, certificate = model, cu.certify(mechanism, **claim, params=model, state=optimizer)
assert cu.verify(certificate, released)
assert certificate.epsilon <= 1.0
assert changes == certificate.steps_run == mechanism.steps
print(f"epsilon {certificate.epsilon:.3f}, {calls} calls, {certificate.steps_run} noisy steps")
