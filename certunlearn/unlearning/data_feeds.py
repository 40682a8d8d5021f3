"""What each compiled step gets: of arrays in memory, of random-access sources, and of streams."""

import abc
import itertools
from collections.abc import Callable, Generator, Iterable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from chex import ArrayTree

from certunlearn._numerics import batches, recognition
from certunlearn._numerics.batches import Drawn, PoissonSampling
from certunlearn.unlearning import data_sources, data_streams, inputs, prefetching

# What `unlearn` takes as retain data.
RetainData: TypeAlias = ArrayTree | recognition.RandomAccess | data_streams.Stream


class Call(NamedTuple):
    """The arguments of one compiled call, of one step or several.

    Attributes:
      data: a batch, or if `most` is above 1 as many batches `[most, batch, ...]`, of which the
        first `count` are meant; or the sample of a step; or with a key all examples.
      sampling_key: from which each step draws its own sample of all examples; or None.
      step: number of the first step.
      count: how many steps.
      most: as many steps as a call of this shape can take.
    """

    data: ArrayTree
    sampling_key: jax.Array | None
    step: int
    count: int  # type: ignore[assignment]  # tuples have a method of this name
    most: int = 1


class Steps(NamedTuple):
    """Which steps are to be taken.

    Attributes:
      key: of the batches' order, or of the samples.
      batch_size: examples in a batch.
      first: number of the first step.
      stop: where to end.
      pauses: no call goes beyond a multiple of any of these.
      longest: most steps in a call.
      sampling: of steps that draw samples of their own.
      microbatch_size: what the number of a sample's places is a multiple of.
      offset: steps that read the data before step 0.
      prefetch: batches that are made ahead.
    """

    key: jax.Array
    batch_size: int
    first: int
    stop: int
    pauses: tuple[int, ...] = ()
    longest: int = 1
    sampling: PoissonSampling | None = None
    microbatch_size: int | None = None
    offset: int = 0
    prefetch: int = 0


class Feed(abc.ABC):
    """Retain data, and how steps get at it.

    Attributes:
      given: for `recompute_state`: JAX arrays, or the source or stream as it was given.
      size: number of examples.
      batch_size: the only one that is possible; None for any.
      streamed: whether somebody else decided which example comes in which batch.
      shapes: shapes and dtypes of examples; the length of the leading axis means nothing.
      sample: examples that lie where all do, or shapes if they come from the host.
    """

    given: Any
    size: int
    batch_size: int | None = None
    streamed: bool = False
    shapes: ArrayTree
    sample: ArrayTree

    def batch_shapes(self, size: int) -> ArrayTree:
        """Shapes of a batch of so many examples."""
        return _resized(self.shapes, size)

    @abc.abstractmethod
    def calls(self, steps: Steps) -> Generator[Call, None, None]:
        """Cuts steps into compiled calls; close the generator at the end."""

    @abc.abstractmethod
    def trial(self, steps: Steps) -> Call:
        """The first of the calls, with shapes in place of data that would have to be read."""

    @abc.abstractmethod
    def digested(self) -> ArrayTree:
        """What the digest of the data is made of."""

    @abc.abstractmethod
    def for_solvers(self) -> Any:
        """The data as `solvers.minimize` takes it; call under the precision that it is to have."""

    @abc.abstractmethod
    def in_order(self, batch_size: int) -> Generator[ArrayTree, None, None]:
        """One pass over whole batches in the data's own order."""


def feed_of(data: RetainData) -> Feed:
    """The feed of whatever kind of retain data.

    Raises:
      TypeError: if it is of no known kind.
      ValueError: if it holds no example, or other sizes than it says.
    """
    if isinstance(data, data_streams.Stream):
        return StreamFeed(data)
    if recognition.is_random_access(data):
        return SourceFeed(data)
    whole = recognition.is_array_or_text(data) or not recognition.is_leaf(data)
    if not whole and isinstance(data, Iterable):
        raise TypeError(
            "retain_data must be a pytree of arrays, a source with a length and an index, or "
            "unlearning.Stream(loader, size=..., batch_size=...) of batches; got "
            f"{inputs.kind(data)}, which can be a Stream's loader if it yields batches"
        )
    return ArrayFeed(data)


class ArrayFeed(Feed):
    """Examples in arrays. Batches are taken from them outside of the compiled step, which so does
    not depend on their number.
    """

    def __init__(self, data: ArrayTree) -> None:
        """Checks the arrays."""
        self._raw = data
        self.given = inputs.arrays("retain_data", data, keys=True)
        self.shapes = self.sample = self.given
        self.size = batches.data_size(self.given)

    def calls(self, steps: Steps) -> Generator[Call, None, None]:
        """Calls of one or many steps."""
        indices = batches.batches_from(steps.key, self.size, steps.batch_size, steps.first)
        most = self._most(steps)
        step = steps.first
        while step < steps.stop:
            count = min([most, steps.stop - step] + [p - step % p for p in steps.pauses])
            if steps.sampling is not None:
                yield Call(self.given, jax.random.key_data(steps.key), step, 1)
            elif most == 1:
                yield Call(_rows(self.given, next(indices)), None, step, 1)
            else:
                chosen = np.zeros((most, steps.batch_size), np.int32)
                chosen[:count] = list(itertools.islice(indices, count))
                yield Call(_rows(self.given, chosen), None, step, count, most)
            step += count

    def _most(self, steps: Steps) -> int:
        """Steps in a call whose batches together are not large; one of those that draw samples."""
        if steps.sampling is not None:
            return 1
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(self.given)) / self.size
        return max(1, min(steps.longest, int(_BYTES_OF_A_CALL / (size * steps.batch_size + 1))))

    def trial(self, steps: Steps) -> Call:
        """The first call itself."""
        return next(self.calls(steps))

    def digested(self) -> ArrayTree:
        """The arrays."""
        return self.given

    def for_solvers(self) -> ArrayTree:
        """The arrays in their own precision."""
        return inputs.arrays("retain_data", self._raw, keys=True)

    def in_order(self, batch_size: int) -> Generator[ArrayTree, None, None]:
        """Slices."""
        for first in range(0, self.size - batch_size + 1, batch_size):
            yield jax.tree.map(lambda x: x[first : first + batch_size], self.given)  # noqa: B023


