"""Batches that come from elsewhere: a stream whose sizes are declared."""

import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator

import jax
from chex import ArrayTree

from certunlearn._numerics import batches, checks, recognition
from certunlearn.unlearning import inputs


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """Retain data as batches that are made elsewhere: by Grain, `tf.data`, or your own code.

    It stands in the place of `retain_data`. Each epoch takes the first `size // batch_size`
    batches of a pass; what a pass has beyond them is not read.

    Args:
      loader: an iterable of batches, on which every epoch starts a new pass: a Grain `IterDataset`,
        a `tf.data.Dataset` (read by its `as_numpy_iterator`), a list, a PyTorch loader. Or a
        function `loader(epoch) -> iterable`, which may order epoch 0, 1, ... by a key of yours. Or
        an iterator, from which the whole run takes its batches. A batch is a pytree of arrays with
        a leading axis of `batch_size`. It is read in another thread; see `Options.prefetch`.
      size: number of retain examples, which the certificate records.
      batch_size: examples in every batch that is read.

    Raises:
      TypeError: if an argument is not of the right kind.
      ValueError: if a size is out of range.

    Guarantee:
      That which example comes in which batch was decided by keys and sizes alone, never by looking
      at the data, the forget set or the model, is the caller's word, as certunlearn does not draw
      these batches. The certificate lists it among its assumptions.

    >>> import numpy as np
    >>> Stream([np.ones((4, 3)), np.zeros((4, 3))], size=8, batch_size=4).batches_per_epoch
    2
    """

    loader: Iterable[ArrayTree] | Callable[[int], Iterable[ArrayTree]]
    size: int = dataclasses.field(kw_only=True)
    batch_size: int = dataclasses.field(kw_only=True)

    def __post_init__(self) -> None:
        """Checks what can be checked without reading a batch."""
        size = checks.positive_int("size", self.size)
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "batch_size", batches.check_batch_size(self.batch_size, size))
        single = isinstance(self.loader, str | bytes | dict) or recognition.is_shaped(self.loader)
        if single or not (isinstance(self.loader, Iterable) or callable(self.loader)):
            raise TypeError(
                "loader must be an iterable of batches or a function loader(epoch) that returns "
                f"one, got {inputs.kind(self.loader)}"
            )

    def __repr__(self) -> str:
        """The sizes, and nothing of the data."""
        return f"Stream(<loader>, size={self.size}, batch_size={self.batch_size})"

    @property
    def batches_per_epoch(self) -> int:
        """How many batches an epoch takes."""
        return self.size // self.batch_size

    @property
    def passes_once(self) -> bool:
        """Whether the loader is an iterator, which cannot start again."""
        return isinstance(self.loader, Iterator)

    def start(self, epoch: int) -> Iterator[ArrayTree]:
        """Starts an epoch's pass; of an iterator, goes on with it.

        Raises:
          TypeError: if the function returns nothing that can be iterated.
        """
        if recognition.is_numpy_dataset(self.loader):
            return iter(self.loader.as_numpy_iterator())
        if isinstance(self.loader, Iterable):
            return iter(self.loader)
        found = self.loader(epoch)
        if not isinstance(found, Iterable):
            raise TypeError(
                f"loader({epoch}) must return an iterable of batches, got {inputs.kind(found)}"
            )
        return iter(found)


