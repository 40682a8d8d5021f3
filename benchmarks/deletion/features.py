"""Features of every image by the public network, made once and kept in a private folder."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from certunlearn._numerics import files
from certunlearn.demo import public_network
from certunlearn.demo.image_halves import PRIVATE_CLASSES, Halves

FEW = 0.02  # of the private half, made public: what a public head can be trained on
VALIDATION = 0.1  # of the private half, held out for tuning


class Rows(NamedTuple):
    """Features `float32 [n, d]` of norm 1 at most, and labels `int32 [n]`."""

    x: np.ndarray
    y: np.ndarray

    def take(self, which: np.ndarray) -> "Rows":
        """The rows at these positions."""
        return Rows(self.x[which], self.y[which])


class Features(NamedTuple):
    """Rows of the public half, of the private half and of the test set."""

    public: Rows
    private: Rows
    test: Rows


class Split(NamedTuple):
    """One seed's division of the private half; the test set is only for reporting.

    Attributes:
      public: rows of the public classes.
      few: the few public rows of the private classes.
      train: private rows, in random order.
      validation: private rows held out for tuning.
      test: for reporting.
      classes: how many classes the private task has.
    """

    public: Rows
    few: Rows
    train: Rows
    validation: Rows
    test: Rows
    classes: int


def default_cache() -> Path:
    """The folder of the user's caches."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "certunlearn" / "deletion"


def make(images: Halves, widths: tuple[int, ...], epochs: int) -> Features:
    """Trains the public network and applies it to everything."""
    net = public_network.Network(widths)
    params = public_network.train(net, images.public, epochs, functools.partial(print, flush=True))
    raw = [public_network.features(net, params, part) for part in images]
    scaling = public_network.Scaling.of(raw[0])
    return Features(*(Rows(scaling(x), part.labels) for x, part in zip(raw, images, strict=True)))


def cached(
    path: Path, load: Callable[[], Halves], widths: tuple[int, ...], epochs: int
) -> Features:
    """The features kept at `path`; if there are none, they are made and kept.

    The file holds features of private images: it is written for its owner alone.
    """
    if not path.exists():
        features = make(load(), widths, epochs)
        arrays = {
            f"{name}_{part}": array
            for name in Features._fields
            for part, array in getattr(features, name)._asdict().items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, lambda file: np.savez(file, **arrays), private=True)
    with np.load(path, allow_pickle=False) as kept:
        rows = [Rows(kept[f"{name}_x"], kept[f"{name}_y"]) for name in Features._fields]
        return Features(*rows)


def split(features: Features, seed: int) -> Split:
    """Makes a few rows of the private half public, and holds out others, by the seed."""
    private = features.private
    order = np.random.default_rng([seed, 0]).permutation(len(private.y))
    few, held = round(FEW * len(order)), round(VALIDATION * len(order))
    parts = np.split(order, [few, few + held])
    few_rows, validation, train = (private.take(part) for part in parts)
    classes = len(PRIVATE_CLASSES)
    return Split(features.public, few_rows, train, validation, features.test, classes)
