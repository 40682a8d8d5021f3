"""Integer sums over examples, from which an example can be subtracted without a trace."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence

import numpy as np
from jax.typing import ArrayLike

from certunlearn._numerics import checks, recognition
from certunlearn.sums import block_products, device_products
from certunlearn.sums.block_products import BLOCK_ROWS
from certunlearn.sums.fixed_point import MOST_BITS, Settings
from certunlearn.sums.row_batches import ApplyFn, Features, feature_batches
from certunlearn.sums.row_index import RowIndex, new_salt
from certunlearn.sums.wide_integers import WideIntegers

# The largest total weight. Sums of q q^T are then at most 2^44 2^38 = 2^82, and those of q y at
# most 2^44 2^19 2^31 = 2^94: within the 95 bits of `WideIntegers`.
MOST_WEIGHT = 2**44
# Blocks are summed in int64 up to this weight: at most 2^23 2^38 = 2^61, below the 2^62 that
# `WideIntegers.plus` takes.
_MOST_PENDING_WEIGHT = 2**23


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Statistics:
    """Exact sums over rows. Private: they hold the traces of every row until it is removed.

    With q the whole numbers of a row's features, y its target and w its weight:

    Attributes:
      settings: how rows become whole numbers. Public.
      rows: number of rows.
      class_counts: int64 `[classes]`, rows of each class; None for regression.
      weight: sum of w; the number of rows where there are no class weights.
      gram: sum of w q q^T, `[d, d]`.
      cross: sum of w q y, `[d, outputs or 1]`; for labels, sum of w q over each class,
        `[d, classes]`.
      index: which rows there are, to refuse the removal of others; or None.

    Guarantee:
      Whole numbers, added without rounding or overflow for a total weight of up to 2^44. So they
      are a function of the multiset of rows alone: the same, bit for bit, in whatever order,
      batches, and on whatever machine rows were added, removed or merged.
    """

    settings: Settings
    rows: int
    class_counts: np.ndarray | None
    weight: int
    gram: WideIntegers
    cross: WideIntegers
    index: RowIndex | None

    def __repr__(self) -> str:
        """Nothing that depends on a row."""
        return f"Statistics({self.settings.num_features} features, <private>)"


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

    >>> rows, targets = np.eye(4, 2), np.array([0, 1, 1, 0])
    >>> start = empty(2, classes=2)
    >>> merged = merge(add(start, rows[:1], targets[:1]), add(start, rows[1:], targets[1:]))
    >>> digest(merged) == digest(collect(rows, targets))
    True
    """
    weights = None if class_weights is None else tuple(class_weights)
    settings = Settings(
        num_features=num_features,
        feature_norm=feature_norm,
        bits=bits,
        classes=classes,
        outputs=outputs,
        target_norm=target_norm,
        class_weights=weights,
    )
    salt = new_salt() if checks.flag("index", index) else None
    return _empty(settings, salt)


def _empty(settings: Settings, salt: bytes | None) -> Statistics:
    d = settings.num_features
    return Statistics(
        settings=settings,
        rows=0,
        class_counts=None if settings.classes is None else np.zeros(settings.classes, np.int64),
        weight=0,
        gram=WideIntegers.zeros((d, d)),
        cross=WideIntegers.zeros((d, settings.columns)),
        index=None if salt is None else RowIndex.empty(salt),
    )


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
    looked_at = first[1] if targets is None else checks.numbers("targets", targets)
    weights = None if class_weights is None else tuple(class_weights)
    kinds = (np.ndim(first[0]), np.ndim(looked_at))
    if kinds not in ((2, 1), (2, 2)):
        raise ValueError(
            "features must be of shape [n, d], and targets of [n] or [n, outputs], got "
            f"{np.shape(first[0])} and {np.shape(looked_at)}"
        )
    start = empty(
        np.shape(first[0])[1],
        feature_norm=feature_norm,
        bits=bits,
        classes=_classes(looked_at, classes, weights),
        outputs=np.shape(looked_at)[1] if np.ndim(looked_at) == 2 else None,
        target_norm=target_norm,
        class_weights=weights,
        index=index,
    )
    return _changed(start, itertools.chain([first], batches), 1, checks.flag("on_device", on_device))


def _classes(targets: ArrayLike, classes: int | None, weights: Sequence[int] | None) -> int | None:
    if classes is not None or np.ndim(targets) != 1:
        return classes
    if weights is not None:
        return len(weights)
    if recognition.kind_of(recognition.dtype_of(targets)) not in "iub":
        return None
    if not np.size(targets):
        raise ValueError("classes must be given where there is no label to see, got None")
    return max(int(np.max(np.asarray(targets))) + 1, 2)


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

    >>> stats = collect(np.eye(3), np.array([0, 1, 2]))
    >>> more = add(stats, np.ones((2, 3)), np.array([2, 2]))
    >>> stats.rows, more.rows, digest(remove(more, np.ones((2, 3)), [2, 2])) == digest(stats)
    (3, 5, True)
    """
    batches = feature_batches(features, targets, apply_fn, batch_size)
    return _changed(stats, batches, 1, checks.flag("on_device", on_device))


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
    return _changed(stats, feature_batches(features, targets, apply_fn, batch_size), -1, False)


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
    _check_weight(a.weight + b.weight)
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

    >>> stats = collect(np.eye(2), np.array([0, 1]))
    >>> digest(sums_of(stats.settings, np.eye(2), np.array([0, 1]))) == digest(stats)
    True
    """
    return _changed(_empty(settings, None), feature_batches(features, targets, None, 1), 1, False)


