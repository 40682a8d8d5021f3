"""Rows into exact sums and out of them again."""

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
    """The sums over no rows: the common beginning of collections that are to be merged.

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

    >>> from certunlearn.sums import digest
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


def add(
    stats: Statistics,
    features: Features,
    targets: ArrayLike | None = None,
    *,
    apply_fn: ApplyFn | None = None,
    batch_size: int = 1024,
    on_device: bool = False,
) -> Statistics:
    """The sums over the rows of `stats` and these.

    Args:
      stats: what `collect` or `empty` returned; it stays as it is.
      features: as in `collect`.
      targets: as in `collect`.
      apply_fn: as in `collect`.
      batch_size: as in `collect`.
      on_device: as in `collect`.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a shape or a target is wrong, or the total weight exceeds 2^44.

    >>> from certunlearn.sums import digest
    >>> stats = collect(np.eye(3), np.array([0, 1, 2]))
    >>> more = add(stats, np.ones((2, 3)), np.array([2, 2]))
    >>> stats.rows, more.rows, digest(remove(more, np.ones((2, 3)), [2, 2])) == digest(stats)
    (3, 5, True)
    """
    batches = feature_batches(features, targets, apply_fn, batch_size)
    return changed(stats, batches, 1, checks.flag("on_device", on_device))


def remove(
    stats: Statistics,
    features: Features,
    targets: ArrayLike | None = None,
    *,
    apply_fn: ApplyFn | None = None,
    batch_size: int = 1024,
) -> Statistics:
    """The sums over the rows of `stats` without these. What was derived before must be redone.

    Args:
      stats: what `collect`, `add` or `merge` returned. It stays as it is, with the traces of the
        rows removed: delete it, and its files.
      features: as in `collect`: the same numbers as when the rows were added.
      targets: as in `collect`, likewise.
      apply_fn: as in `collect`, the same network on the same machine.
      batch_size: as in `collect`, the same size.

    Returns:
      The same sums, bit for bit, as if the rows had never been added. All rows may be removed.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if a row is not there, or not as often as it is to be removed, naming the position
        of the first such row. Without an index such a row is noticed only if the sums could then
        belong to no rows at all: it is at your word that the rows were added.

    >>> stats = collect(np.eye(2), np.array([0, 1]))
    >>> remove(stats, np.eye(2)[:1], np.array([1]))
    Traceback (most recent call last):
    ValueError: row 0 cannot be removed: there is no such row among the rows collected; ...
    """
    return changed(stats, feature_batches(features, targets, apply_fn, batch_size), -1, False)


def merge(a: Statistics, b: Statistics) -> Statistics:
    """The sums over the rows of both.

    Raises:
      ValueError: if their settings differ, or their indexes have different salts.
    """
    if a.settings != b.settings:
        raise ValueError(
            f"stats must have equal settings to be merged, got {a.settings} and {b.settings}; "
            "start all from one cu.exact.empty(...)"
        )
    if (a.index is None) != (b.index is None) or (
        a.index is not None and b.index is not None and a.index.salt != b.index.salt
    ):
        raise ValueError(
            "stats must share one index to be merged, and theirs were begun apart; start all from "
            "one cu.exact.empty(...) and add rows to it, or give index=False to all"
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
