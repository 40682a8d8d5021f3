"""LoRA: adapters unlearn, the base that they adapt stays as it is.

Shows: `Options(frozen=nnx.Not(nnx.LoRAParam))`, so that adapters alone are trained; `center=` new
adapters.
Keeps the guarantee: the base is public. The certificate covers the adapters alone.
Would void it: a base that was trained on the rows to be forgotten.
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
        self.first = nnx.LoRALinear(64, 32, lora_rank=4, rngs=rngs)
        self.second = nnx.LoRALinear(32, 10, lora_rank=4, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def loss_fn(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"]).mean()


@nnx.jit
def pretrain(model, optimizer):
    grads = nnx.grad(loss_fn, argnums=nnx.DiffState(0, base))(model, public)
    optimizer.update(model, grads)


images, labels = load_digits(return_X_y=True)
images, labels = np.float32(images / 16), np.int32(labels)
public = {"x": images[:500], "y": labels[:500]}
mirrored = images.reshape(-1, 8, 8)[:, :, ::-1].reshape(-1, 64)  # what the adapters are for
retain = {"x": mirrored[500:1200], "y": labels[500:1200]}  # rows 1200 to 1299 are to be forgotten
base = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
center = Network(nnx.Rngs(0))  # the public base with new adapters
optimizer = nnx.Optimizer(center, optax.adam(0.02), wrt=base)
for _ in range(100):
    pretrain(center, optimizer)

model = nnx.clone(center)
model.second.lora.lora_b[...] += 1.0  # in practice: adapters trained on private rows
mechanism = cu.GradientClipping(init_radius=0.05, clip_norm=1.0, learning_rate=0.005, steps=6)
request = {"epsilon": 1.0, "delta": 1e-5, "batch_size": 100, "progress": False}
request["accountant"] = "interpolation"  # takes no time; the default asks for less noise
options, finetune = cu.Options(frozen=nnx.Not(nnx.LoRAParam)), cu.Finetune(optax.adam(0.01), 200)
result = cu.unlearn(
    loss_fn, model, retain, mechanism, **request, center=center, finetune=finetune, options=options
)
released, certificate = result.params, result.certificate
assert cu.verify(certificate, released)
assert certificate.epsilon <= 1.0
same = jax.tree.map(np.array_equal, nnx.state(released, base), nnx.state(center, base))
assert all(jax.tree.leaves(same))  # bit for bit
adapters = jax.tree.leaves(nnx.state(released, nnx.LoRAParam))
assert certificate.coverage["leaves"] == len(adapters) == 4
assert certificate.coverage["parameters"] == sum(map(np.size, adapters))

before, after = (
    jnp.mean(each(mirrored[1300:]).argmax(-1) == labels[1300:]) for each in (center, released)
)
print(f"epsilon {certificate.epsilon:.3f}, test accuracy {before:.1%} -> {after:.1%}")
assert after > before
