"""Which parameters a certificate is for: those that were not frozen."""

from collections.abc import Iterable, Mapping
from typing import Any

from certunlearn._numerics import files


def paths(frozen: Any) -> tuple[str, ...]:
    """The paths of frozen leaves, each once; TypeError if they are not a list of texts."""
    if isinstance(frozen, Iterable) and not isinstance(frozen, str | bytes | Mapping):
        found = tuple(frozen)  # of an iterator, too, which yields them but once
        if all(isinstance(name, str) for name in found):
            return tuple(sorted(set(found)))
    raise TypeError(f"frozen must be a list of paths of leaves, got {frozen!r:.80}")


def leaves(params: Any, frozen: Any) -> list[Any]:
    """The arrays of `params` that the guarantee covers; those spread over devices stay there."""
    kept = frozenset(frozen)
    return [leaf for name, leaf in files.placed_leaves(params).items() if name not in kept]


def record(params: Any, frozen: Any) -> dict[str, Any]:
    """The `coverage` of a certificate for `params` with these frozen paths."""
    named = files.placed_leaves(params)
    kept = frozenset(frozen)
    unknown = sorted(kept - set(named))
    if unknown:
        raise ValueError(f"frozen names no leaf of params: {unknown}; there are {list(named)}")
    covered = [leaf for name, leaf in named.items() if name not in kept]
    return {
        "parameters": sum(leaf.size for leaf in covered),
        "leaves": len(covered),
        "dtypes": sorted({leaf.dtype.name for leaf in covered}),
        "frozen": sorted(kept),
        "frozen_parameters": sum(named[name].size for name in kept),
    }
