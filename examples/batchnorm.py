"""BatchNorm: a network unlearns in one call, and its running statistics are made anew.

Shows: an NNX module goes in and comes out. In the noisy steps every batch is normalised by itself.
Keeps the guarantee: the statistics are recomputed by the released parameters on retain data only.
Would void it: releasing the statistics of the trained model, or those gathered in the noisy steps.
"""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import certunlearn as cu


class Network(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.second = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.norm(self.first(x))))


def loss_fn(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"])


def recompute(model, data):
    for _ in range(100):  # after which 0.9**100 is left of where the averages started
        model(data["x"])


images, labels = load_digits(return_X_y=True)
images, labels = np.float32(images / 16), np.int32(labels)
retain = {"x": images[:1000], "y": labels[:1000]}  # rows 1000 to 1299 are to be forgotten

model = Network(nnx.Rngs(0))  # in practice: the trained model
model.norm.mean[...] += 100.0  # what only the trained model knows
mechanism = cu.GradientClipping(init_radius=0.05, clip_norm=1.0, learning_rate=0.005, steps=6)
request = {"epsilon": 1.0, "delta": 1e-5, "batch_size": 100, "progress": False}
request["accountant"] = "interpolation"  # takes no time; the default asks for less noise
try:
    cu.unlearn(loss_fn, model, retain, mechanism, **request)
except ValueError as refusal:  # ... carries state besides parameters (norm/mean, norm/var) ...
    assert "norm/mean" in str(refusal)
else:
    raise AssertionError("statistics of the trained model would have been released")

options, finetune = cu.Options(recompute_state=recompute), cu.Finetune(optax.adam(0.01), 100)
result = cu.unlearn(
    loss_fn, model, retain, mechanism, **request, finetune=finetune, options=options
)
released, certificate = result.params, result.certificate
assert cu.verify(certificate, released)
assert certificate.epsilon <= 1.0

released.eval()  # from now on the running statistics are used
hidden = released.first(retain["x"])
np.testing.assert_allclose(released.norm.mean[...], hidden.mean(0), rtol=1e-3, atol=1e-3)
np.testing.assert_allclose(released.norm.var[...], hidden.var(0), rtol=1e-2, atol=1e-3)
accuracy = jnp.mean(released(images[1300:]).argmax(-1) == labels[1300:])
print(f"epsilon {certificate.epsilon:.3f}, test accuracy {accuracy:.1%}")
assert accuracy > 0.8