class Reader:
    """Reads a stream's batches in the order of steps, and holds each against the first.

    Attributes:
      stream: what is read.
      shapes: the first batch's shapes and dtypes.
      sample: the first batch.
    """

    def __init__(self, stream: Stream) -> None:
        """Reads one batch.

        Raises:
          TypeError: if it is no pytree of arrays.
          ValueError: if there is none, or it has another number of examples.
        """
        self.stream = stream
        self._once: Iterator[ArrayTree] | None = None
        self._taken = 0  # of an iterator's batches
        started = stream.start(0)
        first = next(started, None)
        if first is None:
            raise ValueError("retain_data must hold at least one batch, got a stream of none")
        self.sample = inputs.arrays("a batch of retain_data", first, keys=True, copied=True)
        self._check_size(self.sample, "the first batch")
        self.shapes = jax.tree.map(_shape, self.sample)
        if stream.passes_once:
            self._once = _after(first, started)

    def read(self, first: int, stop: int, offset: int = 0) -> Generator[ArrayTree, None, None]:
        """The batches of steps first, ..., stop - 1, each a pytree of JAX arrays.

        Args:
          first: number of the first step. The batches before it in its epoch are read and left
            out; of an iterator, all batches before it.
          stop: where to end.
          offset: how many batches of an iterator were for other steps, before step 0.

        Raises:
          TypeError: if a batch is no pytree of arrays.
          ValueError: if the stream ends early, or a batch is not like the first.
        """
        if self._once is not None:
            yield from self._read_once(self._once, first + offset, stop + offset)
            return
        step, per_epoch = first, self.stream.batches_per_epoch
        while step < stop:
            epoch, left_out = divmod(step, per_epoch)
            a_pass = self.stream.start(epoch)
            for position in range(min(per_epoch, stop - epoch * per_epoch)):
                where = f"batch {position} of epoch {epoch}"
                found = _next(a_pass, where, f"{per_epoch} batches an epoch")
                if position >= left_out:
                    yield self._checked(found, where)
                    step += 1
                del found

    def _read_once(
        self, source: Iterator[ArrayTree], first: int, stop: int
    ) -> Generator[ArrayTree, None, None]:
        if self._taken > first:
            raise ValueError(
                f"retain_data must be at batch {first} of its iterator, and is at {self._taken}: "
                "it was read before. Pass one that starts at the beginning of the run"
            )
        while self._taken < stop:
            where = f"batch {self._taken} of the iterator"
            found = _next(source, where, f"{stop} batches")
            self._taken += 1
            if self._taken > first:
                yield self._checked(found, where)
            del found

    def as_given(self) -> Generator[ArrayTree, None, None]:
        """The batches of epoch 0 as the loader makes them; only their number and sizes are checked.

        Raises:
          ValueError: if the stream is an iterator or ends early, or a batch has another size.
        """
        if self._once is not None:
            raise ValueError(
                "retain_data must allow a pass of its own here, got a stream of an iterator: pass "
                "an iterable, or a function loader(epoch)"
            )
        per_epoch, a_pass = self.stream.batches_per_epoch, self.stream.start(0)
        for position in range(per_epoch):
            where = f"batch {position} of epoch 0"
            found = _next(a_pass, where, f"{per_epoch} batches an epoch")
            self._check_size(found, where)
            yield found

    def _checked(self, batch: ArrayTree, where: str) -> ArrayTree:
        found = inputs.arrays(f"{where} of retain_data", batch, keys=True, copied=True)
        self._check_size(found, where)
        shapes = jax.tree.map(_shape, found)
        if shapes != self.shapes:
            raise ValueError(
                f"{where} of retain_data must be like the first one, {self.shapes}, got {shapes}"
            )
        return found

    def _check_size(self, batch: ArrayTree, where: str) -> None:
        size = batches.data_size(batch, f"{where} of retain_data")
        if size != self.stream.batch_size:
            raise ValueError(
                f"{where} of retain_data must have batch_size={self.stream.batch_size} examples, "
                f"got {size}"
            )


def _shape(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _after(first: ArrayTree, rest: Iterator[ArrayTree]) -> Iterator[ArrayTree]:
    yield first
    yield from rest


def _next(source: Iterator[ArrayTree], where: str, wanted: str) -> ArrayTree:
    found = next(source, None)
    if found is None:
        raise ValueError(
            f"retain_data ended before {where}: the run needs {wanted}. Declare the sizes that the "
            "stream has, or mend it"
        )
    return found
