"""Images, and how they are divided: training, validation and test examples share none."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from certunlearn.demo import data as data_lib
from certunlearn.demo import hub, image_halves, network, public_network

SPLIT_SEED = 0  # of the validation split, which is the same for all models


class ConvNet(nn.Module):
    """Two convolutions whose windows do not overlap (4 x 4, then 2 x 2), and a dense layer.

    They are written as products of matrices: XLA's convolutions of several networks are slow.
    """

    widths: tuple[int, int] = (42, 86)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits `[n, 10]` of images `[n, 16, 16, 3]`."""
        for window, width in zip((4, 2), self.widths, strict=True):
            n, height, _, channels = x.shape
            side = height // window
            x = x.reshape(n, side, window, side, window, channels).transpose(0, 1, 3, 2, 4, 5)
            x = nn.relu(nn.Dense(width)(x.reshape(n, side, side, window**2 * channels)))
        return nn.Dense(network.CLASSES)(x.reshape(len(x), -1))


class Problem(NamedTuple):
    """A network and its examples. `train` holds the forget sets, too."""

    name: str
    net: Any
    train: data_lib.Examples
    validation: data_lib.Examples
    test: data_lib.Examples


NETS = {"mnist": network.MLP(5), "cifar10": ConvNet()}


def split(size: int, validation: int, train: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Positions of training and of validation examples among `size`; none is in both."""
    order = np.random.default_rng(SPLIT_SEED).permutation(size)
    kept = order[validation:] if train is None else order[validation : validation + train]
    return np.sort(kept), np.sort(order[:validation])


def load(name: str, data_dir: Path | str | None, validation: int, train: int | None) -> Problem:
    """The problem of this name; `train` examples of it, or all that are not for validation."""
    if name == "mnist":
        dataset = data_lib.mnist(data_dir)
        whole, test = dataset.train, dataset.test
    else:
        whole, test = hub.load("cifar10", "uoft-cs/cifar10", _images, data_dir, False)
    kept, held_out = split(len(whole["y"]), validation, train)
    parts = data_lib.take(whole, kept), data_lib.take(whole, held_out), test
    return Problem(name, NETS[name], *parts)


def init(problem: Problem, key: jax.Array) -> Any:
    """Fresh random weights: they depend on no data but on the size of an image."""
    return problem.net.init(key, jnp.zeros((1, *problem.train["x"].shape[1:])))


def parameters(problem: Problem) -> int:
    """How many the network has."""
    shapes = jax.eval_shape(functools.partial(init, problem), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _images(columns: dict[str, np.ndarray]) -> data_lib.Examples:
    labels = np.asarray(columns["label"], np.int32)
    images = image_halves.Images(np.asarray(columns["img"], np.uint8), labels)
    pixels = public_network.scaled(image_halves.half_size(images).pixels)
    return {"x": np.asarray(pixels), "y": labels}
