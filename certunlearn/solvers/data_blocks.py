"""Blocks of data for passes in float64: of arrays, of spread arrays and of streams of batches."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from chex import ArrayTree
from jax.sharding import Mesh, NamedSharding
from jax.typing import ArrayLike

from certunlearn._numerics import checks, recognition
from certunlearn.models.linear import row_scales
from certunlearn.models.loss import ConvexLoss

Batch = Sequence[ArrayTree]
# All data, batches of it, or a function that starts a new pass over batches.
Data = Batch | Iterable[Batch] | Callable[[], Iterable[Batch]]

# What a block of float64 features takes, at most, and how much is kept between passes.
_BLOCK_BYTES = 2**26
_KEPT_BYTES = 2**31
_LEAST_ROWS, _MOST_ROWS = 64, 2**13
# Blocks have one of so many lengths, and are padded up to it, so that little is compiled.
_LENGTHS = 16
# Rows of a block where examples are not rows of numbers.
_ROWS_OF_OTHERS = 1024


class LinearBlock(NamedTuple):
    """Rows of a linear model in float64, of norm at most `feature_norm`, and padding.

    Attributes:
      features: `[rows, d]`, scaled down where they were longer.
      targets: as the batch has them.
      weights: `[rows]`, or None.
      used: bool `[rows]`, False where a row is padding.
    """

    features: jax.Array
    targets: jax.Array
    weights: jax.Array | None
    used: jax.Array


class Block(NamedTuple):
    """A number of examples, and they: a `LinearBlock`, or a batch for `loss_fn`."""

    rows: int
    examples: LinearBlock | Batch


class Batches(NamedTuple):
    """The batches of a pass.

    Attributes:
      start: starts a pass.
      whole: whether there is one batch, which holds all data in memory.
    """

    start: Callable[[], Iterable[Batch]]
    whole: bool


def batches_of(data: Data) -> Batches:
    """What starts a pass over the batches.

    Raises:
      TypeError: if `data` are no such thing.
      ValueError: if they are an iterator, which passes once.
    """
    if callable(data):
        return Batches(data, False)
    if isinstance(data, tuple) or (
        isinstance(data, list) and not (data and isinstance(data[0], tuple))
    ):
        return Batches(lambda: [data], True)
    single = isinstance(data, str | bytes | dict) or recognition.is_shaped(data)
    if not isinstance(data, Iterable) or single:
        raise TypeError(
            "data must be (features, targets), a list or other iterable of such batches, or a "
            f"function that returns one, got {checks.shown(data)}"
        )
    if isinstance(data, Iterator):
        raise ValueError(
            "data must be a list of batches, or a function that makes an iterator of them, got an "
            "iterator, which allows one pass only"
        )
    return Batches(lambda: data, False)


def is_linear(loss: ConvexLoss) -> bool:
    """Whether blocks are `LinearBlock`s."""
    return loss.feature_norm is not None and loss.output_loss is not None


def fits(loss: ConvexLoss, batch: Batch) -> bool:
    """Whether the batch's float64 features may be kept between passes."""
    if not is_linear(loss) or not batch:
        return True
    return 8 * math.prod(np.shape(checks.numbers("features", batch[0]))) <= _KEPT_BYTES


def is_spread(batch: Batch) -> bool:
    """Whether a batch holds an array that lies on several devices."""
    leaves = jax.tree.leaves(tuple(batch))
    return any(isinstance(leaf, jax.Array) and len(leaf.devices()) > 1 for leaf in leaves)


def blocks_of(
    loss: ConvexLoss, params: ArrayTree, batches: Iterable[Batch], *, check: bool
) -> Iterator[Block]:
    """The blocks of one pass, in order. Call under `jax.enable_x64`.

    Args:
      loss: the loss.
      params: parameters; only their shape counts.
      batches: of one pass.
      check: whether to check the batches against the loss's bounds. Its constants hold for others
        too, as it scales and clips.
    """
    for batch in batches:
        if not isinstance(batch, tuple | list) or not jax.tree.leaves(tuple(batch)):
            raise TypeError(
                f"batches of data must be tuples, as loss takes them, got {checks.shown(batch)}"
            )
        spread = is_spread(batch)
        batch = jax.tree.map(_left_to_compiler, tuple(batch)) if spread else tuple(batch)
        if loss.feature_norm is not None:
            if check and not spread:
                loss.check_data(batch)
            _check_shapes(loss, params, batch)
            if check:
                jax.eval_shape(loss.loss_fn, params, batch)  # says which shapes it takes
        if is_linear(loss):
            yield from [_spread_block(loss, batch)] if spread else _linear_blocks(loss, batch)
        else:
            yield from _other_blocks(batch, spread)


