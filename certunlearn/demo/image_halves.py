"""Images and how they are divided: a public half, a private half, a test set.

The halves share no class. With the same classes in both, a head trained on the public half alone is
as good as one trained on the private half: nothing private would be worth deleting, or training.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from certunlearn.demo import hub

PUBLIC_CLASSES = (0, 2, 4, 6, 8)  # of CIFAR-10: airplane, bird, deer, frog, ship
PRIVATE_CLASSES = (1, 3, 5, 7, 9)  # automobile, cat, dog, horse, truck
_HUB_NAME = "uoft-cs/cifar10"


class Images(NamedTuple):
    """Pictures `uint8 [n, height, width, 3]` and their labels `int32 [n]`."""

    pixels: np.ndarray
    labels: np.ndarray

    def take(self, which: np.ndarray) -> "Images":
        """The images at these positions."""
        return Images(self.pixels[which], self.labels[which])


class Halves(NamedTuple):
    """A public half, a private half of the training images, and test images as the private."""

    public: Images
    private: Images
    test: Images


def cifar10(data_dir: Path | str | None, progress: bool = False) -> Halves:
    """The halves of CIFAR-10, from a folder that holds `cifar10/` or from the public hub."""
    return halves(*hub.load("cifar10", _HUB_NAME, _arrays, data_dir, progress))


def synthetic(train: int, test: int) -> Halves:
    """Noisy copies of ten random pictures: for a run of seconds, whose numbers mean nothing."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, train + test).astype(np.int32)
    mean = rng.uniform(64, 192, (10, 4, 4, 3)).repeat(4, axis=1).repeat(4, axis=2)[labels]
    pixels = np.clip(mean + rng.normal(0, 128, mean.shape), 0, 255).astype(np.uint8)
    everything = Images(pixels, labels)
    each = np.arange(train + test)
    return halves(everything.take(each[:train]), everything.take(each[train:]))


def half_size(images: Images) -> Images:
    """Pictures of half the height and width: means of 2 x 2 pixels, rounded."""
    n, height, width, colours = images.pixels.shape
    squares = images.pixels.reshape(n, height // 2, 2, width // 2, 2, colours)
    means = np.mean(squares, axis=(2, 4), dtype=np.float32)
    return images._replace(pixels=np.rint(means).astype(np.uint8))


def halves(train: Images, test: Images) -> Halves:
    """Divides the images by class; each half's labels count from 0."""
    private = _of_classes(train, PRIVATE_CLASSES), _of_classes(test, PRIVATE_CLASSES)
    return Halves(_of_classes(train, PUBLIC_CLASSES), *private)


def _of_classes(images: Images, classes: tuple[int, ...]) -> Images:
    chosen = images.take(np.isin(images.labels, classes))
    return chosen._replace(labels=np.searchsorted(classes, chosen.labels).astype(np.int32))


def _arrays(columns: dict[str, np.ndarray]) -> Images:
    return Images(np.asarray(columns["img"], np.uint8), np.asarray(columns["label"], np.int32))
