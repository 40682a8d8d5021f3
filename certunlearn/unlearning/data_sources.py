"""Examples that are fetched one by one: anything with a length and an index."""

from collections.abc import Generator, Sequence
from typing import Any

import jax
import numpy as np
from chex import ArrayTree

from certunlearn._numerics import recognition
from certunlearn.unlearning import inputs, resuming

# Positions are 32-bit integers on the device.
_MOST = 2**31 - 1
# Of so many examples the digest of a source is made, and of its length.
DIGESTED = 64


class Rows:
    """Examples of a random-access source, fetched and put together.

    Attributes:
      source: what they are fetched from.
      size: how many there are.
      shapes: shapes and dtypes of one example, with a leading axis of length 1.
    """

    def __init__(self, source: recognition.RandomAccess) -> None:
        """Fetches the first example.

        Raises:
          TypeError: if it is no pytree of numbers or arrays.
          ValueError: if there is none, or the length is not finite.
        """
        self.source, self.size = source, len(source)
        if not 1 <= self.size <= _MOST:
            raise ValueError(
                f"retain_data must have from 1 to {_MOST} examples, got len(retain_data) = "
                f"{self.size}"
            )
        first = [_item(source, 0)]
        self._structure: Any = jax.tree.structure(first[0])
        if any(map(_is_plain_list, jax.tree.leaves(first[0], is_leaf=_is_plain_list))):
            raise TypeError(
                "retain_data[0] must hold arrays where it holds lists of numbers, which JAX takes "
                'for containers: np.asarray(...), or with_format("numpy") of a Hugging Face data '
                "set"
            )
        if not jax.tree.leaves(first[0]):
            raise TypeError(f"retain_data[0] must hold numbers, got {inputs.kind(first[0])}")
        found = inputs.arrays("examples of retain_data", self._stacked(first, [0]))
        self.shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), found)

    def fetch(self, indices: np.ndarray) -> ArrayTree:
        """The examples of these indices as JAX arrays, with a leading axis. Each is fetched once.

        Raises:
          TypeError: if one holds something else than numbers.
          ValueError: if one is not like the first.
        """
        once, places = np.unique(indices, return_inverse=True)
        if len(once) < len(indices):
            host = jax.tree.map(lambda x: x[places], self.fetch_on_host(once))
        else:
            host = self.fetch_on_host(indices)
        found = inputs.arrays("examples of retain_data", host)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), found)
        if like != self.shapes:
            raise ValueError(
                "examples of retain_data must all have the shapes and dtypes of the first, "
                f"{self.shapes}, got {like}"
            )
        return found

    def fetch_on_host(self, indices: np.ndarray) -> ArrayTree:
        """The same as NumPy arrays, as wide as they were given."""
        numbers = [int(index) for index in indices]
        if recognition.is_batched_access(self.source):
            items = list(self.source.__getitems__(numbers))
            if len(items) != len(numbers):
                raise ValueError(
                    f"retain_data.__getitems__ must return as many examples as indices, "
                    f"{len(numbers)}, got {len(items)}"
                )
        else:
            items = [_item(self.source, number) for number in numbers]
        return self._stacked(items, numbers)

    def in_order(self, batch_size: int, count: int) -> Generator[ArrayTree, None, None]:
        """Up to `count` batches in the source's order, on the host; the last may be shorter."""
        for first in range(0, min(count * batch_size, self.size), batch_size):
            yield self.fetch_on_host(np.arange(first, min(first + batch_size, self.size)))

    def digested(self) -> tuple[np.ndarray, np.ndarray]:
        """What the source's digest is made of: its length, and examples spread evenly over it.

        Of each its own digest, so that only one is in memory at a time.
        """
        chosen = np.unique(np.linspace(0, self.size - 1, DIGESTED).astype(np.int64))
        found = [resuming.digest(self.fetch_on_host(chosen[i : i + 1])) for i in range(len(chosen))]
        return np.asarray(self.size), np.asarray(found)

    def _stacked(self, items: Sequence[Any], numbers: Sequence[int]) -> ArrayTree:
        parts = []
        for item, number in zip(items, numbers, strict=True):
            leaves, structure = jax.tree.flatten(item)
            if structure != self._structure:
                raise ValueError(
                    f"retain_data[{number}] must be structured like retain_data[0], "
                    f"{self._structure}, got {structure}. Leave out examples that a filter drops "
                    "before the run"
                )
            parts.append([_on_host(leaf, number) for leaf in leaves])
        try:
            stacked = [np.stack(column) for column in zip(*parts, strict=True)]
        except ValueError as error:
            raise ValueError(
                f"examples of retain_data must all have the shapes of the first: {error}"
            ) from error
        return jax.tree.unflatten(self._structure, stacked)


def _is_plain_list(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, bool | int | float) for each in value)
    )


def _item(source: recognition.RandomAccess, number: int) -> Any:
    try:
        return source[number]
    except Exception as error:
        error.add_note(f"retain_data[{number}] raised this")
        raise


def _on_host(leaf: Any, number: int) -> np.ndarray:
    if recognition.is_prng_key(leaf) or isinstance(leaf, np.ma.MaskedArray):
        raise TypeError(f"retain_data[{number}] must hold numbers, got {inputs.kind(leaf)}")
    return np.asarray(leaf)
