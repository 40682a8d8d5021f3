"""Dropout: every noisy step draws a mask of its own, and none of the trained model's keys leave.

Shows: an NNX module with `nnx.Dropout` unlearns in one call, as it is trained.
Keeps the guarantee: masks are drawn from the step's key, which no example has a part in.
Would void it: masks chosen by looking at data, or a key for them that is also the noise key.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import certunlearn as cu


class Network(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, 32, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.second = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(nnx.relu(self.first(x))))


masks = []  # for this example only


def loss_fn(model, batch):
    drawn = nnx.clone(model).dropout(jnp.ones((len(batch["y"]), 32)))
    jax.debug.callback(lambda mask: masks.append(mask.tobytes()), drawn)
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"])


images, labels = load_digits(return_X_y=True)
images, labels = np.float32(images / 16), np.int32(labels)
retain = {"x": images[:1000], "y": labels[:1000]}  # rows 1000 to 1299 are to be forgotten

model = Network(nnx.Rngs(0))  # in practice: the trained model
mechanism = cu.GradientClipping(init_radius=0.05, clip_norm=1.0, learning_rate=0.005, steps=6)
request = {"epsilon": 1.0, "delta": 1e-5, "batch_size": 100, "progress": False}
request["accountant"] = "interpolation"  # takes no time; the default asks for less noise
finetune = cu.Finetune(optax.adam(0.01), 100)
result = cu.unlearn(loss_fn, model, retain, mechanism, **request, finetune=finetune)
released, certificate = result.params, result.certificate
assert cu.verify(certificate, released)
assert certificate.epsilon <= 1.0

jax.effects_barrier()
assert len(masks) == len(set(masks)) == 6 + 100  # one mask for each step, no two the same
assert int(released.dropout.rngs.count[...]) == 0  # how long the model was trained stays private
old, new = (jax.random.key_data(each.dropout.rngs.key[...]) for each in (model, released))
assert not np.array_equal(old, new)

released.eval()  # no dropout from now on
accuracy = jnp.mean(released(images[1300:]).argmax(-1) == labels[1300:])
print(f"epsilon {certificate.epsilon:.3f}, test accuracy {accuracy:.1%}")
assert accuracy > 0.7
