"""The demo's network, its loss, its training without privacy, and what is measured on it."""

import functools
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from chex import ArrayTree

from certunlearn.demo import membership
from certunlearn.demo.data import Examples
from certunlearn.unlearning import compiled_steps as steps_lib
from certunlearn.unlearning import data_feeds
from certunlearn.unlearning.leaf_split import Split
from certunlearn.unlearning.model_loss import Loss

CLASSES = 10


class LinearHead:
    """Outputs that are linear in the examples, which are features."""

    def apply(self, params: ArrayTree, x: jax.Array | np.ndarray) -> jax.Array:
        """Outputs `[n, 10]` of features `[n, d]` and params `[d, 10]`."""
        return jnp.matmul(x, jnp.asarray(params))


class MLP(nn.Module):
    """One hidden layer of rectified units."""

    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits `[n, 10]` of images `[n, pixels]`."""
        hidden = nn.relu(nn.Dense(self.hidden)(x))
        return nn.Dense(CLASSES)(hidden)


def init(net: MLP, seed: int | jax.Array, pixels: int) -> ArrayTree:
    """Random initial parameters from a seed or a key: they depend on no data."""
    key = jax.random.key(seed) if isinstance(seed, int) else seed
    return net.init(key, jnp.zeros((1, pixels)))


def margins(logits: jax.Array, labels: jax.Array | np.ndarray) -> jax.Array:
    """The label's logit less the log-sum-exp of the others: the logit of its probability."""
    is_label = jax.nn.one_hot(labels, CLASSES, dtype=bool)
    others = jax.nn.logsumexp(logits, axis=-1, where=~is_label)
    return jnp.sum(logits, axis=-1, where=is_label) - others


def losses(
    net: MLP | LinearHead, params: ArrayTree, batch: Examples
) -> tuple[jax.Array, jax.Array]:
    """Each example's cross-entropy, and whether it is classified correctly.

    Written as softplus(-margin), which does not round to zero: a memorised example's loss is far
    below float32's resolution near one, and the attack ranks by it.
    """
    logits = jnp.asarray(net.apply(params, batch["x"]))
    loss = jax.nn.softplus(-margins(logits, batch["y"]))
    return loss, jnp.argmax(logits, axis=-1) == batch["y"]


def mean_loss(net: MLP, params: ArrayTree, batch: Examples) -> jax.Array:
    """The batch's mean cross-entropy: `loss_fn` of `unlearn`, given the network."""
    return jnp.mean(losses(net, params, batch)[0])


def train(
    net: MLP,
    params: ArrayTree,
    data: Examples,
    optimizer: optax.GradientTransformation,
    steps: int,
    batch_size: int,
    key: jax.Array,
    advance: Callable[[int], object] = lambda count: None,
) -> ArrayTree:
    """Trains without noise, in the loop that `unlearn` fine-tunes with."""
    for trained in training(net, params, data, optimizer, steps, batch_size, key):
        params = trained
        advance(1)
    return params


def training(
    net: MLP,
    params: ArrayTree,
    data: Examples,
    optimizer: optax.GradientTransformation,
    steps: int,
    batch_size: int,
    key: jax.Array,
) -> Iterator[ArrayTree]:
    """The parameters after every step of `train`, so that it can be stopped early."""
    loss = Loss.of(functools.partial(mean_loss, net), Split.make(params))
    one = steps_lib.noiseless_step(loss, optimizer, key)
    planned = data_feeds.Steps(key=key, batch_size=batch_size, first=0, stop=steps)
    calls = data_feeds.feed_of(data).calls(planned)
    for trained, _ in steps_lib.finetuning_steps(one, optimizer, params, calls):
        yield trained


def evaluator(
    net: MLP | LinearHead, test: Examples, retain: Examples, forget: Examples, reference: ArrayTree
) -> Callable[[ArrayTree], dict[str, float]]:
    """A function from parameters to what is measured on them.

    Args:
      net: the network.
      test: examples that no model was trained on.
      retain: examples to keep.
      forget: examples to forget.
      reference: parameters trained on retain data only, to calibrate the attack.

    Returns:
      `evaluate(params)`, a dict: accuracies `test`, `retain` and `forget`, and the area under the
      ROC curve of forget against test: `auc` of the calibrated attack, `loss_auc` of the plain one.
    """
    sets = jax.tree.map(jnp.asarray, {"test": test, "retain": retain, "forget": forget})
    measure = jax.jit(functools.partial(losses, net))

    expected = {
        name: jax.device_get(measure(reference, sets[name])[0]) for name in ("forget", "test")
    }

    def evaluate(params: ArrayTree) -> dict[str, float]:
        seen = {name: jax.device_get(measure(params, examples)) for name, examples in sets.items()}
        accuracies = {name: float(np.mean(correct)) for name, (_, correct) in seen.items()}
        scores = {name: membership.calibrated(seen[name][0], expected[name]) for name in expected}
        return {
            **accuracies,
            "auc": membership.auc(scores["forget"], scores["test"]),
            "loss_auc": membership.auc(seen["forget"][0], seen["test"][0]),
        }

    return evaluate
