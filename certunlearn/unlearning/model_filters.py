"""Which parameters of a Flax NNX module a filter is true of."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Where a module holds a parameter: names of attributes and numbers of items.
Path = tuple[Any, ...]


def flags(nnx: Any, chosen: Any, params: Any, shared: Sequence[Sequence[Path]]) -> Any:
    """The state `params` with a bool in the place of each parameter.

    A filter sees shapes in the place of numbers: which parameters it picks cannot depend on what
    was trained, and that on data.

    Args:
      nnx: the module `flax.nnx`.
      chosen: an NNX filter.
      params: `nnx.state(model, nnx.Param)`.
      shared: groups of paths at which the model holds one thing.

    Raises:
      TypeError: if the filter is none, looks at numbers, or answers anything but bools.
      ValueError: if it is true of no parameter, or of one parameter at one of its places and not at
        another.
    """
    try:
        predicate = nnx.filterlib.to_predicate(chosen)
    except (TypeError, ValueError) as error:
        raise TypeError(f"frozen must be bools or an NNX filter, got {chosen!r:.80}") from error
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params)
    found = nnx.map_state(lambda path, leaf: _answer(predicate, path, leaf, shared), shapes)
    if not any(jax.tree.leaves(found)):
        names = [_name(path) for path, _ in nnx.to_flat_state(params)]
        raise ValueError(
            f"frozen must be true of some parameter, got {chosen!r:.80}, which is true of none of "
            f"{', '.join(names):.200}"
        )
    return found


def _answer(
    predicate: Callable[[Path, Any], Any],
    path: Path,
    leaf: Any,
    shared: Sequence[Sequence[Path]],
) -> Any:
    """What the filter says of a parameter, at each place where the model holds it."""
    others = {
        other + path[len(place) :]
        for places in shared
        for place in places
        if path[: len(place)] == place
        for other in places
    }
    try:
        here = predicate(path, leaf)
        parted = [other for other in sorted(others, key=str) if predicate(other, leaf) != here]
    except Exception as error:
        raise TypeError(
            f"frozen must be a filter of paths, types and shapes, since what is frozen must not "
            f"depend on what was trained; of {_name(path)} it raised {error!r}"
        ) from error
    if parted:
        raise ValueError(
            f"frozen must say the same of {_name(path)} and {_name(parted[0])}, which are one "
            f"parameter, got {here} and {not here}"
        )
    return here


def _name(path: Path) -> str:
    return "/".join(map(str, path))
