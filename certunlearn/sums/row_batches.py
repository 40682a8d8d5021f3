"""Rows as they come: whole arrays, streams of batches, or inputs of a public network."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from chex import ArrayTree
from jax.typing import ArrayLike

from certunlearn._numerics import batches, checks, recognition
from certunlearn.sums.fixed_point import on_host

Batch = tuple[ArrayTree, ArrayLike]
# Features (or a network's inputs), or a stream of (features, targets).
Features: TypeAlias = ArrayTree | Iterable[Batch]
# A public network: inputs of one row, `[1, ...]`, to its features `[1, d]`.
ApplyFn = Callable[[ArrayTree], jax.Array]


def feature_batches(
    features: Features, targets: ArrayLike | None, apply_fn: ApplyFn | None, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Features and targets, batch by batch.

    Raises:
      TypeError: if a batch is no pair.
      ValueError: if features and targets differ in length.
    """
    batch_size = checks.positive_int("batch_size", batch_size)
    if apply_fn is not None and not callable(apply_fn):
        raise TypeError(f"apply_fn must be a function or None, got {checks.shown(apply_fn)}")
    stream = _pairs(features) if targets is None else iter([(features, targets)])
    return _batches(stream, apply_fn, batch_size)


def _pairs(features: Features) -> Iterator[Batch]:
    wrong = "targets must be given, unless features is a stream of (features, targets) batches"
    if recognition.is_shaped(features) or not isinstance(features, Iterable):
        raise ValueError(f"{wrong}; got {checks.shown(features)} alone")
    return map(functools.partial(_pair, wrong), features)


def _pair(wrong: str, batch: object) -> Batch:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise TypeError(f"{wrong}; got a batch that is no pair, but {checks.shown(batch)}")
    return batch[0], batch[1]


def _batches(
    stream: Iterator[Batch], apply_fn: ApplyFn | None, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for features, given in stream:
        targets = on_host("targets", given)
        if targets.ndim == 0:
            raise ValueError("targets must be of shape [n] or [n, outputs], got one number")
        if apply_fn is None:
            rows = on_host("features", features)
            size = len(rows) if rows.ndim else 0
        else:
            size = batches.data_size(features, "features")
        if size != len(targets):
            raise ValueError(
                f"features and targets must have as many rows, got {size} and {len(targets)}"
            )
        if apply_fn is None:
            yield rows, targets
            continue
        for start in range(0, size, batch_size):
            piece = slice(start, start + batch_size)
            inputs = jax.tree.map(lambda leaf, piece=piece: leaf[piece], features)
            yield row_features(apply_fn, inputs, batch_size), targets[piece]


def row_features(apply_fn: ApplyFn, inputs: ArrayTree, batch_size: int) -> np.ndarray:
    """Each row's features, in bits a function of that row alone.

    Args:
      apply_fn: from inputs `[1, ...]` to features `[1, d]`; JAX must be able to trace it.
      inputs: a pytree of arrays `[n, ...]` with n at most `batch_size`.
      batch_size: rows that are on the device at a time.

    Returns:
      The features `[n, d]`.

    Raises:
      ValueError: if `apply_fn` returns another shape.
    """
    size = batches.data_size(inputs, "features")
    padded = jax.tree.map(lambda leaf: _padded(np.asarray(leaf), batch_size), inputs)
    return np.asarray(_one_by_one(apply_fn, padded, size))[:size]


def _padded(leaf: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([leaf, np.zeros((size - len(leaf), *leaf.shape[1:]), leaf.dtype)])


# A network's result for one row of a batch may depend, in its last bits, on the batch: matrix
# products choose their blocks, and so their order of additions, by the number of rows. Then a row
# removed in a batch of another size would not be the row that was added. So the network runs on one
# row at a time, in one compiled program for all batches: blocks have a fixed size, the last one is
# padded, and the number of rows is an argument, so that no row is treated as the last one.
@functools.partial(jax.jit, static_argnums=0)
def _one_by_one(apply_fn: ApplyFn, inputs: ArrayTree, size: jax.Array) -> jax.Array:
    def one(i: jax.Array | int) -> jax.Array:
        row = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, i, 1), inputs)
        return apply_fn(row)

    shape = jax.eval_shape(one, 0)
    if not recognition.is_shaped(shape) or len(shape.shape) != 2 or shape.shape[0] != 1:
        raise ValueError(
            "apply_fn must return an array [1, d] of features for inputs of one row [1, ...], got "
            f"{checks.shown(shape)}"
        )
    block = jax.tree.leaves(inputs)[0].shape[0]
    features = jnp.zeros((block, shape.shape[1]), shape.dtype)
    return jax.lax.fori_loop(
        0, size, lambda i, out: jax.lax.dynamic_update_slice_in_dim(out, one(i), i, 0), features
    )
