"""Mixed precision: layers compute in bfloat16, parameters and noise stay in float32.

Shows: a Linen `TrainState` unlearns in one call, and comes back at step 0.
Keeps the guarantee: whatever the gradients' precision, the clip and the noise are in float32.
Would void it: parameters in bfloat16, whose rounding swallows the noise (refused), and in a loop
by hand a loss scale that skips steps whose gradients overflow. bfloat16 needs no loss scale.
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
    def __call__(self, x):  # Flax's `param_dtype` is float32 unless you say otherwise
        x = nn.relu(nn.Dense(32, dtype=jnp.bfloat16)(x))
        return nn.Dense(10, dtype=jnp.bfloat16)(x)


def loss_fn(params, batch):
    logits = network.apply({"params": params}, batch["x"])
    assert logits.dtype == jnp.bfloat16
    logits = logits.astype(jnp.float32)  # for the softmax and the mean
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


images, labels = load_digits(return_X_y=True)
images, labels = np.float32(images / 16), np.int32(labels)
retain = {"x": images[:1000], "y": labels[:1000]}  # rows 1000 to 1299 are to be forgotten

network = Network()
params = network.init(jax.random.key(0), images[:1])["params"]  # in practice: the trained ones
state = TrainState.create(apply_fn=network.apply, params=params, tx=optax.adam(0.01))
mechanism = cu.GradientClipping(init_radius=0.05, clip_norm=1.0, learning_rate=0.005, steps=6)
request = {"epsilon": 1.0, "delta": 1e-5, "batch_size": 100, "progress": False}
request["accountant"] = "interpolation"  # takes no time; the default asks for less noise
narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
try:
    cu.unlearn(loss_fn, narrow, retain, mechanism, **request)
except ValueError as refusal:
    print(f"refused: {refusal}")
else:
    raise AssertionError("parameters in bfloat16 were taken")

finetune = cu.Finetune(state.tx, 100)
result = cu.unlearn(loss_fn, state, retain, mechanism, **request, finetune=finetune)
released, certificate = result.params, result.certificate
assert cu.verify(certificate, released)
assert certificate.epsilon <= 1.0
assert certificate.coverage["dtypes"] == ["float32"]
assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(released.params))

logits = released.apply_fn({"params": released.params}, images[1300:])
accuracy = jnp.mean(logits.argmax(-1) == labels[1300:])
print(f"epsilon {certificate.epsilon:.3f}, test accuracy {accuracy:.1%}")
assert accuracy > 0.7
