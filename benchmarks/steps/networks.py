"""The networks that are measured: parameters, a loss and synthetic data, in JAX alone."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

BATCHES_OF_DATA = 32  # different batches; after them the data begins anew


@dataclasses.dataclass(frozen=True)
class Network:
    """What is trained. `layers` names the PyTorch network that is equal, where there is one."""

    name: str
    params: Any
    loss_fn: Callable[[Any, Any], jax.Array]
    data: Any
    batch_size: int
    layers: tuple[Any, ...] = ()

    @property
    def parameters(self) -> int:
        """How many."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def _weights(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])), jnp.float32)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def mlp(name: str, widths: tuple[int, ...], batch_size: int) -> Network:
    """Dense layers with ReLU between them."""
    rng = np.random.default_rng(0)
    shapes = list(itertools.pairwise(widths))
    params = [{"w": _weights(rng, *shape), "b": jnp.zeros(shape[1])} for shape in shapes]

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        x, y = batch
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        return _cross_entropy(x @ params[-1]["w"] + params[-1]["b"], y)

    size = batch_size * BATCHES_OF_DATA
    x = jnp.asarray(rng.normal(size=(size, widths[0])), jnp.float32)
    y = jnp.asarray(rng.integers(widths[-1], size=size))
    layers = tuple(("dense", *shape) for shape in shapes)
    return Network(name, params, loss_fn, (x, y), batch_size, layers)


def cnn(
    name: str, side: int, channels: tuple[int, ...], hidden: tuple[int, ...], batch_size: int
) -> Network:
    """Convolutions of 3 x 3, each with ReLU and a maximum over 2 x 2, then dense layers."""
    rng = np.random.default_rng(0)
    pairs = list(itertools.pairwise(channels))
    convolutions = [{"w": _weights(rng, 3, 3, *pair), "b": jnp.zeros(pair[1])} for pair in pairs]
    flat = (side // 2 ** len(pairs)) ** 2 * channels[-1]
    shapes = list(zip((flat, *hidden), (*hidden, 10), strict=True))
    dense = [{"w": _weights(rng, *shape), "b": jnp.zeros(shape[1])} for shape in shapes]

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        x, y = batch
        for layer in params["convolutions"]:
            x = jax.lax.conv_general_dilated(
                x, layer["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x + layer["b"])
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        x = x.reshape(len(x), -1)
        for layer in params["dense"][:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        return _cross_entropy(x @ params["dense"][-1]["w"] + params["dense"][-1]["b"], y)

    size = batch_size * BATCHES_OF_DATA
    x = jnp.asarray(rng.normal(size=(size, side, side, channels[0])), jnp.float32)
    y = jnp.asarray(rng.integers(10, size=size))
    layers = (*(("convolution", *p) for p in pairs), "flat", *(("dense", *s) for s in shapes))
    params = {"convolutions": convolutions, "dense": dense}
    return Network(name, params, loss_fn, (x, y), batch_size, layers)


def transformer(
    name: str, width: int, blocks: int, heads: int, words: int, length: int, batch_size: int
) -> Network:
    """A causal language model of attention and dense layers, without dropout."""
    rng = np.random.default_rng(0)
    block = lambda: {  # noqa: E731
        "qkv": _weights(rng, width, 3 * width),
        "out": _weights(rng, width, width),
        "up": _weights(rng, width, 4 * width),
        "down": _weights(rng, 4 * width, width),
        "scales": jnp.ones((2, width)),
    }
    params = {
        "words": _weights(rng, words, width),
        "places": 0.02 * _weights(rng, length, width),
        "blocks": [block() for _ in range(blocks)],
        "last": _weights(rng, width, words),
    }

    def normed(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        x = params["words"][batch[:, :-1]] + params["places"]
        for block in params["blocks"]:
            parts = (normed(x, block["scales"][0]) @ block["qkv"]).reshape(
                *x.shape[:2], 3, heads, width // heads
            )
            seen = jax.nn.dot_product_attention(
                parts[:, :, 0], parts[:, :, 1], parts[:, :, 2], is_causal=True
            )
            x = x + seen.reshape(x.shape) @ block["out"]
            x = x + jax.nn.gelu(normed(x, block["scales"][1]) @ block["up"]) @ block["down"]
        return _cross_entropy(normed(x, jnp.ones(width)) @ params["last"], batch[:, 1:])

    tokens = rng.integers(words, size=(batch_size * BATCHES_OF_DATA, length + 1))
    return Network(name, params, loss_fn, jnp.asarray(tokens), batch_size)


ROWS: dict[str, Callable[[], Network]] = {
    "MLP 4k": lambda: mlp("MLP 3,985, batch 128", (64, 53, 10), 128),
    "MLP 100k": lambda: mlp("MLP 100k, batch 128", (784, 126, 10), 128),
    "CNN 20k": lambda: cnn("CNN 20k, batch 128", 28, (1, 16, 32), (), 128),
    "CNN 2M": lambda: cnn("CNN 2M, batch 32", 28, (1, 32, 64), (640,), 32),
    "transformer 10M": lambda: transformer("transformer 10M, 8 x 128", 384, 4, 6, 4096, 128, 8),
}
TINY = lambda: mlp("MLP 130, batch 8", (10, 8, 4), 8)  # noqa: E731
