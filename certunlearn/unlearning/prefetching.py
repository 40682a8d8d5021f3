"""Items of an iterator, taken ahead by a thread while the device computes."""

import contextlib
import queue
import threading
from collections.abc import Generator
from typing import Any, NamedTuple, TypeVar

import jax

T = TypeVar("T")

# How long to wait for a thread that is in the middle of a user's code, in seconds. It is a daemon:
# one that hangs for good ends with the process.
_PATIENCE = 60.0


def _under(mesh: jax.sharding.Mesh) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if mesh.empty else jax.set_mesh(mesh)


class _Outcome(NamedTuple):
    """What the thread came to: an item, an error, or (both None within a last one) the end."""

    item: object = None
    error: BaseException | None = None
    last: bool = False


def ahead(items: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """The same items in the same order, up to `depth` of them made before they are asked for.

    One thread makes them, one after another, so that what an item is does not depend on timing. It
    sees JAX's 64-bit mode, default device and mesh as the caller does. It ends with the last item,
    with an error, or when the generator is closed.

    Args:
      items: a generator; nobody else may use it. It is closed at the end.
      depth: how many items may be ready or in the making; 0 makes them where they are asked for.

    Yields:
      The items.

    Raises:
      Exception: whatever making an item raised, at the place of that item.

    >>> list(ahead((n * n for n in range(4)), 2))
    [0, 1, 4, 9]
    """
    if depth == 0:
        yield from items
        return
    settings: Any = jax.config
    wide, device = settings.jax_enable_x64, settings.jax_default_device
    mesh = jax.sharding.get_mesh()
    made: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
    room, stopping = threading.Semaphore(depth), threading.Event()

    def work() -> None:
        try:
            # These are settings of a thread.
            with jax.enable_x64(wide), jax.default_device(device), _under(mesh):
                while True:
                    room.acquire()
                    if stopping.is_set():
                        return
                    try:
                        made.put(_Outcome(item=next(items)))
                    except StopIteration:
                        made.put(_Outcome(last=True))
                        return
        except BaseException as error:
            made.put(_Outcome(error=error))
        finally:
            items.close()

    thread = threading.Thread(target=work, name="certunlearn-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            outcome = made.get()
            if outcome.error is not None:
                raise outcome.error
            if outcome.last:
                return
            item = outcome.item
            del outcome  # so that one that was used does not stay in memory
            room.release()
            yield item  # type: ignore[misc]
            del item
    finally:
        stopping.set()
        room.release()
        thread.join(_PATIENCE)