def _check_shapes(loss: ConvexLoss, params: ArrayTree, batch: Batch) -> None:
    if np.ndim(batch[0]) != 2:
        raise ValueError(f"features must be of shape [n, d], got {np.shape(batch[0])}")
    lengths = [np.shape(part)[:1] for part in batch]
    parts = 2 + (loss.largest_weight is not None)
    if len(lengths) != parts or len(set(lengths)) != 1 or lengths[0] == (0,):
        raise ValueError(
            f"data must be {parts} arrays of as many rows, at least 1, got lengths {lengths}"
        )
    expected = loss.init(np.shape(batch[0])[1]).shape
    if np.shape(params) != expected:
        raise ValueError(f"params must be of shape {expected}, got {np.shape(params)}")


def _linear_blocks(loss: ConvexLoss, batch: Batch) -> Iterator[Block]:
    features, targets, *rest = (np.asarray(part) for part in batch)
    size, width = features.shape
    most = 2 ** int(math.log2(max(_BLOCK_BYTES // (8 * width), 1)))
    most = min(max(most, _LEAST_ROWS), _MOST_ROWS)
    unit = most // _LENGTHS
    # As equal as can be, so that all blocks are of one length.
    length = -(-size // (-(-size // most)))
    length = -(-length // unit) * unit
    for start in range(0, size, length):
        part = slice(start, start + length)
        rows = len(features[part])
        padded = [_padded(array[part], length) for array in (features, targets, *rest)]
        wide = _scaled(padded[0].astype(np.float64), loss.feature_norm)
        others = [jnp.asarray(array) for array in padded[1:]]
        weights = others[1] if rest else None
        used = jnp.arange(length) < rows
        yield Block(rows, LinearBlock(wide, others[0], weights, used))


def _spread_block(loss: ConvexLoss, batch: Batch) -> Block:
    """One block of all, left on its devices."""
    features, targets, *rest = batch
    rows = np.shape(features)[0]
    wide = _scaled(features, loss.feature_norm)
    weights = rest[0] if rest else None
    return Block(rows, LinearBlock(wide, targets, weights, jnp.ones(rows, bool)))


def _left_to_compiler(leaf: ArrayLike) -> ArrayLike:
    """The array on the same devices, without a say in how results of it are spread."""
    if not isinstance(leaf, jax.Array) or not isinstance(leaf.sharding, NamedSharding):
        return leaf
    mesh = leaf.sharding.mesh
    if not isinstance(mesh, Mesh):
        return leaf
    return jax.device_put(
        leaf, NamedSharding(Mesh(mesh.devices, mesh.axis_names), leaf.sharding.spec)
    )


def _padded(array: np.ndarray, length: int) -> np.ndarray:
    """With zeros after its rows, up to `length` rows."""
    return np.pad(array, [(0, length - len(array))] + [(0, 0)] * (array.ndim - 1))


@jax.jit
def _scaled(features: jax.Array, bound: float) -> jax.Array:
    wide = features.astype(jnp.float64)
    return wide * row_scales(wide, bound)[:, None]


def _other_blocks(batch: Batch, spread: bool) -> Iterator[Block]:
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or sizes & {(), (0,)}:
        raise ValueError(
            "batches of data must be arrays with one leading axis of at least 1, got lengths "
            f"{sorted(sizes)}"
        )
    ((size,),) = sizes
    length = size if spread else _ROWS_OF_OTHERS
    for start in range(0, size, length):
        part = batch
        if length < size:
            cut = slice(start, start + length)
            part = jax.tree.map(lambda leaf: leaf[cut], batch)  # noqa: B023
        yield Block(min(length, size - start), part)
