"""The public network: trained on the public half alone, and the features that it makes."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from certunlearn.demo.image_halves import PUBLIC_CLASSES, Images

CLASSES = len(PUBLIC_CLASSES)
BATCH_SIZE = 128
PEAK_RATE, WEIGHT_DECAY = 4e-3, 1e-3
SHIFT = 3  # pixels by which training images are moved, at most
CONSTANT = 0.5  # appended to features whose median norm is 1: the intercept's feature
SHARE = 0.8  # of norm 1 that the median row takes, so that few rows are clipped


class Network(nn.Module):
    """Three convolutions, each pooled; the last map is pooled to 2 x 2."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Outputs `[n, 5]` and features `[n, 4 * widths[-1]]`."""
        for width in self.widths:
            x = nn.Conv(width, (3, 3))(x)
            x = nn.relu(nn.GroupNorm(num_groups=min(8, width))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        side = x.shape[1] // 2
        features = nn.avg_pool(x, (side, side), (side, side)).reshape(len(x), -1)
        return nn.Dense(CLASSES)(features), features


def scaled(pixels: Any) -> jax.Array:
    """Pixels as float32 of about unit variance."""
    return (jnp.asarray(pixels, jnp.float32) / 255 - 0.47) / 0.25


def augmented(key: jax.Array, images: jax.Array) -> jax.Array:
    """Images mirrored at random and moved by up to `SHIFT` pixels."""
    flips, moves = jax.random.split(key)
    mirrored = jax.random.bernoulli(flips, 0.5, (len(images), 1, 1, 1))
    images = jnp.where(mirrored, images[:, :, ::-1], images)
    padded = jnp.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)))
    offsets = jax.random.randint(moves, (len(images), 2), 0, 2 * SHIFT + 1)

    def cut(image: jax.Array, at: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (at[0], at[1], 0), images.shape[1:])

    return jax.vmap(cut)(padded, offsets)


def train(
    network: Network, public: Images, epochs: int, say: Callable[[str], object] = lambda text: None
) -> Any:
    """Trains on the public half with AdamW and one cycle of the rate; all seeds are fixed.

    The loss is least squares, as that of the exact heads, so that the features suit them.
    """
    pixels, labels = jnp.asarray(public.pixels), jnp.asarray(public.labels)
    size = len(public.labels)
    steps = epochs * (size // BATCH_SIZE)
    rate = optax.cosine_onecycle_schedule(steps, PEAK_RATE, 0.2)
    optimizer = optax.adamw(rate, weight_decay=WEIGHT_DECAY)
    params = network.init(jax.random.key(0), scaled(public.pixels[:1]))
    state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, indices: jax.Array, key: jax.Array) -> tuple[Any, Any]:
        batch = augmented(key, scaled(pixels[indices]))

        def mean_loss(params: Any) -> jax.Array:
            logits, _ = network.apply(params, batch)
            wanted = 2 * jax.nn.one_hot(labels[indices], CLASSES) - 1
            return jnp.mean(jnp.sum((logits - wanted) ** 2, axis=1)) / 2

        updates, state = optimizer.update(jax.grad(mean_loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    rng, key = np.random.default_rng(1), jax.random.key(1)
    for epoch in range(epochs):
        order = rng.permutation(size)
        for start in range(0, size - BATCH_SIZE + 1, BATCH_SIZE):
            key, own = jax.random.split(key)
            params, state = step(params, state, order[start : start + BATCH_SIZE], own)
        jax.block_until_ready(params)
        say(f"public network: epoch {epoch + 1} of {epochs}")
    return params


def features(network: Network, params: Any, images: Images) -> np.ndarray:
    """Raw features of all images, in blocks."""
    apply = jax.jit(lambda pixels: network.apply(params, scaled(pixels))[1])
    blocks = range(0, len(images.labels), 500)
    return np.concatenate([np.asarray(apply(images.pixels[i : i + 500])) for i in blocks])


class Scaling(NamedTuple):
    """What turns raw features into vectors of norm 1 at most: constants of the public half."""

    mean: np.ndarray
    typical: float  # median norm of the centred public features

    @classmethod
    def of(cls, raw: np.ndarray) -> "Scaling":
        """The constants of these public features."""
        mean = np.asarray(np.mean(raw, axis=0, dtype=np.float64))
        return cls(mean, float(np.median(np.linalg.norm(raw - mean, axis=1))))

    def __call__(self, raw: np.ndarray) -> np.ndarray:
        """Features `[n, d + 1]`: centred, scaled, a constant appended, clipped to norm 1."""
        constant = np.full((len(raw), 1), CONSTANT)
        rows = SHARE * np.concatenate([(raw - self.mean) / self.typical, constant], axis=1)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        # A little more than the norm, so that none exceeds 1 in float32.
        return (rows / np.maximum(norms * (1 + 1e-6), 1.0)).astype(np.float32)
