"""Exact sums of rows, and of other sums."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike

from certunlearn._numerics import checks
from certunlearn.sums.fixed_point import MOST_BITS, Settings, on_host
from certunlearn.sums.row_batches import ApplyFn, Features, feature_batches
from certunlearn.sums.row_index import new_salt
from certunlearn.sums.statistics import Statistics, changed, check_weight, no_rows


def empty(
    num_features: int,
    *,
    feature_norm: float = 1.0,
    bits: int = MOST_BITS,
    classes: int | None = None,
    outputs: int | None = None,
    target_norm: float = 1024.0,
    class_weights: Sequence[int] | None = None,
    index: bool = True,
) -> Statistics:
    """The sums over no rows: settings that are said, not seen, to begin a stream or a shard with.

    Args:
      num_features: d, features of a row.
      feature_norm: largest L2 norm of a row's features; longer rows are scaled down.
      bits: bits of a feature in fixed point, 2 to 20.
      classes: number of classes, if targets are labels.
      outputs: columns of regression targets `[n, outputs]`; None for `[n]`.
      target_norm: largest magnitude of a regression target.
      class_weights: whole numbers from 1 to 255, one a class, public.
      index: whether to keep an index of the rows, 24 bytes each.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if it is out of range.

    >>> from certunlearn.exact import add, digest
    >>> rows, targets = np.eye(4, 2), np.array([0, 1, 1, 0])
    >>> start = empty(2, classes=2)
    >>> merged = merge(add(start, rows[:1], targets[:1]), add(start, rows[1:], targets[1:]))
    >>> digest(merged) == digest(collect(rows, targets))
    True
    """
    settings = Settings(
        num_features=num_features,
        feature_norm=feature_norm,
        bits=bits,
        classes=classes,
        outputs=outputs,
        target_norm=target_norm,
        class_weights=class_weights,
    )
    salt = new_salt() if checks.flag("index", index) else None
    return no_rows(settings, salt)


def collect(
    features: Features,
    targets: ArrayLike | None = None,
    *,
    feature_norm: float = 1.0,
    bits: int = MOST_BITS,
    classes: int | None = None,
    target_norm: float = 1024.0,
    class_weights: Sequence[int] | None = None,
    index: bool = True,
    apply_fn: ApplyFn | None = None,
    batch_size: int = 1024,
    on_device: bool = False,
) -> Statistics:
    """Sums over examples.

    Args:
      features: real numbers `[n, d]`; or, with `targets=None`, a stream of pairs (features,
        targets), read once. With `apply_fn`, the network's inputs, pytrees of arrays `[n, ...]`.
      targets: whole numbers `[n]` are labels; floats `[n]` or `[n, outputs]` are regression
        targets, unless `classes` is given.
      feature_norm: largest L2 norm of a row's features; longer rows are scaled down to it.
      bits: bits of a feature in fixed point, 2 to 20.
      classes: number of classes. None with whole-number targets: the length of `class_weights`, or
        the largest label plus one (of a stream: in the first batch), and at least 2. It counts as
        public knowledge.
      target_norm: largest magnitude of a regression target.
      class_weights: whole numbers from 1 to 255, one a class, public.
      index: whether to keep an index of the rows, 24 bytes each, so that `remove` refuses rows that
        are not there.
      apply_fn: a public network, traceable by JAX, from inputs of one row `[1, ...]` to features
        `[1, d]`. It is run row by row, so that a row's features do not depend on its batch.
      batch_size: inputs on the device at a time, with `apply_fn`. Use one size for all calls.
      on_device: whether JAX's default device multiplies, in 8-bit integers; the sums are the same.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a number or shape is not as described, naming the row where it is a row's.

    Guarantee:
      See `Statistics` and `Settings`: nothing about a row enters but its own whole numbers, as
      terms of exact sums. `feature_norm`, `bits`, `classes`, `target_norm` and `class_weights` must
      be public: chosen without looking at rows that may be removed.

    >>> stats = collect(np.array([[0.5, 0.25], [0.0, 1.0]]), np.array([1.0, -2.0]))
    >>> stats
    Statistics(2 features, <private>)
    >>> (stats.gram.to_objects() * stats.settings.feature_unit**2).tolist()
    [[0.25, 0.125], [0.125, 1.0625]]
    """
    batches = feature_batches(features, targets, apply_fn, batch_size)
    first = next(batches, None)
    if first is None:
        raise ValueError(
            "features must hold at least one batch, got none; cu.exact.empty makes sums of no rows"
        )
    looked_at = first[1] if targets is None else on_host("targets", targets)
    if first[0].ndim != 2 or looked_at.ndim not in (1, 2):
        raise ValueError(
            "features must be of shape [n, d], and targets of [n] or [n, outputs], got "
            f"{first[0].shape} and {looked_at.shape}"
        )
    start = empty(
        first[0].shape[1],
        feature_norm=feature_norm,
        bits=bits,
        classes=_classes(looked_at, classes, class_weights),
        outputs=looked_at.shape[1] if looked_at.ndim == 2 else None,
        target_norm=target_norm,
        class_weights=class_weights,
        index=index,
    )
    return changed(start, itertools.chain([first], batches), 1, checks.flag("on_device", on_device))


def _classes(targets: np.ndarray, classes: int | None, weights: Sequence[int] | None) -> int | None:
    if classes is not None or targets.ndim != 1:
        return classes
    if weights is not None:
        return np.size(weights)
    if targets.dtype.kind not in "iub":
        return None
    if not targets.size:
        raise ValueError("classes must be given where there is no label to see, got None")
    return max(int(targets.max()) + 1, 2)


def merge(a: Statistics, b: Statistics) -> Statistics:
    """The sums over the rows of both.

    Raises:
      ValueError: if their settings differ, or only one has an index.

    >>> from certunlearn.exact import remove
    >>> both = merge(collect(np.eye(2), np.array([0, 1])), collect(np.ones((1, 2)), [1]))
    >>> both.rows, remove(both, np.ones((1, 2)), [1]).rows
    (3, 2)
    """
    if a.settings != b.settings:
        raise ValueError(
            f"stats must have equal settings to be merged, got {a.settings} and {b.settings}; "
            "start all from one cu.exact.empty(...)"
        )
    if (a.index is None) != (b.index is None):
        raise ValueError(
            "stats must both have an index to be merged, or neither, got one of each; give "
            "index=True or index=False to both"
        )
    check_weight(a.weight + b.weight)
    return dataclasses.replace(
        a,
        rows=a.rows + b.rows,
        class_counts=None
        if a.class_counts is None or b.class_counts is None
        else a.class_counts + b.class_counts,
        weight=a.weight + b.weight,
        gram=a.gram + b.gram,
        cross=a.cross + b.cross,
        index=None if a.index is None or b.index is None else a.index.merged(b.index),
    )


def sums_of(settings: Settings, features: Features, targets: ArrayLike | None = None) -> Statistics:
    """The sums of rows under settings that were recorded, without an index.

    Args:
      settings: the settings, for instance those of a certificate.
      features: as in `collect`.
      targets: as in `collect`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a shape or a target is wrong.

    >>> from certunlearn.sums import digest
    >>> stats = collect(np.eye(2), np.array([0, 1]))
    >>> digest(sums_of(stats.settings, np.eye(2), np.array([0, 1]))) == digest(stats)
    True
    """
    return changed(no_rows(settings, None), feature_batches(features, targets, None, 1), 1, False)
