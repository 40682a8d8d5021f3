"""Retain data for runs on several devices: each step gets its own batch, where that has to lie."""

import contextlib
from collections.abc import Generator
from typing import Any

import jax
import numpy as np
from chex import ArrayTree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from certunlearn._numerics import batches, processes
from certunlearn._numerics.batches import Drawn
from certunlearn.unlearning import data_sources, placement
from certunlearn.unlearning.data_feeds import ArrayFeed, Call, Feed, Steps, draw


def spread(feed: Feed, given: NamedSharding | None, mesh: Mesh | None, examples: int) -> Feed:
    """The feed itself if there is no mesh; else one whose batches lie on the mesh.

    Args:
      feed: the data.
      given: where batches are to lie; None is as the examples do, or copies on all devices.
      mesh: over which parameters or examples are spread, or None.
      examples: in a batch.

    Raises:
      ValueError: if a batch cannot be divided among the devices.
    """
    if mesh is None:
        return feed
    return _SpreadFeed(feed, placement.of_batches(given, feed.sample, examples, mesh))


class _SpreadFeed(Feed):
    """Another feed's examples, one step a call, each batch where it has to lie.

    The step gets a batch and not all examples, for a step that picked its batch from arrays would
    leave it to the compiler where that lies.
    """

    def __init__(self, inner: Feed, layout: placement.Layout) -> None:
        self._inner, self._layout = inner, layout
        self.given, self.sample, self.shapes = inner.given, inner.sample, inner.shapes
        self.size, self.batch_size, self.streamed = inner.size, inner.batch_size, inner.streamed

    def batch_shapes(self, size: int) -> ArrayTree:
        """Shapes with their places, which on explicit axes are part of the types."""
        return placement.shapes_of(self.shapes, size, self._layout)

    def calls(self, steps: Steps) -> Generator[Call, None, None]:
        """One step a call, on its own batch."""
        if isinstance(self._inner, ArrayFeed):
            yield from self._taken(self._inner.given, steps)
            return
        with contextlib.closing(self._inner.calls(steps)) as calls:
            for call in calls:
                yield call._replace(data=self._placed(call.data))

    def _taken(self, data: ArrayTree, steps: Steps) -> Generator[Call, None, None]:
        indices = batches.batches_from(steps.key, self.size, steps.batch_size, steps.first)
        for step in range(steps.first, steps.stop):
            if steps.sampling is not None:
                key = jax.random.fold_in(steps.key, step)
                places, taken = draw(steps.sampling, self.size, key, steps.microbatch_size)
                drawn = Drawn(placement.rows(data, places, self._layout), taken)
                yield Call(self._placed(drawn), None, step, 1)
            else:
                rows = placement.rows(data, next(indices), self._layout)
                yield Call(rows, None, step, 1)

    def _placed(self, data: ArrayTree) -> ArrayTree:
        if not isinstance(data, Drawn):
            return placement.put_batch(data, self._layout)
        taken = placement.put(data.taken, self._of_flags())
        return Drawn(placement.put_batch(data.examples, self._layout), taken)

    def _of_flags(self) -> NamedSharding:
        first = next(place for place in self._layout if place is not None)
        return first.update(spec=PartitionSpec(*first.spec[:1]))

    def trial(self, steps: Steps) -> Call:
        """The first call, with shapes where the inner feed has them."""
        if isinstance(self._inner, ArrayFeed):
            return next(self.calls(steps))
        call = self._inner.trial(steps)
        if not isinstance(call.data, Drawn):
            return call._replace(data=self.batch_shapes(steps.batch_size))
        flags: Any = call.data.taken
        taken: Any = jax.ShapeDtypeStruct(flags.shape, flags.dtype, sharding=self._of_flags())
        return call._replace(data=Drawn(self.batch_shapes(flags.shape[0]), taken))

    def digested(self) -> ArrayTree:
        """As of the data itself; of arrays that span processes, the size and a few examples.

        No process may be able to hold all of those.
        """
        if not processes.spans_processes(self.given):
            return self._inner.digested()
        chosen = np.unique(np.linspace(0, self.size - 1, data_sources.DIGESTED).astype(np.int64))
        copies = [
            None if place is None else place.update(spec=PartitionSpec()) for place in self._layout
        ]
        return np.asarray(self.size), placement.rows(self.given, chosen, tuple(copies))

    def for_solvers(self) -> Any:
        """As of the data itself."""
        return self._inner.for_solvers()

    def in_order(self, batch_size: int) -> Generator[ArrayTree, None, None]:
        """As of the data itself."""
        return self._inner.in_order(batch_size)