def digest(stats: Statistics) -> str:
    """SHA-256 (hexadecimal) of settings, counts and sums: equal for equal rows, however collected.

    Index and salt do not enter. It shows whether two parties have the same sums; whoever guesses
    all rows can confirm the guess with it.
    """
    about = {
        "format": "certunlearn exact sums 1",
        "settings": dataclasses.asdict(stats.settings),
        "rows": stats.rows,
        "weight": stats.weight,
        "class_counts": None if stats.class_counts is None else stats.class_counts.tolist(),
    }
    found = hashlib.sha256(json.dumps(about, sort_keys=True, allow_nan=False).encode())
    for sums in (stats.gram, stats.cross):
        found.update(np.ascontiguousarray(sums.high.astype("<i8", copy=False)).data)
        found.update(np.ascontiguousarray(sums.low.astype("<u4")).data)
    return found.hexdigest()


class _Changing:
    """Sums in the making, of which nobody else holds the arrays."""

    def __init__(self, stats: Statistics, sign: int, on_device: bool) -> None:
        self.stats, self.sign = stats, sign
        self.multiply = device_products.products if on_device else block_products.products
        self.gram, self.cross = stats.gram, stats.cross
        self.rows, self.weight = 0, 0
        self.counts = np.zeros(stats.settings.classes or 0, np.int64)
        self.digests: list[np.ndarray] = []
        self._forget_pending()

    def _forget_pending(self) -> None:
        self.pending: block_products.Products | None = None
        self.pending_weight = 0

    def take(self, rows: np.ndarray, targets: np.ndarray) -> None:
        """Counts some rows, at most a block of them."""
        settings = self.stats.settings
        weights = settings.row_weights(targets)
        weight = len(rows) if weights is None else int(weights.sum())
        _check_weight(self.stats.weight + self.weight + weight)
        if self.pending_weight + weight > _MOST_PENDING_WEIGHT:
            self._flush()
        gram, cross = self.multiply(settings, rows, targets)
        if self.pending is None:
            self.pending = gram, cross
        else:
            np.add(self.pending[0], gram, out=self.pending[0])
            for shift, part in cross.items():
                self.pending[1][shift] += part
        self.rows, self.weight = self.rows + len(rows), self.weight + weight
        self.pending_weight += weight
        if settings.classes is not None:
            self.counts += np.bincount(targets, minlength=settings.classes)
        if self.stats.index is not None:
            self.digests.append(self.stats.index.digests(rows, targets))

    def _flush(self) -> None:
        if self.pending is None:
            return
        gram, cross = self.pending
        self.gram = self.gram.plus(gram) if self.sign > 0 else self.gram.minus(gram)
        for shift, part in cross.items():
            total = self.cross
            self.cross = total.plus(part, shift) if self.sign > 0 else total.minus(part, shift)
        self._forget_pending()

    def finish(self) -> Statistics:
        """The new sums; ValueError if a row was to be removed that is not there."""
        index, old_counts = self.stats.index, self.stats.class_counts
        if index is not None and self.digests:
            digests = np.concatenate(self.digests)
            index = index.with_rows(digests) if self.sign > 0 else index.without(digests)
        self._flush()
        result = dataclasses.replace(
            self.stats,
            rows=self.stats.rows + self.sign * self.rows,
            class_counts=None if old_counts is None else old_counts + self.sign * self.counts,
            weight=self.stats.weight + self.sign * self.weight,
            gram=self.gram,
            cross=self.cross,
            index=index,
        )
        problem = None if self.sign > 0 else sums_problem(result)
        if problem is not None:
            raise ValueError(
                f"these rows cannot be removed: {problem}, so that some of them were never added; "
                "nothing was changed"
            )
        return result


def _changed(
    stats: Statistics,
    batches: Iterator[tuple[ArrayLike, ArrayLike]],
    sign: int,
    on_device: bool,
) -> Statistics:
    changing = _Changing(stats, sign, on_device)
    for features, targets in batches:
        first = changing.rows
        # All of a batch's targets are checked before its first row counts.
        whole = stats.settings.target_rows(targets, first_row=first)
        for start in range(0, len(whole), BLOCK_ROWS):
            piece = slice(start, start + BLOCK_ROWS)
            rows = stats.settings.feature_rows(features[piece])  # type: ignore[index]
            changing.take(rows, whole[piece])
    return changing.finish()


def _check_weight(weight: int) -> None:
    if weight > MOST_WEIGHT:
        raise ValueError(
            f"the total weight of the rows must be at most 2^44, got {weight}; beyond it the sums "
            "are not proved to fit"
        )


def sums_problem(stats: Statistics) -> str | None:
    """Why no rows can have these sums, as far as that is quickly seen; None if nothing shows."""
    settings, counts = stats.settings, stats.class_counts
    if stats.rows < 0 or stats.weight < 0 or (counts is not None and (counts < 0).any()):
        return "fewer than no rows would be left"
    diagonal = WideIntegers(
        *(np.diagonal(word).copy() for word in (stats.gram.high, stats.gram.low))
    ).to_objects()
    if (diagonal < 0).any():
        return "a sum of squares would be negative"
    # A row adds at most w b^2 to the trace.
    if diagonal.sum() > stats.weight * settings.norm_in_units**2:
        return "the sums of squares would be too large for the rows that are left"
    if stats.rows == 0 and not (stats.gram.is_zero() and stats.cross.is_zero()):
        return "no row would be left, and sums that are not zero"
    return None
