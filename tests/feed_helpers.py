"""Retain data as arrays, as a source and as a stream, for the tests of each."""

import jax
import numpy as np
import optax
from loop_helpers import BATCH, DATA, SIZE

import certunlearn as cu
from certunlearn.unlearning import Stream

KEYS = cu.split_key(jax.random.key(7))
TUNED = {"finetune": (optax.sgd(0.1), 4)}


class Source:
    """Rows of arrays, one by one."""

    def __init__(self, arrays=DATA, size=SIZE):
        self.arrays, self.size, self.read = arrays, size, []

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if type(index) is not int or not 0 <= index < self.size:
            raise IndexError(index)
        self.read.append(index)
        return jax.tree.map(lambda array: array[index], self.arrays)


class TorchStyle(Source):
    """Several rows at once, as PyTorch's loaders ask for them."""

    def __getitems__(self, indices):
        return [super(TorchStyle, self).__getitem__(index) for index in indices]

    def __getitem__(self, index):
        assert index == 0, "only the first example is asked for alone"
        return super().__getitem__(index)


def keyed(key=KEYS.data, data=DATA):
    """Batches as `unlearn` draws them of arrays."""

    def loader(epoch):
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), SIZE))
        for first in range(0, SIZE, BATCH):
            yield jax.tree.map(lambda x: x[order[first : first + BATCH]], data)  # noqa: B023

    return loader


def stream(loader, **changes):
    return Stream(loader, **({"size": SIZE, "batch_size": BATCH} | changes))
