"""Tied weights: a small transformer whose embedding is its output layer, too.

Shows: an NNX module that holds one array in two places unlearns in one call.
Keeps the guarantee: the shared array is one leaf, with one gradient (the sum) and one noise.
Would surprise: a pytree that holds one array under two names, which are two leaves: noise unties
them. The guarantee holds, but the model is another one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import certunlearn as cu


class Transformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(8, 16, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.hidden = nnx.Linear(16, 16, rngs=rngs)
        self.out = self.embed  # tied: the same module, and so the same array

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(self.norm(x), mask=nnx.make_causal_mask(tokens))
        return self.out.attend(x + nnx.relu(self.hidden(x)))


def loss_fn(model, tokens):
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


starts = np.random.default_rng(0).integers(0, 8, (400, 1))
retain = np.int32((starts + 3 * np.arange(9)) % 8)  # every token is the one before, plus 3

model = Transformer(nnx.Rngs(0))  # in practice: the trained model
mechanism = cu.GradientClipping(init_radius=0.05, clip_norm=1.0, learning_rate=0.005, steps=6)
request = {"epsilon": 1.0, "delta": 1e-5, "batch_size": 100, "progress": False}
request["accountant"] = "interpolation"  # takes no time; the default asks for less noise
finetune = cu.Finetune(optax.adam(0.01), 100)
result = cu.unlearn(loss_fn, model, retain, mechanism, **request, finetune=finetune)
released, certificate = result.params, result.certificate
assert cu.verify(certificate, released)
assert certificate.epsilon <= 1.0

assert released.out is released.embed  # still tied
assert "out" not in nnx.state(released, nnx.Param)  # one leaf, counted once
assert certificate.coverage["parameters"] == sum(map(jnp.size, jax.tree.leaves(nnx.state(model))))

array = jnp.zeros((8, 16))
pytree = {"embed": array, "out": array}  # not tied: two leaves
noise = cu.noisy_sgd(mechanism, 0.1, key=cu.unlearning.system_keys().noise)
updates, _ = noise.update(pytree, noise.init(pytree), pytree)
assert not np.array_equal(updates["embed"], updates["out"])

accuracy = jnp.mean(released(retain[:, :-1]).argmax(-1) == retain[:, 1:])
print(f"epsilon {certificate.epsilon:.3f}, accuracy {accuracy:.1%}")
assert accuracy > 0.8
