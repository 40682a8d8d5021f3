"""Whether values inside `shard_map` and `pmap` are pieces of one array, or copies."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
from chex import ArrayTree
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from certunlearn._numerics import recognition

# The axis of a `pmap` without an axis name.
_PMAP_AXIS = "_internal_pmap_axis_name"


def pieces_axes(*values: ArrayLike) -> tuple[str, ...]:
    """The mesh axes over which values inside `shard_map` differ: each device holds its own piece.

    Args:
      *values: arrays that belong together, such as a parameter and its update.

    Returns:
      Names in the mesh's order; none outside of `shard_map`.

    Raises:
      ValueError: if a value is a sum that was not carried out yet.

    The answer means nothing where `check_tracked` raises.
    """
    named = frozenset[str]().union(*map(recognition.varying_axes, values))
    return tuple(name for name in jax.sharding.get_abstract_mesh().axis_names if name in named)


def explicit_sharding(value: jax.Array) -> NamedSharding | None:
    """The sharding that is part of a value's type; None if no axis of its mesh is of that kind."""
    sharding = jax.typeof(value).sharding
    return sharding if sharding.mesh.explicit_axes else None


def sharding_without_rows(value: jax.Array) -> NamedSharding | None:
    """`explicit_sharding` of what is left when an array's first axis is summed over."""
    sharding = explicit_sharding(value)
    return None if sharding is None else sharding.update(spec=PartitionSpec(*sharding.spec[1:]))


def no_rows(leaves: list[jax.Array], rows: int) -> jax.Array:
    """False for each row of the leaves' first `rows` axes, spread as these are."""
    if not (rows and leaves):
        return jnp.zeros((), bool)
    sharding = explicit_sharding(leaves[0])
    if sharding is not None:
        sharding = sharding.update(spec=PartitionSpec(*sharding.spec[:rows]))
    return jax.lax.broadcast(False, leaves[0].shape[:rows], out_sharding=sharding)


def check_whole(name: str, tree: ArrayTree) -> None:
    """Raises ValueError if rows of one array are spread over devices inside `shard_map`."""
    check_tracked()
    axes = pieces_axes(*jax.tree.leaves(tree))
    if axes:
        raise ValueError(
            f"{name} must be the same on all devices inside shard_map, got pieces over {axes}, "
            "whose rows would be clipped together: call this outside, or under jit"
        )


def check_tracked() -> None:
    """Raises ValueError inside a `shard_map` that does not distinguish pieces from copies."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = tuple(mesh.manual_axes)
    if not manual or manual == (_PMAP_AXIS,) or _tracks(mesh, manual) or _directly_in_pmap(manual):
        return
    raise ValueError(
        f"check_vma must be True in the shard_map over {manual}: otherwise JAX does not say "
        "whether arrays are pieces of one (one clip, independent noise) or copies (equal noise). "
        "Inside pmap, call the optimizer directly, not inside a further jit"
    )


def _tracks(mesh: jax.sharding.AbstractMesh, manual: tuple[str, ...]) -> bool:
    """Whether a device's own number counts as differing, as it does if JAX keeps track."""
    large = [name for name in manual if mesh.shape[name] > 1]
    if not large:
        return True
    return bool(recognition.varying_axes(jax.lax.axis_index(large[0])))


def _directly_in_pmap(manual: tuple[str, ...]) -> bool:
    """Whether the innermost traced function is that of a `pmap`, whose arrays are copies.

    A function that is jitted by itself may be traced here once and used elsewhere, so it does not
    count.
    """
    if len(manual) != 1:
        return False
    frame: Any = sys._getframe()
    while frame is not None:
        place = frame.f_code.co_filename.replace("\\", "/")
        if place.endswith("jax/_src/pjit.py"):
            return False
        # JAX 0.8 has `pmap` beside `shard_map`, with a step of its own.
        older = place.endswith("jax/_src/shard_map.py")
        if older and frame.f_code.co_name == "_handle_reshapes":
            return True
        if place.endswith("jax/_src/pmap.py"):
            return True
        frame = frame.f_back
    return False
