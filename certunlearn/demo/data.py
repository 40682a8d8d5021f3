"""The demo's images: scikit-learn's bundled digits, or MNIST from a folder or the public hub."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

Examples = dict[str, np.ndarray]  # "x": float32 [n, pixels] in [0, 1]; "y": int32 [n]

_HUB_NAME = "ylecun/mnist"


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Training and test examples."""

    name: str
    train: Examples
    test: Examples


def load(name: str, data_dir: Path | str | None, seed: int, *, progress: bool = False) -> Dataset:
    """Loads `"digits"` (split 80/20 by the seed) or `"mnist"` (with its own test set).

    Args:
      name: the name of the dataset.
      data_dir: for MNIST, the folder that holds `mnist/` or is it; None for the public hub.
      seed: of the split.
      progress: whether loaders may draw progress bars.

    Raises:
      OSError: if MNIST cannot be found or read.
    """
    return digits(seed) if name == "digits" else mnist(data_dir, progress)


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
    source = _HUB_NAME if data_dir is None else str(_mnist_folder(Path(data_dir)))
    import datasets

    if not progress:
        datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(source)
        return Dataset("mnist", _arrays(loaded["train"]), _arrays(loaded["test"]))
    except Exception as error:  # network, disk, parquet and image errors of several libraries
        remedy = "; give --data-dir, a folder that holds mnist/" if data_dir is None else ""
        raise OSError(f"cannot load MNIST from {source!r} ({error}){remedy}") from error


def split_forget(train: Examples, fraction: float, seed: int) -> tuple[Examples, Examples]:
    """Splits training examples at random into (retain, forget)."""
    size = len(train["y"])
    order = np.random.default_rng([seed, 1]).permutation(size)
    forget = round(size * fraction)
    return take(train, np.sort(order[forget:])), take(train, np.sort(order[:forget]))


def take(examples: Examples, indices: np.ndarray) -> Examples:
    """The examples at the given indices."""
    return {name: array[indices] for name, array in examples.items()}


def _mnist_folder(data_dir: Path) -> Path:
    for folder in (data_dir / "mnist", data_dir):
        if folder.is_dir() and any(folder.glob("*.parquet")):
            return folder
    raise OSError(f"no MNIST in {str(data_dir)!r}: neither it nor its mnist/ holds .parquet files")


def _arrays(split: Any) -> Examples:
    columns = split.with_format("numpy")[:]
    images = np.asarray(columns["image"], np.float32) / 255
    return {"x": images.reshape(len(images), -1), "y": np.asarray(columns["label"], np.int32)}
