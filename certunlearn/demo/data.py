"""The demo's images: scikit-learn's digits, or MNIST or CIFAR-10 from a folder or the public hub.

Of CIFAR-10 one half is public: five classes that train a network once. Its features of the other
five classes are the examples; they depend on no private image but their own.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from certunlearn.demo import hub, image_halves, public_network

Examples = dict[str, np.ndarray]  # "x": float32 [n, pixels in [0, 1], or features]; "y": int32 [n]

_HUB_NAME = "ylecun/mnist"
_PUBLIC_WIDTHS, _PUBLIC_EPOCHS = (16, 32, 64), 3


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Training and test examples.

    `is_features`: whether `x` holds public features of norm 1 at most, and not pixels. `origin`:
    where they come from, in a sentence, if they are.
    """

    name: str
    train: Examples
    test: Examples
    is_features: bool = False
    origin: str = ""


def load(
    name: str,
    data_dir: Path | str | None,
    seed: int,
    *,
    progress: bool = False,
    say: Callable[[str], object] = print,
) -> Dataset:
    """Loads `"digits"` (split 80/20 by the seed), `"mnist"` or `"cifar10"` (with own test sets).

    Args:
      name: the name of the dataset.
      data_dir: the folder that holds `mnist/` or `cifar10/`, or is it; None for the public hub.
      seed: of the split.
      progress: whether loaders may draw progress bars.
      say: told what is being done.

    Raises:
      OSError: if the data cannot be found or read.
    """
    if name == "digits":
        return digits(seed)
    return mnist(data_dir, progress) if name == "mnist" else cifar10(data_dir, progress, say)


def digits(seed: int) -> Dataset:
    """1,797 images of 8 x 8 pixels, no download."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    everything = {"x": (images / 16).astype(np.float32), "y": labels.astype(np.int32)}
    order = np.random.default_rng(seed).permutation(len(labels))
    test = len(labels) // 5
    return Dataset("digits", take(everything, order[test:]), take(everything, order[:test]))


def mnist(data_dir: Path | str | None, progress: bool = False) -> Dataset:
    """60,000 training and 10,000 test images of 28 x 28 pixels."""
    return Dataset("mnist", *hub.load("mnist", _HUB_NAME, _arrays, data_dir, progress))


def cifar10(
    data_dir: Path | str | None, progress: bool = False, say: Callable[[str], object] = print
) -> Dataset:
    """25,000 training and 5,000 test images of five classes, as features of a public network."""
    full = image_halves.cifar10(data_dir, progress)
    # A quarter of the pixels, so that the public network takes half a minute on two cores.
    small = image_halves.Halves(*map(image_halves.half_size, full))
    return of_halves("cifar10", small, say)


def of_halves(name: str, halves: image_halves.Halves, say: Callable[[str], object]) -> Dataset:
    """The private half and the test set, as features of a network trained on the public half."""
    say(f"{name}: training a network on the public half, {_PUBLIC_EPOCHS} epochs")
    net = public_network.Network(_PUBLIC_WIDTHS)
    params = public_network.train(net, halves.public, _PUBLIC_EPOCHS)
    raw = [public_network.features(net, params, images) for images in halves]
    scaling = public_network.Scaling.of(raw[0])
    train, test = (
        {"x": scaling(rows), "y": images.labels}
        for rows, images in zip(raw[1:], halves[1:], strict=True)
    )
    origin = (
        f"Its examples are features by a network that was trained on {len(halves.public.labels)} "
        "public images of other classes."
    )
    return Dataset(name, train, test, is_features=True, origin=origin)


def split_forget(train: Examples, fraction: float, seed: int) -> tuple[Examples, Examples]:
    """Splits training examples at random into (retain, forget)."""
    size = len(train["y"])
    order = np.random.default_rng([seed, 1]).permutation(size)
    forget = round(size * fraction)
    return take(train, np.sort(order[forget:])), take(train, np.sort(order[:forget]))


def take(examples: Examples, indices: np.ndarray) -> Examples:
    """The examples at the given indices."""
    return {name: array[indices] for name, array in examples.items()}


def _arrays(columns: dict[str, np.ndarray]) -> Examples:
    images = np.asarray(columns["image"], np.float32) / 255
    return {"x": images.reshape(len(images), -1), "y": np.asarray(columns["label"], np.int32)}
