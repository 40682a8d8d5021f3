"""Compiled steps that are kept from one run to the next of the same structure and shapes."""

import collections
import threading
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import jax

from certunlearn.unlearning.snapshots import snapshot

Fixed = TypeVar("Fixed")

# Each keeps one compiled program, a few megabytes for a large model, and no array.
_MOST_KEPT = 16


class Compiled(Generic[Fixed]):
    """A compiled function, and what it is traced from."""

    def __init__(
        self, fixed: Fixed, make: Callable[["Compiled[Fixed]"], Callable[..., Any]]
    ) -> None:
        """`make(self)` is the function; it reads `self.fixed` whenever it is traced."""
        self.fixed = fixed
        self.function = make(self)


_kept: collections.OrderedDict[Hashable, Compiled[Any]] = collections.OrderedDict()
_lock = threading.Lock()


def compiled(
    name: str,
    fixed: Fixed,
    looked_at: tuple[Any, ...],
    shapes: tuple[Any, ...],
    make: Callable[[Compiled[Fixed]], Callable[..., Any]],
) -> Callable[..., Any]:
    """A function as `make` makes it, or the kept one that was made for the same.

    Args:
      name: which of the functions it is.
      fixed: what it is traced from, besides its arguments.
      looked_at: the same as parts that `snapshots.snapshot` can look into.
      shapes: arguments of the first call, traced or not, of which shapes and dtypes count.
      make: see `Compiled`.
    """
    found = snapshot(looked_at)
    key: Hashable = None
    if found is not None:
        leaves, structure = jax.tree.flatten(shapes)
        key = name, found, structure, tuple((jax.numpy.shape(x), _dtype(x)) for x in leaves)
        try:
            hash(key)
        except TypeError:
            key = None
    if key is None:
        return Compiled(fixed, make).function
    with _lock:
        entry = _kept.pop(key, None)
        if entry is None:
            entry = Compiled(fixed, make)
        # These do the same as those before, now; what those look at may have changed since.
        entry.fixed = fixed
        _kept[key] = entry
        while len(_kept) > _MOST_KEPT:
            _kept.popitem(last=False)
    return entry.function


def clear_compiled_steps() -> int:
    """Forgets all compiled steps that are kept for later calls of `unlearn`; returns how many.

    At most 16 are kept, of the runs used last: programs only, without parameters, data or keys.

    >>> import certunlearn as cu
    >>> _ = cu.unlearning.clear_compiled_steps()
    >>> cu.unlearning.clear_compiled_steps()
    0
    """
    with _lock:
        count = len(_kept)
        _kept.clear()
    return count


def _dtype(value: Any) -> Any:
    return jax.numpy.result_type(value)
