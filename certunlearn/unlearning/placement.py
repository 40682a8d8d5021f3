"""Where a run's arrays lie when there are several devices: parameters, state and batches."""

import functools
from typing import Any, TypeVar

import jax
import numpy as np
from chex import ArrayTree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from certunlearn._numerics import processes, recognition

Tree = TypeVar("Tree")

# For each leaf where it has to lie; None where that is left to JAX.
Layout = tuple[NamedSharding | None, ...]


def mesh_of(given: NamedSharding | None, *trees: ArrayTree) -> Mesh | None:
    """The mesh over which arrays are spread; None if each is on one device.

    Args:
      given: the sharding that was asked for batches, or None.
      *trees: parameters and data.

    Raises:
      ValueError: if some are spread over other devices than others.
    """
    places = [given, *(place for tree in trees for place in layout_of(tree))]
    found = [place.mesh for place in places if place is not None]
    meshes = [mesh for mesh in found if isinstance(mesh, Mesh)]
    devices = {frozenset(mesh.devices.flat) for mesh in meshes}
    if len(devices) > 1:
        sizes = sorted(map(len, devices))
        raise ValueError(
            "params, retain_data and batch_sharding must be spread over the same devices, got "
            f"{len(devices)} sets of {sizes} devices"
        )
    return meshes[0] if meshes and len(meshes[0].devices.flat) > 1 else None


def layout_of(tree: ArrayTree) -> Layout:
    """Where the leaves lie that are spread over several devices; None for the others."""
    return tuple(map(_sharding, jax.tree.leaves(tree)))


def together(tree: Tree, mesh: Mesh | None) -> Tree:
    """The same with every leaf on the mesh: those that were on one device are copied to all.

    Otherwise each call of a compiled step would copy them anew.
    """
    if mesh is None:
        return tree
    copied = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: leaf if _sharding(leaf) else put(leaf, copied), tree)


def like(tree: Tree, other: ArrayTree) -> Tree:
    """The same with every leaf where that of another tree lies, if that is spread."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, list(map(put, leaves, layout_of(other))))


def put(leaf: Any, sharding: NamedSharding | None) -> Any:
    """An array where it has to lie, if it is not there.

    Every process has all of an array that is not spread yet.
    """
    if sharding is None or recognition.is_prng_key(leaf):
        return leaf
    if processes.is_spread(leaf):
        return leaf if leaf.sharding == sharding else jax.device_put(leaf, sharding)
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    # `device_put` would compare the numbers of all processes, and show them where they differ.
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def constrained(tree: Tree, layout: Layout) -> Tree:
    """Inside a compiled function: the same with every leaf where the layout says."""
    leaves, structure = jax.tree.flatten(tree)
    # Explicit axes are in the types of arrays, and stay by themselves.
    kept = [
        jax.lax.with_sharding_constraint(leaf, sharding) if _is_automatic(sharding) else leaf
        for leaf, sharding in zip(leaves, layout or [None] * len(leaves), strict=True)
    ]
    return jax.tree.unflatten(structure, kept)


def automatic(tree: ArrayTree) -> Layout:
    """The layout that `constrained` keeps; empty if there is none to keep."""
    found = layout_of(tree)
    return found if any(map(_is_automatic, found)) else ()


def of_batches(given: NamedSharding | None, data: ArrayTree, batch_size: int, mesh: Mesh) -> Layout:
    """Where each leaf of a batch is to lie.

    Args:
      given: what was asked for; None is as the examples lie.
      data: the examples, or a batch, or shapes of it.
      batch_size: examples in a batch.
      mesh: over which parameters or examples are spread.

    Returns:
      For each leaf the sharding asked for, without axes that the leaf has not; else that of the
      examples; else copies on all devices of the mesh.

    Raises:
      ValueError: if a batch cannot be divided among the devices.
    """
    found = []
    for leaf in jax.tree.leaves(data):
        place = given or _sharding(leaf) or NamedSharding(mesh, PartitionSpec())
        place = place.update(spec=PartitionSpec(*place.spec[: leaf.ndim]))
        _check_divided((batch_size, *leaf.shape[1:]), place)
        found.append(place)
    return tuple(found)


def _check_divided(shape: tuple[int, ...], place: NamedSharding) -> None:
    try:
        place.shard_shape(shape)
    except ValueError as error:
        raise ValueError(
            "batch_size must be such that a batch can be divided among devices (with DPSGD the "
            "places for a sample, which are a multiple of Options(microbatch_size=...)): a batch "
            f"has the shape {shape}, to be spread by {place.spec} over a mesh of "
            f"{dict(place.mesh.shape)}"
        ) from error


def put_batch(batch: Tree, layout: Layout) -> Tree:
    """A batch where its leaves have to lie."""
    leaves, structure = jax.tree.flatten(batch)
    return jax.tree.unflatten(structure, list(map(put, leaves, layout)))


def rows(data: Tree, indices: ArrayLike, layout: Layout) -> Tree:
    """The examples of these indices, where the batch's leaves have to lie.

    Of arrays that are spread, only the batch moves between devices.
    """
    leaves, structure = jax.tree.flatten(data)
    taken = [
        put(_taken(leaf, indices, place if processes.is_spread(leaf) else None), place)
        for leaf, place in zip(leaves, layout, strict=True)
    ]
    return jax.tree.unflatten(structure, taken)


@functools.partial(jax.jit, static_argnums=2)
def _taken(leaf: jax.Array, indices: ArrayLike, place: NamedSharding | None) -> jax.Array:
    if place is None:
        return leaf[indices]
    if _is_automatic(place):
        return jax.lax.with_sharding_constraint(leaf[indices], place)
    return leaf.at[indices].get(out_sharding=place)


def shapes_of(batch: ArrayTree, size: int, layout: Layout) -> ArrayTree:
    """Shapes of as many examples, with the places that a batch of theirs has.

    Places that they cannot be divided among are left out.
    """
    leaves, structure = jax.tree.flatten(batch)
    found = []
    for leaf, place in zip(leaves, layout or [None] * len(leaves), strict=True):
        shape = (size, *leaf.shape[1:])
        if place is not None:
            try:
                place.shard_shape(shape)
            except ValueError:
                place = place.update(spec=PartitionSpec(None, *place.spec[1:]))
        found.append(jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=place))
    return jax.tree.unflatten(structure, found)


def _sharding(leaf: Any) -> NamedSharding | None:
    """Where an array lies, or the shape of one is to lie, that is spread over a mesh."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        found = leaf.sharding
    else:
        found = leaf.sharding if processes.is_spread(leaf) else None
    return found if isinstance(found, NamedSharding) else None


def _is_automatic(sharding: NamedSharding | None) -> bool:
    return sharding is not None and all(t == AxisType.Auto for t in sharding.mesh.axis_types)
