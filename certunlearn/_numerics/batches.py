"""Batches of retain data, without replacement within an epoch; Poisson samples."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from chex import ArrayTree

from certunlearn._numerics import binomial, checks, random_keys

# The largest chance that a step's Poisson sample is larger than the places kept for it. It is added
# to delta: see `accounting.poisson_training`.
OVERFLOW_CHANCE = 1e-30


def data_size(data: ArrayTree, name: str = "retain_data") -> int:
    """Number of examples in a pytree of arrays with a common leading axis.

    Raises:
      ValueError: if there is no array, no example, or the leading axes differ.
    """
    leaves = jax.tree.leaves(data)
    if not leaves or any(jnp.ndim(leaf) == 0 for leaf in leaves):
        raise ValueError(f"{name} must be a pytree of arrays with a leading axis of examples")
    sizes = {leaf.shape[0] for leaf in leaves}
    if len(sizes) > 1:
        raise ValueError(f"{name} must have one leading axis length, got {sorted(sizes)}")
    size = sizes.pop()
    if size == 0:
        raise ValueError(f"{name} must hold at least one example, got 0")
    return size


def check_batch_size(batch_size: int, size: int) -> int:
    """Returns `batch_size`, or raises ValueError if an epoch of `size` examples holds no batch."""
    batch_size = checks.positive_int("batch_size", batch_size)
    if batch_size > size:
        raise ValueError(
            f"batch_size must be at most the number of examples, {size}, got {batch_size}"
        )
    return batch_size


def epoch_order(key: jax.Array, epoch: int, size: int) -> np.ndarray:
    """int32 `[size]`: the order of the examples in epoch number `epoch`.

    It is that of `jax.random.permutation(jax.random.fold_in(key, epoch), size)`.
    """
    if jax.default_backend() != "cpu":
        return np.asarray(_permutation(key, epoch, size))
    # XLA sorts slowly on CPU: for small networks that took as long as the steps.
    order = places = np.arange(size, dtype=np.int32)
    rounds = math.ceil(3 * math.log(size) / math.log(2**32 - 1))
    for words in _sort_words(key, epoch, rounds, _drawn(key, size)):
        # In the low half the place: equal words stay in their order, and the sort gives the places.
        packed = np.asarray(words)[:size].astype(np.uint64)
        packed <<= 32
        packed |= places.view(np.uint32)
        packed.sort()
        packed &= 2**32 - 1
        order = order[packed]
    return order


@functools.partial(jax.jit, static_argnums=2)
def _permutation(key: jax.Array, epoch: int, size: int) -> jax.Array:
    return jax.random.permutation(jax.random.fold_in(key, epoch), size)


def _drawn(key: jax.Array, size: int) -> int:
    """How many words to draw so that the first are those for `size` examples.

    Up to an eighth more, if a word depends on its place alone: so that the program which draws them
    serves most retain sets of about the same size.
    """
    settings: Any = jax.config
    if not settings.jax_threefry_partitionable or jax.random.key_impl(key) != "threefry2x32":
        return size
    unit = 2 ** max(0, size.bit_length() - 4)
    return -(-size // unit) * unit


@functools.partial(jax.jit, static_argnums=(2, 3))
def _sort_words(key: jax.Array, epoch: int, rounds: int, size: int) -> list[jax.Array]:
    """The words by which `jax.random.permutation` sorts, round after round."""
    key, found = jax.random.fold_in(key, epoch), []
    for _ in range(rounds):
        key, own = jax.random.split(key)
        found.append(jax.random.bits(own, (size,), jnp.uint32))
    return found


def batches_from(
    key: jax.Array, size: int, batch_size: int, first: int = 0
) -> Iterator[np.ndarray]:
    """int32 `[batch_size]`: the indices of each step's batch, from step number `first` on."""
    per_epoch = size // batch_size
    for epoch in itertools.count(first // per_epoch):
        order = epoch_order(key, epoch, size)
        for position in range(first % per_epoch if epoch == first // per_epoch else 0, per_epoch):
            yield order[position * batch_size : (position + 1) * batch_size]


def batch_indices(key: jax.Array, size: int, batch_size: int, steps: int) -> Iterator[jax.Array]:
    """The indices of each step's batch, as `unlearn` draws them.

    Each epoch is a fresh random order of all examples, cut into batches; a remainder smaller than
    a batch is left out. The order depends on the key and the sizes only, never on parameters.

    Args:
      key: the data key; see `split_key`.
      size: number of examples.
      batch_size: examples in a batch.
      steps: number of batches.

    Yields:
      int32 `[batch_size]` index arrays, `steps` of them.

    Raises:
      TypeError: if an argument is not of the right kind.
      ValueError: if a number is out of range, or the batch larger than the data.

    >>> [b.shape for b in batch_indices(jax.random.key(0), size=10, batch_size=4, steps=3)]
    [(4,), (4,), (4,)]
    """
    key, size = random_keys.as_key(key), checks.positive_int("size", size)
    batch_size, steps = check_batch_size(batch_size, size), checks.positive_int("steps", steps)
    # A generator of its own, so that the checks are made at the call.
    return _batch_indices(key, size, batch_size, steps)


def _batch_indices(key: jax.Array, size: int, batch_size: int, steps: int) -> Iterator[jax.Array]:
    for indices in itertools.islice(batches_from(key, size, batch_size), steps):
        yield jnp.asarray(indices)


def poisson_capacity(
    size: int, rate: float, deletions: int = 0, microbatch_size: int | None = None
) -> int:
    """How many places to keep for a Poisson sample.

    They are enough for all examples, or too few with a chance of at most `OVERFLOW_CHANCE`.

    Args:
      size: number of examples. Private, and so is the number of places.
      rate: chance of each.
      deletions: number of examples that only the other run may draw. So many places are added.
      microbatch_size: what the number of places must be a multiple of, if not None; it may then
        exceed `size`.

    >>> poisson_capacity(60_000, 0.01), poisson_capacity(60_000, 0.01, microbatch_size=64)
    (900, 960)
    """
    places = max(1, min(size, binomial.quantile(size, rate, OVERFLOW_CHANCE) + deletions))
    unit = microbatch_size or 1
    return -(-places // unit) * unit


class Drawn(NamedTuple):
    """A sample whose examples were fetched before the step.

    Attributes:
      examples: one for each place.
      taken: bool, one for each place: False where it is empty.
    """

    examples: ArrayTree
    taken: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoissonSampling:
    """Steps that take each example with the same chance, independently.

    Attributes:
      rate: the chance, in (0, 1].
      deletions: number of examples that only one of the two runs may draw.
      batch_size: what sums of clipped gradients are divided by.
      sensitivity: how far one example moves a step at most, in parameter units.
    """

    rate: float
    deletions: int
    batch_size: int
    sensitivity: float

    def sample(
        self, data: ArrayTree, key: jax.Array | None, microbatch_size: int | None = None
    ) -> tuple[tuple[ArrayTree, jax.Array], float]:
        """One step's sample, drawn from all examples; `Drawn` is one already and needs no key.

        Returns:
          ((examples, taken), factor): an example for each place, a bool for each, and the number
          that their mean gradient (zero where not taken) must be multiplied by for the update. A
          sample with more examples than places is cut. Places left empty repeat the first example.
        """
        if isinstance(data, Drawn):
            return (data.examples, data.taken), data.taken.shape[0] / self.batch_size
        assert key is not None
        places, taken = self.draw(data_size(data), key, microbatch_size)
        drawn = Drawn(jax.tree.map(lambda x: x[places], data), taken)
        return self.sample(drawn, key)

    def places(self, size: int, microbatch_size: int | None = None) -> int:
        """How many places there are for a sample of `size` examples."""
        return poisson_capacity(size, self.rate, self.deletions, microbatch_size)

    def draw(
        self, size: int, key: jax.Array, microbatch_size: int | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """One step's sample, as (index of each place's example, whether the place is taken)."""
        capacity = self.places(size, microbatch_size)
        # Uniform float32 numbers are multiples of 2^-23: a rate that is one has exactly its chance,
        # and a lower rate is as private.
        rounded = math.floor(self.rate * 2**23) / 2**23
        chosen = jax.random.uniform(key, (size,), jnp.float32) < rounded
        places = jnp.nonzero(chosen, size=capacity, fill_value=0)[0]
        return places, jnp.arange(capacity) < jnp.sum(chosen)
