"""Embeddings: a customer's rows leave a classifier on public embeddings, with epsilon = 0.

Shows: `cu.exact`: rows are subtracted from exact sums, and the new head is the head of someone who
never had them, bit for bit. Nothing is retrained.
Keeps the guarantee: the network that makes embeddings, and their standardisation, are public.
Would void it: a network that was trained or chosen on the customer's rows, or sums that leave.
"""

import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import certunlearn as cu

images, labels = load_digits(return_X_y=True)
images, labels = np.float32(images / 16), np.int32(labels)
public, private, test = slice(0, 500), slice(500, 1400), slice(1400, None)
customer = np.arange(900) % 30  # whose each private row is


def hidden(weights, x):
    return jax.nn.relu(x @ weights["in"])


@jax.jit
def train(weights, state):
    def loss_fn(weights):
        logits = hidden(weights, images[public]) @ weights["out"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[public]).mean()

    updates, state = adam.update(jax.grad(loss_fn)(weights), state)
    return optax.apply_updates(weights, updates), state


# A network that public images have trained. In practice: one that you have downloaded.
keys, adam = jax.random.split(jax.random.key(0)), optax.adam(0.01)
weights = {
    "in": jax.random.normal(keys[0], (64, 64)) / 8,
    "out": jax.random.normal(keys[1], (64, 10)) / 8,
}
state = adam.init(weights)
for _ in range(100):
    weights, state = train(weights, state)

# Embeddings are made once and stored, so that a row is subtracted as it was added.
embeddings = np.asarray(hidden(weights, images))
scaled = cu.exact.standardization(embeddings[public])
x, y = scaled(embeddings[private]), labels[private]
stats = cu.exact.collect(x, y, feature_norm=scaled.feature_norm)
before = cu.exact.ridge(stats, l2=1e-2)

# Customer 7 asks to be forgotten.
gone = customer == 7
stats = cu.exact.remove(stats, x[gone], y[gone])
head = cu.exact.ridge(stats, l2=1e-2)
certificate = cu.exact.certify(stats, head, forget_size=int(gone.sum()))
verified = cu.verify(certificate, head, stats=stats)
print(verified.summary)

assert verified, verified.problems
assert certificate.epsilon == certificate.delta == 0
never = cu.exact.collect(x[~gone], y[~gone], feature_norm=scaled.feature_norm)
assert np.array_equal(head, cu.exact.ridge(never, l2=1e-2))  # bit for bit
assert not np.array_equal(head, before)
assert not cu.verify(certificate, before, stats=stats)  # the old head has no certificate


def accuracy(head):
    scores = scaled(embeddings[test]) @ head
    return np.mean(np.argmax(scores, axis=-1) == labels[test])


print(f"epsilon 0, test accuracy {accuracy(before):.1%} -> {accuracy(head):.1%}")
assert accuracy(head) > 0.8