class SourceFeed(Feed):
    """Examples that are fetched: in the same batches, in the same order, as of arrays."""

    def __init__(self, source: recognition.RandomAccess) -> None:
        """Fetches a few examples."""
        self.given, self._rows = source, data_sources.Rows(source)
        self.size, self.shapes = self._rows.size, self._rows.shapes
        self.sample = self.shapes
        # Now, for a state is made where the source may have failed.
        self._digested = self._rows.digested()

    def calls(self, steps: Steps) -> Generator[Call, None, None]:
        """One step a call, on its own batch."""
        fetched = self._sampled(steps) if steps.sampling is not None else self._batches(steps)
        yield from _one_by_one(prefetching.ahead(fetched, steps.prefetch), steps)

    def _batches(self, steps: Steps) -> Generator[ArrayTree, None, None]:
        indices = batches.batches_from(steps.key, self.size, steps.batch_size, steps.first)
        for _ in range(steps.first, steps.stop):
            yield self._rows.fetch(next(indices))

    def _sampled(self, steps: Steps) -> Generator[ArrayTree, None, None]:
        assert steps.sampling is not None
        for step in range(steps.first, steps.stop):
            key = jax.random.fold_in(steps.key, step)
            places, taken = draw(steps.sampling, self.size, key, steps.microbatch_size)
            yield Drawn(self._rows.fetch(np.asarray(places)), taken)

    def trial(self, steps: Steps) -> Call:
        """A call on shapes alone."""
        sampling = steps.sampling
        if sampling is None:
            return _abstract(_resized(self.shapes, steps.batch_size), steps)
        places = sampling.places(self.size, steps.microbatch_size)
        taken: Any = jax.ShapeDtypeStruct((places,), jnp.bool_)
        return _abstract(Drawn(_resized(self.shapes, places), taken), steps)

    def digested(self) -> ArrayTree:
        """The length and a few examples: reading all would take as long as an epoch."""
        return self._digested

    def for_solvers(self) -> Callable[[], Iterable[Any]]:
        """A function that starts a pass over batches on the host."""
        rows = self._rows
        return lambda: rows.in_order(_ROWS_OF_A_PASS, rows.size)

    def in_order(self, batch_size: int) -> Generator[ArrayTree, None, None]:
        """Whole batches of neighbouring examples."""
        for batch in self._rows.in_order(batch_size, self.size // batch_size):
            yield inputs.arrays("examples of retain_data", batch)


class StreamFeed(Feed):
    """Batches that somebody else makes."""

    streamed = True

    def __init__(self, stream: data_streams.Stream) -> None:
        """Reads one batch."""
        self.given, self._reader = stream, data_streams.Reader(stream)
        self.size, self.batch_size = stream.size, stream.batch_size
        self.shapes, self.sample = self._reader.shapes, self._reader.sample

    def calls(self, steps: Steps) -> Generator[Call, None, None]:
        """One step a call, on its own batch."""
        read = self._reader.read(steps.first, steps.stop, steps.offset)
        yield from _one_by_one(prefetching.ahead(read, steps.prefetch), steps)

    def trial(self, steps: Steps) -> Call:
        """A call on shapes alone."""
        if steps.batch_size != self.batch_size:
            raise ValueError(
                f"batch_size must be the stream's, {self.batch_size}, got {steps.batch_size}"
            )
        return _abstract(self.shapes, steps)

    def digested(self) -> ArrayTree:
        """The sizes and the first batch."""
        return np.asarray([self.size, self.batch_size]), self._reader.sample

    def for_solvers(self) -> Callable[[], Iterable[Any]]:
        """A function that starts a pass over all batches, which must hold all examples."""
        if self.size % self.given.batch_size:
            raise ValueError(
                "retain_data must be a stream whose batches hold all examples, for all count in "
                f"the objective: batch_size={self.batch_size} does not divide size={self.size}"
            )
        return self._reader.as_given

    def in_order(self, batch_size: int) -> Generator[ArrayTree, None, None]:
        """The batches of epoch 0."""
        if batch_size != self.batch_size:
            raise ValueError(
                f"batch_size must be the stream's, {self.batch_size}, got {batch_size}"
            )
        for batch in self._reader.as_given():
            yield inputs.arrays("a batch of retain_data", batch, keys=True, copied=True)


# Rows that are fetched at a time where the objective is minimised.
_ROWS_OF_A_PASS = 1024
# Of the batches that go into one call of several steps.
_BYTES_OF_A_CALL = 2**26
draw = jax.jit(PoissonSampling.draw, static_argnums=(0, 1, 3))


def _one_by_one(
    fetched: Generator[ArrayTree, None, None], steps: Steps
) -> Generator[Call, None, None]:
    try:
        for step, batch in enumerate(fetched, steps.first):
            yield Call(batch, None, step, 1)
            del batch
    finally:
        fetched.close()


def _resized(shapes: ArrayTree, size: int) -> ArrayTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), shapes)


def _abstract(data: ArrayTree, steps: Steps) -> Call:
    return Call(data, None, steps.first, 1)


@jax.jit
def _rows(data: ArrayTree, indices: jax.typing.ArrayLike) -> ArrayTree:
    return jax.tree.map(lambda leaf: leaf[indices], data)
